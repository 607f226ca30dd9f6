//! The journal of a cached blob: which chunks were written to its data file.

use std::{
    collections::HashMap,
    fs::File,
    io::{self, Read as _},
    os::unix::fs::FileExt as _,
    path::Path,
    sync::Arc,
};

use super::{cache_file::open_or_read_only, layout::Chunk};

/// Length of an entry, in bytes. It divides the length of a page, so that an incomplete write damages one entry only.
const ENTRY_SIZE: usize = 32;
/// Bytes of a chunk's digest in an entry.
const DIGEST_PREFIX: usize = 12;
/// Overwrites a removed entry. No chunk has this index.
const REMOVED: [u8; ENTRY_SIZE] = [0xff; ENTRY_SIZE];

/// The chunks that were written, in memory and in a file. An entry is no proof: the data file may not have reached the
/// disk.
///
/// An entry has, little-endian: the chunk's index (4 bytes), uncompressed length (4) and offset (8), the first 12 bytes
/// of its digest, and a CRC-32 of all these. Offset and digest tell which chunk was written, so that an image with
/// another chunk table is detected before it overwrites anything.
pub(super) struct ChunkJournal {
    file: Arc<File>,
    by_index: HashMap<u32, JournalEntry>,
    /// Offsets of removed and damaged entries, which new entries overwrite. So the file does not grow where chunks are
    /// evicted and fetched again.
    free: Vec<u64>,
    /// Offset after the last entry.
    len: u64,
}

/// A chunk in the journal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct JournaledChunk {
    /// Index of the chunk in the blob.
    pub(super) index: u32,
    /// Where the chunk starts in the data file.
    pub(super) start: u64,
    /// Where it ends.
    pub(super) end: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct JournalEntry {
    /// Offset in the journal file.
    at: u64,
    size: u32,
    offset: u64,
    digest: [u8; DIGEST_PREFIX],
}

impl ChunkJournal {
    /// Opens the file, and creates it if it is missing. Ignores damaged entries.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let mut file = open_or_read_only(path)?;
        let mut content = Vec::new();
        file.read_to_end(&mut content)?;
        let (entries, _) = content.as_chunks::<ENTRY_SIZE>();
        let (mut by_index, mut free) = (HashMap::<_, JournalEntry>::new(), Vec::new());
        for (number, entry) in entries.iter().enumerate() {
            let at = (number * ENTRY_SIZE) as u64;
            let Some((index, entry)) = parse(entry, at) else {
                free.push(at);
                continue;
            };
            // A chunk may have been removed and added elsewhere, of which only the addition has reached the disk. An
            // entry that is not known would never be removed.
            if let Some(earlier) = by_index.insert(index, entry) {
                file.write_all_at(&REMOVED, earlier.at)?;
                free.push(earlier.at);
            }
        }
        Ok(Self {
            file: Arc::new(file),
            by_index,
            free,
            len: (entries.len() * ENTRY_SIZE) as u64,
        })
    }

    /// Length of the file, in bytes.
    pub(super) fn len(&self) -> u64 {
        self.len
    }

    /// The file, to be synced without a lock of the journal. If that fails, call [`Self::on_failed_sync`].
    pub(super) fn file(&self) -> Arc<File> {
        Arc::clone(&self.file)
    }

    /// Whether there is an entry of that index.
    pub(super) fn contains(&self, index: u32) -> bool {
        self.by_index.contains_key(&index)
    }

    /// Whether the entry of the chunk's index describes that chunk; `None` if there is no entry.
    pub(super) fn matches(&self, chunk: &Chunk) -> Option<bool> {
        let entry = self.by_index.get(&chunk.index)?;
        Some(*entry == JournalEntry::new(chunk, entry.at))
    }

    /// All chunks, in no order.
    pub(super) fn chunks(&self) -> impl Iterator<Item = JournaledChunk> {
        self.by_index.iter().map(|(index, entry)| JournaledChunk {
            index: *index,
            start: entry.offset,
            end: entry.offset.saturating_add(u64::from(entry.size)),
        })
    }

    /// Adds an entry, unless there is one of the chunk's index.
    pub(super) fn add(&mut self, chunk: &Chunk) -> io::Result<()> {
        if self.contains(chunk.index) {
            return Ok(());
        }
        let entry = JournalEntry::new(chunk, self.free.last().copied().unwrap_or(self.len));
        self.file.write_all_at(&entry.to_bytes(chunk.index), entry.at)?;
        if self.free.pop().is_none() {
            self.len += ENTRY_SIZE as u64;
        }
        self.by_index.insert(chunk.index, entry);
        Ok(())
    }

    /// Removes the entry of that index.
    pub(super) fn remove(&mut self, index: u32) -> io::Result<()> {
        if let Some(entry) = self.by_index.get(&index) {
            self.file.write_all_at(&REMOVED, entry.at)?;
            self.free.push(entry.at);
            self.by_index.remove(&index);
        }
        Ok(())
    }

    /// Releases the space of the file if it has no entries.
    pub(super) fn shrink(&mut self) -> io::Result<()> {
        if self.by_index.is_empty() && self.len > 0 {
            self.file.set_len(0)?;
            self.free.clear();
            self.len = 0;
        }
        Ok(())
    }

    /// The file could not be synced. Drops all entries: the kernel reports a failed write only once, and what the file
    /// contains is unknown then.
    pub(super) fn on_failed_sync(&mut self) {
        self.by_index.clear();
        self.free.clear();
        self.len = 0;
        self.file.set_len(0).ok();
    }
}

