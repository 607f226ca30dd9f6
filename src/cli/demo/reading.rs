//! Lists the image and reads from it, comparing what comes with what went in.

use std::{
    fs::{self, File},
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use rustix::fs::Advice;

use crate::digest::Digest;

/// How many small files are read, and up to which size a file is small.
const SMALL_FILES: usize = 10;
const SMALL: u64 = 64 << 10;
/// How much is read in the midst of a large file.
const PART: u64 = 4096;

/// The regular files below a directory.
pub struct Listing {
    /// Path below the directory, and size; in order of paths.
    pub files: Vec<(PathBuf, u64)>,
    pub directories: usize,
}

/// Something to be read.
pub struct Read {
    /// Path below the image's root.
    pub path: PathBuf,
    /// Size of the file.
    pub size: u64,
    /// Where to read, and how much.
    offset: u64,
    len: u64,
}

/// What was read.
pub struct Done {
    pub digest: Digest,
    pub took: Duration,
}

impl Listing {
    /// Walks through `root` as `find` does, looking at each file.
    pub fn of(root: &Path) -> anyhow::Result<Self> {
        let mut listing = Self {
            files: Vec::new(),
            directories: 0,
        };
        listing.walk(root, root)?;
        listing.files.sort();
        Ok(listing)
    }

    fn walk(&mut self, root: &Path, dir: &Path) -> anyhow::Result<()> {
        let failed = || format!("cannot list {}", dir.display());
        for entry in fs::read_dir(dir).with_context(failed)? {
            let path = entry.with_context(failed)?.path();
            let metadata = fs::symlink_metadata(&path).with_context(|| format!("cannot look at {}", path.display()))?;
            if metadata.is_dir() {
                self.directories += 1;
                self.walk(root, &path)?;
            } else if metadata.is_file() {
                self.files.push((path.strip_prefix(root)?.to_owned(), metadata.len()));
            }
        }
        Ok(())
    }

    /// Sum of the sizes.
    pub fn bytes(&self) -> u64 {
        self.files.iter().map(|(_, size)| size).sum()
    }

    /// What to read: small files from all over the image, a large one, and a little in the midst of the largest.
    pub fn choose(&self) -> Vec<Read> {
        let whole = |(path, size): &(PathBuf, u64)| Read {
            path: path.clone(),
            size: *size,
            offset: 0,
            len: *size,
        };
        let mut by_size: Vec<_> = self.files.iter().collect();
        by_size.sort_by_key(|(_, size)| *size);
        let part = by_size.pop().map(|file| Read {
            offset: file.1 / 2,
            len: PART.min(file.1),
            ..whole(file)
        });
        let large = by_size.pop().map(whole);
        let mut small: Vec<_> = by_size.into_iter().filter(|(_, size)| *size <= SMALL).collect();
        small.sort();
        let step = (small.len() / SMALL_FILES).max(1);
        let small = small.into_iter().step_by(step).take(SMALL_FILES).map(whole);
        small.chain(large).chain(part).collect()
    }
}

impl Read {
    /// How much is read.
    pub fn bytes(&self) -> u64 {
        self.len
    }

    /// Whether not all of the file is read.
    pub fn is_part(&self) -> bool {
        self.len < self.size
    }

    /// Reads it from the file below `root`.
    pub fn read(&self, root: &Path) -> anyhow::Result<Done> {
        self.read_file(&root.join(&self.path))
    }

    /// Reads it again, and not from the kernel's memory.
    pub fn read_again(&self, root: &Path) -> anyhow::Result<Done> {
        let path = root.join(&self.path);
        let file = File::open(&path).with_context(|| format!("cannot open {}", path.display()))?;
        rustix::fs::fadvise(&file, 0, None, Advice::DontNeed).context("cannot drop the kernel's cache of a file")?;
        self.read_file(&path)
    }

    fn read_file(&self, path: &Path) -> anyhow::Result<Done> {
        let start = Instant::now();
        let failed = || format!("cannot read {}", path.display());
        let file = File::open(path).with_context(failed)?;
        if self.is_part() {
            // The kernel would read ahead, which is right for whole files.
            rustix::fs::fadvise(&file, 0, None, Advice::Random).with_context(failed)?;
        }
        let mut bytes = vec![0; usize::try_from(self.len).with_context(failed)?];
        file.read_exact_at(&mut bytes, self.offset).with_context(failed)?;
        let took = start.elapsed();
        Ok(Done {
            digest: Digest::of(&bytes),
            took,
        })
    }

    /// Fails unless `done` has what is in `source`.
    pub fn prove(&self, done: &Done, source: &Path) -> anyhow::Result<()> {
        let expected = self.read_file(source)?.digest;
        ensure!(
            done.digest == expected,
            "{} is wrong: {} came of it, but {expected} went in",
            self.path.display(),
            done.digest
        );
        Ok(())
    }
}
