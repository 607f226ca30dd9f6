//! Collects and checks the blobs of a bootstrap and their chunks.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

use nydus_storage::device::{BlobFeatures, BlobInfo};

use super::{
    ChunkRef, LoadError,
    error::FormatError,
    summary::{BlobSummary, flag_names, packing_name},
};
use crate::blob::layout::{BlobLayout, Chunk, MAX_CHUNK_SIZE, MAX_COMPRESSED_SIZE, MAX_OFFSET, MetaLocation, Packing};

/// Chunk numbers have 24 bits in RAFS (`RAFS_MAX_CHUNKS_PER_BLOB` in nydus-storage).
const MAX_CHUNKS_PER_BLOB: u32 = 1 << 24;

// Chunk flags on disk (`BlobChunkFlags` in nydus-storage).
const COMPRESSED: u32 = 0x01;
const HOLE: u32 = 0x02;
const ENCRYPTED: u32 = 0x04;
const BATCH: u32 = 0x08;
const HAS_CRC32: u32 = 0x10;

/// A chunk as a file refers to it, not checked yet.
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
    /// Offset in the file where the chunk belongs. `None` in version 6, where the position in the list determines it.
    pub(super) file_offset: Option<u64>,
}

/// The blobs during the walk, while the chunks in use are collected.
#[derive(Default)]
pub(super) struct Blobs(Vec<BlobTableEntry>);

struct BlobTableEntry {
    layout: BlobLayout,
    features: BlobFeatures,
    /// Chunk number → position in `layout.chunks`, which is in order of discovery until [`Blobs::finish`].
    positions: HashMap<u32, u32>,
}

impl Blobs {
    /// Checks the entries of the blob table.
    pub(super) fn new(infos: &[Arc<BlobInfo>]) -> Result<Self, LoadError> {
        if infos.len() > usize::from(u16::MAX) {
            return Err(LoadError::TooLarge {
                what: format!("{} blobs", infos.len()),
            });
        }
        let mut seen = HashSet::new();
        let mut blobs = Vec::with_capacity(infos.len());
        for info in infos {
            let blob = BlobTableEntry::new(info).map_err(|error| error.at(|| format!("blob {}", blobs.len())))?;
            if !seen.insert(blob.layout.id.clone()) {
                let what = format!("blob {} is listed twice", blob.layout.id);
                return Err(LoadError::Superblock { what });
            }
            blobs.push(blob);
        }
        Ok(Self(blobs))
    }

    /// Checks and adds a chunk. The result counts chunks in order of discovery, until [`Blobs::finish`] renumbers it.
    pub(super) fn add(&mut self, raw: &RawChunk) -> Result<ChunkRef, FormatError> {
        let unknown = FormatError::malformed("a chunk lies in a blob that is not in the blob table");
        let Ok(number) = u16::try_from(raw.blob) else {
            return Err(unknown);
        };
        let blob = self.0.get_mut(usize::from(number)).ok_or(unknown)?;
        let chunk = check_chunk(raw, &blob.layout)?;
        let next = blob.layout.chunks.len() as u32; // below 2^24, like chunk numbers
        let position = *blob.positions.entry(chunk.index).or_insert(next);
        match blob.layout.chunks.get(position as usize) {
            None => blob.layout.chunks.push(chunk),
            Some(known) if *known == chunk => {}
            Some(_) => {
                return Err(FormatError::Malformed(
                    format!("chunk {} is described in two ways", chunk.index).into(),
                ));
            }
        }
        Ok(ChunkRef {
            blob: number,
            chunk: position,
        })
    }

    /// Orders the chunks by number and adjusts the references to them.
    pub(super) fn finish(self, refs: &mut [ChunkRef]) -> Result<(Vec<Arc<BlobLayout>>, Vec<BlobSummary>), LoadError> {
        let mut orders = Vec::with_capacity(self.0.len());
        let mut layouts = Vec::with_capacity(self.0.len());
        let mut summaries = Vec::with_capacity(self.0.len());
        for mut blob in self.0 {
            orders.push(blob.sort());
            blob.check_overlap()
                .map_err(|error| error.at(|| format!("blob {}", blob.layout.id)))?;
            summaries.push(blob.summary());
            layouts.push(Arc::new(blob.layout));
        }
        for reference in refs {
            // Both exist, because `add` created the reference.
            let order: Option<&Vec<u32>> = orders.get(usize::from(reference.blob));
            if let Some(&position) = order.and_then(|order| order.get(reference.chunk as usize)) {
                reference.chunk = position;
            }
        }
        Ok((layouts, summaries))
    }
}

/// Id of the blob that holds the blob meta of a blob whose own bytes are an ordinary layer.
fn meta_blob(info: &BlobInfo) -> Option<String> {
    let digest = info.blob_meta_digest();
    let separate = info.has_feature(BlobFeatures::SEPARATE) && *digest != [0; 32];
    separate.then(|| hex::encode(digest))
}

