//! Files of the root: accessible to their owner only, and replaced atomically.

use std::{
    fs::{self, DirBuilder, Permissions},
    io::{self, Write as _},
    os::unix::fs::{DirBuilderExt as _, PermissionsExt as _},
    path::Path,
    time::Duration,
};

use tempfile::NamedTempFile;

use crate::disk_usage;

/// Prefix of the names of unfinished files.
const UNFINISHED_PREFIX: &str = ".new-";

/// Creates `dir` and its missing parents without access for others. Revokes the access of others to an existing one.
pub fn make_private_dir(dir: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
    fs::set_permissions(dir, Permissions::from_mode(0o700))
}

/// Writes `path` so that it holds either the old or the new bytes, even after a power cut.
pub fn write_atomically(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = new_beside(path.parent().unwrap_or(Path::new(".")))?;
    file.write_all(bytes)?;
    persist(file, path)
}

/// Creates an unfinished file in `dir`. It is deleted unless it is passed to [`persist`].
pub fn new_beside(dir: &Path) -> io::Result<NamedTempFile> {
    tempfile::Builder::new().prefix(UNFINISHED_PREFIX).tempfile_in(dir)
}

/// Syncs a file of [`new_beside`], then renames it to `path`.
pub fn persist(file: NamedTempFile, path: &Path) -> io::Result<()> {
    file.as_file().sync_data()?;
    file.persist(path)?;
    sync_dir(path.parent().unwrap_or(Path::new(".")))
}

/// Syncs the directory, so that its entries are on disk.
pub fn sync_dir(dir: &Path) -> io::Result<()> {
    fs::File::open(dir)?.sync_all()
}

/// Removes unfinished files of a killed process from `dir`.
pub fn remove_unfinished(dir: &Path) -> io::Result<()> {
    remove_unfinished_since(dir, Duration::ZERO)
}

/// Removes the unfinished files from `dir` that were not written to for that time.
pub fn remove_unfinished_since(dir: &Path, age: Duration) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        if entry
            .file_name()
            .as_encoded_bytes()
            .starts_with(UNFINISHED_PREFIX.as_bytes())
            && disk_usage::age(&entry.metadata()?) >= age
        {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}
