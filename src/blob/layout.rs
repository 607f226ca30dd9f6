//! What a bootstrap says of its data blobs: the location and digest of each chunk.

use nydus_utils::{compress, digest};

/// The largest uncompressed chunk a RAFS image may hold, in bytes (`RAFS_MAX_CHUNK_SIZE` in nydus-storage).
pub const MAX_CHUNK_SIZE: u32 = 16 << 20;
/// The greatest length of a compressed chunk, in bytes. It may be a little longer than the plain one; a much longer one
/// would only cost memory.
pub const MAX_COMPRESSED_SIZE: u32 = 2 * MAX_CHUNK_SIZE + (64 << 10);
/// The greatest offset, in bytes: the system takes an `off_t`.
pub const MAX_OFFSET: u64 = i64::MAX as u64;

/// One chunk of a data blob, as the bootstrap's chunk table describes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Chunk {
    /// Index of the chunk within its blob; below 2^24.
    pub index: u32,
    /// Digest of the uncompressed bytes, by [`BlobLayout::digester`].
    pub digest: [u8; 32],
    /// Where the stored bytes start in the blob. Meaningless in packed blobs ([`Packing`]).
    pub compressed_offset: u64,
    /// Length of the stored bytes. Meaningless in packed blobs.
    pub compressed_size: u32,
    /// Where the chunk starts in the uncompressed image of the blob.
    pub uncompressed_offset: u64,
    /// Length of the uncompressed bytes: 1 to [`MAX_CHUNK_SIZE`].
    pub uncompressed_size: u32,
    /// Whether the stored bytes are compressed. Builders store a chunk plain that would not shrink.
    pub compressed: bool,
}

/// How chunks are packed into the stored bytes of a blob.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Packing {
    /// Each chunk is compressed by itself.
    PerChunk,
    /// Small chunks are compressed together; the blob meta locates them.
    Batch,
    /// The blob is an ordinary gzip layer; the blob meta has its points of random access.
    Zran,
}

/// Where the blob meta (the compression context table) lies inside the blob itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct MetaLocation {
    /// Offset of the stored table; its 4 KiB header follows it.
    pub offset: u64,
    /// Stored length of the table, without the header.
    pub compressed_size: u64,
    /// Length of the table once decompressed.
    pub uncompressed_size: u64,
    /// How the table is compressed.
    pub compressor: compress::Algorithm,
}

/// A data blob and those of its chunks that one image uses.
#[derive(Debug, Clone)]
pub struct BlobLayout {
    /// SHA-256 of the blob in hexadecimal: the layer's digest without `sha256:`.
    pub id: String,
    /// How compressed chunks are compressed.
    pub compressor: compress::Algorithm,
    /// How chunks are hashed.
    pub digester: digest::Algorithm,
    /// How chunks are packed.
    pub packing: Packing,
    /// Whether the blob meta has chunk entries of the longer, second format. Packed blobs always do.
    pub meta_v2: bool,
    /// Where the blob meta is in the blob that holds it.
    pub meta: MetaLocation,
    /// The blob that holds the blob meta, if it is not this one: the id of the small blob that converters make beside
    /// an original gzip layer (`blob_meta_digest` in the blob table).
    pub meta_blob: Option<String>,
    /// Number of chunks in the whole blob, including those that this image does not use; 0 if the bootstrap does not
    /// say.
    pub chunk_count: u32,
    /// Length of the blob, in bytes, as the bootstrap gives it.
    pub compressed_size: u64,
    /// Length of the blob's uncompressed image, in bytes.
    pub uncompressed_size: u64,
    /// The chunks this image uses, ordered by index.
    pub chunks: Vec<Chunk>,
}

impl BlobLayout {
    /// Uncompressed bytes of the chunks that the image uses.
    pub fn chunk_bytes(&self) -> u64 {
        let sizes = self.chunks.iter().map(|chunk| chunk.uncompressed_size);
        sizes.map(u64::from).sum()
    }
}

#[cfg(test)]
impl BlobLayout {
    /// A blob of uncompressed chunks, each stored by itself and hashed by SHA-256.
    pub fn of_plain(chunks: Vec<Chunk>) -> Self {
        let sizes = chunks.iter().map(|chunk| u64::from(chunk.compressed_size));
        let ends = chunks
            .iter()
            .map(|chunk| chunk.uncompressed_offset + u64::from(chunk.uncompressed_size));
        Self {
            id: "ab".repeat(32),
            compressor: compress::Algorithm::None,
            digester: digest::Algorithm::Sha256,
            packing: Packing::PerChunk,
            meta_v2: true,
            meta: MetaLocation::default(),
            meta_blob: None,
            chunk_count: chunks.len() as u32,
            compressed_size: sizes.sum(),
            uncompressed_size: ends.max().unwrap_or(0),
            chunks,
        }
    }
}
