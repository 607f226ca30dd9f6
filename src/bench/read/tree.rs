//! What there is to be read in a directory.

use std::{
    fs::{File, OpenOptions},
    io,
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    time::Instant,
};

use walkdir::WalkDir;

use super::Reading;

/// Most files that are read; what is beyond is only looked at.
const MOST: usize = 4_000_000;

/// A regular file.
#[derive(Debug)]
pub struct Entry {
    /// Where it is.
    pub path: PathBuf,
    /// Its length in bytes.
    pub size: u64,
}

/// The regular files of a directory.
#[derive(Debug, Default)]
pub struct Tree {
    /// In the order in which they are found.
    pub files: Vec<Entry>,
}

impl Entry {
    /// Opens it to be read, if no symbolic link or named pipe has come in its place.
    pub fn open(&self) -> io::Result<File> {
        let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
        OpenOptions::new().read(true).custom_flags(flags).open(&self.path)
    }
}

impl Tree {
    /// Adds a file.
    pub fn add(&mut self, entry: Entry) {
        if self.files.len() < MOST {
            self.files.push(entry);
        }
    }

    /// Bytes of all files.
    pub fn bytes(&self) -> u64 {
        self.files.iter().map(|file| file.size).sum()
    }

    /// Up to so many files, the largest first.
    pub fn largest(&self, count: usize) -> impl Iterator<Item = &Entry> {
        let mut order: Vec<&Entry> = self.files.iter().collect();
        order.sort_by_key(|entry| std::cmp::Reverse(entry.size));
        order.into_iter().take(count)
    }
}

/// Looks at everything in `dir` (lstat), each as one operation, and gives the regular files to `found`. Neither symbolic links nor
/// mounts are entered.
pub(super) fn walk(dir: &Path, reading: &Reading, mut found: impl FnMut(Entry)) {
    let entries = WalkDir::new(dir).follow_links(false).same_file_system(true);
    for entry in entries {
        if reading.is_over() {
            return;
        }
        let start = Instant::now();
        let looked = entry.and_then(|entry| Ok((entry.metadata()?, entry.into_path())));
        match looked {
            Ok((metadata, path)) => {
                reading.done(start);
                if metadata.is_file() {
                    found(Entry {
                        path,
                        size: metadata.len(),
                    });
                }
            }
            Err(error) => {
                let path = error.path().unwrap_or(dir).to_owned();
                let cause = error.io_error().map_or_else(|| error.to_string(), ToString::to_string);
                reading.failed(&path, &cause);
            }
        }
    }
}
