//! The file tree of an image in memory, and look-ups in it.

use std::{ops::Range, sync::Arc};

use super::BootstrapSummary;
use crate::blob::layout::BlobLayout;

/// Number of an inode: its index in the [`Tree`]. The same bootstrap always yields the same numbers.
pub type Ino = u32;

/// The root directory.
pub const ROOT: Ino = 0;

/// Type of a file, as in the upper bits of `st_mode`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FileKind {
    /// `S_IFDIR`
    Directory,
    /// `S_IFREG`
    Regular,
    /// `S_IFLNK`
    Symlink,
    /// `S_IFCHR`
    CharDevice,
    /// `S_IFBLK`
    BlockDevice,
    /// `S_IFIFO`
    Fifo,
    /// `S_IFSOCK`
    Socket,
}

impl FileKind {
    /// The type in `mode`; `None` if it is not one of these seven.
    pub const fn of_mode(mode: u32) -> Option<Self> {
        Some(match mode & libc::S_IFMT {
            libc::S_IFDIR => Self::Directory,
            libc::S_IFREG => Self::Regular,
            libc::S_IFLNK => Self::Symlink,
            libc::S_IFCHR => Self::CharDevice,
            libc::S_IFBLK => Self::BlockDevice,
            libc::S_IFIFO => Self::Fifo,
            libc::S_IFSOCK => Self::Socket,
            _ => return None,
        })
    }
}

/// Attributes of a file.
#[derive(Debug, Clone)]
pub struct Inode {
    /// `st_mode`: file type and permissions. The type is always one of [`FileKind`].
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Number of names in the image; for a directory, 2 plus the number of subdirectories.
    pub nlink: u32,
    /// Length in bytes, at most `i64::MAX`. For a symbolic link, the length of its target; for a directory, the length
    /// of its entries rounded up to 4096.
    pub size: u64,
    /// Seconds since 1970, possibly negative.
    pub mtime: i64,
    /// Nanoseconds, 0 to 999,999,999.
    pub mtime_nsec: u32,
    /// Lower 32 bits of `st_rdev`; 0 unless a device.
    pub rdev: u32,
    /// Depends on the type: first entry of a directory, first chunk of a regular file, offset of a link's target in the
    /// arena.
    pub(super) first: u32,
    /// Depends on the type: number of entries, of chunks, of bytes.
    pub(super) count: u32,
    /// Parent of a directory.
    pub(super) parent: Ino,
    /// Index of the set of extended attributes; set 0 is empty.
    pub(super) xattrs: u32,
}

impl Inode {
    /// The type of the file.
    pub fn kind(&self) -> FileKind {
        // The alternative is unreachable, because the loader rejects other modes.
        FileKind::of_mode(self.mode).unwrap_or(FileKind::Regular)
    }

    /// Whether this is a directory.
    pub fn is_dir(&self) -> bool {
        self.kind() == FileKind::Directory
    }

    fn range(&self, kind: FileKind) -> Range<usize> {
        // Cannot overflow: all arrays are shorter than 2^32 and ranges lie within them.
        if self.kind() == kind {
            self.first as usize..self.first as usize + self.count as usize
        } else {
            0..0
        }
    }
}

/// A directory entry.
#[derive(Debug, Clone, Copy)]
pub struct TreeEntry {
    /// The inode.
    pub ino: Ino,
    pub(super) name_at: u32,
    pub(super) name_len: u8,
}

/// A reference to a chunk of a file.
///
/// Chunk `k` of a file covers exactly the bytes from `k * chunk_size` to `min((k + 1) * chunk_size, size)`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChunkRef {
    /// Position in [`Tree::blobs`].
    pub blob: u16,
    /// Position in [`BlobLayout::chunks`]; not the chunk's number in the blob.
    pub chunk: u32,
}

/// An extended attribute. Its name and value are adjacent in the arena.
#[derive(Debug, Clone, Copy)]
pub(super) struct Xattr {
    pub(super) at: u32,
    pub(super) value_len: u32,
    pub(super) name_len: u8,
}

/// The files of one image, without their data.
#[derive(Debug)]
pub struct Tree {
    pub(super) inodes: Vec<Inode>,
    /// Entries of all directories; those of one directory are adjacent and ordered by name.
    pub(super) entries: Vec<TreeEntry>,
    pub(super) chunks: Vec<ChunkRef>,
    /// Ends of the sets of extended attributes in `xattrs`; each set begins where the previous one ends.
    pub(super) xattr_ends: Vec<u32>,
    /// Attributes of all sets; those of one set are adjacent and ordered by name.
    pub(super) xattrs: Vec<Xattr>,
    /// All names, link targets, attribute names and attribute values.
    pub(super) arena: Vec<u8>,
    pub(super) blobs: Vec<Arc<BlobLayout>>,
    pub(super) summary: BootstrapSummary,
}

impl Tree {
    /// Attributes of `ino`.
    pub fn inode(&self, ino: Ino) -> Option<&Inode> {
        self.inodes.get(ino as usize)
    }

    /// Number of inodes, which are numbered from 0.
    pub fn len(&self) -> u32 {
        // At most MAX_INODES.
        self.inodes.len() as u32
    }

    /// Always false: a tree has at least a root.
    pub fn is_empty(&self) -> bool {
        self.inodes.is_empty()
    }

