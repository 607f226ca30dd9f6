//! Opens the files of cached blobs, also on a disk that cannot be written to.

use std::{
    fs::{File, OpenOptions},
    io,
    os::unix::fs::OpenOptionsExt as _,
    path::Path,
};

use crate::atomic_file::is_unwritable;

/// An empty file that cannot be written to: opened for reading, it stands for a file that cannot be created.
const EMPTY: &str = "/dev/null";

/// Opens a file for reading and writing, and creates it if it is missing. On a full or read-only disk, opens it for
/// reading, and a missing one as an empty file. Then writes fail, so that nothing is cached.
pub(super) fn open_or_read_only(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false).mode(0o600);
    match options.open(path) {
        Err(error) if is_unwritable(&error) => match File::open(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => File::open(EMPTY),
            opened => opened,
        },
        opened => opened,
    }
}