impl BlobTableEntry {
    fn new(info: &BlobInfo) -> Result<Self, FormatError> {
        let features = info.features();
        reject_unsupported(info)?;
        // The id in the table. `blob_id()` would derive some ids from the name of the bootstrap file, which is right
        // only for a bootstrap extracted from a single blob.
        let id = info.raw_blob_id();
        if id.len() != 64 || !id.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b)) {
            let what = format!(
                "blob id {:?} is not 64 hexadecimal digits",
                id.chars().take(80).collect::<String>()
            );
            return Err(FormatError::Malformed(what.into()));
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
            meta_blob: meta_blob(info),
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

    /// Orders the chunks by number. Returns the new position for each old one.
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

    /// Rejects chunks that share bytes of the cache file, because they would overwrite each other.
    fn check_overlap(&self) -> Result<(), FormatError> {
        let span = |chunk: &Chunk| (chunk.uncompressed_offset, u64::from(chunk.uncompressed_size));
        let mut spans: Vec<(u64, u64)> = self.layout.chunks.iter().map(span).collect();
        spans.sort_unstable();
        // The sums are below 2^63, as `check_chunk` ensures.
        match spans
            .windows(2)
            .any(|pair| matches!(pair, [(at, len), (next, _)] if at + len > *next))
        {
            true => Err(FormatError::malformed("chunks overlap")),
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

fn reject_unsupported(info: &BlobInfo) -> Result<(), FormatError> {
    let features = info.features();
    if features.contains(BlobFeatures::ENCRYPTED) || info.cipher() != nydus_utils::crypt::Algorithm::None {
        Err(FormatError::unsupported("encrypted blobs"))
    } else if features.contains(BlobFeatures::TARFS) {
        Err(FormatError::unsupported("tarfs blobs"))
    } else if features.contains(BlobFeatures::EXTERNAL) {
        Err(FormatError::unsupported("blobs on an external storage"))
    } else if info.is_legacy_stargz() && !features.contains(BlobFeatures::HAS_TAR_HEADER) {
        // nydus-storage applies this term to all gzip blobs of this kind. Blobs made by a converter have a tar header
        // of their own. An eStargz layer is used as it is, and the lengths of its compressed chunks are only guessed.
        Err(FormatError::unsupported(
            "eStargz layers indexed in the legacy way (gzip blobs without chunk information)",
        ))
    } else {
        Ok(())
    }
}

/// Checks a chunk against its blob.
fn check_chunk(raw: &RawChunk, blob: &BlobLayout) -> Result<Chunk, FormatError> {
    if raw.flags & ENCRYPTED != 0 {
        return Err(FormatError::unsupported("encrypted chunks"));
    }
    if raw.flags & HOLE != 0 {
        return Err(FormatError::unsupported("files with holes"));
    }
    if raw.flags & !(COMPRESSED | BATCH | HAS_CRC32) != 0 {
        return Err(FormatError::Unsupported(
            format!("chunks with flags {:#x}", raw.flags).into(),
        ));
    }
    if raw.flags & BATCH != 0 && blob.packing != Packing::Batch {
        return Err(FormatError::malformed(
            "a batched chunk in a blob that is not packed in batches",
        ));
    }
    if raw.index >= MAX_CHUNKS_PER_BLOB || (blob.chunk_count != 0 && raw.index >= blob.chunk_count) {
        return Err(FormatError::malformed(
            "a chunk number is beyond the number of chunks in the blob",
        ));
    }
    if !(1..=MAX_CHUNK_SIZE).contains(&raw.uncompressed_size) {
        return Err(FormatError::malformed("a chunk's size is not 1 to 16777216 bytes"));
    }
    let ends_in_range = |at: u64, len: u32| at.checked_add(u64::from(len)).is_some_and(|end| end <= MAX_OFFSET);
    if !ends_in_range(raw.uncompressed_offset, raw.uncompressed_size) {
        return Err(FormatError::malformed("a chunk's uncompressed offset is out of range"));
    }
    let compressed = raw.flags & COMPRESSED != 0;
    if blob.packing == Packing::PerChunk {
        if !ends_in_range(raw.compressed_offset, raw.compressed_size) {
            return Err(FormatError::malformed("a chunk's compressed offset is out of range"));
        }
        if !(1..=MAX_COMPRESSED_SIZE).contains(&raw.compressed_size) {
            return Err(FormatError::malformed("a chunk's compressed size is out of range"));
        }
        if !compressed && raw.compressed_size != raw.uncompressed_size {
            return Err(FormatError::malformed("an uncompressed chunk's sizes differ"));
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

#[cfg(test)]
mod tests {
    use nydus_utils::compress;

    use super::*;

    const ID: &str = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

    fn info(id: &str, features: BlobFeatures) -> BlobInfo {
        BlobInfo::new(0, id.to_owned(), 1 << 20, 1 << 20, 4096, 9, features)
    }

    fn chunk(index: u32) -> RawChunk {
        RawChunk {
            blob: 0,
            flags: COMPRESSED,
            digest: [7; 32],
            index,
            compressed_offset: 100,
            compressed_size: 50,
            uncompressed_offset: u64::from(index) * 4096,
            uncompressed_size: 4096,
            file_offset: None,
        }
    }

    fn blobs() -> Blobs {
        Blobs::new(&[Arc::new(info(ID, BlobFeatures::ALIGNED))]).unwrap()
    }

    #[test]
    fn kinds_of_blobs() {
        let packing = |features| BlobTableEntry::new(&info(ID, features)).map(|blob| blob.layout.packing);
        assert!(matches!(packing(BlobFeatures::BATCH), Ok(Packing::Batch)));
        assert!(matches!(packing(BlobFeatures::ZRAN), Ok(Packing::Zran)));
        for features in [BlobFeatures::ENCRYPTED, BlobFeatures::TARFS, BlobFeatures::EXTERNAL] {
            assert!(
                matches!(packing(features), Err(FormatError::Unsupported(_))),
                "{features:?}"
            );
        }
        let mut stargz = info(ID, BlobFeatures::empty());
        stargz.set_compressor(compress::Algorithm::GZip);
        assert!(matches!(BlobTableEntry::new(&stargz), Err(FormatError::Unsupported(_))));
        let mut native = info(ID, BlobFeatures::HAS_TAR_HEADER);
        native.set_compressor(compress::Algorithm::GZip);
        assert!(BlobTableEntry::new(&native).is_ok());
    }

    #[test]
    fn ids_are_digests() {
        for id in [
            "",
            "..",
            &ID[1..],
            &ID.to_uppercase(),
            &format!("{ID}0"),
            &ID.replace('0', "/"),
        ] {
            assert!(
                matches!(
                    BlobTableEntry::new(&info(id, BlobFeatures::ALIGNED)),
                    Err(FormatError::Malformed(_))
                ),
                "{id}"
            );
        }
        let twice = Arc::new(info(ID, BlobFeatures::ALIGNED));
        assert!(matches!(
            Blobs::new(&[twice.clone(), twice]),
            Err(LoadError::Superblock { .. })
        ));
    }

    #[test]
    fn chunks_are_kept_once_and_ordered() {
        let mut blobs = blobs();
        let mut refs: Vec<ChunkRef> = [5, 2, 5, 8].map(|index| blobs.add(&chunk(index)).unwrap()).to_vec();
        let (layouts, _) = blobs.finish(&mut refs).unwrap();
        let indexes: Vec<u32> = layouts[0].chunks.iter().map(|chunk| chunk.index).collect();
        assert_eq!(indexes, [2, 5, 8]);
        assert_eq!(refs.iter().map(|at| at.chunk).collect::<Vec<_>>(), [1, 0, 1, 2]);
    }

    #[test]
    fn chunks_that_cannot_be() {
        let good = chunk(1);
        let bad = [
            RawChunk { blob: 1, ..good },
            RawChunk { blob: 1 << 16, ..good },
            RawChunk { index: 9, ..good },
            RawChunk {
                flags: ENCRYPTED,
                ..good
            },
            RawChunk { flags: HOLE, ..good },
            RawChunk { flags: BATCH, ..good },
            RawChunk { flags: 0x100, ..good },
            RawChunk { flags: 0, ..good },
            RawChunk {
                compressed_size: 0,
                ..good
            },
            RawChunk {
                compressed_size: u32::MAX,
                ..good
            },
            RawChunk {
                compressed_offset: u64::MAX,
                ..good
            },
            RawChunk {
                uncompressed_offset: u64::MAX - 4096,
                ..good
            },
            RawChunk {
                uncompressed_size: 0,
                ..good
            },
            RawChunk {
                uncompressed_size: MAX_CHUNK_SIZE + 1,
                ..good
            },
        ];
        for raw in bad {
            assert!(blobs().add(&raw).is_err(), "{raw:?}");
        }
        let mut known = blobs();
        known.add(&good).unwrap();
        assert!(
            known
                .add(&RawChunk {
                    digest: [8; 32],
                    ..good
                })
                .is_err()
        );
        known
            .add(&RawChunk {
                uncompressed_offset: good.uncompressed_offset + 4095,
                ..chunk(2)
            })
            .unwrap();
        assert!(matches!(known.finish(&mut []), Err(LoadError::Malformed { .. })));
    }
}
