//! Interface of a file system, independent of FUSE.
//!
//! [`crate::store`] implements it, [`crate::fuse`] serves it to the kernel, and tests call it without a mount.

use std::{pin::Pin, time::Duration};

pub use rustix::io::Errno;

/// Id of a node, which is also the inode number that programs see. Must be below 2^32, because 32-bit programs cannot
/// `stat` larger ones.
pub type NodeId = u64;

/// The root of a mount (`FUSE_ROOT_ID`).
pub const ROOT: NodeId = 1;

/// A result that is available at once or must be awaited. Request threads await the latter elsewhere, so that slow
/// requests do not delay fast ones.
pub enum Answer<T> {
    /// Available now.
    Ready(Result<T, Errno>),
    /// Needs a registry or a disk.
    Pending(PendingResult<T>),
}

/// A result to be awaited.
pub type PendingResult<T> = Pin<Box<dyn Future<Output = Result<T, Errno>> + Send>>;

/// Result of a read.
pub enum ReadAnswer {
    /// The number of bytes in the buffer.
    Ready(Result<usize, Errno>),
    /// The bytes, to be awaited.
    Pending(PendingResult<Vec<u8>>),
}

/// Attributes of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attr {
    /// The node.
    pub node: NodeId,
    /// Type and permissions, as in `st_mode`.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Number of links.
    pub nlink: u32,
    /// Length in bytes.
    pub size: u64,
    /// Device number of a device node, in the kernel's 32-bit encoding.
    pub rdev: u32,
    /// Modification time, in seconds since 1970; possibly negative.
    pub mtime: i64,
    /// Nanoseconds of the modification time.
    pub mtime_nsec: u32,
}

/// Result of a look-up.
#[derive(Debug, Clone, Copy)]
pub struct Entry {
    /// Attributes of the node; `None` if the name does not exist and the kernel may cache that.
    pub attr: Option<Attr>,
    /// How long the kernel may cache the result.
    pub ttl: Duration,
}

/// An entry of a directory listing.
pub struct DirEntry<'a> {
    /// The name.
    pub name: &'a [u8],
    /// Attributes of the node.
    pub attr: Attr,
    /// Offset at which the listing continues after this entry.
    pub next: u64,
    /// How long the kernel may cache the entry.
    pub ttl: Duration,
}

/// Statistics for `statfs`.
#[derive(Debug, Clone, Copy, Default)]
pub struct FsStat {
    /// Total length of all files, in bytes.
    pub bytes: u64,
    /// Number of files.
    pub files: u64,
}

/// A read-only file system.
///
/// Methods must not block on a network; the futures they return may wait for it.
pub trait FileSystem: Send + Sync + 'static {
    /// What requests on `node` must wait for, if anything. The other methods expect that it has succeeded.
    fn prepare(&self, _node: NodeId) -> Option<PendingResult<()>> {
        None
    }

    /// Looks up `name` in `parent`. Adds a look-up to the returned node, which the kernel releases by [`Self::forget`].
    fn lookup(&self, parent: NodeId, name: &[u8]) -> Answer<Entry>;

    /// Removes `count` look-ups from the node, which the kernel has forgotten. Listings count as look-ups too.
    fn forget(&self, _node: NodeId, _count: u64) {}

    /// Attributes, and how long the kernel may cache them.
    fn attr(&self, node: NodeId) -> Result<(Attr, Duration), Errno>;

    /// Target of a symbolic link.
    fn readlink(&self, node: NodeId) -> Result<Vec<u8>, Errno>;

    /// Lists a directory from `offset` (0 or an entry's `next`) until `add` returns `false`.
    fn list(&self, dir: NodeId, offset: u64, add: &mut dyn FnMut(DirEntry<'_>) -> bool) -> Result<(), Errno>;

    /// Reads into `into`. Returns fewer bytes only at the end of the file.
    fn read(&self, file: NodeId, offset: u64, into: &mut [u8]) -> ReadAnswer;

    /// Value of an extended attribute.
    fn xattr(&self, node: NodeId, name: &[u8]) -> Result<Vec<u8>, Errno>;

    /// Names of all extended attributes, each terminated by a NUL.
    fn xattrs(&self, node: NodeId) -> Result<Vec<u8>, Errno>;

    /// Statistics for `statfs`.
    fn statfs(&self) -> FsStat;
}
