//! Walking an image and building the [`Tree`], for both versions of the format.
//!
//! The walk is breadth first and does not recurse. Every byte of names, attributes and chunk lists that is taken in is
//! paid from a budget of twice the bootstrap's length: an honest image states each thing once, while a hostile one, of
//! which parts overlap, would otherwise take time and memory out of proportion.

use std::collections::{HashMap, VecDeque, hash_map};

use super::{
    ChunkRef, Entry, Ino, Inode, Kind, Kinds, LoadError, ROOT, Summary, Tree,
    blobs::{Blobs, RawChunk},
    error::Fault,
    tree::Xattr,
};

/// Far more than file systems in containers have; node ids of the store may rely on 24 bits.
const MAX_INODES: usize = 1 << 24;
/// Deeper than any path the kernel could be given.
const MAX_DEPTH: u32 = 4096;
const MAX_NAME: usize = 255;
const MAX_TARGET: usize = 4095;
const MAX_XATTR_VALUE: usize = 64 << 10;
/// What a directory entry takes in the bootstrap, without its name, at the least.
const ENTRY_COST: usize = 12;
/// What a reference to a chunk takes in the bootstrap at the least.
const CHUNK_COST: u64 = 8;

/// Attributes as the bootstrap states them.
#[derive(Debug, Clone, Copy)]
pub(super) struct Attributes {
    /// The same for all hard links to a file.
    pub(super) key: u64,
    pub(super) mode: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) size: u64,
    pub(super) mtime: i64,
    pub(super) mtime_nsec: u32,
    pub(super) rdev: u32,
}

/// Is given name and id of a directory entry.
pub(super) type EachEntry<'e, 'a> = &'e mut dyn FnMut(&'a [u8], u64) -> Result<(), Fault>;
/// Is given a prefix of the name, the rest of the name, and the value of an extended attribute.
pub(super) type EachXattr<'e, 'a> = &'e mut dyn FnMut(&str, &'a [u8], &'a [u8]) -> Result<(), Fault>;
/// Is given a chunk of a file.
pub(super) type EachChunk<'e> = &'e mut dyn FnMut(RawChunk) -> Result<(), Fault>;

/// A version of the format: how inodes and what belongs to them are found and decoded.
///
/// Callbacks end the iteration by an error, which is passed on.
pub(super) trait Format<'a> {
    /// A decoded inode.
    type Node: Copy;

    /// Id of the root directory.
    fn root(&self) -> u64;

    /// The inode with that id.
    fn node(&self, id: u64) -> Result<Self::Node, Fault>;

    /// Its attributes.
    fn attributes<'n>(&self, node: &'n Self::Node) -> &'n Attributes;

    /// Calls `each` with name and id of each entry of a directory. `.` and `..` may be among them.
    fn entries(&self, dir: &Self::Node, each: EachEntry<'_, 'a>) -> Result<(), Fault>;

    /// Target of a symbolic link.
    fn target(&self, link: &Self::Node) -> Result<&'a [u8], Fault>;

    /// Calls `each` with a prefix of the name, the name and the value of each extended attribute.
    fn xattrs(&self, node: &Self::Node, each: EachXattr<'_, 'a>) -> Result<(), Fault>;

    /// Calls `each` with the chunks of a regular file, which must be `count`.
    fn chunks(&self, file: &Self::Node, count: u64, each: EachChunk<'_>) -> Result<(), Fault>;
}

/// What the superblock says, for the walk.
pub(super) struct TreeInput {
    pub(super) bootstrap_len: u64,
    pub(super) chunk_size: u32,
    pub(super) explicit_owners: bool,
    pub(super) blobs: Blobs,
    /// Keys of files to be read ahead.
    pub(super) prefetch: Vec<u32>,
    pub(super) summary: Summary,
}

/// Walks the image and builds the tree.
pub(super) fn walk<'a, F: Format<'a>>(format: &F, plan: TreeInput) -> Result<Tree, LoadError> {
    let mut walk = Walk::new(format, plan);
    walk.root()?;
    while let Some(dir) = walk.queue.pop_front() {
        walk.directory(&dir)?;
    }
    walk.finish()
}

