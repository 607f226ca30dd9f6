//! Files of the root: made for their owner alone, and replaced whole or not at all.

use std::{
    fs::{self, DirBuilder, Permissions},
    io::{self, Write as _},
    os::unix::fs::{DirBuilderExt as _, PermissionsExt as _},
    path::Path,
};

use tempfile::NamedTempFile;

/// How names of files start that are not finished.
const NEW: &str = ".new-";

/// Makes `dir` and its missing parents, with no access for others; an existing one is closed to others.
pub fn make_private_dir(dir: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
    fs::set_permissions(dir, Permissions::from_mode(0o700))
}

/// Writes `path` so that it holds either its old bytes or all of the new ones, even after a power cut.
pub fn write_atomically(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = new_beside(path.parent().unwrap_or(Path::new(".")))?;
    file.write_all(bytes)?;
    persist(file, path)
}

/// A new file in `dir`, which is deleted unless it is [`persist`]ed.
pub fn new_beside(dir: &Path) -> io::Result<NamedTempFile> {
    tempfile::Builder::new().prefix(NEW).tempfile_in(dir)
}

/// Gives a file of [`new_beside`] its name, once all of it is on disk.
pub fn persist(file: NamedTempFile, path: &Path) -> io::Result<()> {
    file.as_file().sync_data()?;
    file.persist(path)?;
    sync_dir(path.parent().unwrap_or(Path::new(".")))
}

/// Waits until the names in `dir` are on disk.
pub fn sync_dir(dir: &Path) -> io::Result<()> {
    fs::File::open(dir)?.sync_all()
}

/// Removes what a process that was killed has left of [`new_beside`] in `dir`.
pub fn remove_unfinished(dir: &Path) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_name().as_encoded_bytes().starts_with(NEW.as_bytes()) {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}
