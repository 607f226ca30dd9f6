//! [`ChunkTable`]: the chunks of a cached blob that images in use know, and the state of each.

use std::collections::{BTreeMap, HashMap};

use super::{
    cache::ChunkState,
    chunk_journal::{ChunkJournal, JournaledChunk},
    layout::{BlobLayout, Chunk},
};

/// The chunks of the images that share a blob.
pub(super) struct ChunkTable {
    /// Chunks by index.
    pub(super) by_index: HashMap<u32, (Chunk, ChunkState)>,
    /// Uncompressed ranges in use: start → end.
    ranges: BTreeMap<u64, u64>,
}

impl ChunkTable {
    /// A table without chunks. The ranges of journaled chunks are in use.
    pub(super) fn new(journal: &ChunkJournal) -> Self {
        Self {
            by_index: HashMap::new(),
            ranges: journal.chunks().map(|chunk| (chunk.start, chunk.end)).collect(),
        }
    }

    /// A journaled chunk is evicted: it is missing, and its range is free unless an image in use knows the chunk.
    pub(super) fn on_evicted(&mut self, chunk: &JournaledChunk) {
        match self.by_index.get_mut(&chunk.index) {
            Some((_, state)) => *state = ChunkState::Missing,
            None => _ = self.ranges.remove(&chunk.start),
        }
    }

    /// Adds the chunks of `layout`. Returns false, and changes nothing, if they contradict those already known.
    pub(super) fn add_layout(&mut self, layout: &BlobLayout, journal: &ChunkJournal) -> bool {
        let mut new: Vec<&Chunk> = Vec::new();
        for chunk in &layout.chunks {
            match self.by_index.get(&chunk.index) {
                Some((known, _)) if known == chunk => {}
                Some(_) => return false,
                None => new.push(chunk),
            }
        }
        let mut reserved = Vec::with_capacity(new.len());
        let fits = new.iter().all(|chunk| match journal.matches(chunk) {
            // The range of a journaled chunk is reserved already.
            Some(is_same) => is_same,
            None => self
                .reserve_range(chunk)
                .inspect(|start| reserved.push(*start))
                .is_some(),
        });
        if !fits {
            for start in reserved {
                self.ranges.remove(&start);
            }
            return false;
        }
        for chunk in new {
            let state = if journal.contains(chunk.index) {
                ChunkState::Unverified
            } else {
                ChunkState::Missing
            };
            self.by_index.insert(chunk.index, (*chunk, state));
        }
        true
    }

    /// Reserves the chunk's uncompressed range and returns its start; `None` if it overlaps another chunk.
    fn reserve_range(&mut self, chunk: &Chunk) -> Option<u64> {
        let start = chunk.uncompressed_offset;
        let end = start.checked_add(u64::from(chunk.uncompressed_size))?;
        let overlaps = self
            .ranges
            .range(..end)
            .next_back()
            .is_some_and(|(_, known_end)| *known_end > start);
        (!overlaps).then(|| {
            self.ranges.insert(start, end);
            start
        })
    }
}
