//! The tree in memory and the look-ups on it.

use std::{ops::Range, sync::Arc};

use super::{LoadError, Summary, load};
use crate::blob::layout::BlobLayout;

/// Number of an inode of one image: its index in the [`Tree`]. The same bootstrap always gives the same numbers.
pub type Ino = u32;

/// The root directory.
pub const ROOT: Ino = 0;

/// The type of a file, as in the upper bits of `st_mode`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
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

impl Kind {
    /// The type in `mode`, if it is one of the seven there are.
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

/// One file's attributes.
#[derive(Debug, Clone)]
pub struct Inode {
    /// `st_mode`: file type and permissions. The type is always one of [`Kind`].
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Links to the file found in the image; of a directory, 2 and one for each subdirectory.
    pub nlink: u32,
    /// Length in bytes, at most `i64::MAX`; of a symbolic link, of its target; of a directory, 4096 for each 4096 bytes
    /// of names begun.
    pub size: u64,
    /// Seconds since 1970; negative before.
    pub mtime: i64,
    /// Nanoseconds, 0 to 999,999,999.
    pub mtime_nsec: u32,
    /// `st_rdev`, its lower 32 bits; 0 unless a device.
    pub rdev: u32,
    /// By type: a directory's first entry, a regular file's first chunk, a link's target in the arena.
    pub(super) first: u32,
    /// By type: number of entries, of chunks, of bytes.
    pub(super) count: u32,
    /// A directory's parent.
    pub(super) parent: Ino,
    /// Index of the set of extended attributes; set 0 is empty.
    pub(super) xattrs: u32,
}

impl Inode {
    /// The type of the file.
    pub fn kind(&self) -> Kind {
        // The loader accepts no other mode, so the alternative is never taken.
        Kind::of_mode(self.mode).unwrap_or(Kind::Regular)
    }

    /// Whether it is a directory.
    pub fn is_dir(&self) -> bool {
        self.kind() == Kind::Directory
    }

    fn range(&self, kind: Kind) -> Range<usize> {
        // The end cannot overflow: all the arrays are shorter than 2^32 and ranges lie within them.
        if self.kind() == kind {
            self.first as usize..self.first as usize + self.count as usize
        } else {
            0..0
        }
    }
}

/// One name in a directory.
#[derive(Debug, Clone, Copy)]
pub struct Entry {
    /// What it names.
    pub ino: Ino,
    pub(super) name_at: u32,
    pub(super) name_len: u8,
}

/// Where a part of a file is kept.
///
/// Chunk `k` of a file covers its bytes from `k * chunk_size` to `min((k + 1) * chunk_size, size)`, exactly.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChunkRef {
    /// Position in [`Tree::blobs`].
    pub blob: u16,
    /// Position in [`BlobLayout::chunks`], which is not the chunk's number in the blob.
    pub chunk: u32,
}

/// One extended attribute: name and value lie side by side in the arena.
#[derive(Debug, Clone, Copy)]
pub(super) struct Xattr {
    pub(super) at: u32,
    pub(super) value_len: u32,
    pub(super) name_len: u8,
}

/// One image's files, without their contents.
#[derive(Debug)]
pub struct Tree {
    pub(super) inodes: Vec<Inode>,
    /// Each directory's entries in a row, by name.
    pub(super) entries: Vec<Entry>,
    pub(super) chunks: Vec<ChunkRef>,
    /// Ends of the sets of extended attributes in `xattrs`; a set begins where the one before it ends.
    pub(super) xattr_ends: Vec<u32>,
    /// Each set's attributes in a row, by name.
    pub(super) xattrs: Vec<Xattr>,
    /// All names, link targets, attribute names and values.
    pub(super) arena: Vec<u8>,
    pub(super) blobs: Vec<Arc<BlobLayout>>,
    pub(super) summary: Summary,
}

impl Tree {
    /// Reads a bootstrap. `bootstrap` may be a path like `/proc/self/fd/N`; its name has no meaning.
    ///
    /// The file is read whole and must not be larger than 1 GiB. Takes about 1 µs for each inode.
    pub fn load(bootstrap: &std::path::Path) -> Result<Self, LoadError> {
        load::load(bootstrap)
    }

