//! Gathering what the bootstrap says of its blobs.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

use nydus_storage::device::{BlobFeatures, BlobInfo};

use super::{
    ChunkRef, LoadError,
    error::Fault,
    summary::{BlobSummary, flag_names, packing_name},
};
use crate::blob::layout::{BlobLayout, Chunk, MAX_CHUNK_SIZE, MetaLocation, Packing};

/// A compressed chunk may be a little longer than the plain one; much longer is a lie that would cost memory.
const MAX_COMPRESSED_SIZE: u32 = 2 * MAX_CHUNK_SIZE + (64 << 10);
/// Chunk numbers have 24 bits in RAFS (`RAFS_MAX_CHUNKS_PER_BLOB` in nydus-storage).
const MAX_CHUNKS_PER_BLOB: u32 = 1 << 24;
/// Offsets are passed to the system as `off_t`.
const MAX_OFFSET: u64 = i64::MAX as u64;

// Chunk flags on disk (`BlobChunkFlags` in nydus-storage).
const COMPRESSED: u32 = 0x01;
const HOLE: u32 = 0x02;
const ENCRYPTED: u32 = 0x04;
const BATCH: u32 = 0x08;
const HAS_CRC32: u32 = 0x10;

/// A chunk as a file refers to it, before any check.
#[derive(Debug, Clone, Copy)]
pub(super) struct RawChunk {
    pub(super) blob: u32,
    pub(super) flags: u32,
    pub(super) digest: [u8; 32],
    pub(super) index: u32,
    pub(super) compressed_offset: u64,
    pub(super) compressed_size: u32,
    pub(super) uncompressed_offset: u64,
    pub(super) uncompressed_size: u32,
    /// Where in the file the chunk belongs. Version 6 does not say: there the chunk's place in the list does.
    pub(super) file_offset: Option<u64>,
}

/// The blobs while the chunks in use are being found out.
#[derive(Default)]
pub(super) struct Blobs(Vec<Blob>);

struct Blob {
    layout: BlobLayout,
    features: BlobFeatures,
    /// Chunk number to position in `layout.chunks`, which is in order of discovery until the end.
    positions: HashMap<u32, u32>,
}

impl Blobs {
    /// Takes over the bootstrap's table of blobs.
    pub(super) fn new(infos: &[Arc<BlobInfo>]) -> Result<Self, LoadError> {
        if infos.len() > usize::from(u16::MAX) {
            return Err(LoadError::TooLarge {
                what: format!("{} blobs", infos.len()),
            });
        }
        let mut seen = HashSet::new();
        let mut blobs = Vec::with_capacity(infos.len());
        for info in infos {
            let blob = Blob::new(info).map_err(|fault| fault.at(|| format!("blob {}", blobs.len())))?;
            if !seen.insert(blob.layout.id.clone()) {
                let what = format!("blob {} is listed twice", blob.layout.id);
                return Err(LoadError::Superblock { what });
            }
            blobs.push(blob);
        }
        Ok(Self(blobs))
    }

    /// Checks a chunk and notes it. The reference counts chunks in order of discovery; [`Blobs::finish`] mends that.
    pub(super) fn add(&mut self, raw: &RawChunk) -> Result<ChunkRef, Fault> {
        let unknown = Fault::malformed("a chunk lies in a blob that is not in the blob table");
        let Ok(number) = u16::try_from(raw.blob) else {
            return Err(unknown);
        };
        let blob = self.0.get_mut(usize::from(number)).ok_or(unknown)?;
        let chunk = checked(raw, &blob.layout)?;
        let next = blob.layout.chunks.len() as u32; // below 2^24, as indexes are
        let position = *blob.positions.entry(chunk.index).or_insert(next);
        match blob.layout.chunks.get(position as usize) {
            None => blob.layout.chunks.push(chunk),
            Some(known) if *known == chunk => {}
            Some(_) => {
                return Err(Fault::Malformed(
                    format!("chunk {} is described in two ways", chunk.index).into(),
                ));
            }
        }
        Ok(ChunkRef {
            blob: number,
            chunk: position,
        })
    }

