//! [`Disk`]: what is certainly on disk, and what may be, after each step of a recording.

use std::{
    collections::{BTreeMap, HashMap},
    fs,
    path::Path,
    sync::Arc,
};

use nydus_store::fixtures::content::Random;

use super::recording::Change;

/// Unit in which a file system writes data.
const PAGE: u64 = 4096;
/// Unit that a disk writes as a whole.
const SECTOR: u64 = 512;

/// What of the changes after the last sync survives a power cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Survival {
    /// Nothing.
    Synced,
    /// All of it.
    Everything,
    /// Names, and no data: new files are empty.
    Names,
    /// Names and lengths: data beyond the old length reads as zeros (delayed allocation).
    Lengths,
    /// In each directory, the first of the changes. Of each page of a file, the first of its writes; some length that
    /// the file had.
    Pages,
    /// The same for each sector.
    Sectors,
}

/// What is left of a file or directory.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Remains {
    File(Vec<u8>),
    Dir(BTreeMap<String, Remains>),
}

/// Files and directories, with the changes that no sync has covered.
pub struct Disk {
    inodes: Vec<Inode>,
}

#[derive(Default)]
struct Inode {
    content: Content,
    /// Number of changes that were made durable.
    durable_changes: usize,
    /// Changes since then.
    pending: Vec<Pending>,
    /// For each running sync, the number of changes that it covers.
    syncs: HashMap<usize, usize>,
}

/// What is durable.
enum Content {
    File(Vec<u8>),
    Dir {
        durable: BTreeMap<String, usize>,
        /// As programs see it.
        current: BTreeMap<String, usize>,
    },
}

impl Default for Content {
    fn default() -> Self {
        Self::File(Vec::new())
    }
}

#[derive(Clone)]
enum Pending {
    Write {
        offset: u64,
        bytes: Arc<[u8]>,
    },
    Truncate(u64),
    Extend(u64),
    Punch {
        offset: u64,
        len: u64,
    },
    /// Names that change together, and what they name afterwards.
    Names(Vec<(String, Option<usize>)>),
}

impl Disk {
    /// An empty directory.
    pub fn new() -> Self {
        Self {
            inodes: vec![Inode::dir()],
        }
    }

    /// Applies a step of the recording.
    pub fn apply(&mut self, change: &Change) {
        match change {
            Change::Open { path, is_truncated } => match self.find(path) {
                Some(file) if *is_truncated => self.inodes[file].pending.push(Pending::Truncate(0)),
                Some(_) => {}
                None => _ = self.create(path, Inode::default()),
            },
            Change::Write { path, offset, bytes } => {
                let write = Pending::Write {
                    offset: *offset,
                    bytes: Arc::clone(bytes),
                };
                self.file(path).pending.push(write);
            }
            Change::Truncate { path, len } => self.file(path).pending.push(Pending::Truncate(*len)),
            Change::Extend { path, len } => self.file(path).pending.push(Pending::Extend(*len)),
            Change::Punch { path, offset, len } => {
                let punch = Pending::Punch {
                    offset: *offset,
                    len: *len,
                };
                self.file(path).pending.push(punch);
            }
            Change::Rename { from, to } => self.rename(from, to),
            Change::Link { from, to } => {
                let file = self.find(from).unwrap();
                self.set_names(to, vec![(name_of(to), Some(file))]);
            }
            // Sockets are not recorded.
            Change::Remove { path } if self.find(path).is_none() => assert!(path.ends_with(".sock"), "{path}"),
            Change::Remove { path } => self.set_names(path, vec![(name_of(path), None)]),
            Change::MakeDir { path } => _ = self.create(path, Inode::dir()),
            Change::BeginSync { path, number } => {
                let inode = self.file(path);
                inode.syncs.insert(*number, inode.durable_changes + inode.pending.len());
            }
            Change::EndSync { path, number } => self.file(path).end_sync(*number),
        }
    }

