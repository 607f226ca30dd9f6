//! The blob meta: how the chunks of a packed blob (batch or zran) lie in its bytes.
//!
//! The format is nydus-storage's compression context table (`meta/mod.rs`, `chunk_info_v2.rs`, `batch.rs` and
//! `zran.rs` of that crate): an array of 24-byte chunk entries, then an array of 40-byte contexts and, for zran, the
//! inflate dictionaries; a 4 KiB header tells their sizes. It is read here, and not by that crate, because it comes
//! from outside and the crate indexes it without bounds. It need not be trusted: whatever it says, the bytes that come
//! out are checked against the chunk digests of the bootstrap.

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
/// The longest table of all, in bytes: of as many chunk entries as a blob can have.
const MAX_TABLE_SIZE: u64 = (1 << 24) * CHUNK_ENTRY_SIZE as u64;
/// What is allowed to every table, in bytes, so that bootstraps may leave some lengths out.
const SMALL_TABLE: u64 = 16 << 20;
/// Points of random access are farther apart than that, in bytes: converters have one every 768 KiB or more.
const INFLATE_STEP: u64 = 256 << 10;
/// The longest dictionary of such a point, in bytes.
const DICTIONARY_SIZE: u64 = 32 << 10;
/// What the table of the form in files is padded to, in bytes.
const PADDING: usize = 4096;
/// The longest batch, uncompressed, in bytes: no longer than a chunk.
const MAX_BATCH: u32 = MAX_CHUNK_SIZE;
/// The longest zran unit, uncompressed, in bytes. A unit ends where a deflate block starts, and blocks of data that
/// compress well are of several MiB, with whole chunks after them. Some compressors make a single block of all.
const MAX_ZRAN_UNIT: u32 = 8 * MAX_CHUNK_SIZE;

/// The table is not what the bootstrap describes.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("malformed blob meta: {0}")]
pub struct MetaError(String);

/// Stored bytes that decompress together, giving one or more chunks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unit {
    /// Where the stored bytes start in the blob.
    pub compressed_offset: u64,
    /// Length of the stored bytes.
    pub compressed_size: u32,
    /// Length once decompressed.
    pub uncompressed_size: u32,
    /// What inflating from the middle of a gzip stream needs; batches have none.
    pub inflate: Option<InflateStart>,
}

impl Unit {
    /// Where the stored bytes end in the blob.
    pub fn compressed_end(&self) -> u64 {
        // Far from overflowing: no unit starts beyond MAX_OFFSET.
        self.compressed_offset + u64::from(self.compressed_size)
    }
}

/// The state from which a gzip stream can be inflated at some point.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InflateStart {
    /// The byte before, of which some bits belong to the stream.
    pub byte: u8,
    /// How many bits of that byte: 0 to 7.
    pub bits: u8,
    /// Where the dictionary (the preceding output, at most 32 KiB) starts in the table.
    dictionary: std::ops::Range<usize>,
}

