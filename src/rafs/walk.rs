//! Walks an image and builds the [`Tree`], for both versions of the format.
//!
//! The walk is breadth-first and does not recurse. Each byte of names, attributes and chunk lists is charged to a
//! budget of twice the bootstrap's length. A valid image states each thing once. A hostile one with overlapping parts
//! would otherwise take excessive time and memory.

use std::collections::{HashMap, VecDeque, hash_map};

use super::{
    BootstrapSummary, ChunkRef, FileCounts, FileKind, Ino, Inode, LoadError, ROOT, Tree, TreeEntry,
    blobs::{Blobs, RawChunk},
    error::FormatError,
    tree::Xattr,
};

/// Maximum number of inodes, far above what containers have. Node ids of the store may rely on 24 bits.
const MAX_INODES: usize = 1 << 24;
/// Maximum depth of directories. The kernel accepts no path of this depth.
const MAX_DEPTH: u32 = 4096;
const MAX_NAME_BYTES: usize = 255;
const MAX_TARGET_BYTES: usize = 4095;
const MAX_XATTR_VALUE_BYTES: usize = 64 << 10;
/// Minimum size of a directory entry in the bootstrap, without its name.
const MIN_ENTRY_BYTES: usize = 12;
/// Minimum size of a reference to a chunk in the bootstrap.
const MIN_CHUNK_REF_BYTES: u64 = 8;

/// Attributes as stated in the bootstrap.
#[derive(Debug, Clone, Copy)]
pub(super) struct Attributes {
    /// Equal for all hard links to a file.
    pub(super) key: u64,
    pub(super) mode: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) size: u64,
    pub(super) mtime: i64,
    pub(super) mtime_nsec: u32,
    pub(super) rdev: u32,
}

/// Receives name and id of a directory entry.
pub(super) type EachEntry<'e, 'a> = &'e mut dyn FnMut(&'a [u8], u64) -> Result<(), FormatError>;
/// Receives a prefix of the name, the rest of the name, and the value of an extended attribute.
pub(super) type EachXattr<'e, 'a> = &'e mut dyn FnMut(&str, &'a [u8], &'a [u8]) -> Result<(), FormatError>;
/// Receives a chunk of a file.
pub(super) type EachChunk<'e> = &'e mut dyn FnMut(RawChunk) -> Result<(), FormatError>;

/// Decoder of one version of the format.
///
/// If a callback returns an error, the iteration ends with this error.
pub(super) trait Format<'a> {
    /// A decoded inode.
    type RawInode: Copy;

    /// Id of the root directory.
    fn root(&self) -> u64;

    /// Decodes the inode with this id.
    fn node(&self, id: u64) -> Result<Self::RawInode, FormatError>;

    /// Attributes of the inode.
    fn attributes<'n>(&self, node: &'n Self::RawInode) -> &'n Attributes;

    /// Calls `each` with name and id of each entry of a directory. The entries may include `.` and `..`.
    fn entries(&self, dir: &Self::RawInode, each: EachEntry<'_, 'a>) -> Result<(), FormatError>;

    /// Target of a symbolic link.
    fn target(&self, link: &Self::RawInode) -> Result<&'a [u8], FormatError>;

    /// Calls `each` with prefix, name and value of each extended attribute.
    fn xattrs(&self, node: &Self::RawInode, each: EachXattr<'_, 'a>) -> Result<(), FormatError>;

    /// Calls `each` with the chunks of a regular file. Fails if there are not exactly `count`.
    fn chunks(&self, file: &Self::RawInode, count: u64, each: EachChunk<'_>) -> Result<(), FormatError>;
}

/// Data of the superblock for the walk.
pub(super) struct TreeInput {
    pub(super) bootstrap_len: u64,
    pub(super) chunk_size: u32,
    pub(super) explicit_owners: bool,
    pub(super) blobs: Blobs,
    /// Keys of the files to be prefetched.
    pub(super) prefetch: Vec<u32>,
    pub(super) summary: BootstrapSummary,
}

