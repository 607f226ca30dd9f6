//! Which blobs nobody can use as layers, of the manifests that the mirror has given.

use std::collections::VecDeque;

use parking_lot::Mutex;

use crate::{digest::Digest, image::manifest::Manifest, registry::Repository};

/// How many blobs are remembered, of some hundred bytes each.
const BLOBS: usize = 4096;

/// The RAFS blobs of the manifests given last.
#[derive(Default)]
pub struct RafsBlobs(Mutex<VecDeque<RafsBlob>>);

struct RafsBlob {
    repository: Repository,
    digest: Digest,
    /// The digest of its image's manifest with the annotations.
    image: Digest,
}

impl RafsBlobs {
    /// Remembers the blobs of a manifest, which with the annotations has the digest `image`. What is known goes to the front.
    pub fn note(&self, repository: &Repository, manifest: &Manifest, image: Digest) {
        let mut all = self.0.lock();
        for digest in manifest.rafs_blobs() {
            all.retain(|known| known.digest != digest || known.repository != *repository);
            let repository = repository.clone();
            all.push_front(RafsBlob {
                repository,
                digest,
                image,
            });
        }
        all.truncate(BLOBS);
    }

    /// The image of the blob, if it is one of these.
    pub fn image_of(&self, repository: &Repository, digest: &Digest) -> Option<Digest> {
        let all = self.0.lock();
        let known = all
            .iter()
            .find(|known| known.digest == *digest && known.repository == *repository);
        known.map(|known| known.image)
    }
}
