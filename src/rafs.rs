//! RAFS images: parses a bootstrap into the file tree of one image.
//!
//! [`Tree::load`] parses a bootstrap (RAFS version 5 or 6) once, into a compact immutable tree. The tree keeps nothing
//! of the file or of the nydus crates. Every defect of a bootstrap is found while loading and is a [`LoadError`].
//! Look-ups afterwards take no lock, cannot fail halfway and cost at most a binary search.
//!
//! `nydus-rafs` parses and checks the superblock and the blob table, which tell features and algorithms (`load`).
//! Inodes, directories, attributes and chunks are decoded here (`v5`, `v6`): `nydus-rafs` walks them with assertions
//! and unaligned pointers, and hostile input can make it run without a time limit. Both versions share the walk
//! (`walk`).

mod blobs;
mod bytes;
mod catch_panic;
mod error;
mod load;
mod summary;
mod tree;
mod v5;
mod v6;
mod walk;

#[cfg(test)]
mod damaged;
#[cfg(test)]
mod hostile;
#[cfg(test)]
mod tests;

pub use error::LoadError;
pub use load::MAX_BOOTSTRAP_BYTES;
pub use summary::{BootstrapSummary, FileCounts};
pub use tree::{ChunkRef, FileKind, Ino, Inode, ROOT, Tree, TreeEntry};
