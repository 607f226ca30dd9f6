//! Statistics of an image, for display.

use serde::Serialize;

use super::Ino;
use crate::blob::layout::Packing;

/// Statistics of an image.
#[derive(Debug, Clone, Default, Serialize)]
pub struct BootstrapSummary {
    /// RAFS version: 5 or 6.
    pub version: u8,
    /// Compression algorithm in the superblock. Blobs may differ, see [`BootstrapSummary::blobs`].
    pub compressor: String,
    /// Digest algorithm in the superblock.
    pub digester: String,
    /// Length of a chunk of a file, in bytes.
    pub chunk_size: u32,
    /// Flags of the superblock, by their nydus names.
    pub features: Vec<String>,
    /// Whether files have their own owners; otherwise all files belong to root.
    pub explicit_owners: bool,
    /// Length of the bootstrap, in bytes.
    pub bootstrap_size: u64,
    /// Files and directories that the image's builder listed for prefetching, in its order.
    pub prefetch: Vec<Ino>,
    /// Number of inodes by type.
    pub kinds: FileCounts,
    /// Number of hard links: names of files beyond the first one.
    pub hard_links: u64,
    /// Total length of all regular files, in bytes; each inode counts once.
    pub file_bytes: u64,
    /// Number of references from files to chunks.
    pub chunk_refs: u64,
    /// Number of different chunks that files refer to.
    pub chunks: u64,
    /// Total uncompressed length of these chunks, in bytes.
    pub chunk_bytes: u64,
    /// Number of different sets of extended attributes.
    pub xattr_sets: u64,
    /// The blobs, in the order of the bootstrap.
    pub blobs: Vec<BlobSummary>,
}

/// Number of inodes of each type.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct FileCounts {
    /// Directories, the root included.
    pub directories: u64,
    /// Regular files.
    pub regular: u64,
    /// Symbolic links.
    pub symlinks: u64,
    /// Character devices, including whiteouts.
    pub char_devices: u64,
    /// Block devices.
    pub block_devices: u64,
    /// Named pipes.
    pub fifos: u64,
    /// Sockets.
    pub sockets: u64,
}

/// Statistics of a blob.
#[derive(Debug, Clone, Serialize)]
pub struct BlobSummary {
    /// SHA-256 of the blob, in hexadecimal.
    pub id: String,
    /// Compression algorithm of the chunks.
    pub compressor: String,
    /// How chunks are packed: `chunk`, `batch` or `zran`.
    pub packing: &'static str,
    /// Features of the blob, by their nydus names.
    pub features: Vec<String>,
    /// Length of the blob in bytes; 0 if unknown.
    pub compressed_size: u64,
    /// Uncompressed length of the blob in bytes; 0 if unknown.
    pub uncompressed_size: u64,
    /// Number of chunks in the blob; 0 if unknown.
    pub chunk_count: u32,
    /// Number of chunks that this image uses.
    pub chunks_used: u64,
}

/// Display name of `packing`.
pub(super) const fn packing_name(packing: Packing) -> &'static str {
    match packing {
        Packing::PerChunk => "chunk",
        Packing::Batch => "batch",
        Packing::Zran => "zran",
    }
}

/// Splits the debug form of bitflags, `A | B`, into names.
pub(super) fn flag_names(flags: &impl std::fmt::Debug) -> Vec<String> {
    let text = format!("{flags:?}");
    text.split(" | ")
        .filter(|name| *name != "(empty)")
        .map(|name| name.trim_start_matches('_').to_owned())
        .collect()
}