impl JournalEntry {
    fn new(chunk: &Chunk, at: u64) -> Self {
        let mut digest = [0; DIGEST_PREFIX];
        digest.copy_from_slice(&chunk.digest[..DIGEST_PREFIX]);
        Self {
            at,
            size: chunk.uncompressed_size,
            offset: chunk.uncompressed_offset,
            digest,
        }
    }

    fn to_bytes(self, index: u32) -> [u8; ENTRY_SIZE] {
        let mut entry = [0; ENTRY_SIZE];
        entry[..4].copy_from_slice(&index.to_le_bytes());
        entry[4..8].copy_from_slice(&self.size.to_le_bytes());
        entry[8..16].copy_from_slice(&self.offset.to_le_bytes());
        entry[16..28].copy_from_slice(&self.digest);
        let crc = crc(&entry[..28]);
        entry[28..].copy_from_slice(&crc.to_le_bytes());
        entry
    }
}

/// Index and content of the entry at offset `at`, unless it is removed or damaged.
fn parse(entry: &[u8; ENTRY_SIZE], at: u64) -> Option<(u32, JournalEntry)> {
    let (rest, checksum) = entry.split_last_chunk::<4>()?;
    let (index, rest) = rest.split_first_chunk::<4>()?;
    let (size, rest) = rest.split_first_chunk::<4>()?;
    let (offset, digest) = rest.split_first_chunk::<8>()?;
    let parsed = JournalEntry {
        at,
        size: u32::from_le_bytes(*size),
        offset: u64::from_le_bytes(*offset),
        digest: digest.try_into().ok()?,
    };
    let is_valid = *entry != REMOVED && crc(&entry[..28]) == u32::from_le_bytes(*checksum);
    is_valid.then_some((u32::from_le_bytes(*index), parsed))
}

fn crc(bytes: &[u8]) -> u32 {
    let mut crc = flate2::Crc::new();
    crc.update(bytes);
    crc.sum()
}

#[cfg(test)]
mod tests {
    use std::fs;

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
    fn entries_survive_reopening() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("journal");
        let mut journal = ChunkJournal::open(&path).unwrap();
        for index in [5, 1, 700, 1] {
            journal.add(&chunk(index)).unwrap();
        }
        journal.remove(1).unwrap();
        journal.remove(2).unwrap();
        journal.add(&chunk(2)).unwrap();
        let mut other = chunk(5);
        other.digest[3] ^= 1;
        for journal in [journal, ChunkJournal::open(&path).unwrap()] {
            assert_eq!(
                [1, 2, 5, 700].map(|index| journal.contains(index)),
                [false, true, true, true]
            );
            assert_eq!(journal.matches(&chunk(5)), Some(true));
            assert_eq!(journal.matches(&other), Some(false));
            assert_eq!(journal.matches(&chunk(1)), None);
            assert_eq!(journal.chunks().count(), 3);
        }
    }

    #[test]
    fn damaged_entries_are_ignored() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("journal");
        let mut journal = ChunkJournal::open(&path).unwrap();
        (0..4).for_each(|index| journal.add(&chunk(index)).unwrap());
        let mut bytes = fs::read(&path).unwrap();
        bytes[ENTRY_SIZE + 9] ^= 1;
        bytes.extend([7; 10]);
        fs::write(&path, bytes).unwrap();
        let mut journal = ChunkJournal::open(&path).unwrap();
        assert_eq!(
            [0, 1, 2, 3].map(|index| journal.contains(index)),
            [true, false, true, true]
        );
        // The damaged and the incomplete entry are overwritten.
        journal.add(&chunk(9)).unwrap();
        journal.add(&chunk(10)).unwrap();
        let reopened = ChunkJournal::open(&path).unwrap();
        assert!(reopened.contains(9) && reopened.contains(10));
        assert_eq!(reopened.len(), 5 * ENTRY_SIZE as u64);
    }

    #[test]
    fn second_entry_of_a_chunk_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("journal");
        let entry = JournalEntry::new(&chunk(1), 0).to_bytes(1);
        fs::write(&path, [entry, entry].concat()).unwrap();
        ChunkJournal::open(&path).unwrap().remove(1).unwrap();
        assert!(!ChunkJournal::open(&path).unwrap().contains(1));
    }

    #[test]
    fn removed_entries_are_reused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("journal");
        let mut journal = ChunkJournal::open(&path).unwrap();
        (0..4).for_each(|index| journal.add(&chunk(index)).unwrap());
        for _ in 0..3 {
            [1, 3].iter().for_each(|index| journal.remove(*index).unwrap());
            journal.shrink().unwrap();
            journal = ChunkJournal::open(&path).unwrap();
            [3, 1].iter().for_each(|index| journal.add(&chunk(*index)).unwrap());
        }
        assert_eq!(fs::metadata(&path).unwrap().len(), 4 * ENTRY_SIZE as u64);
        let mut journal = ChunkJournal::open(&path).unwrap();
        assert!((0..4).all(|index| journal.matches(&chunk(index)) == Some(true)));
        (0..4).for_each(|index| journal.remove(index).unwrap());
        journal.shrink().unwrap();
        assert_eq!((fs::metadata(&path).unwrap().len(), journal.len()), (0, 0));
        journal.add(&chunk(2)).unwrap();
        assert!(ChunkJournal::open(&path).unwrap().contains(2));
    }
}
