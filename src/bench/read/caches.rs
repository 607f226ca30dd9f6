//! Has the kernel forget what it has read, so that the next reading comes from the file system.

use std::{fs, io, str::FromStr};

use rustix::fs::{Advice, fadvise};

use super::tree::Tree;

/// Where the kernel takes an order to drop its caches (`/proc/sys/vm/drop_caches` in the kernel's documentation).
const DROP_CACHES: &str = "/proc/sys/vm/drop_caches";
/// Pages, and what is known of names and inodes.
const EVERYTHING: &str = "3";

/// What is to be forgotten.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Drop {
    /// The pages of the files to be read.
    Files,
    /// Everything that the kernel has read on this machine, names and inodes too. For root.
    System,
}

/// Not something to be dropped.
#[derive(Debug, thiserror::Error)]
#[error("`{0}` is neither files nor system")]
pub struct InvalidDrop(String);

impl FromStr for Drop {
    type Err = InvalidDrop;

    fn from_str(text: &str) -> Result<Self, InvalidDrop> {
        match text {
            "files" => Ok(Self::Files),
            "system" => Ok(Self::System),
            _ => Err(InvalidDrop(text.to_owned())),
        }
    }
}

impl Drop {
    /// As it is written.
    pub fn name(self) -> &'static str {
        match self {
            Self::Files => "files",
            Self::System => "system",
        }
    }

    /// Has it forgotten. A file that cannot be opened is left out: reading it fails as well, and tells of it.
    ///
    /// # Errors
    /// If the kernel does not take the order.
    pub fn now(self, tree: &Tree) -> io::Result<()> {
        match self {
            Self::System => fs::write(DROP_CACHES, EVERYTHING),
            Self::Files => {
                for file in tree.files.iter().filter_map(|entry| entry.open().ok()) {
                    fadvise(&file, 0, None, Advice::DontNeed)?;
                }
                Ok(())
            }
        }
    }
}