    /// Looks up `name` in the directory `parent`. Does not find `.` and `..`.
    pub fn lookup(&self, parent: Ino, name: &[u8]) -> Option<Ino> {
        let entries = self.entries(parent);
        let at = entries.binary_search_by(|entry| self.name(entry).cmp(name)).ok()?;
        entries.get(at).map(|entry| entry.ino)
    }

    /// Entries of a directory without `.` and `..`, in byte order of their names. Empty if `dir` is not a directory.
    pub fn entries(&self, dir: Ino) -> &[TreeEntry] {
        self.part(&self.entries, dir, FileKind::Directory)
    }

    /// Name of an entry: 1 to 255 bytes, without `/` and NUL.
    pub fn name(&self, entry: &TreeEntry) -> &[u8] {
        self.arena_at(entry.name_at, u32::from(entry.name_len))
    }

    /// Parent of the directory `dir`. The root if `dir` is the root or not a directory.
    pub fn parent(&self, dir: Ino) -> Ino {
        self.inode(dir).map_or(ROOT, |inode| inode.parent)
    }

    /// Target of a symbolic link: 1 to 4095 bytes, without NUL.
    pub fn target(&self, ino: Ino) -> Option<&[u8]> {
        let inode = self.inode(ino).filter(|inode| inode.kind() == FileKind::Symlink)?;
        Some(self.arena_at(inode.first, inode.count))
    }

    /// Extended attributes (name, value), ordered by name.
    pub fn xattrs(&self, ino: Ino) -> impl Iterator<Item = (&[u8], &[u8])> {
        self.xattr_set(ino).iter().map(|xattr| self.xattr_parts(xattr))
    }

    /// Value of the extended attribute `name`.
    pub fn xattr(&self, ino: Ino, name: &[u8]) -> Option<&[u8]> {
        let set = self.xattr_set(ino);
        let at = set.binary_search_by(|xattr| self.xattr_parts(xattr).0.cmp(name)).ok()?;
        set.get(at).map(|xattr| self.xattr_parts(xattr).1)
    }

    /// A path of `ino` from the root, for display. Searches the whole tree.
    pub fn path(&self, ino: Ino) -> Option<String> {
        let mut path = String::new();
        let mut at = ino;
        while at != ROOT {
            let is_dir = self.inode(at)?.is_dir();
            let mut dirs = (0..self.len()).filter(|dir| !is_dir || *dir == self.parent(at));
            let (dir, entry) = dirs.find_map(|dir| {
                let entry = self.entries(dir).iter().find(|entry| entry.ino == at)?;
                Some((dir, entry))
            })?;
            path = format!("/{}{path}", String::from_utf8_lossy(self.name(entry)));
            at = dir;
        }
        Some(if path.is_empty() { "/".to_owned() } else { path })
    }

    /// The chunks of a regular file in order. Empty for other types.
    pub fn chunks(&self, ino: Ino) -> &[ChunkRef] {
        self.part(&self.chunks, ino, FileKind::Regular)
    }

    /// The data blobs, in the order of the bootstrap.
    pub fn blobs(&self) -> &[Arc<BlobLayout>] {
        &self.blobs
    }

    /// Length of a file's chunks in bytes: a power of two, 4 KiB to 16 MiB.
    pub fn chunk_size(&self) -> u32 {
        self.summary.chunk_size
    }

    /// Statistics of the image.
    pub fn summary(&self) -> &BootstrapSummary {
        &self.summary
    }

    /// Number of files of all types, for `statfs`.
    pub fn total_files(&self) -> u64 {
        self.inodes.len() as u64
    }

    /// Total length of all regular files in bytes, for `statfs`.
    pub fn total_bytes(&self) -> u64 {
        self.summary.file_bytes
    }

    /// Memory used by the tree in bytes, without the blob layouts.
    pub fn memory(&self) -> usize {
        size_of_val(&*self.inodes)
            + size_of_val(&*self.entries)
            + size_of_val(&*self.chunks)
            + size_of_val(&*self.xattr_ends)
            + size_of_val(&*self.xattrs)
            + self.arena.len()
    }

    fn part<'a, T>(&self, all: &'a [T], ino: Ino, kind: FileKind) -> &'a [T] {
        self.inode(ino)
            .and_then(|inode| all.get(inode.range(kind)))
            .unwrap_or_default()
    }

    fn arena_at(&self, at: u32, len: u32) -> &[u8] {
        self.arena
            .get(at as usize..at as usize + len as usize)
            .unwrap_or_default()
    }

    fn xattr_set(&self, ino: Ino) -> &[Xattr] {
        let Some(set) = self.inode(ino).map(|inode| inode.xattrs as usize) else {
            return &[];
        };
        let end = |set: usize| self.xattr_ends.get(set).map(|&end| end as usize);
        let begin = if set == 0 { Some(0) } else { end(set - 1) };
        match (begin, end(set)) {
            (Some(begin), Some(end)) => self.xattrs.get(begin..end).unwrap_or_default(),
            _ => &[],
        }
    }

    fn xattr_parts(&self, xattr: &Xattr) -> (&[u8], &[u8]) {
        let name_len = u32::from(xattr.name_len);
        // Name and value were added to the arena together, so the sum does not overflow.
        (
            self.arena_at(xattr.at, name_len),
            self.arena_at(xattr.at + name_len, xattr.value_len),
        )
    }
}