/// A directory of which the entries are still to be read.
struct Pending<N> {
    node: N,
    ino: Ino,
    depth: u32,
}

struct Walk<'f, 'a, F: Format<'a>> {
    format: &'f F,
    chunk_size: u64,
    explicit_owners: bool,
    budget: u64,
    queue: VecDeque<Pending<F::Node>>,
    known: HashMap<u64, Ino>,
    xattr_sets: HashMap<Vec<u8>, u32>,
    scratch: Vec<(&'a [u8], u64)>,
    blobs: Blobs,
    prefetch: Vec<u32>,
    tree: Tree,
}

impl<'f, 'a, F: Format<'a>> Walk<'f, 'a, F> {
    fn new(format: &'f F, plan: TreeInput) -> Self {
        let tree = Tree {
            inodes: Vec::new(),
            entries: Vec::new(),
            chunks: Vec::new(),
            xattr_ends: vec![0],
            xattrs: Vec::new(),
            arena: Vec::new(),
            blobs: Vec::new(),
            summary: plan.summary,
        };
        Self {
            format,
            chunk_size: u64::from(plan.chunk_size),
            explicit_owners: plan.explicit_owners,
            budget: plan.bootstrap_len.saturating_mul(2),
            queue: VecDeque::new(),
            known: HashMap::new(),
            xattr_sets: HashMap::new(),
            scratch: Vec::new(),
            blobs: plan.blobs,
            prefetch: plan.prefetch,
            tree,
        }
    }

    fn root(&mut self) -> Result<(), LoadError> {
        let mut begin = || {
            let node = self.format.node(self.format.root())?;
            match Kind::of_mode(self.format.attributes(&node).mode) {
                Some(Kind::Directory) => self.inode(&node, ROOT, 0).map(drop),
                _ => Err(Fault::malformed("the root is not a directory")),
            }
        };
        begin().map_err(|fault| fault.at(|| "/".to_owned()))
    }

    fn directory(&mut self, dir: &Pending<F::Node>) -> Result<(), LoadError> {
        let mut names = std::mem::take(&mut self.scratch);
        names.clear();
        let first = self.tree.entries.len();
        self.read_entries(&dir.node, &mut names)
            .map_err(|fault| fault.at(|| self.path(dir.ino)))?;
        let mut subdirectories = 0;
        let mut cost = 0;
        for &(name, id) in &names {
            let kind = self
                .entry(name, id, dir)
                .map_err(|fault| fault.at(|| format!("{}/{}", self.path(dir.ino), name.escape_ascii())))?;
            subdirectories += u32::from(kind == Kind::Directory);
            cost += (ENTRY_COST + name.len()) as u64;
        }
        if let Some(inode) = self.tree.inodes.get_mut(dir.ino as usize) {
            // Both fit: `entry` saw to the number of entries.
            inode.first = first as u32;
            inode.count = names.len() as u32;
            inode.nlink = 2 + subdirectories;
            inode.size = cost.next_multiple_of(4096).max(4096);
        }
        self.scratch = names;
        Ok(())
    }

    /// A directory's names, in order.
    fn read_entries(&mut self, node: &F::Node, names: &mut Vec<(&'a [u8], u64)>) -> Result<(), Fault> {
        let budget = &mut self.budget;
        self.format.entries(node, &mut |name, id| {
            charge(budget, (ENTRY_COST + name.len()) as u64)?;
            if !matches!(name, b"." | b"..") {
                check_name(name)?;
                names.push((name, id));
            }
            Ok(())
        })?;
        names.sort_unstable_by_key(|&(name, _)| name);
        match names.windows(2).find(|pair| matches!(pair, [(a, _), (b, _)] if a == b)) {
            Some([(name, _), ..]) => Err(Fault::Malformed(
                format!("two entries {:?}", name.escape_ascii()).into(),
            )),
            _ => Ok(()),
        }
    }

    /// Adds one entry, and the file it names unless it is known already.
    fn entry(&mut self, name: &'a [u8], id: u64, dir: &Pending<F::Node>) -> Result<Kind, Fault> {
        let node = self.format.node(id)?;
        let attributes = self.format.attributes(&node);
        let kind = Kind::of_mode(attributes.mode)
            .ok_or_else(|| Fault::Malformed(format!("file mode {:#o}", attributes.mode).into()))?;
        let ino = match self.known.get(&attributes.key) {
            Some(&ino) => self.link(ino, kind)?,
            None => self.inode(&node, dir.ino, dir.depth + 1)?,
        };
        let name_at = self.remember(name)?;
        if u32::try_from(self.tree.entries.len()).is_err() {
            return Err(Fault::TooLarge("the number of names"));
        }
        // `check_name` saw to the length.
        self.tree.entries.push(Entry {
            ino,
            name_at,
            name_len: name.len() as u8,
        });
        Ok(kind)
    }

    /// Another name of a known file.
    fn link(&mut self, ino: Ino, kind: Kind) -> Result<Ino, Fault> {
        let inode = self
            .tree
            .inodes
            .get_mut(ino as usize)
            .ok_or(Fault::malformed("an unknown inode"))?;
        if inode.kind() == Kind::Directory || kind == Kind::Directory {
            return Err(Fault::malformed("a directory with two parents"));
        }
        if inode.kind() != kind {
            return Err(Fault::malformed("hard links to one file differ in type"));
        }
        inode.nlink = inode.nlink.saturating_add(1);
        self.tree.summary.hard_links += 1;
        Ok(ino)
    }

    /// A file seen for the first time.
    fn inode(&mut self, node: &F::Node, parent: Ino, depth: u32) -> Result<Ino, Fault> {
        if self.tree.inodes.len() >= MAX_INODES {
            return Err(Fault::TooLarge("more than 16777216 files"));
        }
        let ino = self.tree.inodes.len() as Ino; // below MAX_INODES
        let attributes = *self.format.attributes(node);
        let kind = Kind::of_mode(attributes.mode).ok_or(Fault::malformed("no file type"))?;
        let (first, count, size) = match kind {
            Kind::Regular => self.file(node, attributes.size)?,
            Kind::Symlink => self.symlink(node)?,
            _ => (0, 0, 0),
        };
        let is_device = matches!(kind, Kind::CharDevice | Kind::BlockDevice);
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
            parent: if kind == Kind::Directory { parent } else { ROOT },
            xattrs: self.xattr_set(node)?,
        };
        self.known.insert(attributes.key, ino);
        count_kind(&mut self.tree.summary.kinds, kind);
        self.tree.inodes.push(inode);
        if kind == Kind::Directory {
            if depth > MAX_DEPTH {
                return Err(Fault::TooLarge("directories nested more than 4096 deep"));
            }
            self.queue.push_back(Pending {
                node: *node,
                ino,
                depth,
            });
        }
        Ok(ino)
    }

    /// A regular file's chunks: the first, their number, and the file's size.
    fn file(&mut self, node: &F::Node, size: u64) -> Result<(u32, u32, u64), Fault> {
        if i64::try_from(size).is_err() {
            return Err(Fault::malformed("the file's size is beyond 2^63"));
        }
        let count = size.div_ceil(self.chunk_size);
        charge(&mut self.budget, count.saturating_mul(CHUNK_COST))?;
        let first = self.tree.chunks.len();
        let (chunk_size, blobs, chunks) = (self.chunk_size, &mut self.blobs, &mut self.tree.chunks);
        let mut offset = 0;
        self.format.chunks(node, count, &mut |raw| {
            let expected = chunk_size.min(size.saturating_sub(offset));
            if u64::from(raw.uncompressed_size) != expected {
                let what = format!("a chunk of {} bytes where there are {expected}", raw.uncompressed_size);
                return Err(Fault::Malformed(what.into()));
            }
            if raw.file_offset.is_some_and(|stated| stated != offset) {
                return Err(Fault::malformed("chunks are out of order"));
            }
            chunks.push(blobs.add(&raw)?);
            offset += expected;
            Ok(())
        })?;
        if offset != size {
            return Err(Fault::malformed("chunks do not make up the file"));
        }
        self.tree.summary.file_bytes = self.tree.summary.file_bytes.saturating_add(size);
        let too_many = |_| Fault::TooLarge("the number of chunks");
        let first = u32::try_from(first).map_err(too_many)?;
        u32::try_from(self.tree.chunks.len()).map_err(too_many)?;
        Ok((first, u32::try_from(count).map_err(too_many)?, size))
    }

    /// A link's target: where it is, its length, and the length again as the file's size.
    fn symlink(&mut self, node: &F::Node) -> Result<(u32, u32, u64), Fault> {
        let target = self.format.target(node)?;
        charge(&mut self.budget, target.len() as u64)?;
        if !(1..=MAX_TARGET).contains(&target.len()) || target.contains(&0) {
            return Err(Fault::malformed("the link target is not 1 to 4095 bytes without NUL"));
        }
        // Checked just now: the length fits.
        Ok((self.remember(target)?, target.len() as u32, target.len() as u64))
    }

    /// Number of the set of extended attributes that `node` has.
    fn xattr_set(&mut self, node: &F::Node) -> Result<u32, Fault> {
        let mut set: Vec<(Vec<u8>, &[u8])> = Vec::new();
        let budget = &mut self.budget;
        self.format.xattrs(node, &mut |prefix, name, value| {
            // Even without a name it takes a few bytes.
            charge(budget, (4 + name.len() + value.len()) as u64)?;
            let name = [prefix.as_bytes(), name].concat();
            if !(1..=MAX_NAME).contains(&name.len()) || name.contains(&0) || value.len() > MAX_XATTR_VALUE {
                return Err(Fault::malformed(
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
            return Err(Fault::malformed("two extended attributes of the same name"));
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
            hash_map::Entry::Occupied(known) => return Ok(*known.get()),
            hash_map::Entry::Vacant(new) => new.insert(next),
        };
        for (name, value) in &set {
            let at = self.remember(name)?;
            self.remember(value)?;
            // Lengths as above.
            self.tree.xattrs.push(Xattr {
                at,
                value_len: value.len() as u32,
                name_len: name.len() as u8,
            });
        }
        let end = u32::try_from(self.tree.xattrs.len());
        self.tree
            .xattr_ends
            .push(end.map_err(|_| Fault::TooLarge("the number of extended attributes"))?);
        Ok(next)
    }

    /// Puts `bytes` into the arena and tells where.
    fn remember(&mut self, bytes: &[u8]) -> Result<u32, Fault> {
        let too_large = |_| Fault::TooLarge("names and attributes of more than 4 GiB");
        let at = u32::try_from(self.tree.arena.len()).map_err(too_large)?;
        self.tree.arena.extend_from_slice(bytes);
        u32::try_from(self.tree.arena.len()).map_err(too_large)?;
        Ok(at)
    }

    /// Path of a known directory, for messages.
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
            .filter_map(|key| self.known.get(&u64::from(*key)).copied());
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

fn charge(budget: &mut u64, cost: u64) -> Result<(), Fault> {
    let what = "its parts overlap: it states more than it has room for";
    *budget = budget.checked_sub(cost).ok_or(Fault::malformed(what))?;
    Ok(())
}

fn check_name(name: &[u8]) -> Result<(), Fault> {
    if (1..=MAX_NAME).contains(&name.len()) && !name.iter().any(|byte| matches!(byte, 0 | b'/')) {
        Ok(())
    } else {
        let shown = name.get(..MAX_NAME).unwrap_or(name).escape_ascii();
        Err(Fault::Malformed(format!("\"{shown}\" cannot be a file name").into()))
    }
}

fn count_kind(kinds: &mut Kinds, kind: Kind) {
    *match kind {
        Kind::Directory => &mut kinds.directories,
        Kind::Regular => &mut kinds.regular,
        Kind::Symlink => &mut kinds.symlinks,
        Kind::CharDevice => &mut kinds.char_devices,
        Kind::BlockDevice => &mut kinds.block_devices,
        Kind::Fifo => &mut kinds.fifos,
        Kind::Socket => &mut kinds.sockets,
    } += 1;
}

// 20 images stay in memory: nobody should make these larger unawares.
const _: () = assert!(size_of::<ChunkRef>() == 8 && size_of::<Entry>() == 12 && size_of::<Inode>() == 56);
