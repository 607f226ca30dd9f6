//! The chunks of a layout in the order of their uncompressed offsets, which every kind of blob stores its bytes in.

use std::{
    ops::Range,
    sync::{Arc, OnceLock},
};

use super::layout::{BlobLayout, Chunk};

/// Positions in [`BlobLayout::chunks`] by uncompressed offset. Sorted at first use.
pub(super) struct ChunkOrder {
    layout: Arc<BlobLayout>,
    longest: u32,
    positions: OnceLock<Vec<u32>>,
}

impl ChunkOrder {
    pub(super) fn new(layout: Arc<BlobLayout>) -> Self {
        let sizes = layout.chunks.iter().map(|chunk| chunk.uncompressed_size);
        Self {
            longest: sizes.max().unwrap_or(0),
            layout,
            positions: OnceLock::new(),
        }
    }

    /// The chunks that are ordered.
    pub(super) fn layout(&self) -> &BlobLayout {
        &self.layout
    }

    /// Uncompressed size of the longest chunk. A chunk of that size probably does not end its file.
    pub(super) fn longest(&self) -> u32 {
        self.longest
    }

    /// Positions of the chunks that end in that range of uncompressed offsets, in order.
    pub(super) fn ending_in(&self, range: Range<u64>) -> Vec<usize> {
        let (chunks, positions) = (&self.layout.chunks, self.positions());
        let end = |position: &u32| uncompressed_end(&chunks[*position as usize]);
        // Chunks of a blob do not overlap, so that their ends are in order too.
        let start = positions.partition_point(|position| end(position) <= range.start);
        let rest = positions[start..].iter();
        rest.take_while(|position| end(position) <= range.end)
            .map(|position| *position as usize)
            .collect()
    }

    /// Positions of the chunks that start at that uncompressed offset or behind it, in order.
    pub(super) fn starting_from(&self, offset: u64) -> impl Iterator<Item = usize> {
        let (chunks, positions) = (&self.layout.chunks, self.positions());
        let start = positions.partition_point(|position| chunks[*position as usize].uncompressed_offset < offset);
        positions[start..].iter().map(|position| *position as usize)
    }

    fn positions(&self) -> &[u32] {
        self.positions.get_or_init(|| {
            let chunks = &self.layout.chunks;
            // A blob has fewer than 2^24 chunks.
            let mut positions: Vec<_> = (0..chunks.len() as u32).collect();
            positions.sort_by_key(|position| chunks[*position as usize].uncompressed_offset);
            positions
        })
    }
}

/// Where a chunk ends in the uncompressed image of its blob.
pub(super) fn uncompressed_end(chunk: &Chunk) -> u64 {
    chunk.uncompressed_offset + u64::from(chunk.uncompressed_size)
}
