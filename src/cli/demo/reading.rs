//! Lists the mounted image, reads files from it, and compares their contents with the source.

use std::{
    fs::{self, File},
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use rustix::fs::Advice;

use crate::digest::Digest;

/// Number of small files to read, and their maximum size.
const SMALL_FILE_READS: usize = 10;
const SMALL_FILE_MAX_BYTES: u64 = 64 << 10;
/// Length of the read in the middle of the largest file.
const PARTIAL_READ_BYTES: u64 = 4096;

/// The regular files below a directory.
pub struct FileListing {
    /// Relative path and size, sorted by path.
    pub files: Vec<(PathBuf, u64)>,
    pub directories: usize,
}

/// A read of a file, or of a part of it.
pub struct PlannedRead {
    /// Path relative to the image's root.
    pub path: PathBuf,
    /// Size of the file.
    pub size: u64,
    offset: u64,
    len: u64,
}

/// The digest of the data and the time of the read.
pub struct ReadResult {
    pub digest: Digest,
    pub took: Duration,
}

impl FileListing {
    /// Walks `root` as `find` does, with a stat of each entry.
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

    /// Chooses reads: small files from all over the image, a large file, and a part of the largest file.
    pub fn choose(&self) -> Vec<PlannedRead> {
        let whole = |(path, size): &(PathBuf, u64)| PlannedRead {
            path: path.clone(),
            size: *size,
            offset: 0,
            len: *size,
        };
        let mut by_size: Vec<_> = self.files.iter().collect();
        by_size.sort_by_key(|(_, size)| *size);
        let part = by_size.pop().map(|file| PlannedRead {
            offset: file.1 / 2,
            len: PARTIAL_READ_BYTES.min(file.1),
            ..whole(file)
        });
        let large = by_size.pop().map(whole);
        let mut small: Vec<_> = by_size
            .into_iter()
            .filter(|(_, size)| *size <= SMALL_FILE_MAX_BYTES)
            .collect();
        small.sort();
        let step = (small.len() / SMALL_FILE_READS).max(1);
        let small = small.into_iter().step_by(step).take(SMALL_FILE_READS).map(whole);
        small.chain(large).chain(part).collect()
    }
}

impl PlannedRead {
    /// Number of bytes to read.
    pub fn bytes(&self) -> u64 {
        self.len
    }

    /// Whether the read covers less than the file.
    pub fn is_part(&self) -> bool {
        self.len < self.size
    }

    /// Reads from the file below `root`.
    pub fn read(&self, root: &Path) -> anyhow::Result<ReadResult> {
        self.read_file(&root.join(&self.path))
    }

    /// Reads again, after dropping the file from the page cache.
    pub fn read_again(&self, root: &Path) -> anyhow::Result<ReadResult> {
        let path = root.join(&self.path);
        let file = File::open(&path).with_context(|| format!("cannot open {}", path.display()))?;
        rustix::fs::fadvise(&file, 0, None, Advice::DontNeed).context("cannot drop the kernel's cache of a file")?;
        self.read_file(&path)
    }

    fn read_file(&self, path: &Path) -> anyhow::Result<ReadResult> {
        let start = Instant::now();
        let failed = || format!("cannot read {}", path.display());
        let file = File::open(path).with_context(failed)?;
        if self.is_part() {
            // Turns off the kernel's read-ahead, which suits whole files only.
            rustix::fs::fadvise(&file, 0, None, Advice::Random).with_context(failed)?;
        }
        let mut bytes = vec![0; usize::try_from(self.len).with_context(failed)?];
        file.read_exact_at(&mut bytes, self.offset).with_context(failed)?;
        let took = start.elapsed();
        Ok(ReadResult {
            digest: Digest::of(&bytes),
            took,
        })
    }

    /// Fails unless `result` has the digest of the same read from `source`.
    pub fn ensure_same_as(&self, result: &ReadResult, source: &Path) -> anyhow::Result<()> {
        let expected = self.read_file(source)?.digest;
        ensure!(
            result.digest == expected,
            "{} has digest {}, but its source has {expected}",
            self.path.display(),
            result.digest
        );
        Ok(())
    }
}
