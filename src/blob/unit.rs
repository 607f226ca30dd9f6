//! Units: the stored bytes that are fetched and decompressed together, and the chunks they give.
//!
//! In most blobs a unit is a chunk. In packed blobs it is a batch of small chunks, or the stretch of a gzip stream
//! between two points of random access (zran).

use std::{
    collections::{HashMap, HashSet},
    io,
    sync::Arc,
};

use nydus_utils::compress::{
    Algorithm,
    zlib_random::{ZranContext, ZranDecoder},
};

use super::{
    cache::{CachedBlob, ChunkState},
    codec,
    error::ReadCause,
    layout::{BlobLayout, Chunk},
    meta::{self, BlobMeta, MetaError, UnitExtent},
};

/// Names a unit within its blob, or the cached copy of a chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum UnitId {
    /// The chunk of this index, compressed by itself.
    Chunk(u32),
    /// This context of the blob meta.
    Context(u32),
    /// The chunk of this index in the cache file.
    Cached(u32),
}

/// Maps the chunks of a blob to units.
pub enum UnitMap {
    /// Each chunk is a unit.
    PerChunk,
    /// As the blob meta says.
    Packed {
        /// The blob meta.
        meta: BlobMeta,
        /// For each context, its chunks: position in the layout and offset in the unit.
        members: HashMap<u32, Vec<(usize, u32)>>,
    },
}

/// A unit of one image's layout.
#[derive(Clone)]
pub struct Unit {
    /// Its name.
    pub id: UnitId,
    /// Where its stored bytes are.
    pub extent: UnitExtent,
    /// How they are compressed.
    compressor: Algorithm,
    /// The chunks in it: position in the layout, offset in the decompressed unit.
    pub members: Vec<(usize, u32)>,
}

/// The verified chunks of a unit, in memory.
pub struct DecodedUnit {
    plain: Vec<u8>,
    /// Index of the chunk in the blob → offset in `plain`, for chunks that match their digests. An index is not a
    /// position in a layout: images that share the blob wait for each other's units, and each has its own layout.
    verified: Vec<(u32, u32)>,
    /// Whether it was read from the cache, rather than fetched.
    pub(super) is_from_cache: bool,
    /// Why some of the chunks are not in the cache.
    pub(super) cache_write_error: Option<Arc<io::Error>>,
}

impl UnitMap {
    /// The map of a packed blob.
    pub fn packed(meta: BlobMeta, layout: &BlobLayout) -> Result<Self, MetaError> {
        let members = meta.members(layout)?;
        Ok(Self::Packed { meta, members })
    }

    /// The unit that holds `chunk`.
    pub fn unit_of(&self, chunk: &Chunk) -> Result<UnitId, MetaError> {
        let location = match self {
            Self::PerChunk => None,
            Self::Packed { meta, .. } => meta.locate(chunk.index)?,
        };
        Ok(location.map_or(UnitId::Chunk(chunk.index), |location| UnitId::Context(location.unit)))
    }

    /// The unit that holds the chunk at `position` of `layout`.
    pub fn unit(&self, layout: &BlobLayout, position: usize) -> Result<Unit, MetaError> {
        let chunk = &layout.chunks[position];
        if let Self::Packed { meta, members } = self
            && let Some(location) = meta.locate(chunk.index)?
        {
            let extent = meta.extent(chunk.index, location)?;
            // A batch that would not shrink is stored as it is.
            let is_stored_plain = extent.compressed_size == extent.uncompressed_size;
            return Ok(Unit {
                id: UnitId::Context(location.unit),
                compressor: if is_stored_plain {
                    Algorithm::None
                } else {
                    layout.compressor
                },
                members: members.get(&location.unit).cloned().unwrap_or_default(),
                extent,
            });
        }
        Ok(Unit {
            id: UnitId::Chunk(chunk.index),
            extent: meta::single_chunk_extent(chunk)?,
            compressor: if chunk.compressed {
                layout.compressor
            } else {
                Algorithm::None
            },
            members: vec![(position, 0)],
        })
    }

    /// The units that hold the chunks at `positions` of `layout`, each once. An error names the position of the chunk.
    pub fn units(&self, layout: &BlobLayout, positions: &[usize]) -> Result<Vec<Unit>, (usize, MetaError)> {
        let (mut units, mut seen) = (Vec::new(), HashSet::new());
        for position in positions {
            let failed = |error| (*position, error);
            if seen.insert(self.unit_of(&layout.chunks[*position]).map_err(failed)?) {
                units.push(self.unit(layout, *position).map_err(failed)?);
            }
        }
        Ok(units)
    }

