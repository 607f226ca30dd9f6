//! [`StateFile`]: bytes in a memory file, replaced as a whole.

use std::{
    fs::File,
    io,
    os::{
        fd::{AsFd, BorrowedFd},
        unix::fs::FileExt as _,
    },
};

use parking_lot::Mutex;
use rustix::fs::MemfdFlags;

/// Offset of the first slot. The position of the current content is at the start of the file.
const FIRST_SLOT: u64 = 4096;
/// Room for each of the two slots, in bytes.
const SLOT_BYTES: u64 = 16 << 20;

/// A memory file whose content is replaced as a whole, also if the process is killed meanwhile: new content goes to the
/// other of two slots, and then one write of eight bytes makes it current.
#[derive(Debug)]
pub(super) struct StateFile {
    file: File,
    writer: Mutex<()>,
}

impl StateFile {
    /// Creates an empty file.
    pub fn create() -> io::Result<Self> {
        let file = rustix::fs::memfd_create("nydus-store", MemfdFlags::CLOEXEC)?;
        Ok(Self::open(file.into()))
    }

    /// Uses the file of an earlier process.
    pub fn open(file: File) -> Self {
        Self {
            file,
            writer: Mutex::new(()),
        }
    }

    /// The current content.
    pub fn read(&self) -> io::Result<Vec<u8>> {
        let (slot, len) = self.position()?;
        let mut bytes = vec![0; usize::try_from(len).unwrap_or_default()];
        self.file.read_exact_at(&mut bytes, slot)?;
        Ok(bytes)
    }

    /// Replaces the content.
    pub fn write(&self, bytes: &[u8]) -> io::Result<()> {
        let _guard = self.writer.lock();
        let len = bytes.len() as u64;
        if len > SLOT_BYTES {
            return Err(io::Error::other(format!("{len} bytes are too many")));
        }
        let other = match self.position() {
            Ok((FIRST_SLOT, _)) => FIRST_SLOT + SLOT_BYTES,
            _ => FIRST_SLOT,
        };
        self.file.write_all_at(bytes, other)?;
        // Both numbers have 32 bits.
        self.file.write_all_at(&(other << 32 | len).to_ne_bytes(), 0)
    }

    /// Offset and length of the current content.
    fn position(&self) -> io::Result<(u64, u64)> {
        let mut word = [0; 8];
        self.file.read_exact_at(&mut word, 0)?;
        let word = u64::from_ne_bytes(word);
        let (slot, len) = (word >> 32, word & u64::from(u32::MAX));
        if ![FIRST_SLOT, FIRST_SLOT + SLOT_BYTES].contains(&slot) || len > SLOT_BYTES {
            return Err(io::Error::other("malformed state"));
        }
        Ok((slot, len))
    }
}

impl AsFd for StateFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_is_replaced_as_a_whole() {
        let state = StateFile::create().unwrap();
        assert!(state.read().is_err());
        for content in ["first", "the second one", ""] {
            state.write(content.as_bytes()).unwrap();
            assert_eq!(state.read().unwrap(), content.as_bytes());
        }
        let next = StateFile::open(state.file.try_clone().unwrap());
        next.write(b"of the next process").unwrap();
        assert_eq!(state.read().unwrap(), b"of the next process");
        assert!(state.write(&vec![0; SLOT_BYTES as usize + 1]).is_err());
    }

    #[test]
    fn content_that_was_not_finished_does_not_count() {
        let state = StateFile::create().unwrap();
        state.write(b"whole").unwrap();
        // A process that is killed has written to the other slot only.
        state.file.write_all_at(b"half", FIRST_SLOT + SLOT_BYTES).unwrap();
        assert_eq!(state.read().unwrap(), b"whole");
    }
}