    /// Attributes of `ino`.
    pub fn inode(&self, ino: Ino) -> Option<&Inode> {
        self.inodes.get(ino as usize)
    }

    /// Number of inodes; they are numbered from 0.
    pub fn len(&self) -> u32 {
        // At most MAX_INODES.
        self.inodes.len() as u32
    }

    /// Whether there is nothing, not even a root. Never so.
    pub fn is_empty(&self) -> bool {
        self.inodes.is_empty()
    }

    /// What `name` is in the directory `parent`. `.` and `..` are not found.
    pub fn lookup(&self, parent: Ino, name: &[u8]) -> Option<Ino> {
        let entries = self.entries(parent);
        let at = entries.binary_search_by(|entry| self.name(entry).cmp(name)).ok()?;
        entries.get(at).map(|entry| entry.ino)
    }

    /// The entries of a directory, without `.` and `..`, ordered by their names' bytes. Empty if `dir` is no directory.
    pub fn entries(&self, dir: Ino) -> &[Entry] {
        self.part(&self.entries, dir, Kind::Directory)
    }

    /// An entry's name: 1 to 255 bytes, without `/` and NUL.
    pub fn name(&self, entry: &Entry) -> &[u8] {
        self.arena_at(entry.name_at, u32::from(entry.name_len))
    }

    /// The directory that holds the directory `dir`; the root is its own parent. The root if `dir` is no directory.
    pub fn parent(&self, dir: Ino) -> Ino {
        self.inode(dir).map_or(ROOT, |inode| inode.parent)
    }

    /// The target of a symbolic link: 1 to 4095 bytes, without NUL.
    pub fn target(&self, ino: Ino) -> Option<&[u8]> {
        let inode = self.inode(ino).filter(|inode| inode.kind() == Kind::Symlink)?;
        Some(self.arena_at(inode.first, inode.count))
    }

    /// Extended attributes, name and value, ordered by name.
    pub fn xattrs(&self, ino: Ino) -> impl Iterator<Item = (&[u8], &[u8])> {
        self.xattr_set(ino).iter().map(|xattr| self.xattr_parts(xattr))
    }

    /// The value of the extended attribute `name`.
    pub fn xattr(&self, ino: Ino, name: &[u8]) -> Option<&[u8]> {
        let set = self.xattr_set(ino);
        let at = set.binary_search_by(|xattr| self.xattr_parts(xattr).0.cmp(name)).ok()?;
        set.get(at).map(|xattr| self.xattr_parts(xattr).1)
    }

    /// The path of `ino` from the root, for people; one of them if it has several. Looks through the whole tree.
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

    /// Where a regular file's bytes are, chunk by chunk. Empty for anything else.
    pub fn chunks(&self, ino: Ino) -> &[ChunkRef] {
        self.part(&self.chunks, ino, Kind::Regular)
    }

    /// The data blobs, in the bootstrap's order.
    pub fn blobs(&self) -> &[Arc<BlobLayout>] {
        &self.blobs
    }

    /// Length of a chunk of a file in bytes: a power of two, 4 KiB to 16 MiB.
    pub fn chunk_size(&self) -> u32 {
        self.summary.chunk_size
    }

    /// What the image is made of.
    pub fn summary(&self) -> &Summary {
        &self.summary
    }

    /// Number of files of all types, for `statfs`.
    pub fn total_files(&self) -> u64 {
        self.inodes.len() as u64
    }

    /// Bytes in all regular files together, for `statfs`.
    pub fn total_bytes(&self) -> u64 {
        self.summary.file_bytes
    }

    /// Bytes of memory the tree takes, blob layouts not counted.
    pub fn memory(&self) -> usize {
        size_of_val(&*self.inodes)
            + size_of_val(&*self.entries)
            + size_of_val(&*self.chunks)
            + size_of_val(&*self.xattr_ends)
            + size_of_val(&*self.xattrs)
            + self.arena.len()
    }

    fn part<'a, T>(&self, all: &'a [T], ino: Ino, kind: Kind) -> &'a [T] {
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
        // Name and value were put into the arena together, so the sum does not overflow.
        (
            self.arena_at(xattr.at, name_len),
            self.arena_at(xattr.at + name_len, xattr.value_len),
        )
    }
}