/// A chunk's place in its unit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// Number of the unit.
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
    /// Reads the form found beside the bootstrap (`image/<blob>.blob.meta`): the plain table, padded to 4 KiB, then
    /// the header.
    pub fn from_file(layout: &BlobLayout, file: Vec<u8>) -> Result<Self, MetaError> {
        let Some((table, header)) = file.split_last_chunk::<HEADER_SIZE>() else {
            return Err(error("shorter than its header"));
        };
        let meta = Self::new(layout, table.len(), header)?;
        Ok(Self { file, ..meta })
    }

    /// The form that [`BlobMeta::from_file`] reads.
    pub fn as_file(&self) -> &[u8] {
        &self.file
    }

    /// The longest file or stored form that is believed of a blob like that, in bytes. The plain table is no longer.
    pub fn max_size(layout: &BlobLayout) -> u64 {
        let chunks = match layout.chunk_count {
            0 => MAX_TABLE_SIZE,
            // In batches, the worst is a context for each chunk.
            count => u64::from(count) * (CHUNK_ENTRY_SIZE + CONTEXT_SIZE) as u64,
        };
        let points = layout.compressed_size / INFLATE_STEP + layout.uncompressed_size / INFLATE_STEP + 1;
        let points = points.saturating_mul(CONTEXT_SIZE as u64 + DICTIONARY_SIZE);
        let table = chunks.saturating_add(points).saturating_add(SMALL_TABLE);
        table.min(MAX_TABLE_SIZE) + (HEADER_SIZE + PADDING) as u64
    }

    /// Where the stored form lies in the blob that holds it: offset and length, header included; and how much memory
    /// it takes to read it.
    pub fn location(layout: &BlobLayout) -> Result<(u64, usize, usize), MetaError> {
        let (location, limit) = (&layout.meta, Self::max_size(layout));
        let stored = location.compressed_size.saturating_add(HEADER_SIZE as u64);
        if stored > limit || location.uncompressed_size > limit {
            return Err(MetaError::too_large());
        }
        if location.offset > MAX_OFFSET - stored {
            return Err(error("the table lies outside"));
        }
        let stored = stored as usize; // at most `limit`, like the other
        Ok((location.offset, stored, stored + location.uncompressed_size as usize))
    }

    /// Reads the form found in the blob at [`BlobLayout::meta`]: the compressed table, then the header.
    pub fn from_blob(layout: &BlobLayout, stored: &[u8]) -> Result<Self, MetaError> {
        let Some((table, header)) = stored.split_last_chunk::<HEADER_SIZE>() else {
            return Err(error("shorter than its header"));
        };
        Self::location(layout)?;
        let len = layout.meta.uncompressed_size as usize; // `location` has seen that it is sane
        let compressor = match layout.meta.compressor {
            compress::Algorithm::None if len != table.len() => return Err(error("stored table has another length")),
            other => other,
        };
        let mut file = codec::decompress(compressor, table, len).map_err(|e| MetaError(e.to_string()))?;
        let padded = len.next_multiple_of(PADDING);
        file.reserve_exact(padded - len + HEADER_SIZE);
        file.resize(padded, 0);
        file.extend_from_slice(header);
        Self::from_file(layout, file)
    }

    /// What the header says, without the bytes.
    fn new(layout: &BlobLayout, table_len: usize, header: &[u8]) -> Result<Self, MetaError> {
        // Field offsets of `BlobCompressionContextHeader`, all little-endian.
        let (magic, entries) = (u32_at(header, 0), u32_at(header, 12));
        let (contexts_at, units) = (u64_at(header, 40), u32_at(header, 56));
        if magic != Some(MAGIC) || u32_at(header, HEADER_SIZE - 4) != Some(MAGIC) {
            return Err(error("no magic number in the header"));
        }
        if !layout.meta_v2 || layout.packing == Packing::PerChunk {
            return Err(error("the blob is not packed"));
        }
        let (Some(entries), Some(contexts_at), Some(units)) = (entries, contexts_at, units) else {
            return Err(error("header too short"));
        };
        let meta = Self {
            packing: layout.packing,
            chunk_count: entries as usize,
            units: units as usize,
            contexts: usize::try_from(contexts_at).map_err(|_| error("contexts lie outside"))?,
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

    /// Where the chunk of that index lies; `None` if it is stored by itself (possible in batch blobs).
    pub fn place(&self, index: u32) -> Result<Option<Place>, MetaError> {
        const ZRAN: u64 = 0x2 << 56;
        const BATCH: u64 = 0x4 << 56;
        let at = index as usize * CHUNK_ENTRY_SIZE;
        let in_table = (index as usize) < self.chunk_count;
        let (true, Some(flags), Some(data)) = (in_table, u64_at(self.table(), at), u64_at(self.table(), at + 16))
        else {
            return Err(MetaError(format!("no chunk {index}")));
        };
        let wanted = if self.packing == Packing::Zran { ZRAN } else { BATCH };
        if flags & wanted == 0 {
            return Ok(None);
        }
        Ok(Some(Place {
            unit: (data >> 32) as u32,
            offset: data as u32,
        }))
    }

    /// The unit that holds the chunk of that index. `index` matters in batch blobs, whose contexts have no offset.
    pub fn unit(&self, index: u32, place: Place) -> Result<Unit, MetaError> {
        let at = self.contexts + place.unit as usize * CONTEXT_SIZE;
        if place.unit as usize >= self.units {
            return Err(MetaError(format!("no context {}", place.unit)));
        }
        // `new` checked that every context lies in the table.
        let context = &self.table()[at..at + CONTEXT_SIZE];
        let (unit, limit) = match self.packing {
            Packing::Zran => (self.zran_unit(context), MAX_ZRAN_UNIT),
            Packing::Batch | Packing::PerChunk => (self.batch_unit(index, context), MAX_BATCH),
        };
        let unit = unit.ok_or_else(|| MetaError(format!("context {} points outside", place.unit)))?;
        // What compresses badly grows a little.
        if unit.uncompressed_size > limit || unit.compressed_size > limit + limit / 8 {
            let (stored, plain) = (unit.compressed_size, unit.uncompressed_size);
            let message = format!("context {}: {stored} bytes that give {plain} are too many", place.unit);
            return Err(MetaError(message));
        }
        if unit.compressed_size == 0 || unit.compressed_offset > MAX_OFFSET - u64::from(unit.compressed_size) {
            return Err(MetaError(format!("context {} points outside", place.unit)));
        }
        Ok(unit)
    }

    fn batch_unit(&self, index: u32, context: &[u8]) -> Option<Unit> {
        let entry = index as usize * CHUNK_ENTRY_SIZE;
        Some(Unit {
            compressed_offset: u64_at(self.table(), entry + 8)? & 0xff_ffff_ffff,
            compressed_size: u32_at(context, 0)?,
            uncompressed_size: u32_at(context, 4)?,
            inflate: None,
        })
    }

    fn zran_unit(&self, context: &[u8]) -> Option<Unit> {
        let dictionaries = self.contexts + self.units * CONTEXT_SIZE;
        let start = dictionaries.checked_add(usize::try_from(u64_at(context, 16)?).ok()?)?;
        let end = start.checked_add(u32_at(context, 32)? as usize)?;
        self.table().get(start..end)?;
        Some(Unit {
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
    /// Chunks that are stored by themselves are left out.
    ///
    /// Chunks that share bytes of a unit are an error: no converter makes them, since equal bytes are one chunk, and
    /// hashing them would take far longer than the unit's length suggests.
    pub fn members(&self, layout: &BlobLayout) -> Result<HashMap<u32, Vec<(usize, u32)>>, MetaError> {
        let mut members: HashMap<u32, Vec<(usize, u32)>> = HashMap::new();
        for (position, chunk) in layout.chunks.iter().enumerate() {
            if let Some(place) = self.place(chunk.index)? {
                members.entry(place.unit).or_default().push((position, place.offset));
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

/// The unit that is a chunk stored by itself, in a packed blob: one whose place the bootstrap need not have got right.
pub(super) fn lone_unit(chunk: &Chunk) -> Result<Unit, MetaError> {
    let size = chunk.compressed_size;
    if !(1..=MAX_COMPRESSED_SIZE).contains(&size) || chunk.compressed_offset > MAX_OFFSET - u64::from(size) {
        return Err(MetaError(format!("chunk {} is nowhere", chunk.index)));
    }
    Ok(Unit {
        compressed_offset: chunk.compressed_offset,
        compressed_size: size,
        uncompressed_size: chunk.uncompressed_size,
        inflate: None,
    })
}

impl MetaError {
    pub(super) fn too_large() -> Self {
        error("the table is too large for such a blob")
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
