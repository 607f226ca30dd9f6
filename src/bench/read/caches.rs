//! Drops kernel caches, so that the next reads reach the file system.

use std::{fs, io, str::FromStr};

use rustix::fs::{Advice, fadvise};

use super::file_list::FileList;

/// Control file that drops caches (Documentation/admin-guide/sysctl/vm.rst, `drop_caches`).
const DROP_CACHES_PATH: &str = "/proc/sys/vm/drop_caches";
/// Value that drops the page cache, dentries and inodes.
const DROP_ALL: &str = "3";

/// The caches to drop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DropCaches {
    /// The page cache of the files to read.
    Files,
    /// All page caches, dentries and inodes of the machine. Needs root.
    System,
}

/// The text is neither `files` nor `system`.
#[derive(Debug, thiserror::Error)]
#[error("invalid caches `{0}`: expected files or system")]
pub struct InvalidDropCaches(String);

impl FromStr for DropCaches {
    type Err = InvalidDropCaches;

    fn from_str(text: &str) -> Result<Self, InvalidDropCaches> {
        match text {
            "files" => Ok(Self::Files),
            "system" => Ok(Self::System),
            _ => Err(InvalidDropCaches(text.to_owned())),
        }
    }
}

impl DropCaches {
    /// The name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Files => "files",
            Self::System => "system",
        }
    }

    /// Drops the caches. Skips files that cannot be opened: reading them later reports the error.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn now(self, list: &FileList) -> io::Result<()> {
        match self {
            Self::System => fs::write(DROP_CACHES_PATH, DROP_ALL),
            Self::Files => {
                for file in list.files.iter().filter_map(|entry| entry.open().ok()) {
                    fadvise(&file, 0, None, Advice::DontNeed)?;
                }
                Ok(())
            }
        }
    }
}
