//! The steps from stored bytes to cached chunks one by one, for benchmarks that measure each. Readers take them at
//! once, by [`super::unit::UnitMap::decode`].

use std::{collections::HashMap, sync::Arc};

use super::{
    bulk,
    cache::CachedBlob,
    error::{ReadCause, ReadError},
    fetcher::ChunkFetcher,
    layout::BlobLayout,
    unit::{self, Unit},
    unit_map::LoadedUnitMap,
};

/// All units of a blob that hold chunks which the image uses.
pub struct Units {
    fetcher: Arc<ChunkFetcher>,
    loaded: Arc<LoadedUnitMap>,
    units: Vec<Unit>,
    /// Index of a chunk → position of its unit.
    by_chunk: HashMap<u32, usize>,
}

/// The chunks of a unit that match their digests: position in the layout, offset in the unit.
pub type VerifiedChunks = Vec<(usize, u32)>;

impl Units {
    /// The units of the blob. Fetches the blob meta if it is needed and not on disk.
    ///
    /// # Errors
    /// If the blob meta cannot be fetched, or is malformed.
    pub async fn load(fetcher: &Arc<ChunkFetcher>) -> Result<Self, ReadError> {
        let loaded = fetcher.unit_map().get().await;
        let loaded = loaded.map_err(|cause| fetcher.error(0, cause))?;
        let layout = fetcher.layout();
        let positions: Vec<_> = bulk::positions(fetcher).collect();
        let failed = |(position, error)| fetcher.error(position, ReadCause::Meta(error));
        let mut units = loaded.map.units(layout, &positions).map_err(failed)?;
        units.sort_unstable_by_key(|unit| unit.extent.compressed_offset);
        let members = units.iter().enumerate();
        let by_chunk = members
            .flat_map(|(at, unit)| unit.members.iter().map(move |(position, _)| (*position, at)))
            .map(|(position, at)| (layout.chunks[position].index, at))
            .collect();
        Ok(Self {
            fetcher: Arc::clone(fetcher),
            loaded,
            units,
            by_chunk,
        })
    }

    /// The blob.
    pub fn layout(&self) -> &BlobLayout {
        self.fetcher.layout()
    }

    /// The units, in the order in which they are stored.
    pub fn all(&self) -> &[Unit] {
        &self.units
    }

    /// Position of the unit that holds the chunk of that index, if the image uses it.
    pub fn of_chunk(&self, index: u32) -> Option<usize> {
        self.by_chunk.get(&index).copied()
    }

    /// Decompresses the stored bytes of a unit.
    ///
    /// # Errors
    /// If they are corrupt.
    pub fn decompress(&self, unit: &Unit, stored: &[u8]) -> Result<Vec<u8>, ReadCause> {
        self.loaded.map.decompress(unit, stored)
    }

    /// Hashes the chunks in the plain bytes of a unit.
    ///
    /// # Errors
    /// [`ReadCause::Digest`] if one of them does not match its digest.
    pub fn verify(&self, unit: &Unit, plain: &[u8]) -> Result<VerifiedChunks, ReadCause> {
        let verified = unit.verified_chunks(self.layout(), plain);
        if verified.len() < unit.members.len() {
            return Err(ReadCause::Digest);
        }
        Ok(verified)
    }

    /// Writes chunks to the cache.
    ///
    /// # Errors
    /// If one of them cannot be written.
    pub fn write(&self, plain: &[u8], verified: &VerifiedChunks) -> Result<(), ReadCause> {
        unit::write_chunks(self.layout(), self.fetcher.cached(), plain, verified)
            .map_err(|error| ReadCause::CacheWrite(Arc::new(error)))
    }

    /// Waits until all that was written has reached the disk.
    ///
    /// # Errors
    /// If the disk fails.
    pub async fn sync(&self) -> Result<(), ReadError> {
        bulk::on_disk(&self.fetcher, 0, CachedBlob::sync_all).await
    }
}
