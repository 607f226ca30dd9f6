//! RAFS images: one image's tree of files, read from its bootstrap.
//!
//! A bootstrap (RAFS version 5 or 6) is read once, by [`Tree::load`], into a compact immutable tree; nothing of the
//! file or of the nydus crates stays behind. Whatever is wrong with a bootstrap is found then and is a [`LoadError`].
//! Look-ups afterwards take no lock, cannot fail half-way and cost at most a binary search.
//!
//! Who does what: `nydus-rafs` reads and checks the superblock and the table of blobs, where features and algorithms
//! are told apart (`load`). Inodes, directories, attributes and chunks are decoded here (`v5`, `v6`), since
//! `nydus-rafs` walks them with assertions and unaligned pointers, and needs time without limit on hostile input. The
//! walk itself (`walk`) is the same for both versions.

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
mod fuzz;
#[cfg(test)]
mod hostile;
#[cfg(test)]
mod tests;

pub use error::LoadError;
pub use load::MAX_BOOTSTRAP;
pub use summary::{BlobSummary, Kinds, Summary};
pub use tree::{ChunkRef, Entry, Ino, Inode, Kind, ROOT, Tree};