    /// Orders the chunks and adjusts the references to them.
    pub(super) fn finish(self, refs: &mut [ChunkRef]) -> Result<(Vec<Arc<BlobLayout>>, Vec<BlobSummary>), LoadError> {
        let mut orders = Vec::with_capacity(self.0.len());
        let mut layouts = Vec::with_capacity(self.0.len());
        let mut summaries = Vec::with_capacity(self.0.len());
        for mut blob in self.0 {
            orders.push(blob.sort());
            blob.check_overlap()
                .map_err(|fault| fault.at(|| format!("blob {}", blob.layout.id)))?;
            summaries.push(blob.summary());
            layouts.push(Arc::new(blob.layout));
        }
        for reference in refs {
            // Both exist: `add` made the reference.
            let order: Option<&Vec<u32>> = orders.get(usize::from(reference.blob));
            if let Some(&position) = order.and_then(|order| order.get(reference.chunk as usize)) {
                reference.chunk = position;
            }
        }
        Ok((layouts, summaries))
    }
}

impl Blob {
    fn new(info: &BlobInfo) -> Result<Self, Fault> {
        let features = info.features();
        refuse_unsupported(info)?;
        // The id in the table, and not `blob_id()`, which for some blobs is taken from the name of the bootstrap file:
        // that serves bootstraps cut out of a single blob, and not those of a whole image.
        let id = info.raw_blob_id();
        if id.len() != 64 || !id.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b)) {
            let what = format!(
                "blob id {:?} is not 64 hexadecimal digits",
                id.chars().take(80).collect::<String>()
            );
            return Err(Fault::Malformed(what.into()));
        }
        let packing = if features.contains(BlobFeatures::ZRAN) {
            Packing::Zran
        } else if features.contains(BlobFeatures::BATCH) {
            Packing::Batch
        } else {
            Packing::PerChunk
        };
        let layout = BlobLayout {
            id: id.to_owned(),
            compressor: info.compressor(),
            digester: info.digester(),
            packing,
            meta_v2: features.contains(BlobFeatures::CHUNK_INFO_V2),
            meta: MetaLocation {
                offset: info.meta_ci_offset(),
                compressed_size: info.meta_ci_compressed_size(),
                uncompressed_size: info.meta_ci_uncompressed_size(),
                compressor: info.meta_ci_compressor(),
            },
            chunk_count: info.chunk_count(),
            compressed_size: info.compressed_size(),
            uncompressed_size: info.uncompressed_size(),
            chunks: Vec::new(),
        };
        Ok(Self {
            layout,
            features,
            positions: HashMap::new(),
        })
    }

    /// Orders chunks by index; gives for each old position the new one.
    fn sort(&mut self) -> Vec<u32> {
        self.positions = HashMap::new();
        let old = std::mem::take(&mut self.layout.chunks);
        let mut numbered: Vec<(u32, Chunk)> = (0..).zip(old).collect();
        numbered.sort_unstable_by_key(|(_, chunk)| chunk.index);
        let mut order = vec![0; numbered.len()];
        for (new, (old, _)) in (0..).zip(&numbered) {
            if let Some(slot) = order.get_mut(*old as usize) {
                *slot = new;
            }
        }
        self.layout.chunks = numbered.into_iter().map(|(_, chunk)| chunk).collect();
        order
    }

    /// Chunks that share bytes of the cache file would overwrite each other.
    fn check_overlap(&self) -> Result<(), Fault> {
        let span = |chunk: &Chunk| (chunk.uncompressed_offset, u64::from(chunk.uncompressed_size));
        let mut spans: Vec<(u64, u64)> = self.layout.chunks.iter().map(span).collect();
        spans.sort_unstable();
        // The sums are below 2^63: `checked` saw to it.
        match spans
            .windows(2)
            .any(|pair| matches!(pair, [(at, len), (next, _)] if at + len > *next))
        {
            true => Err(Fault::malformed("chunks overlap")),
            false => Ok(()),
        }
    }

    fn summary(&self) -> BlobSummary {
        let layout = &self.layout;
        BlobSummary {
            id: layout.id.clone(),
            compressor: layout.compressor.to_string(),
            packing: packing_name(layout.packing),
            features: flag_names(&self.features),
            compressed_size: layout.compressed_size,
            uncompressed_size: layout.uncompressed_size,
            chunk_count: layout.chunk_count,
            chunks_used: layout.chunks.len() as u64,
        }
    }
}

