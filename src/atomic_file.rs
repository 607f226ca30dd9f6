//! Files of the root: accessible to their owner only, and replaced atomically.

use std::{
    ffi::OsStr,
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

/// Mode of directories that are accessible to their owner only.
const PRIVATE_MODE: u32 = 0o700;

/// Creates `dir` and its missing parents without access for others. Revokes the access of others to an existing one.
/// After a power cut it is still there, also if an earlier process has created it.
pub fn make_private_dir(dir: &Path) -> io::Result<()> {
    create_private_dir(dir)?;
    // Not changed without need, which a read-only file system refuses.
    if dir.metadata()?.permissions().mode() & 0o7777 == PRIVATE_MODE {
        return Ok(());
    }
    fs::set_permissions(dir, Permissions::from_mode(PRIVATE_MODE))
}

/// Whether nothing can be written at present: the disk is full, read-only or broken. It may be repaired later.
pub fn is_unwritable(error: &io::Error) -> bool {
    let is_broken = error.raw_os_error() == Some(libc::EIO);
    is_broken || is_full(error) || error.kind() == io::ErrorKind::ReadOnlyFilesystem
}

/// Whether the disk or a quota is full.
pub fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

/// `Ok` instead of an error for which [`is_unwritable`] holds, for changes that can be left out.
pub fn unless_unwritable(done: io::Result<()>) -> io::Result<()> {
    match done {
        Err(error) if is_unwritable(&error) => Ok(()),
        done => done,
    }
}

/// Creates `dir` and its missing parents without access for others, and syncs the directories that contain them.
pub fn create_private_dir(dir: &Path) -> io::Result<()> {
    let parent = dir.parent().filter(|parent| *parent != Path::new(""));
    let parent = parent.unwrap_or(Path::new("."));
    if !parent.is_dir() {
        create_private_dir(parent)?;
    }
    match DirBuilder::new().mode(PRIVATE_MODE).create(dir) {
        Err(_) if dir.is_dir() => {}
        created => created?,
    }
    unless_unwritable(sync_dir(parent))
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

/// Whether a file of that name was not finished.
pub fn is_unfinished(name: &OsStr) -> bool {
    name.as_encoded_bytes().starts_with(UNFINISHED_PREFIX.as_bytes())
}

/// Removes unfinished files of a killed process from `dir`.
pub fn remove_unfinished(dir: &Path) -> io::Result<()> {
    remove_unfinished_since(dir, Duration::ZERO)
}

/// Removes the unfinished files from `dir` that were not written to for that time.
pub fn remove_unfinished_since(dir: &Path, age: Duration) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        if is_unfinished(&entry.file_name()) && disk_usage::age(&entry.metadata()?) >= age {
            unless_unwritable(fs::remove_file(entry.path()))?;
        }
    }
    Ok(())
}
