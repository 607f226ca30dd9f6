//! The log of chunks that were written to a cached blob.

use std::{
    collections::HashMap,
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::{FileExt as _, OpenOptionsExt as _},
    path::Path,
};

use super::layout::Chunk;

/// Length of an entry: a page is a multiple of it, so that a write that is cut short spoils no other entry.
const ENTRY: usize = 32;
/// How much of a chunk's digest an entry has.
const PREFIX: usize = 12;
/// An entry that is no more. No chunk has this index.
const REMOVED: [u8; ENTRY] = [0xff; ENTRY];

/// The chunks that are said to be on disk, in memory and in a file.
///
/// An entry has, little-endian: the chunk's index (4 bytes), uncompressed length (4) and offset (8), the first 12 bytes of its
/// digest, and a CRC-32 of all these. It tells not only that a chunk is there but also which, so that an image whose table
/// says otherwise is known before it overwrites anything.
pub(super) struct ChunkJournal {
    file: File,
    by_index: HashMap<u32, Claim>,
    /// Where the next entry goes.
    len: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Claim {
    /// Where its entry is in the file.
    at: u64,
    size: u32,
    offset: u64,
    digest: [u8; PREFIX],
}

impl ChunkJournal {
    /// Opens the file, which is made if it is missing. Damaged entries are ignored.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false).mode(0o600);
        let file = options.open(path)?;
        let log = fs::read(path)?;
        let (entries, _) = log.as_chunks::<ENTRY>();
        let claim = |(number, entry): (usize, &[u8; ENTRY])| parse(entry, (number * ENTRY) as u64);
        Ok(Self {
            file,
            by_index: entries.iter().enumerate().filter_map(claim).collect(),
            len: (entries.len() * ENTRY) as u64,
        })
    }

    /// Whether a chunk of that index is said to be there.
    pub(super) fn contains(&self, index: u32) -> bool {
        self.by_index.contains_key(&index)
    }

    /// Whether that is the chunk that is said to be there; `None` if there is none of its index.
    pub(super) fn is_of(&self, chunk: &Chunk) -> Option<bool> {
        let claim = self.by_index.get(&chunk.index)?;
        Some(*claim == Claim::new(chunk, claim.at))
    }

    /// Where the chunks start and end in the data file.
    pub(super) fn ranges(&self) -> impl Iterator<Item = (u64, u64)> {
        let ends = |claim: &Claim| (claim.offset, claim.offset.saturating_add(u64::from(claim.size)));
        self.by_index.values().map(ends)
    }

    /// Adds a chunk, unless it is there.
    pub(super) fn add(&mut self, chunk: &Chunk) -> io::Result<()> {
        if self.contains(chunk.index) {
            return Ok(());
        }
        let claim = Claim::new(chunk, self.len);
        self.file.write_all_at(&claim.entry(chunk.index), claim.at)?;
        self.len += ENTRY as u64;
        self.by_index.insert(chunk.index, claim);
        Ok(())
    }

    /// Removes the chunk of that index.
    pub(super) fn remove(&mut self, index: u32) -> io::Result<()> {
        if let Some(claim) = self.by_index.get(&index) {
            self.file.write_all_at(&REMOVED, claim.at)?;
            self.by_index.remove(&index);
        }
        Ok(())
    }

    /// Waits until the file is on disk. If it does not get there, nothing is said to be there any more: what is in the file
    /// is not known then, and the system tells of it but once.
    pub(super) fn sync(&mut self) -> io::Result<()> {
        self.file.sync_data().inspect_err(|_| {
            self.by_index.clear();
            self.len = 0;
            self.file.set_len(0).ok();
        })
    }
}

impl Claim {
    fn new(chunk: &Chunk, at: u64) -> Self {
        let mut digest = [0; PREFIX];
        digest.copy_from_slice(&chunk.digest[..PREFIX]);
        Self {
            at,
            size: chunk.uncompressed_size,
            offset: chunk.uncompressed_offset,
            digest,
        }
    }

    fn entry(&self, index: u32) -> [u8; ENTRY] {
        let mut entry = [0; ENTRY];
        entry[..4].copy_from_slice(&index.to_le_bytes());
        entry[4..8].copy_from_slice(&self.size.to_le_bytes());
        entry[8..16].copy_from_slice(&self.offset.to_le_bytes());
        entry[16..28].copy_from_slice(&self.digest);
        let crc = crc(&entry[..28]);
        entry[28..].copy_from_slice(&crc.to_le_bytes());
        entry
    }
}

/// The entry at `at`, if it is a whole one.
fn parse(entry: &[u8; ENTRY], at: u64) -> Option<(u32, Claim)> {
    let (rest, checksum) = entry.split_last_chunk::<4>()?;
    let (index, rest) = rest.split_first_chunk::<4>()?;
    let (size, rest) = rest.split_first_chunk::<4>()?;
    let (offset, digest) = rest.split_first_chunk::<8>()?;
    let claim = Claim {
        at,
        size: u32::from_le_bytes(*size),
        offset: u64::from_le_bytes(*offset),
        digest: digest.try_into().ok()?,
    };
    let whole = *entry != REMOVED && crc(&entry[..28]) == u32::from_le_bytes(*checksum);
    whole.then_some((u32::from_le_bytes(*index), claim))
}

fn crc(bytes: &[u8]) -> u32 {
    let mut crc = flate2::Crc::new();
    crc.update(bytes);
    crc.sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chunk(index: u32) -> Chunk {
        Chunk {
            index,
            digest: [index as u8; 32],
            compressed_offset: 0,
            compressed_size: 0,
            uncompressed_offset: u64::from(index) * 100,
            uncompressed_size: 100,
            compressed: false,
        }
    }

    #[test]
    fn claims_come_and_go() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("claims");
        let mut claims = ChunkJournal::open(&path).unwrap();
        for index in [5, 1, 700, 1] {
            claims.add(&chunk(index)).unwrap();
        }
        claims.remove(1).unwrap();
        claims.remove(2).unwrap();
        claims.add(&chunk(2)).unwrap();
        let mut other = chunk(5);
        other.digest[3] ^= 1;
        for claims in [claims, ChunkJournal::open(&path).unwrap()] {
            assert_eq!(
                [1, 2, 5, 700].map(|index| claims.contains(index)),
                [false, true, true, true]
            );
            assert_eq!(claims.is_of(&chunk(5)), Some(true));
            assert_eq!(claims.is_of(&other), Some(false));
            assert_eq!(claims.is_of(&chunk(1)), None);
            assert_eq!(claims.ranges().count(), 3);
        }
    }

    #[test]
    fn damaged_entries_are_ignored() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("claims");
        let mut claims = ChunkJournal::open(&path).unwrap();
        (0..4).for_each(|index| claims.add(&chunk(index)).unwrap());
        let mut bytes = fs::read(&path).unwrap();
        bytes[ENTRY + 9] ^= 1;
        bytes.extend([7; 10]);
        fs::write(&path, bytes).unwrap();
        let mut claims = ChunkJournal::open(&path).unwrap();
        assert_eq!(
            [0, 1, 2, 3].map(|index| claims.contains(index)),
            [true, false, true, true]
        );
        // An entry that was cut short is overwritten.
        claims.add(&chunk(9)).unwrap();
        assert!(ChunkJournal::open(&path).unwrap().contains(9));
    }
}