    /// What a power cut leaves of the directory.
    pub fn cut(&self, survival: Survival, random: &mut Random) -> Remains {
        self.remains(0, survival, random)
    }

    fn remains(&self, inode: usize, survival: Survival, random: &mut Random) -> Remains {
        let inode = &self.inodes[inode];
        match &inode.content {
            Content::File(durable) => Remains::File(file_remains(durable, &inode.pending, survival, random)),
            Content::Dir { durable, .. } => {
                let count = match survival {
                    Survival::Synced => 0,
                    Survival::Everything | Survival::Names | Survival::Lengths => inode.pending.len(),
                    Survival::Pages | Survival::Sectors => random.below(inode.pending.len() as u64 + 1) as usize,
                };
                let mut names = durable.clone();
                inode.pending[..count]
                    .iter()
                    .for_each(|change| change.apply_to_names(&mut names));
                let entry = |(name, inode)| (name, self.remains(inode, survival, random));
                Remains::Dir(names.into_iter().map(entry).collect())
            }
        }
    }

    fn find(&self, path: &str) -> Option<usize> {
        path.split('/')
            .filter(|name| !name.is_empty())
            .try_fold(0, |dir, name| match &self.inodes[dir].content {
                Content::Dir { current, .. } => current.get(name).copied(),
                Content::File(_) => None,
            })
    }

    fn file(&mut self, path: &str) -> &mut Inode {
        let inode = self.find(path).unwrap_or_else(|| panic!("{path} does not exist"));
        &mut self.inodes[inode]
    }

    fn create(&mut self, path: &str, inode: Inode) -> usize {
        self.inodes.push(inode);
        let new = self.inodes.len() - 1;
        self.set_names(path, vec![(name_of(path), Some(new))]);
        new
    }

    fn rename(&mut self, from: &str, to: &str) {
        let moved = self.find(from).unwrap_or_else(|| panic!("{from} does not exist"));
        let (remove, add) = ((name_of(from), None), (name_of(to), Some(moved)));
        if parent_of(from) == parent_of(to) {
            self.set_names(to, vec![remove, add]);
        } else {
            // Stricter than a file system, which changes both directories together.
            self.set_names(to, vec![add]);
            self.set_names(from, vec![remove]);
        }
    }

    /// Changes names in the directory of `path`.
    fn set_names(&mut self, path: &str, names: Vec<(String, Option<usize>)>) {
        let change = Pending::Names(names);
        let dir = self.file(parent_of(path));
        if let Content::Dir { current, .. } = &mut dir.content {
            change.apply_to_names(current);
        }
        dir.pending.push(change);
    }
}

impl Inode {
    fn dir() -> Self {
        let content = Content::Dir {
            durable: BTreeMap::new(),
            current: BTreeMap::new(),
        };
        Self {
            content,
            ..Self::default()
        }
    }

    fn end_sync(&mut self, number: usize) {
        let covered = self.syncs.remove(&number).expect("the sync has begun");
        let covered = covered.saturating_sub(self.durable_changes);
        self.durable_changes += covered;
        for change in self.pending.drain(..covered) {
            match &mut self.content {
                Content::File(bytes) => change.apply_to_file(bytes),
                Content::Dir { durable, .. } => change.apply_to_names(durable),
            }
        }
    }
}

impl Pending {
    fn apply_to_names(&self, names: &mut BTreeMap<String, usize>) {
        let Self::Names(changes) = self else {
            panic!("a write to a directory")
        };
        for (name, inode) in changes {
            match inode {
                Some(inode) => names.insert(name.clone(), *inode),
                None => names.remove(name),
            };
        }
    }

    fn apply_to_file(&self, bytes: &mut Vec<u8>) {
        bytes.resize(self.len_after(bytes.len()), 0);
        if let Some((range, written)) = self.data() {
            let end = range.end.min(bytes.len());
            let changed = &mut bytes[range.start.min(end)..end];
            match written {
                Some(written) => changed.copy_from_slice(written),
                None => changed.fill(0),
            }
        }
    }

