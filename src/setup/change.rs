//! Changes to files, planned before the first of them is made.

use std::{
    fs::{self, DirBuilder, Permissions},
    io::{self, Write as _},
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
};

use super::{Error, layout};

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

    /// Makes it.
    pub fn apply(&self) -> Result<(), Error> {
        let done = match (&self.after, self.kind()) {
            (_, Kind::Unchanged) => Ok(()),
            (Some(text), _) => write(&self.path, text),
            (None, _) => fs::remove_file(&self.path),
        };
        done.map_err(|source| Error::Write {
            path: self.path.clone(),
            source,
        })
    }
}

/// Replaces a file whole or not at all. It keeps its owner and mode; behind a symbolic link it is the file that is replaced.
fn write(path: &Path, text: &str) -> io::Result<()> {
    let path = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    let dir = path.parent().unwrap_or(Path::new("/"));
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
        Err(_) => 0o644,
    };
    file.as_file().set_permissions(Permissions::from_mode(mode))?;
    file.as_file().sync_all()?;
    file.persist(&path)?;
    Ok(())
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
}
