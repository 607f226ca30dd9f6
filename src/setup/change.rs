//! Changes to files, planned before the first of them is made.

use std::{
    fs::{self, DirBuilder, Permissions},
    io::{self, Write as _},
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
};

use super::{Error, layout};
use crate::atomic_file::sync_dir;

/// A file as it is and as it shall be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// The file.
    pub path: PathBuf,
    /// What it holds; nothing if there is none.
    pub before: Option<String>,
    /// What it shall hold; nothing if there shall be none.
    pub after: Option<String>,
}

/// What a change does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The file is made.
    New,
    /// The file is changed.
    Changed,
    /// The file is deleted.
    Deleted,
    /// Nothing.
    Unchanged,
}

impl Kind {
    /// In a word.
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
    /// A file that stays as it is.
    pub fn none(path: PathBuf) -> Result<Self, Error> {
        let before = layout::read(&path)?;
        if before.is_none() && path.is_symlink() {
            return Err(Error::Dangling { path });
        }
        Ok(Self {
            path,
            after: before.clone(),
            before,
        })
    }

    /// What it does.
    pub fn kind(&self) -> Kind {
        match (&self.before, &self.after) {
            (before, after) if before == after => Kind::Unchanged,
            (None, _) => Kind::New,
            (Some(_), Some(_)) => Kind::Changed,
            (Some(_), None) => Kind::Deleted,
        }
    }

    /// Makes it, if the file is still as it was.
    pub fn apply(&self) -> Result<(), Error> {
        if self.kind() == Kind::Unchanged {
            return Ok(());
        }
        if layout::read(&self.path)? != self.before {
            let path = self.path.clone();
            return Err(Error::Meanwhile { path });
        }
        let done = match &self.after {
            Some(text) => write(&self.path, text),
            None => delete(&self.path),
        };
        done.map_err(|source| Error::Write {
            path: self.path.clone(),
            source,
        })
    }
}

/// Replaces a file whole or not at all. It keeps its owner and mode, and a new script can be started; behind a symbolic link it is the file that is replaced.
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
    fn a_file_keeps_its_mode_and_its_links() {
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
    fn what_was_changed_meanwhile_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        fs::write(&path, "theirs").unwrap();
        for (before, after) in [(Some("old"), Some("new")), (Some("old"), None), (None, Some("new"))] {
            let change = Change {
                path: path.clone(),
                before: before.map(str::to_owned),
                after: after.map(str::to_owned),
            };
            assert!(matches!(change.apply(), Err(Error::Meanwhile { .. })), "{change:?}");
            assert_eq!(fs::read_to_string(&path).unwrap(), "theirs");
        }
    }

    #[test]
    fn a_link_to_nothing_stays() {
        let dir = tempfile::tempdir().unwrap();
        let link = dir.path().join("link");
        std::os::unix::fs::symlink("missing", &link).unwrap();
        assert!(matches!(Change::none(link.clone()), Err(Error::Dangling { .. })));
        assert!(write(&link, "new").is_err());
        assert!(link.is_symlink());
    }
}