    /// Decompresses the stored bytes of `unit`, verifies its chunks and caches those that match their digests.
    pub fn decode(
        &self,
        layout: &BlobLayout,
        cached: &Arc<CachedBlob>,
        unit: &Unit,
        stored: &[u8],
    ) -> Result<DecodedUnit, ReadCause> {
        let plain = self.decompress(unit, stored)?;
        let verified = unit.verified_chunks(layout, &plain);
        let cache_write_error = write_chunks(layout, cached, &plain, &verified).err().map(Arc::new);
        let index = |(position, offset): (usize, u32)| (layout.chunks[position].index, offset);
        Ok(DecodedUnit {
            verified: verified.into_iter().map(index).collect(),
            plain,
            is_from_cache: false,
            cache_write_error,
        })
    }

    /// Decompresses the stored bytes of `unit`.
    pub(super) fn decompress(&self, unit: &Unit, stored: &[u8]) -> Result<Vec<u8>, ReadCause> {
        Ok(match (&unit.extent.inflate, self) {
            (Some(_), Self::Packed { meta, .. }) => inflate(meta, &unit.extent, stored)?,
            _ => codec::decompress(unit.compressor, stored, unit.extent.uncompressed_size as usize)?,
        })
    }
}

impl Unit {
    /// The chunks whose bytes in `plain` match their digests: position in the layout, offset in the unit.
    pub(super) fn verified_chunks(&self, layout: &BlobLayout, plain: &[u8]) -> Vec<(usize, u32)> {
        let is_good = |(position, offset): &(usize, u32)| {
            let chunk = &layout.chunks[*position];
            let bytes = slice(plain, *offset, chunk.uncompressed_size);
            bytes.is_some_and(|bytes| codec::matches(layout.digester, bytes, &chunk.digest))
        };
        self.members.iter().copied().filter(is_good).collect()
    }
}

/// Writes those of `chunks`, as [`Unit::verified_chunks`] returns them, that are not in the cache. Continues after an
/// error, and returns the last one.
pub(super) fn write_chunks(
    layout: &BlobLayout,
    cached: &Arc<CachedBlob>,
    plain: &[u8],
    chunks: &[(usize, u32)],
) -> io::Result<()> {
    let mut outcome = Ok(());
    for (position, offset) in chunks {
        let chunk = &layout.chunks[*position];
        let is_cached = cached.state(chunk.index) == ChunkState::Ready && cached.is_journaled(chunk.index);
        if let Some(bytes) = slice(plain, *offset, chunk.uncompressed_size)
            && !is_cached
            && let Err(error) = cached.write(chunk, bytes)
        {
            outcome = Err(error);
        }
    }
    outcome
}

impl DecodedUnit {
    /// A single chunk that was read from the cache file and verified.
    pub fn single(chunk: &Chunk, plain: Vec<u8>) -> Self {
        Self {
            plain,
            verified: vec![(chunk.index, 0)],
            is_from_cache: true,
            cache_write_error: None,
        }
    }

    /// Number of verified chunks.
    pub(super) fn chunk_count(&self) -> usize {
        self.verified.len()
    }

    /// The bytes of `chunk`, if the unit holds it and they match its digest.
    pub fn chunk(&self, chunk: &Chunk) -> Option<&[u8]> {
        let (_, offset) = self.verified.iter().find(|(verified, _)| *verified == chunk.index)?;
        slice(&self.plain, *offset, chunk.uncompressed_size)
    }
}

fn slice(plain: &[u8], offset: u32, len: u32) -> Option<&[u8]> {
    plain.get(offset as usize..(offset as usize).checked_add(len as usize)?)
}

fn inflate(meta: &BlobMeta, extent: &UnitExtent, stored: &[u8]) -> Result<Vec<u8>, ReadCause> {
    let Some(start) = &extent.inflate else {
        return Err(ReadCause::Inflate("no inflate state".to_owned()));
    };
    let context = ZranContext {
        in_offset: extent.compressed_offset,
        out_offset: 0,
        in_len: extent.compressed_size,
        out_len: extent.uncompressed_size,
        ctx_byte: start.byte,
        ctx_bits: start.bits,
        dict: Vec::new(),
    };
    let mut plain = vec![0; extent.uncompressed_size as usize];
    ZranDecoder::new()
        .and_then(|mut decoder| decoder.uncompress(&context, Some(meta.dictionary(start)), stored, &mut plain))
        .map_err(|error| ReadCause::Inflate(error.to_string()))?;
    Ok(plain)
}
