//! What a file system of this program must be able to do, in words of its own and not of FUSE.
//!
//! [`crate::store`] implements it, tests drive it without a mount, and [`crate::fuse`] translates it for the kernel.

use std::{pin::Pin, time::Duration};

pub use rustix::io::Errno;

/// Names a node towards the kernel. It is also the inode number that programs see, so that it must be below 2^32: programs
/// of 32 bits cannot `stat` others.
pub type NodeId = u64;

/// The root of a mount (`FUSE_ROOT_ID`).
pub const ROOT: NodeId = 1;

/// An answer that is there at once, or one that must be waited for. Whoever serves requests waits for the latter
/// elsewhere, so that nothing slow holds up what is quick.
pub enum Answer<T> {
    /// Here it is.
    Ready(Result<T, Errno>),
    /// It takes a registry or a disk.
    Pending(Later<T>),
}

/// An answer to wait for.
pub type Later<T> = Pin<Box<dyn Future<Output = Result<T, Errno>> + Send>>;

/// The answer to a read.
pub enum ReadAnswer {
    /// The buffer was filled so far.
    Ready(Result<usize, Errno>),
    /// These will be the bytes.
    Pending(Later<Vec<u8>>),
}

/// Attributes of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attr {
    /// The node.
    pub node: NodeId,
    /// Type and permissions, as `st_mode`.
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
    /// Modification time: seconds since 1970, perhaps negative.
    pub mtime: i64,
    /// Nanoseconds of the modification time.
    pub mtime_nsec: u32,
}

/// A name that was looked up.
#[derive(Debug, Clone, Copy)]
pub struct Entry {
    /// What it names; `None` if there is no such name and the kernel may remember that.
    pub attr: Option<Attr>,
    /// How long the kernel may remember it.
    pub ttl: Duration,
}

/// An entry of a directory listing.
pub struct DirEntry<'a> {
    /// The name.
    pub name: &'a [u8],
    /// What it names.
    pub attr: Attr,
    /// Where to continue after it.
    pub next: u64,
    /// How long the kernel may remember it.
    pub ttl: Duration,
}

/// Numbers for `statfs`.
#[derive(Debug, Clone, Copy, Default)]
pub struct FsStat {
    /// Bytes of all files.
    pub bytes: u64,
    /// Number of files.
    pub files: u64,
}

/// A read-only file system.
///
/// No method but a returned future may block on a network.
pub trait FileSystem: Send + Sync + 'static {
    /// Looks `name` up in `parent`. A node that is given counts as known to the kernel until it is forgotten.
    fn lookup(&self, parent: NodeId, name: &[u8]) -> Answer<Entry>;

    /// The kernel knows the node once more: it was given in a listing.
    fn retain(&self, node: NodeId);

    /// The kernel has forgotten the node as often as `count`.
    fn forget(&self, node: NodeId, count: u64);

    /// Attributes, and how long they may be remembered.
    fn attr(&self, node: NodeId) -> Result<(Attr, Duration), Errno>;

    /// The target of a symbolic link.
    fn readlink(&self, node: NodeId) -> Result<Vec<u8>, Errno>;

    /// Lists a directory from `offset` (0, or an entry's `next`), until `add` says that it takes no more.
    fn list(&self, dir: NodeId, offset: u64, add: &mut dyn FnMut(DirEntry<'_>) -> bool) -> Result<(), Errno>;

    /// Reads into `into`; short only at the end of the file.
    fn read(&self, file: NodeId, offset: u64, into: &mut [u8]) -> ReadAnswer;

    /// The value of an extended attribute.
    fn xattr(&self, node: NodeId, name: &[u8]) -> Result<Vec<u8>, Errno>;

    /// The names of all extended attributes, each ended by a NUL.
    fn xattrs(&self, node: NodeId) -> Result<Vec<u8>, Errno>;

    /// Numbers for `statfs`.
    fn statfs(&self) -> FsStat;
}
