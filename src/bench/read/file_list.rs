//! Lists the regular files of a directory.

use std::{
    fs::{File, OpenOptions},
    io,
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    time::Instant,
};

use walkdir::WalkDir;

use super::PhaseState;

/// Maximum number of files to read. Further files only count in the walk.
const MAX_FILES: usize = 4_000_000;

/// A regular file.
#[derive(Debug)]
pub struct ListedFile {
    /// Path.
    pub path: PathBuf,
    /// Size in bytes.
    pub size: u64,
}

/// The regular files of a directory tree.
#[derive(Debug, Default)]
pub struct FileList {
    /// Files, in the order of the walk.
    pub files: Vec<ListedFile>,
}

impl ListedFile {
    /// Opens the file for reading. Does not follow a symbolic link or block on a named pipe that replaced it.
    pub fn open(&self) -> io::Result<File> {
        let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
        OpenOptions::new().read(true).custom_flags(flags).open(&self.path)
    }
}

impl FileList {
    /// Adds a file.
    pub fn add(&mut self, entry: ListedFile) {
        if self.files.len() < MAX_FILES {
            self.files.push(entry);
        }
    }

    /// Total size in bytes.
    pub fn bytes(&self) -> u64 {
        self.files.iter().map(|file| file.size).sum()
    }

    /// The `count` largest files, the largest first.
    pub fn largest(&self, count: usize) -> impl Iterator<Item = &ListedFile> {
        let mut order: Vec<&ListedFile> = self.files.iter().collect();
        order.sort_by_key(|entry| std::cmp::Reverse(entry.size));
        order.into_iter().take(count)
    }
}

/// Walks `dir` and passes regular files to `found`; each lstat is an operation. Does not follow symbolic links or enter
/// mounts.
pub(super) fn walk(dir: &Path, reading: &PhaseState, mut found: impl FnMut(ListedFile)) {
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
                    found(ListedFile {
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