    /// Length of a file of `len` bytes after the change.
    fn len_after(&self, len: usize) -> usize {
        match self {
            Self::Write { offset, bytes } => len.max(*offset as usize + bytes.len()),
            Self::Truncate(new) => *new as usize,
            Self::Extend(new) => len.max(*new as usize),
            Self::Punch { .. } | Self::Names(_) => len,
        }
    }

    /// The changed range of a file, with its new bytes; `None` instead of them for zeros.
    fn data(&self) -> Option<(std::ops::Range<usize>, Option<&[u8]>)> {
        match self {
            Self::Write { offset, bytes } => {
                let start = *offset as usize;
                Some((start..start + bytes.len(), Some(bytes)))
            }
            Self::Punch { offset, len } => Some((*offset as usize..(*offset + *len) as usize, None)),
            Self::Truncate(_) | Self::Extend(_) | Self::Names(_) => None,
        }
    }
}

fn file_remains(durable: &[u8], pending: &[Pending], survival: Survival, random: &mut Random) -> Vec<u8> {
    let mut bytes = durable.to_vec();
    match survival {
        Survival::Synced | Survival::Names => {}
        Survival::Everything => pending.iter().for_each(|change| change.apply_to_file(&mut bytes)),
        Survival::Lengths => {
            for change in pending {
                bytes.resize(change.len_after(bytes.len()), 0);
            }
        }
        Survival::Pages => in_part(&mut bytes, pending, PAGE as usize, random),
        Survival::Sectors => in_part(&mut bytes, pending, SECTOR as usize, random),
    }
    bytes
}

/// Applies to each unit of the file the first of its changes, of random number. The length is one that the file had.
fn in_part(bytes: &mut Vec<u8>, pending: &[Pending], unit: usize, random: &mut Random) {
    let lens = pending.iter().scan(bytes.len(), |len, change| {
        *len = change.len_after(*len);
        Some(*len)
    });
    let lens: Vec<_> = std::iter::once(bytes.len()).chain(lens).collect();
    let len = lens[random.below(lens.len() as u64) as usize];
    bytes.resize(lens.iter().copied().max().unwrap_or(0), 0);
    // Of a few of all units, of half of them, or of most, all changes are lost.
    let lost = [1, 4, 7][random.below(3) as usize];
    let mut stopped = vec![false; bytes.len().div_ceil(unit)];
    for change in pending {
        if let Pending::Truncate(len) = change {
            bytes[(*len as usize)..].fill(0);
        }
        let Some((range, written)) = change.data() else {
            continue;
        };
        let end = range.end.min(bytes.len());
        let mut at = range.start;
        while at < end {
            let stop = ((at / unit + 1) * unit).min(end);
            let stopped = &mut stopped[at / unit];
            *stopped = *stopped || random.below(8) < lost;
            if !*stopped {
                let within = at - range.start..stop - range.start;
                match written {
                    Some(written) => bytes[at..stop].copy_from_slice(&written[within]),
                    None => bytes[at..stop].fill(0),
                }
            }
            at = stop;
        }
    }
    bytes.truncate(len);
}

impl Remains {
    /// Writes the file or directory to `path`.
    pub fn write_to(&self, path: &Path) {
        match self {
            Self::File(bytes) => fs::write(path, bytes).unwrap(),
            Self::Dir(entries) => {
                fs::create_dir_all(path).unwrap();
                entries
                    .iter()
                    .for_each(|(name, entry)| entry.write_to(&path.join(name)));
            }
        }
    }
}

fn parent_of(path: &str) -> &str {
    path.rsplit_once('/').map_or("", |(parent, _)| parent)
}

fn name_of(path: &str) -> String {
    path.rsplit('/').next().unwrap().to_owned()
}