fn refuse_unsupported(info: &BlobInfo) -> Result<(), Fault> {
    let features = info.features();
    if features.contains(BlobFeatures::ENCRYPTED) || info.cipher() != nydus_utils::crypt::Algorithm::None {
        Err(Fault::unsupported("encrypted blobs"))
    } else if features.contains(BlobFeatures::TARFS) {
        Err(Fault::unsupported("tarfs blobs"))
    } else if features.contains(BlobFeatures::EXTERNAL) {
        Err(Fault::unsupported("blobs on an external storage"))
    } else if info.is_legacy_stargz() {
        Err(Fault::unsupported(
            "eStargz layers indexed in the legacy way (gzip blobs without chunk information)",
        ))
    } else {
        Ok(())
    }
}

/// A chunk, if what is said of it can be true of that blob.
fn checked(raw: &RawChunk, blob: &BlobLayout) -> Result<Chunk, Fault> {
    if raw.flags & ENCRYPTED != 0 {
        return Err(Fault::unsupported("encrypted chunks"));
    }
    if raw.flags & HOLE != 0 {
        return Err(Fault::unsupported("files with holes"));
    }
    if raw.flags & !(COMPRESSED | BATCH | HAS_CRC32) != 0 {
        return Err(Fault::Unsupported(format!("chunks with flags {:#x}", raw.flags).into()));
    }
    if raw.flags & BATCH != 0 && blob.packing != Packing::Batch {
        return Err(Fault::malformed(
            "a batched chunk in a blob that is not packed in batches",
        ));
    }
    if raw.index >= MAX_CHUNKS_PER_BLOB || (blob.chunk_count != 0 && raw.index >= blob.chunk_count) {
        return Err(Fault::malformed(
            "a chunk number is beyond the number of chunks in the blob",
        ));
    }
    if !(1..=MAX_CHUNK_SIZE).contains(&raw.uncompressed_size) {
        return Err(Fault::malformed("a chunk's size is not 1 to 16777216 bytes"));
    }
    let ends_in_range = |at: u64, len: u32| at.checked_add(u64::from(len)).is_some_and(|end| end <= MAX_OFFSET);
    if !ends_in_range(raw.uncompressed_offset, raw.uncompressed_size) {
        return Err(Fault::malformed("a chunk's uncompressed offset is out of range"));
    }
    let compressed = raw.flags & COMPRESSED != 0;
    if blob.packing == Packing::PerChunk {
        if !ends_in_range(raw.compressed_offset, raw.compressed_size) {
            return Err(Fault::malformed("a chunk's compressed offset is out of range"));
        }
        if !(1..=MAX_COMPRESSED_SIZE).contains(&raw.compressed_size) {
            return Err(Fault::malformed("a chunk's compressed size is out of range"));
        }
        if !compressed && raw.compressed_size != raw.uncompressed_size {
            return Err(Fault::malformed("an uncompressed chunk's sizes differ"));
        }
    }
    Ok(Chunk {
        index: raw.index,
        digest: raw.digest,
        compressed_offset: raw.compressed_offset,
        compressed_size: raw.compressed_size,
        uncompressed_offset: raw.uncompressed_offset,
        uncompressed_size: raw.uncompressed_size,
        compressed,
    })
}
