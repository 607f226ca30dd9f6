//! Space for changes of the store on a full disk.
//!
//! An image that starts on a full disk needs a few kilobytes: for the database and the records that Podman reads. So a
//! file beside them holds some space, and gives it up in parts when a change finds the disk full.

use std::{
    fs::{File, OpenOptions},
    io,
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
};

use rustix::fs::{FallocateFlags, fallocate, fstatvfs};

use super::error::StoreError;

/// Length of the file, in bytes.
const LEN: u64 = 8 << 20;
/// How much of it is given up at a time. Other programs may take that, too, before the change is repeated.
const STEP: u64 = 1 << 20;
/// Free space of the disk from which on the file is made whole again, in bytes.
const ENOUGH: u64 = 8 * LEN;

/// The reserve of one root.
pub struct DiskReserve {
    path: PathBuf,
    /// Whether a part was given up.
    is_used: AtomicBool,
}

impl DiskReserve {
    /// The reserve in the file at `path`, which is created if there is enough free space.
    pub fn open(path: &Path) -> Self {
        let reserve = Self {
            path: path.to_owned(),
            is_used: AtomicBool::new(false),
        };
        reserve.refill();
        reserve
    }

    /// Runs `change`. If it finds the disk full, gives up some of the reserve and runs it again.
    pub fn with<T>(&self, mut change: impl FnMut() -> Result<T, StoreError>) -> Result<T, StoreError> {
        loop {
            match change() {
                Err(error) if error.is_disk_full() && self.give_up().is_ok_and(|given| given) => {
                    if !self.is_used.swap(true, Ordering::Relaxed) {
                        let file = self.path.display();
                        tracing::warn!(%file, %error, "disk is full; using the space reserved for changes of the store");
                    }
                }
                changed => return changed,
            }
        }
    }

    /// Makes the reserve whole again if the disk has enough free space. A failure has no consequence but the next one.
    pub fn refill(&self) {
        if self.try_refill().unwrap_or(false) && self.is_used.swap(false, Ordering::Relaxed) {
            tracing::info!(file = %self.path.display(), "reserved space for changes of the store again");
        }
    }

    fn try_refill(&self) -> io::Result<bool> {
        let file = self.file()?;
        if file.metadata()?.len() >= LEN {
            return Ok(true);
        }
        let disk = fstatvfs(&file)?;
        if disk.f_bavail.saturating_mul(disk.f_frsize) < ENOUGH {
            return Ok(false);
        }
        fallocate(&file, FallocateFlags::empty(), 0, LEN)?;
        Ok(true)
    }

    /// Gives up a part; false if nothing is left.
    fn give_up(&self) -> io::Result<bool> {
        let file = self.file()?;
        let len = file.metadata()?.len();
        if len == 0 {
            return Ok(false);
        }
        file.set_len(len.saturating_sub(STEP))?;
        // A journaling file system frees the space with its next transaction.
        file.sync_all()?;
        Ok(true)
    }

    fn file(&self) -> io::Result<File> {
        let mut options = OpenOptions::new();
        options.write(true).create(true).truncate(false).mode(0o600);
        options.open(&self.path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn full() -> StoreError {
        StoreError::Write {
            path: PathBuf::from("/full"),
            source: io::ErrorKind::StorageFull.into(),
        }
    }

    #[test]
    fn full_disk_uses_up_the_reserve_in_parts() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("reserve");
        let reserve = DiskReserve::open(&path);
        let len = || path.metadata().unwrap().len();
        assert_eq!(len(), LEN);
        let mut failures = 2;
        let changed = reserve.with(|| match failures {
            0 => Ok(7),
            _ => {
                failures -= 1;
                Err(full())
            }
        });
        assert_eq!((changed.unwrap(), len()), (7, LEN - 2 * STEP));
        let other = reserve.with(|| Err::<(), _>(StoreError::UnknownName("a".to_owned())));
        assert!(other.is_err() && len() == LEN - 2 * STEP);
        assert!(reserve.with(|| Err::<(), _>(full())).is_err());
        assert_eq!(len(), 0);
        reserve.refill();
        assert_eq!(len(), LEN);
    }
}