/// Walks the image and builds the tree.
pub(super) fn walk<'a, F: Format<'a>>(format: &F, input: TreeInput) -> Result<Tree, LoadError> {
    let mut walk = Walk::new(format, input);
    walk.add_root()?;
    while let Some(dir) = walk.queue.pop_front() {
        walk.add_directory(&dir)?;
    }
    walk.finish()
}

/// A directory whose entries have not been read yet.
struct PendingDir<N> {
    node: N,
    ino: Ino,
    depth: u32,
}

struct Walk<'f, 'a, F: Format<'a>> {
    format: &'f F,
    chunk_size: u64,
    explicit_owners: bool,
    budget: u64,
    queue: VecDeque<PendingDir<F::RawInode>>,
    inos_by_key: HashMap<u64, Ino>,
    xattr_sets: HashMap<Vec<u8>, u32>,
    scratch: Vec<(&'a [u8], u64)>,
    blobs: Blobs,
    prefetch: Vec<u32>,
    tree: Tree,
}

impl<'f, 'a, F: Format<'a>> Walk<'f, 'a, F> {
    fn new(format: &'f F, input: TreeInput) -> Self {
        let tree = Tree {
            inodes: Vec::new(),
            entries: Vec::new(),
            chunks: Vec::new(),
            xattr_ends: vec![0],
            xattrs: Vec::new(),
            arena: Vec::new(),
            blobs: Vec::new(),
            summary: input.summary,
        };
        Self {
            format,
            chunk_size: u64::from(input.chunk_size),
            explicit_owners: input.explicit_owners,
            budget: input.bootstrap_len.saturating_mul(2),
            queue: VecDeque::new(),
            inos_by_key: HashMap::new(),
            xattr_sets: HashMap::new(),
            scratch: Vec::new(),
            blobs: input.blobs,
            prefetch: input.prefetch,
            tree,
        }
    }

    fn add_root(&mut self) -> Result<(), LoadError> {
        let mut begin = || {
            let node = self.format.node(self.format.root())?;
            match FileKind::of_mode(self.format.attributes(&node).mode) {
                Some(FileKind::Directory) => self.add_inode(&node, ROOT, 0).map(drop),
                _ => Err(FormatError::malformed("the root is not a directory")),
            }
        };
        begin().map_err(|error| error.at(|| "/".to_owned()))
    }

    fn add_directory(&mut self, dir: &PendingDir<F::RawInode>) -> Result<(), LoadError> {
        let mut names = std::mem::take(&mut self.scratch);
        names.clear();
        let first = self.tree.entries.len();
        self.read_entries(&dir.node, &mut names)
            .map_err(|error| error.at(|| self.path(dir.ino)))?;
        let mut subdirectories = 0;
        let mut cost = 0;
        for &(name, id) in &names {
            let kind = self
                .add_entry(name, id, dir)
                .map_err(|error| error.at(|| format!("{}/{}", self.path(dir.ino), name.escape_ascii())))?;
            subdirectories += u32::from(kind == FileKind::Directory);
            cost += (MIN_ENTRY_BYTES + name.len()) as u64;
        }
        if let Some(inode) = self.tree.inodes.get_mut(dir.ino as usize) {
            // Both fit, because `entry` checked the number of entries.
            inode.first = first as u32;
            inode.count = names.len() as u32;
            inode.nlink = 2 + subdirectories;
            inode.size = cost.next_multiple_of(4096).max(4096);
        }
        self.scratch = names;
        Ok(())
    }

    /// Names and ids of the entries of a directory, ordered by name.
    fn read_entries(&mut self, node: &F::RawInode, names: &mut Vec<(&'a [u8], u64)>) -> Result<(), FormatError> {
        let budget = &mut self.budget;
        self.format.entries(node, &mut |name, id| {
            charge(budget, (MIN_ENTRY_BYTES + name.len()) as u64)?;
            if !matches!(name, b"." | b"..") {
                check_name(name)?;
                names.push((name, id));
            }
            Ok(())
        })?;
        names.sort_unstable_by_key(|&(name, _)| name);
        match names.windows(2).find(|pair| matches!(pair, [(a, _), (b, _)] if a == b)) {
            Some([(name, _), ..]) => Err(FormatError::Malformed(
                format!("two entries {:?}", name.escape_ascii()).into(),
            )),
            _ => Ok(()),
        }
    }

    /// Adds an entry, and the file unless it is known already.
    fn add_entry(&mut self, name: &'a [u8], id: u64, dir: &PendingDir<F::RawInode>) -> Result<FileKind, FormatError> {
        let node = self.format.node(id)?;
        let attributes = self.format.attributes(&node);
        let kind = FileKind::of_mode(attributes.mode)
            .ok_or_else(|| FormatError::Malformed(format!("file mode {:#o}", attributes.mode).into()))?;
        let ino = match self.inos_by_key.get(&attributes.key) {
            Some(&ino) => self.add_link(ino, kind)?,
            None => self.add_inode(&node, dir.ino, dir.depth + 1)?,
        };
        let name_at = self.append_to_arena(name)?;
        if u32::try_from(self.tree.entries.len()).is_err() {
            return Err(FormatError::TooLarge("the number of names"));
        }
        // `check_name` checked the length.
        self.tree.entries.push(TreeEntry {
            ino,
            name_at,
            name_len: name.len() as u8,
        });
        Ok(kind)
    }

    /// Adds another name of a known file.
    fn add_link(&mut self, ino: Ino, kind: FileKind) -> Result<Ino, FormatError> {
        let inode = self
            .tree
            .inodes
            .get_mut(ino as usize)
            .ok_or(FormatError::malformed("an unknown inode"))?;
        if inode.kind() == FileKind::Directory || kind == FileKind::Directory {
            return Err(FormatError::malformed("a directory with two parents"));
        }
        if inode.kind() != kind {
            return Err(FormatError::malformed("hard links to one file differ in type"));
        }
        inode.nlink = inode.nlink.saturating_add(1);
        self.tree.summary.hard_links += 1;
        Ok(ino)
    }

    /// Adds a file that is seen for the first time.
    fn add_inode(&mut self, node: &F::RawInode, parent: Ino, depth: u32) -> Result<Ino, FormatError> {
        if self.tree.inodes.len() >= MAX_INODES {
            return Err(FormatError::TooLarge("more than 16777216 files"));
        }
        let ino = self.tree.inodes.len() as Ino; // below MAX_INODES
        let attributes = *self.format.attributes(node);
        let kind = FileKind::of_mode(attributes.mode).ok_or(FormatError::malformed("no file type"))?;
        let (first, count, size) = match kind {
            FileKind::Regular => self.add_chunks(node, attributes.size)?,
            FileKind::Symlink => self.add_target(node)?,
            _ => (0, 0, 0),
        };
        let is_device = matches!(kind, FileKind::CharDevice | FileKind::BlockDevice);
        let inode = Inode {
            mode: attributes.mode & (libc::S_IFMT | 0o7777),
            uid: if self.explicit_owners { attributes.uid } else { 0 },
            gid: if self.explicit_owners { attributes.gid } else { 0 },
            nlink: 1,
            size,
            mtime: attributes.mtime,
            mtime_nsec: attributes.mtime_nsec.min(999_999_999),
            rdev: if is_device { attributes.rdev } else { 0 },
            first,
            count,
            parent: if kind == FileKind::Directory { parent } else { ROOT },
            xattrs: self.add_xattr_set(node)?,
        };
        self.inos_by_key.insert(attributes.key, ino);
        count_kind(&mut self.tree.summary.kinds, kind);
        self.tree.inodes.push(inode);
        if kind == FileKind::Directory {
            if depth > MAX_DEPTH {
                return Err(FormatError::TooLarge("directories nested more than 4096 deep"));
            }
            self.queue.push_back(PendingDir {
                node: *node,
                ino,
                depth,
            });
        }
        Ok(ino)
    }

    /// Adds the chunks of a regular file. Returns the index of the first one, their number, and the length of the file.
    fn add_chunks(&mut self, node: &F::RawInode, size: u64) -> Result<(u32, u32, u64), FormatError> {
        if i64::try_from(size).is_err() {
            return Err(FormatError::malformed("the file's size is beyond 2^63"));
        }
        let count = size.div_ceil(self.chunk_size);
        charge(&mut self.budget, count.saturating_mul(MIN_CHUNK_REF_BYTES))?;
        let first = self.tree.chunks.len();
        let (chunk_size, blobs, chunks) = (self.chunk_size, &mut self.blobs, &mut self.tree.chunks);
        let mut offset = 0;
        self.format.chunks(node, count, &mut |raw| {
            let expected = chunk_size.min(size.saturating_sub(offset));
            if u64::from(raw.uncompressed_size) != expected {
                let what = format!("a chunk of {} bytes instead of {expected}", raw.uncompressed_size);
                return Err(FormatError::Malformed(what.into()));
            }
            if raw.file_offset.is_some_and(|stated| stated != offset) {
                return Err(FormatError::malformed("chunks are out of order"));
            }
            chunks.push(blobs.add(&raw)?);
            offset += expected;
            Ok(())
        })?;
        if offset != size {
            return Err(FormatError::malformed("chunks do not make up the file"));
        }
        self.tree.summary.file_bytes = self.tree.summary.file_bytes.saturating_add(size);
        let too_many = |_| FormatError::TooLarge("the number of chunks");
        let first = u32::try_from(first).map_err(too_many)?;
        u32::try_from(self.tree.chunks.len()).map_err(too_many)?;
        Ok((first, u32::try_from(count).map_err(too_many)?, size))
    }

    /// Adds the target of a link. Returns its offset, its length, and the length as that of the file.
    fn add_target(&mut self, node: &F::RawInode) -> Result<(u32, u32, u64), FormatError> {
        let target = self.format.target(node)?;
        charge(&mut self.budget, target.len() as u64)?;
        if !(1..=MAX_TARGET_BYTES).contains(&target.len()) || target.contains(&0) {
            return Err(FormatError::malformed(
                "the link target is not 1 to 4095 bytes without NUL",
            ));
        }
        // The length was checked above.
        Ok((self.append_to_arena(target)?, target.len() as u32, target.len() as u64))
    }

    /// Index of the set of extended attributes of `node`.
    fn add_xattr_set(&mut self, node: &F::RawInode) -> Result<u32, FormatError> {
        let mut set: Vec<(Vec<u8>, &[u8])> = Vec::new();
        let budget = &mut self.budget;
        self.format.xattrs(node, &mut |prefix, name, value| {
            // Charges a few bytes even for an empty attribute.
            charge(budget, (4 + name.len() + value.len()) as u64)?;
            let name = [prefix.as_bytes(), name].concat();
            if !(1..=MAX_NAME_BYTES).contains(&name.len()) || name.contains(&0) || value.len() > MAX_XATTR_VALUE_BYTES {
                return Err(FormatError::malformed(
                    "an extended attribute's name or value is out of range",
                ));
            }
            set.push((name, value));
            Ok(())
        })?;
        if set.is_empty() {
            return Ok(0);
        }
        set.sort_unstable();
        if set.windows(2).any(|pair| matches!(pair, [(a, _), (b, _)] if a == b)) {
            return Err(FormatError::malformed("two extended attributes of the same name"));
        }
        let mut image = Vec::new();
        for (name, value) in &set {
            image.extend_from_slice(&[name.len() as u8]); // at most MAX_NAME
            image.extend_from_slice(&(value.len() as u32).to_le_bytes()); // at most MAX_XATTR_VALUE
            image.extend_from_slice(name);
            image.extend_from_slice(value);
        }
        let next = self.tree.xattr_ends.len() as u32; // no more than there are inodes, and one
        match self.xattr_sets.entry(image) {
            hash_map::Entry::Occupied(inos_by_key) => return Ok(*inos_by_key.get()),
            hash_map::Entry::Vacant(new) => new.insert(next),
        };
        for (name, value) in &set {
            let at = self.append_to_arena(name)?;
            self.append_to_arena(value)?;
            // The lengths were checked above.
            self.tree.xattrs.push(Xattr {
                at,
                value_len: value.len() as u32,
                name_len: name.len() as u8,
            });
        }
        let end = u32::try_from(self.tree.xattrs.len());
        self.tree
            .xattr_ends
            .push(end.map_err(|_| FormatError::TooLarge("the number of extended attributes"))?);
        Ok(next)
    }

    /// Appends `bytes` to the arena and returns the offset.
    fn append_to_arena(&mut self, bytes: &[u8]) -> Result<u32, FormatError> {
        let too_large = |_| FormatError::TooLarge("names and attributes of more than 4 GiB");
        let at = u32::try_from(self.tree.arena.len()).map_err(too_large)?;
        self.tree.arena.extend_from_slice(bytes);
        u32::try_from(self.tree.arena.len()).map_err(too_large)?;
        Ok(at)
    }

    /// Path of a known directory, for error messages.
    fn path(&self, mut dir: Ino) -> String {
        let mut names = Vec::new();
        while dir != ROOT {
            let parent = self.tree.parent(dir);
            let entry = self.tree.entries(parent).iter().find(|entry| entry.ino == dir);
            names.push(entry.map_or_else(
                || "?".to_owned(),
                |entry| self.tree.name(entry).escape_ascii().to_string(),
            ));
            dir = parent;
        }
        names.iter().rev().fold(String::new(), |path, name| path + "/" + name)
    }

    fn finish(self) -> Result<Tree, LoadError> {
        let mut tree = self.tree;
        (tree.blobs, tree.summary.blobs) = self.blobs.finish(&mut tree.chunks)?;
        let mut listed = std::collections::HashSet::new();
        let wanted = self
            .prefetch
            .iter()
            .filter_map(|key| self.inos_by_key.get(&u64::from(*key)).copied());
        tree.summary.prefetch = wanted.filter(|ino| listed.insert(*ino)).collect();
        tree.summary.chunk_refs = tree.chunks.len() as u64;
        tree.summary.xattr_sets = tree.xattr_ends.len() as u64 - 1;
        let used = tree.blobs.iter().flat_map(|blob| &blob.chunks);
        (tree.summary.chunks, tree.summary.chunk_bytes) = used.fold((0, 0), |(count, bytes), chunk| {
            (count + 1, bytes + u64::from(chunk.uncompressed_size))
        });
        tree.inodes.shrink_to_fit();
        tree.entries.shrink_to_fit();
        tree.chunks.shrink_to_fit();
        tree.xattr_ends.shrink_to_fit();
        tree.xattrs.shrink_to_fit();
        tree.arena.shrink_to_fit();
        Ok(tree)
    }
}

