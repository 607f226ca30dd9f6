//! Disk space that files take. Files may be sparse, so it is counted in allocated blocks.

use std::{
    fs::{self, Metadata},
    io,
    os::unix::fs::MetadataExt as _,
    path::Path,
    time::{Duration, SystemTime},
};

use crate::digest::Digest;

/// A file that is named after a digest.
#[derive(Debug, Clone, Copy)]
pub struct StoredFile {
    /// The digest in the file's name.
    pub digest: Digest,
    /// Disk space, in bytes.
    pub bytes: u64,
    /// Time since the last change.
    pub age: Duration,
}

/// Disk space of a file, in bytes.
pub fn of_file(file: &Metadata) -> u64 {
    // st_blocks counts 512 bytes on every file system (stat(2)).
    file.blocks() * 512
}

/// Disk space of the files in a directory, without those in its subdirectories, in bytes.
pub fn of_dir(dir: &Path) -> io::Result<u64> {
    let mut bytes = 0;
    for entry in fs::read_dir(dir)? {
        match entry?.metadata() {
            Ok(file) if file.is_file() => bytes += of_file(&file),
            // Replaced or removed meanwhile.
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    Ok(bytes)
}

/// The files in a directory whose names are a digest in hexadecimal followed by `ending`.
pub fn stored_files(dir: &Path, ending: &str) -> io::Result<Vec<StoredFile>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let name = entry.file_name();
        let hex = name.to_str().and_then(|name| name.strip_suffix(ending));
        let Some(digest) = hex.and_then(|hex| Digest::from_hex(hex).ok()) else {
            continue;
        };
        match entry.metadata() {
            Ok(file) => files.push(StoredFile {
                digest,
                bytes: of_file(&file),
                age: age(&file),
            }),
            // Removed meanwhile.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(files)
}

/// Time since the last change of a file; zero if the clock was set back.
pub fn age(file: &Metadata) -> Duration {
    let changed = file.modified().unwrap_or(SystemTime::UNIX_EPOCH);
    changed.elapsed().unwrap_or_default()
}
