//! The blob meta: how the chunks of a packed blob (batch or zran) lie in its bytes.
//!
//! The format is nydus-storage's compression context table (`meta/mod.rs`, `chunk_info_v2.rs`, `batch.rs` and `zran.rs`
//! of that crate): an array of 24-byte chunk entries, then an array of 40-byte contexts and, for zran, the inflate
//! dictionaries; a 4 KiB header has their sizes. It is parsed here because that crate indexes it without bounds checks,
//! and it comes from outside. It is not trusted: the decompressed chunks are verified against the digests of the
//! bootstrap.

use std::collections::HashMap;

use nydus_storage::meta::BlobCompressionContextHeader;
use nydus_utils::compress;

use super::{
    codec,
    layout::{BlobLayout, Chunk, MAX_CHUNK_SIZE, MAX_COMPRESSED_SIZE, MAX_OFFSET, Packing},
};

/// Length of the header that follows the table, in bytes.
pub const HEADER_SIZE: usize = size_of::<BlobCompressionContextHeader>();
const MAGIC: u32 = 0xb10b_b10b;
const CHUNK_ENTRY_SIZE: usize = 24;
const CONTEXT_SIZE: usize = 40;
/// The longest table, in bytes: as many chunk entries as a blob can have.
const MAX_TABLE_SIZE: u64 = (1 << 24) * CHUNK_ENTRY_SIZE as u64;
/// Bytes that every table may have, whatever its bootstrap says: some bootstraps omit lengths.
const SMALL_TABLE: u64 = 16 << 20;
/// The least distance between points of random access, in bytes: converters write one every 768 KiB or more.
const INFLATE_STEP: u64 = 256 << 10;
/// The longest dictionary of such a point, in bytes.
const DICTIONARY_SIZE: u64 = 32 << 10;
/// The table in a file is padded to a multiple of this, in bytes.
const PADDING: usize = 4096;
/// The longest batch, uncompressed, in bytes: no longer than a chunk.
const MAX_BATCH: u32 = MAX_CHUNK_SIZE;
/// The longest zran unit, uncompressed, in bytes. A unit ends where a deflate block starts. Blocks of data that
/// compress well have several MiB, with whole chunks after them; some compressors write a single block.
const MAX_ZRAN_UNIT: u32 = 8 * MAX_CHUNK_SIZE;

/// The blob meta contradicts the bootstrap, or itself.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("malformed blob meta: {0}")]
pub struct MetaError(String);

/// Where the stored bytes of a unit are, and how to decompress them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnitExtent {
    /// Where the stored bytes start in the blob.
    pub compressed_offset: u64,
    /// Length of the stored bytes.
    pub compressed_size: u32,
    /// Length once decompressed.
    pub uncompressed_size: u32,
    /// State to inflate from the middle of a gzip stream; `None` for batches and single chunks.
    pub inflate: Option<InflateStart>,
}

impl UnitExtent {
    /// Where the stored bytes end in the blob.
    pub fn compressed_end(&self) -> u64 {
        // Cannot overflow: no unit starts beyond MAX_OFFSET.
        self.compressed_offset + u64::from(self.compressed_size)
    }
}

/// The state in which a gzip stream can be inflated from some point on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InflateStart {
    /// The byte before the point, some bits of which belong to the stream.
    pub byte: u8,
    /// How many bits of that byte: 0 to 7.
    pub bits: u8,
    /// Where the dictionary (the preceding output, at most 32 KiB) starts in the table.
    dictionary: std::ops::Range<usize>,
}

/// Where a chunk lies in its unit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChunkLocation {
    /// Index of the unit's context.
    pub unit: u32,
    /// Where the chunk starts in the decompressed unit.
    pub offset: u32,
}

/// The blob meta of one packed blob.
pub struct BlobMeta {
    /// The table, padded, and the header.
    file: Vec<u8>,
    table_len: usize,
    packing: Packing,
    chunk_count: usize,
    units: usize,
    contexts: usize,
}

impl BlobMeta {
    /// Parses the file form, which lies beside the bootstrap (`image/<blob>.blob.meta`): the plain table, padded to
    /// 4 KiB, then the header.
    pub fn from_file(layout: &BlobLayout, file: Vec<u8>) -> Result<Self, MetaError> {
        let Some((table, header)) = file.split_last_chunk::<HEADER_SIZE>() else {
            return Err(error("shorter than its header"));
        };
        let meta = Self::new(layout, table.len(), header)?;
        Ok(Self { file, ..meta })
    }

    /// The file form, which [`BlobMeta::from_file`] parses.
    pub fn as_file(&self) -> &[u8] {
        &self.file
    }

