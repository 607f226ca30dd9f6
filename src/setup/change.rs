//! [`Change`]: a planned change to one file.

use std::{
    fs::{self, DirBuilder, Permissions},
    io::{self, Write as _},
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
};

use super::{SetupError, layout};
use crate::atomic_file::sync_dir;

/// A file's contents before and after the set-up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// The file.
    pub path: PathBuf,
    /// Current contents; `None` if the file is missing.
    pub before: Option<String>,
    /// New contents; `None` to delete the file.
    pub after: Option<String>,
}

/// The kind of a change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChangeKind {
    /// The file is created.
    New,
    /// The file is changed.
    Changed,
    /// The file is deleted.
    Deleted,
    /// The file stays as it is.
    Unchanged,
}

impl ChangeKind {
    /// The word for output.
    pub fn word(self) -> &'static str {
        match self {
            Self::New => "new",
            Self::Changed => "changed",
            Self::Deleted => "deleted",
            Self::Unchanged => "unchanged",
        }
    }
}

impl Change {
    /// Reads a file, with no change planned yet. Fails on a symbolic link to a missing file.
    pub fn unchanged(path: PathBuf) -> Result<Self, SetupError> {
        let before = layout::read_optional(&path)?;
        if before.is_none() && path.is_symlink() {
            return Err(SetupError::DanglingLink { path });
        }
        Ok(Self {
            path,
            after: before.clone(),
            before,
        })
    }

    /// The kind of the change.
    pub fn kind(&self) -> ChangeKind {
        match (&self.before, &self.after) {
            (before, after) if before == after => ChangeKind::Unchanged,
            (None, _) => ChangeKind::New,
            (Some(_), Some(_)) => ChangeKind::Changed,
            (Some(_), None) => ChangeKind::Deleted,
        }
    }

    /// Applies the change. Fails if the file changed since it was read.
    pub fn apply(&self) -> Result<(), SetupError> {
        if self.kind() == ChangeKind::Unchanged {
            return Ok(());
        }
        if layout::read_optional(&self.path)? != self.before {
            let path = self.path.clone();
            return Err(SetupError::ConcurrentChange { path });
        }
        let done = match &self.after {
            Some(text) => write(&self.path, text),
            None => delete(&self.path),
        };
        done.map_err(|source| SetupError::Write {
            path: self.path.clone(),
            source,
        })
    }
}

/// Replaces a file atomically and keeps its owner and mode. Replaces the target of a symbolic link. A new script (`#!`)
/// is executable.
fn write(path: &Path, text: &str) -> io::Result<()> {
    let path = match path.symlink_metadata() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => path.to_owned(),
        _ => path.canonicalize()?,
    };
    let dir = dir_of(&path);
    DirBuilder::new().recursive(true).mode(0o755).create(dir)?;
    let mut file = tempfile::Builder::new().prefix(".nydus-store-").tempfile_in(dir)?;
    file.write_all(text.as_bytes())?;
    let mode = match path.metadata() {
        Ok(old) => {
            let new = file.as_file().metadata()?;
            if (old.uid(), old.gid()) != (new.uid(), new.gid()) {
                std::os::unix::fs::fchown(file.as_file(), Some(old.uid()), Some(old.gid()))?;
            }
            old.mode() & 0o7777
        }
        Err(_) if text.starts_with("#!") => 0o755,
        Err(_) => 0o644,
    };
    file.as_file().set_permissions(Permissions::from_mode(mode))?;
    file.as_file().sync_all()?;
    file.persist(&path)?;
    sync_dir(dir)
}

fn delete(path: &Path) -> io::Result<()> {
    fs::remove_file(path)?;
    sync_dir(dir_of(path))
}

fn dir_of(path: &Path) -> &Path {
    match path.parent() {
        Some(dir) if dir.as_os_str().is_empty() => Path::new("."),
        Some(dir) => dir,
        None => Path::new("/"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn write_keeps_mode_and_symlink() {
        let dir = tempfile::tempdir().unwrap();
        let (file, link) = (dir.path().join("file"), dir.path().join("link"));
        fs::write(&file, "old").unwrap();
        fs::set_permissions(&file, Permissions::from_mode(0o640)).unwrap();
        std::os::unix::fs::symlink(&file, &link).unwrap();
        let change = Change {
            path: link.clone(),
            before: Some("old".to_owned()),
            after: Some("new".to_owned()),
        };
        change.apply().unwrap();
        assert!(link.is_symlink());
        assert_eq!(fs::read_to_string(&file).unwrap(), "new");
        assert_eq!(file.metadata().unwrap().mode() & 0o7777, 0o640);

        let made = Change {
            path: dir.path().join("a/b/c.conf"),
            before: None,
            after: Some("new".to_owned()),
        };
        made.apply().unwrap();
        assert_eq!(made.path.metadata().unwrap().mode() & 0o7777, 0o644);
        assert_eq!(fs::read_dir(dir.path().join("a/b")).unwrap().count(), 1);
    }

    #[test]
    fn concurrently_changed_file_is_not_overwritten() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        fs::write(&path, "theirs").unwrap();
        for (before, after) in [(Some("old"), Some("new")), (Some("old"), None), (None, Some("new"))] {
            let change = Change {
                path: path.clone(),
                before: before.map(str::to_owned),
                after: after.map(str::to_owned),
            };
            assert!(
                matches!(change.apply(), Err(SetupError::ConcurrentChange { .. })),
                "{change:?}"
            );
            assert_eq!(fs::read_to_string(&path).unwrap(), "theirs");
        }
    }

    #[test]
    fn dangling_link_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let link = dir.path().join("link");
        std::os::unix::fs::symlink("missing", &link).unwrap();
        assert!(matches!(
            Change::unchanged(link.clone()),
            Err(SetupError::DanglingLink { .. })
        ));
        assert!(write(&link, "new").is_err());
        assert!(link.is_symlink());
    }
}
