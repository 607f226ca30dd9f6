//! The steps from stored bytes to cached chunks, one by one, for who measures each. Readers take them all at once
//! ([`super::unit::UnitMap::decode`]).

use std::{collections::HashMap, sync::Arc};

use super::{
    error::{ReadCause, ReadError},
    layout::BlobLayout,
    reader::BlobReader,
    unit::{self, PlannedUnit},
    unit_map::KnownUnitMap,
};

/// All units of a blob that hold chunks which the image uses.
pub struct Units {
    reader: Arc<BlobReader>,
    known: Arc<KnownUnitMap>,
    units: Vec<PlannedUnit>,
    /// Index of a chunk → position of its unit.
    by_chunk: HashMap<u32, usize>,
}

/// Those chunks of a unit whose bytes are right: position in the layout, offset in the unit.
pub type Right = Vec<(usize, u32)>;

impl BlobReader {
    /// The blob's units. Needs the blob meta, which is fetched if need be, and nothing else.
    ///
    /// # Errors
    /// If the blob meta cannot be had, or is malformed.
    pub async fn units(self: &Arc<Self>) -> Result<Units, ReadError> {
        let known = self.unit_map().get().await.map_err(|cause| self.error(0, cause))?;
        let (layout, plan) = (self.layout(), &known.plan);
        let positions: Vec<_> = self.positions().collect();
        let failed = |(position, error)| self.error(position, ReadCause::Meta(error));
        let mut units = plan.units(layout, &positions).map_err(failed)?;
        units.sort_unstable_by_key(|plan| plan.unit.compressed_offset);
        let members = units.iter().enumerate();
        let by_chunk = members
            .flat_map(|(at, plan)| plan.members.iter().map(move |(position, _)| (*position, at)))
            .map(|(position, at)| (layout.chunks[position].index, at))
            .collect();
        Ok(Units {
            reader: Arc::clone(self),
            known,
            units,
            by_chunk,
        })
    }
}

impl Units {
    /// The blob.
    pub fn layout(&self) -> &BlobLayout {
        self.reader.layout()
    }

    /// The units, in the order in which they are stored.
    pub fn all(&self) -> &[PlannedUnit] {
        &self.units
    }

    /// Position of the unit that holds the chunk of that index, if the image uses it.
    pub fn of_chunk(&self, index: u32) -> Option<usize> {
        self.by_chunk.get(&index).copied()
    }

    /// Decompresses the stored bytes of a unit.
    ///
    /// # Errors
    /// If they are damaged.
    pub fn decompress(&self, unit: &PlannedUnit, stored: &[u8]) -> Result<Vec<u8>, ReadCause> {
        self.known.plan.decompress(unit, stored)
    }

    /// Hashes the chunks in the plain bytes of a unit.
    ///
    /// # Errors
    /// [`ReadCause::Digest`] if one of them is not what it should be.
    pub fn verify(&self, unit: &PlannedUnit, plain: &[u8]) -> Result<Right, ReadCause> {
        let right = unit.right(self.layout(), plain);
        if right.len() < unit.members.len() {
            return Err(ReadCause::Digest);
        }
        Ok(right)
    }

    /// Writes chunks to the cache.
    ///
    /// # Errors
    /// If one of them cannot be written.
    pub fn keep(&self, plain: &[u8], right: &Right) -> Result<(), ReadCause> {
        unit::keep(self.layout(), self.reader.cached(), plain, right).map_err(|error| ReadCause::Keep(Arc::new(error)))
    }

    /// Waits until what was kept is on disk.
    ///
    /// # Errors
    /// If the disk fails.
    pub async fn sync(&self) -> Result<(), ReadError> {
        self.reader.on_disk(0, |cached| cached.sync_all()).await
    }
}
