//! Verifies all that is on disk of a blob.

use std::{collections::HashMap, sync::Arc};

use super::{
    bulk::{self, BulkLimits},
    error::ReadError,
    fetcher::ChunkFetcher,
};

/// What is in the cache of one blob's chunks, as one image knows them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Tally {
    /// Chunks that are on disk and match their digests.
    pub good: u64,
    /// Uncompressed bytes of these.
    pub good_bytes: u64,
    /// Chunks that are not on disk.
    pub missing: u64,
    /// Uncompressed bytes of these.
    pub missing_bytes: u64,
    /// Chunks that the journal lists and that do not match their digests.
    pub corrupt: u64,
    /// Uncompressed bytes of these.
    pub corrupt_bytes: u64,
}

impl Tally {
    /// The sum of both.
    pub fn plus(self, other: Self) -> Self {
        Self {
            good: self.good + other.good,
            good_bytes: self.good_bytes + other.good_bytes,
            missing: self.missing + other.missing,
            missing_bytes: self.missing_bytes + other.missing_bytes,
            corrupt: self.corrupt + other.corrupt,
            corrupt_bytes: self.corrupt_bytes + other.corrupt_bytes,
        }
    }
}

/// Hashes every chunk that the journal lists, except those whose index is in `verified`. Adds each to `verified`:
/// whether it is good. Corrupt chunks are invalidated; with `repair`, they are also removed from the journal.
///
/// # Errors
/// If the journal cannot be written to.
pub async fn verify(
    fetcher: &Arc<ChunkFetcher>,
    limits: &BulkLimits,
    repair: bool,
    verified: &mut HashMap<u32, bool>,
) -> Result<Tally, ReadError> {
    // What is evicted while it is hashed would look corrupt.
    let _held = bulk::hold(fetcher).await?;
    let index = |position: &usize| fetcher.layout().chunks[*position].index;
    let is_listed = |position: &usize| {
        let index = index(position);
        verified.contains_key(&index) || fetcher.cached().is_journaled(index)
    };
    let (listed, missing): (Vec<_>, Vec<_>) = bulk::positions(fetcher).partition(is_listed);
    let is_new = |position: &usize| !verified.contains_key(&index(position));
    let new: Vec<_> = listed.iter().copied().filter(is_new).collect();
    fetcher.cached().drop_page_cache();
    verified.extend(new.iter().map(|position| (index(position), true)));
    for corrupt in bulk::hash(fetcher, new, limits, None).await? {
        verified.insert(index(&corrupt), false);
    }
    let is_corrupt = |position: &&usize| verified.get(&index(position)) == Some(&false);
    let corrupt: Vec<_> = listed.iter().filter(is_corrupt).copied().collect();
    if let Some(first) = corrupt.first().filter(|_| repair) {
        let indexes: Vec<_> = corrupt.iter().map(index).collect();
        bulk::on_disk(fetcher, *first, move |cached| cached.remove_from_journal(&indexes)).await?;
    }
    let (missing_bytes, corrupt_bytes) = (bytes_of(fetcher, &missing), bytes_of(fetcher, &corrupt));
    Ok(Tally {
        good: (listed.len() - corrupt.len()) as u64,
        good_bytes: fetcher.layout().chunk_bytes() - missing_bytes - corrupt_bytes,
        missing: missing.len() as u64,
        missing_bytes,
        corrupt: corrupt.len() as u64,
        corrupt_bytes,
    })
}

fn bytes_of(fetcher: &ChunkFetcher, positions: &[usize]) -> u64 {
    let chunks = &fetcher.layout().chunks;
    let sizes = positions.iter().map(|position| chunks[*position].uncompressed_size);
    sizes.map(u64::from).sum()
}
