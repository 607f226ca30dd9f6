//! What the mirror remembers of manifests: those that it has made, which no registry has, since Podman may ask for one again
//! by its digest; and which blobs of others nobody can use as layers.

use std::collections::VecDeque;

use parking_lot::Mutex;

use super::annotate::Annotated;
use crate::{digest::Digest, image::manifest::Manifest, registry::Repository};

/// How many are remembered: those of the images that are pulled at a time.
const REMEMBERED: usize = 256;
/// Bytes of all that are remembered. Most have a few KiB, but a registry may give some MiB.
const REMEMBERED_BYTES: usize = 16 << 20;

/// The manifests made last.
#[derive(Default)]
pub struct Produced(Mutex<VecDeque<(Repository, Annotated)>>);

impl Produced {
    /// Remembers a manifest.
    pub fn note(&self, repository: &Repository, made: &Annotated) {
        let mut all = self.0.lock();
        all.retain(|(of, known)| of != repository || known.digest != made.digest);
        all.push_front((repository.clone(), made.clone()));
        all.truncate(REMEMBERED);
        let mut bytes = 0;
        let fits = |(_, made): &(Repository, Annotated)| {
            bytes += made.bytes.len();
            bytes <= REMEMBERED_BYTES
        };
        let fitting = all.iter().map(fits).take_while(|fits| *fits).count();
        all.truncate(fitting);
    }

    /// The manifest of that digest, if it was made for the repository.
    pub fn get(&self, repository: &Repository, digest: &Digest) -> Option<Annotated> {
        let all = self.0.lock();
        let found = all
            .iter()
            .find(|(of, known)| of == repository && known.digest == *digest);
        found.map(|(_, made)| made.clone())
    }
}

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_latest_are_remembered() {
        let (produced, repository) = (Produced::default(), Repository::new("r.example", "a"));
        let made = |number: usize| Annotated {
            bytes: number.to_string().into(),
            digest: Digest::of(number.to_string().as_bytes()),
            media_type: String::new(),
        };
        for number in [0, 1, 0] {
            produced.note(&repository, &made(number));
        }
        (2..=REMEMBERED).for_each(|number| produced.note(&repository, &made(number)));
        assert_eq!(produced.get(&repository, &made(0).digest), Some(made(0)));
        assert_eq!(produced.get(&repository, &made(1).digest), None);
        let other = Repository::new("r.example", "b");
        assert_eq!(produced.get(&other, &made(0).digest), None);
    }
}
