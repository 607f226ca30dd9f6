//! Images that are being fetched, and must not be collected as garbage meanwhile.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

use parking_lot::Mutex;

use crate::{blob::cache::Hold, digest::Digest};

/// Counts of [`KeptImage`]s, by manifest.
#[derive(Clone, Default)]
pub(super) struct KeptImages(Arc<Mutex<HashMap<Digest, usize>>>);

/// Keeps an image, published or not, as long as this exists.
pub struct KeptImage {
    counts: KeptImages,
    manifest: Digest,
    /// Prevent the eviction of chunks.
    pub(super) holds: Vec<Hold>,
}

impl KeptImages {
    /// Keeps the image with this manifest.
    pub(super) fn keep(&self, manifest: Digest) -> KeptImage {
        *self.0.lock().entry(manifest).or_default() += 1;
        KeptImage {
            counts: self.clone(),
            manifest,
            holds: Vec::new(),
        }
    }

    /// Manifests of all kept images.
    pub(super) fn all(&self) -> HashSet<Digest> {
        self.0.lock().keys().copied().collect()
    }
}

impl Drop for KeptImage {
    fn drop(&mut self) {
        let mut counts = self.counts.0.lock();
        if let Some(count) = counts.get_mut(&self.manifest) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&self.manifest);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn image_is_kept_until_the_last_value_is_dropped() {
        let (kept, manifest) = (KeptImages::default(), Digest::of(b"manifest"));
        let [first, second] = [kept.keep(manifest), kept.keep(manifest)];
        drop(first);
        assert_eq!(kept.all(), [manifest].into());
        drop(second);
        assert!(kept.all().is_empty());
    }
}