    /// The greatest plausible length of the file form and of the stored form for such a blob, in bytes. It also limits
    /// the plain table.
    pub fn max_size(layout: &BlobLayout) -> u64 {
        let chunks = match layout.chunk_count {
            0 => MAX_TABLE_SIZE,
            // At worst, each chunk of a batch blob has a context.
            count => u64::from(count) * (CHUNK_ENTRY_SIZE + CONTEXT_SIZE) as u64,
        };
        let points = layout.compressed_size / INFLATE_STEP + layout.uncompressed_size / INFLATE_STEP + 1;
        let points = points.saturating_mul(CONTEXT_SIZE as u64 + DICTIONARY_SIZE);
        let table = chunks.saturating_add(points).saturating_add(SMALL_TABLE);
        table.min(MAX_TABLE_SIZE) + (HEADER_SIZE + PADDING) as u64
    }

    /// Offset and length of the stored form in the blob that holds it, header included, and the bytes of memory needed
    /// to read it.
    pub fn location(layout: &BlobLayout) -> Result<(u64, usize, usize), MetaError> {
        let (location, limit) = (&layout.meta, Self::max_size(layout));
        let stored = location.compressed_size.saturating_add(HEADER_SIZE as u64);
        if stored > limit || location.uncompressed_size > limit {
            return Err(MetaError::too_large());
        }
        if location.offset > MAX_OFFSET - stored {
            return Err(error("the table lies outside of the blob"));
        }
        let stored = stored as usize; // at most `limit`, like the other
        Ok((location.offset, stored, stored + location.uncompressed_size as usize))
    }

    /// Parses the stored form, which lies in a blob at [`BlobLayout::meta`]: the compressed table, then the header.
    pub fn from_blob(layout: &BlobLayout, stored: &[u8]) -> Result<Self, MetaError> {
        let Some((table, header)) = stored.split_last_chunk::<HEADER_SIZE>() else {
            return Err(error("shorter than its header"));
        };
        Self::location(layout)?;
        let len = layout.meta.uncompressed_size as usize; // checked by `location`
        let compressor = match layout.meta.compressor {
            compress::Algorithm::None if len != table.len() => {
                return Err(error("the stored table has another length"));
            }
            other => other,
        };
        let mut file = codec::decompress(compressor, table, len).map_err(|e| MetaError(e.to_string()))?;
        let padded = len.next_multiple_of(PADDING);
        file.reserve_exact(padded - len + HEADER_SIZE);
        file.resize(padded, 0);
        file.extend_from_slice(header);
        Self::from_file(layout, file)
    }

    /// Parses the header. `file` is left empty.
    fn new(layout: &BlobLayout, table_len: usize, header: &[u8]) -> Result<Self, MetaError> {
        // Field offsets of `BlobCompressionContextHeader`, all little-endian.
        let (magic, entries) = (u32_at(header, 0), u32_at(header, 12));
        let (contexts_at, units) = (u64_at(header, 40), u32_at(header, 56));
        if magic != Some(MAGIC) || u32_at(header, HEADER_SIZE - 4) != Some(MAGIC) {
            return Err(error("the header has no magic number"));
        }
        if !layout.meta_v2 || layout.packing == Packing::PerChunk {
            return Err(error("the blob is not packed"));
        }
        let (Some(entries), Some(contexts_at), Some(units)) = (entries, contexts_at, units) else {
            return Err(error("the header is too short"));
        };
        let meta = Self {
            packing: layout.packing,
            chunk_count: entries as usize,
            units: units as usize,
            contexts: usize::try_from(contexts_at).map_err(|_| error("the contexts lie outside of the table"))?,
            file: Vec::new(),
            table_len,
        };
        let end_of = |start: usize, count: usize, size: usize| count.checked_mul(size)?.checked_add(start);
        for end in [
            end_of(0, meta.chunk_count, CHUNK_ENTRY_SIZE),
            end_of(meta.contexts, meta.units, CONTEXT_SIZE),
        ] {
            if end.is_none_or(|end| end > table_len) {
                return Err(error("the table is shorter than the header says"));
            }
        }
        Ok(meta)
    }

    fn table(&self) -> &[u8] {
        &self.file[..self.table_len]
    }

    /// Where the chunk of that index lies; `None` if it is stored by itself, which batch blobs may do.
    pub fn locate(&self, index: u32) -> Result<Option<ChunkLocation>, MetaError> {
        const ZRAN: u64 = 0x2 << 56;
        const BATCH: u64 = 0x4 << 56;
        let at = index as usize * CHUNK_ENTRY_SIZE;
        let in_table = (index as usize) < self.chunk_count;
        let (true, Some(flags), Some(data)) = (in_table, u64_at(self.table(), at), u64_at(self.table(), at + 16))
        else {
            return Err(MetaError(format!("no chunk {index}")));
        };
        let expected = if self.packing == Packing::Zran { ZRAN } else { BATCH };
        if flags & expected == 0 {
            return Ok(None);
        }
        Ok(Some(ChunkLocation {
            unit: (data >> 32) as u32,
            offset: data as u32,
        }))
    }

