//! Disk space that files take. Files may be sparse, so it is counted in allocated blocks.

use std::{
    fs::{self, Metadata},
    io,
    os::unix::fs::MetadataExt as _,
    path::Path,
};

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
