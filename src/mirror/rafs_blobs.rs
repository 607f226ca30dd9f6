//! Which blobs nobody can use as layers, of the manifests that the mirror has given.

use std::collections::VecDeque;

use parking_lot::Mutex;

use crate::{digest::Digest, image::manifest::Manifest, registry::Repository};

/// How many blobs are remembered, of some hundred bytes each.
const BLOBS: usize = 4096;

/// The RAFS blobs of the manifests given last.
#[derive(Default)]
pub struct RafsBlobs(Mutex<VecDeque<(Repository, Digest)>>);

impl RafsBlobs {
    /// Remembers the blobs of a manifest.
    pub fn note(&self, repository: &Repository, manifest: &Manifest) {
        let mut all = self.0.lock();
        for blob in manifest.rafs_blobs() {
            let entry = (repository.clone(), blob);
            if !all.contains(&entry) {
                all.push_front(entry);
            }
        }
        all.truncate(BLOBS);
    }

    /// Whether the blob is one of these.
    pub fn has(&self, repository: &Repository, digest: &Digest) -> bool {
        self.0
            .lock()
            .iter()
            .any(|(of, blob)| of == repository && blob == digest)
    }
}