    /// The extent of the unit at `location`. `index` is a chunk in that unit: contexts of batch blobs have no offset,
    /// but their chunk entries have.
    pub fn extent(&self, index: u32, location: ChunkLocation) -> Result<UnitExtent, MetaError> {
        let at = self.contexts + location.unit as usize * CONTEXT_SIZE;
        if location.unit as usize >= self.units {
            return Err(MetaError(format!("no context {}", location.unit)));
        }
        // `new` checked that every context lies in the table.
        let context = &self.table()[at..at + CONTEXT_SIZE];
        let (extent, limit) = match self.packing {
            Packing::Zran => (self.zran_extent(context), MAX_ZRAN_UNIT),
            Packing::Batch | Packing::PerChunk => (self.batch_extent(index, context), MAX_BATCH),
        };
        let extent = extent.ok_or_else(|| MetaError(format!("context {} lies outside of the blob", location.unit)))?;
        // Data that does not compress grows a little.
        if extent.uncompressed_size > limit || extent.compressed_size > limit + limit / 8 {
            let (stored, plain) = (extent.compressed_size, extent.uncompressed_size);
            let message = format!(
                "context {}: {stored} stored and {plain} plain bytes are too many",
                location.unit
            );
            return Err(MetaError(message));
        }
        if extent.compressed_size == 0 || extent.compressed_offset > MAX_OFFSET - u64::from(extent.compressed_size) {
            return Err(MetaError(format!("context {} lies outside of the blob", location.unit)));
        }
        Ok(extent)
    }

    fn batch_extent(&self, index: u32, context: &[u8]) -> Option<UnitExtent> {
        let entry = index as usize * CHUNK_ENTRY_SIZE;
        Some(UnitExtent {
            compressed_offset: u64_at(self.table(), entry + 8)? & 0xff_ffff_ffff,
            compressed_size: u32_at(context, 0)?,
            uncompressed_size: u32_at(context, 4)?,
            inflate: None,
        })
    }

    fn zran_extent(&self, context: &[u8]) -> Option<UnitExtent> {
        let dictionaries = self.contexts + self.units * CONTEXT_SIZE;
        let start = dictionaries.checked_add(usize::try_from(u64_at(context, 16)?).ok()?)?;
        let end = start.checked_add(u32_at(context, 32)? as usize)?;
        self.table().get(start..end)?;
        Some(UnitExtent {
            compressed_offset: u64_at(context, 0)?,
            compressed_size: u32_at(context, 24)?,
            uncompressed_size: u32_at(context, 28)?,
            inflate: Some(InflateStart {
                byte: context[36],
                bits: context[37] & 7,
                dictionary: start..end,
            }),
        })
    }

    /// The dictionary to inflate with.
    pub fn dictionary(&self, start: &InflateStart) -> &[u8] {
        self.table().get(start.dictionary.clone()).unwrap_or_default()
    }

    /// The chunks of `layout` that lie in each unit: position in [`BlobLayout::chunks`] and offset in the unit.
    /// Leaves out chunks that are stored by themselves.
    ///
    /// # Errors
    /// If chunks of a unit overlap. No converter writes such: equal bytes are one chunk. Hashing them could take far
    /// longer than the unit's length suggests.
    pub fn members(&self, layout: &BlobLayout) -> Result<HashMap<u32, Vec<(usize, u32)>>, MetaError> {
        let mut members: HashMap<u32, Vec<(usize, u32)>> = HashMap::new();
        for (position, chunk) in layout.chunks.iter().enumerate() {
            if let Some(location) = self.locate(chunk.index)? {
                members
                    .entry(location.unit)
                    .or_default()
                    .push((position, location.offset));
            }
        }
        for (unit, members) in &mut members {
            members.sort_unstable_by_key(|(_, offset)| *offset);
            let end = |(position, offset): &(usize, u32)| {
                let size = layout.chunks.get(*position).map_or(0, |chunk| chunk.uncompressed_size);
                u64::from(*offset) + u64::from(size)
            };
            let overlap = |pair: &[(usize, u32)]| matches!(pair, [a, b] if end(a) > u64::from(b.1));
            if members.windows(2).any(overlap) {
                return Err(MetaError(format!("chunks overlap in context {unit}")));
            }
        }
        Ok(members)
    }
}

/// The extent of a chunk that is stored by itself. In a packed blob the bootstrap may have its location wrong.
pub(super) fn single_chunk_extent(chunk: &Chunk) -> Result<UnitExtent, MetaError> {
    let size = chunk.compressed_size;
    if !(1..=MAX_COMPRESSED_SIZE).contains(&size) || chunk.compressed_offset > MAX_OFFSET - u64::from(size) {
        return Err(MetaError(format!("chunk {} lies outside of the blob", chunk.index)));
    }
    Ok(UnitExtent {
        compressed_offset: chunk.compressed_offset,
        compressed_size: size,
        uncompressed_size: chunk.uncompressed_size,
        inflate: None,
    })
}

impl MetaError {
    pub(super) fn too_large() -> Self {
        error("the table is too large for the blob")
    }
}

fn error(what: &str) -> MetaError {
    MetaError(what.to_owned())
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at.checked_add(4)?)?.try_into().ok()?))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(at..at.checked_add(8)?)?.try_into().ok()?))
}