fn charge(budget: &mut u64, cost: u64) -> Result<(), FormatError> {
    let what = "parts overlap: there is more content than the bootstrap has room for";
    *budget = budget.checked_sub(cost).ok_or(FormatError::malformed(what))?;
    Ok(())
}

fn check_name(name: &[u8]) -> Result<(), FormatError> {
    if (1..=MAX_NAME_BYTES).contains(&name.len()) && !name.iter().any(|byte| matches!(byte, 0 | b'/')) {
        Ok(())
    } else {
        let shown = name.get(..MAX_NAME_BYTES).unwrap_or(name).escape_ascii();
        Err(FormatError::Malformed(
            format!("\"{shown}\" cannot be a file name").into(),
        ))
    }
}

fn count_kind(kinds: &mut FileCounts, kind: FileKind) {
    *match kind {
        FileKind::Directory => &mut kinds.directories,
        FileKind::Regular => &mut kinds.regular,
        FileKind::Symlink => &mut kinds.symlinks,
        FileKind::CharDevice => &mut kinds.char_devices,
        FileKind::BlockDevice => &mut kinds.block_devices,
        FileKind::Fifo => &mut kinds.fifos,
        FileKind::Socket => &mut kinds.sockets,
    } += 1;
}

// Guards against accidental growth: trees of many images stay in memory.
const _: () = assert!(size_of::<ChunkRef>() == 8 && size_of::<TreeEntry>() == 12 && size_of::<Inode>() == 56);
