//! What an image is made of, for people.

use serde::Serialize;

use super::Ino;
use crate::blob::layout::Packing;

/// What an image is made of.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Summary {
    /// RAFS version: 5 or 6.
    pub version: u8,
    /// How chunks are compressed, by the superblock. Blobs may differ, see [`Summary::blobs`].
    pub compressor: String,
    /// How chunks are hashed, by the superblock.
    pub digester: String,
    /// Length of a chunk of a file, in bytes.
    pub chunk_size: u32,
    /// The superblock's flags, by nydus' names.
    pub features: Vec<String>,
    /// Whether files have their own owners; without, all belong to root.
    pub explicit_owners: bool,
    /// Length of the bootstrap, in bytes.
    pub bootstrap_size: u64,
    /// Files and directories the image's builder wished to be read ahead, in its order.
    pub prefetch: Vec<Ino>,
    /// Number of inodes by type.
    pub kinds: Kinds,
    /// Names of files beyond the first of each.
    pub hard_links: u64,
    /// Bytes in all regular files together, each counted once.
    pub file_bytes: u64,
    /// Chunks that files refer to, with repetition.
    pub chunk_refs: u64,
    /// Chunks that files refer to, without repetition.
    pub chunks: u64,
    /// Uncompressed bytes of the chunks without repetition.
    pub chunk_bytes: u64,
    /// Different sets of extended attributes.
    pub xattr_sets: u64,
    /// The blobs, in the bootstrap's order.
    pub blobs: Vec<BlobSummary>,
}

/// Number of inodes of each type.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Kinds {
    /// Directories, the root included.
    pub directories: u64,
    /// Regular files.
    pub regular: u64,
    /// Symbolic links.
    pub symlinks: u64,
    /// Character devices; whiteouts are among them, if any.
    pub char_devices: u64,
    /// Block devices.
    pub block_devices: u64,
    /// Named pipes.
    pub fifos: u64,
    /// Sockets.
    pub sockets: u64,
}

/// A blob, for people.
#[derive(Debug, Clone, Serialize)]
pub struct BlobSummary {
    /// SHA-256 of the blob in hexadecimal.
    pub id: String,
    /// How chunks are compressed.
    pub compressor: String,
    /// `chunk`, `batch` or `zran`: how chunks are laid out.
    pub packing: &'static str,
    /// The blob's features, by nydus' names.
    pub features: Vec<String>,
    /// Length of the blob in bytes; 0 if the bootstrap does not say.
    pub compressed_size: u64,
    /// Length of the blob's uncompressed image in bytes; 0 if the bootstrap does not say.
    pub uncompressed_size: u64,
    /// Number of chunks in the blob; 0 if the bootstrap does not say.
    pub chunk_count: u32,
    /// Number of chunks this image uses.
    pub chunks_used: u64,
}

/// The word for `packing`.
pub(super) const fn packing_name(packing: Packing) -> &'static str {
    match packing {
        Packing::PerChunk => "chunk",
        Packing::Batch => "batch",
        Packing::Zran => "zran",
    }
}

/// `A | B` as bitflags print themselves, to names.
pub(super) fn flag_names(flags: &impl std::fmt::Debug) -> Vec<String> {
    let text = format!("{flags:?}");
    text.split(" | ")
        .filter(|name| *name != "(empty)")
        .map(|name| name.trim_start_matches('_').to_owned())
        .collect()
}
