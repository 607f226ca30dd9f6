//! Cached blobs together with the fetches in flight for them.
//!
//! The cache only knows what is on disk. Images that use the same [`CachedBlob`] must also share its flights, so that
//! one process fetches a unit once. [`SharedBlob`] joins the two.

use std::{
    collections::HashMap,
    io,
    path::Path,
    sync::{Arc, Weak},
};

use parking_lot::Mutex;

use super::{
    cache::CachedBlob,
    cache_dir::BlobCache,
    layout::BlobLayout,
    singleflight::{Owner, SingleFlight},
    size_limit::SizeLimit,
    unit::{DecodedUnit, UnitId},
};

/// Units in flight.
pub(super) type UnitFlights = SingleFlight<FlightKey, Arc<DecodedUnit>>;

/// Key of a flight.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct FlightKey {
    unit: UnitId,
    /// `None` if every image may join. Set for a second flight that one image starts after a shared one failed.
    only_for: Option<Owner>,
}

impl FlightKey {
    /// The flight of `unit` that every image may join.
    pub(super) fn shared(unit: UnitId) -> Self {
        Self { unit, only_for: None }
    }

    /// The flight of `unit` that only `owner` may join.
    pub(super) fn only_for(owner: Owner, unit: UnitId) -> Self {
        let only_for = Some(owner);
        Self { unit, only_for }
    }
}

/// A cached blob and its flights, shared by all images that use the cached blob.
pub struct SharedBlob {
    cached: Arc<CachedBlob>,
    flights: Arc<UnitFlights>,
}

/// All blobs of a root: the cache, and the flights of the blobs in use.
pub struct SharedBlobs {
    cache: BlobCache,
    blobs: Mutex<HashMap<String, Weak<SharedBlob>>>,
}

impl SharedBlobs {
    /// Opens the cache in `dir`; see [`BlobCache::open`].
    pub fn open(dir: &Path, limit: SizeLimit) -> io::Result<Self> {
        Ok(Self {
            cache: BlobCache::open(dir, limit)?,
            blobs: Mutex::default(),
        })
    }

    /// The blob that `layout` describes, for `image`; see [`BlobCache::blob`].
    pub fn blob(&self, layout: &BlobLayout, image: &str) -> io::Result<Arc<SharedBlob>> {
        let cached = self.cache.blob(layout, image)?;
        let mut blobs = self.blobs.lock();
        // It keeps its cached blob alive, so the cache has returned that same one.
        if let Some(shared) = blobs.get(cached.name()).and_then(Weak::upgrade) {
            return Ok(shared);
        }
        blobs.retain(|_, shared| shared.strong_count() > 0);
        let name = cached.name().to_owned();
        let shared = Arc::new(SharedBlob {
            cached,
            flights: Arc::default(),
        });
        blobs.insert(name, Arc::downgrade(&shared));
        Ok(shared)
    }

    /// The cache on disk.
    pub fn cache(&self) -> &BlobCache {
        &self.cache
    }
}

impl SharedBlob {
    /// What is on disk of the blob.
    pub(super) fn cached(&self) -> &Arc<CachedBlob> {
        &self.cached
    }

    /// The units of the blob that are being fetched.
    pub(super) fn flights(&self) -> &Arc<UnitFlights> {
        &self.flights
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::blob::layout::Chunk;

    #[test]
    fn images_share_the_flights_of_a_cached_blob_they_share() {
        let dir = tempfile::tempdir().unwrap();
        let blobs = SharedBlobs::open(dir.path(), SizeLimit::NONE).unwrap();
        let chunk = |digest: u8| Chunk {
            index: 0,
            digest: [digest; 32],
            compressed_offset: 0,
            compressed_size: 10,
            uncompressed_offset: 0,
            uncompressed_size: 10,
            compressed: false,
        };
        let [layout, contradicting] = [1, 2].map(|digest| BlobLayout::of_plain(vec![chunk(digest)]));
        let first = blobs.blob(&layout, "aa").unwrap();
        assert!(Arc::ptr_eq(&first, &blobs.blob(&layout, "bb").unwrap()));
        let other = blobs.blob(&contradicting, "cc").unwrap();
        assert!(!Arc::ptr_eq(first.flights(), other.flights()));
        assert!(!Arc::ptr_eq(first.cached(), other.cached()));
    }
}
