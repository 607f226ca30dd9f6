//! Units: the stored bytes that are fetched and decompressed together, and the chunks they give.
//!
//! In most blobs a unit is a chunk. In packed blobs it is a batch of small chunks, or the stretch of a gzip stream
//! between two points of random access.

use std::{
    collections::{HashMap, HashSet},
    io,
    sync::Arc,
};

use nydus_utils::compress::zlib_random::{ZranContext, ZranDecoder};

use super::{
    cache::{CachedBlob, ChunkState},
    codec,
    error::ReadCause,
    layout::{BlobLayout, Chunk},
    meta::{self, BlobMeta, MetaError, Unit},
};

/// Names a unit within its blob, or what is on disk of a chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum UnitId {
    /// The chunk of this index, compressed by itself.
    Chunk(u32),
    /// This context of the blob meta.
    Context(u32),
    /// The chunk of this index, as it is on disk.
    Disk(u32),
}

/// Which units the chunks of a blob lie in.
pub enum UnitMap {
    /// Each chunk is a unit.
    PerChunk,
    /// As the blob meta says.
    Packed {
        /// The blob meta.
        meta: BlobMeta,
        /// For each context, the chunks in it: position in the layout and offset in the unit.
        members: HashMap<u32, Vec<(usize, u32)>>,
    },
}

/// A unit to be fetched.
#[derive(Clone)]
pub struct PlannedUnit {
    /// Its name.
    pub id: UnitId,
    /// Where its stored bytes are.
    pub unit: Unit,
    /// How they are compressed; `None` for chunks that are stored as they are.
    compressor: nydus_utils::compress::Algorithm,
    /// The chunks in it: position in the layout, offset in the unit.
    pub members: Vec<(usize, u32)>,
}

/// Verified chunks of a unit, in memory.
pub struct Decoded {
    plain: Vec<u8>,
    /// Index of the chunk in the blob → offset in `plain`, of those that match their digests. Not its position in a
    /// layout: images that share the blob wait for each other's units, and each has a layout of its own.
    verified: Vec<(u32, u32)>,
    /// Why some of them are not on disk.
    pub(super) cache_write_error: Option<Arc<io::Error>>,
}

impl UnitMap {
    /// The plan of a packed blob.
    pub fn packed(meta: BlobMeta, layout: &BlobLayout) -> Result<Self, MetaError> {
        let members = meta.members(layout)?;
        Ok(Self::Packed { meta, members })
    }

    /// The unit that holds `chunk`.
    pub fn unit_of(&self, chunk: &Chunk) -> Result<UnitId, MetaError> {
        let place = match self {
            Self::PerChunk => None,
            Self::Packed { meta, .. } => meta.place(chunk.index)?,
        };
        Ok(place.map_or(UnitId::Chunk(chunk.index), |place| UnitId::Context(place.unit)))
    }

    /// How to fetch the unit that holds the chunk at `position` of `layout`.
    pub fn unit(&self, layout: &BlobLayout, position: usize) -> Result<PlannedUnit, MetaError> {
        use nydus_utils::compress::Algorithm;
        let chunk = &layout.chunks[position];
        if let Self::Packed { meta, members } = self
            && let Some(place) = meta.place(chunk.index)?
        {
            let unit = meta.unit(chunk.index, place)?;
            // A batch that would not shrink is stored as it is.
            let stored = unit.compressed_size == unit.uncompressed_size;
            return Ok(PlannedUnit {
                id: UnitId::Context(place.unit),
                compressor: if stored { Algorithm::None } else { layout.compressor },
                members: members.get(&place.unit).cloned().unwrap_or_default(),
                unit,
            });
        }
        Ok(PlannedUnit {
            id: UnitId::Chunk(chunk.index),
            unit: meta::lone_unit(chunk)?,
            compressor: if chunk.compressed {
                layout.compressor
            } else {
                Algorithm::None
            },
            members: vec![(position, 0)],
        })
    }

    /// How to fetch the units that hold the chunks at `positions` of `layout`, each once. An error tells which chunk it is of.
    pub fn units(&self, layout: &BlobLayout, positions: &[usize]) -> Result<Vec<PlannedUnit>, (usize, MetaError)> {
        let (mut units, mut seen) = (Vec::new(), HashSet::new());
        for position in positions {
            let failed = |error| (*position, error);
            if seen.insert(self.unit_of(&layout.chunks[*position]).map_err(failed)?) {
                units.push(self.unit(layout, *position).map_err(failed)?);
            }
        }
        Ok(units)
    }

    /// Decompresses the stored bytes of `plan`, verifies the chunks in them and keeps those that are right.
    pub fn decode(
        &self,
        layout: &BlobLayout,
        cached: &Arc<CachedBlob>,
        plan: &PlannedUnit,
        stored: &[u8],
    ) -> Result<Decoded, ReadCause> {
        let plain = self.decompress(plan, stored)?;
        let right = plan.right(layout, &plain);
        let cache_write_error = keep(layout, cached, &plain, &right).err().map(Arc::new);
        let index = |(position, offset): (usize, u32)| (layout.chunks[position].index, offset);
        Ok(Decoded {
            verified: right.into_iter().map(index).collect(),
            plain,
            cache_write_error,
        })
    }

    /// Decompresses the stored bytes of `plan`.
    pub(super) fn decompress(&self, plan: &PlannedUnit, stored: &[u8]) -> Result<Vec<u8>, ReadCause> {
        Ok(match (&plan.unit.inflate, self) {
            (Some(_), Self::Packed { meta, .. }) => inflate(meta, &plan.unit, stored)?,
            _ => codec::decompress(plan.compressor, stored, plan.unit.uncompressed_size as usize)?,
        })
    }
}

impl PlannedUnit {
    /// Those of its chunks whose bytes in `plain` match their digests: position in the layout, offset in the unit.
    pub(super) fn right(&self, layout: &BlobLayout, plain: &[u8]) -> Vec<(usize, u32)> {
        let is_right = |(position, offset): &(usize, u32)| {
            let chunk = &layout.chunks[*position];
            let bytes = slice(plain, *offset, chunk.uncompressed_size);
            bytes.is_some_and(|bytes| codec::matches(layout.digester, bytes, &chunk.digest))
        };
        self.members.iter().copied().filter(is_right).collect()
    }
}

/// Writes those of `chunks` to the cache that are not there, as [`PlannedUnit::right`] gives them. Goes on after an error.
pub(super) fn keep(
    layout: &BlobLayout,
    cached: &Arc<CachedBlob>,
    plain: &[u8],
    chunks: &[(usize, u32)],
) -> io::Result<()> {
    let mut outcome = Ok(());
    for (position, offset) in chunks {
        let chunk = &layout.chunks[*position];
        let is_kept = cached.state(chunk.index) == ChunkState::Ready && cached.is_journaled(chunk.index);
        if let Some(bytes) = slice(plain, *offset, chunk.uncompressed_size)
            && !is_kept
            && let Err(error) = cached.keep(chunk, bytes)
        {
            outcome = Err(error);
        }
    }
    outcome
}

impl Decoded {
    /// A single chunk that was read from disk and verified.
    pub fn single(chunk: &Chunk, plain: Vec<u8>) -> Self {
        Self {
            plain,
            verified: vec![(chunk.index, 0)],
            cache_write_error: None,
        }
    }

    /// How many chunks of the unit are right.
    pub(super) fn chunks(&self) -> usize {
        self.verified.len()
    }

    /// The bytes of `chunk`, if they match its digest.
    pub fn chunk(&self, chunk: &Chunk) -> Option<&[u8]> {
        let (_, offset) = self.verified.iter().find(|(verified, _)| *verified == chunk.index)?;
        slice(&self.plain, *offset, chunk.uncompressed_size)
    }
}

fn slice(plain: &[u8], offset: u32, len: u32) -> Option<&[u8]> {
    plain.get(offset as usize..(offset as usize).checked_add(len as usize)?)
}

fn inflate(meta: &BlobMeta, unit: &Unit, stored: &[u8]) -> Result<Vec<u8>, ReadCause> {
    let Some(start) = &unit.inflate else {
        return Err(ReadCause::Inflate("no point to start from".to_owned()));
    };
    let context = ZranContext {
        in_offset: unit.compressed_offset,
        out_offset: 0,
        in_len: unit.compressed_size,
        out_len: unit.uncompressed_size,
        ctx_byte: start.byte,
        ctx_bits: start.bits,
        dict: Vec::new(),
    };
    let mut plain = vec![0; unit.uncompressed_size as usize];
    ZranDecoder::new()
        .and_then(|mut decoder| decoder.uncompress(&context, Some(meta.dictionary(start)), stored, &mut plain))
        .map_err(|error| ReadCause::Inflate(error.to_string()))?;
    Ok(plain)
}
