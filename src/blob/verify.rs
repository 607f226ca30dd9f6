//! Whole blobs at a time: bounds for such work, and hashing all that is in the cache.

use std::{
    collections::HashMap,
    num::NonZero,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    task::JoinSet,
};

use super::{
    cache::{CachedBlob, ChunkState},
    codec,
    error::{ReadCause, ReadError},
    reader::BlobReader,
    scheduler::{PAGE, one, room},
};

/// Bytes that may be in memory: stored ones, on their way or waiting for a core, and those of a unit decompressed.
const MEMORY: usize = 64 << 20;
/// What each request counts for at least, so that there are never many: readers use the same connections.
const LEAST: usize = MEMORY / 12;
/// Uncompressed bytes that are hashed without looking up.
const SLICE: u64 = 8 << 20;

/// Does such work within bounds. Those who share one share the bounds.
pub struct Bulk {
    memory: Arc<Semaphore>,
    cores: Arc<Semaphore>,
}

/// How far such work has come, in bytes.
#[derive(Debug, Default)]
pub struct Progress {
    /// Bytes that there are to be in the end; 0 until that is known.
    pub total: AtomicU64,
    /// Uncompressed bytes of chunks that are in the cache and verified.
    pub there: AtomicU64,
    /// Stored bytes that were fetched.
    pub fetched: AtomicU64,
}

/// What is in the cache of one blob's chunks, as one image knows them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Tally {
    /// Chunks that are there and right.
    pub good: u64,
    /// Uncompressed bytes of these.
    pub good_bytes: u64,
    /// Chunks that are not there.
    pub missing: u64,
    /// Uncompressed bytes of these.
    pub missing_bytes: u64,
    /// Chunks that were said to be there and are not what they should be.
    pub corrupt: u64,
    /// Uncompressed bytes of these.
    pub corrupt_bytes: u64,
}

impl Default for Bulk {
    fn default() -> Self {
        let cores = std::thread::available_parallelism().map_or(1, NonZero::get);
        Self {
            memory: Arc::new(Semaphore::new(MEMORY / PAGE)),
            cores: Arc::new(Semaphore::new(cores)),
        }
    }
}

impl Bulk {
    pub(super) async fn core(&self) -> Option<OwnedSemaphorePermit> {
        one(&self.cores).await
    }

    pub(super) async fn room_for(&self, bytes: usize) -> Option<OwnedSemaphorePermit> {
        room(&self.memory, bytes.clamp(LEAST, MEMORY)).await
    }
}

impl Progress {
    pub(super) fn add_there(&self, bytes: u64) {
        self.there.fetch_add(bytes, Ordering::Relaxed);
    }
}

impl Tally {
    /// Both together.
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

impl BlobReader {
    /// Uncompressed bytes of the chunks that the image uses.
    pub fn chunk_bytes(&self) -> u64 {
        let sizes = self.layout().chunks.iter();
        sizes.map(|chunk| u64::from(chunk.uncompressed_size)).sum()
    }

    /// Uncompressed bytes of those that are on disk, as far as is known.
    pub fn cached_bytes(&self) -> u64 {
        let chunks = self.layout().chunks.iter();
        let cached = chunks.filter(|chunk| self.cached().is_journaled(chunk.index));
        cached.map(|chunk| u64::from(chunk.uncompressed_size)).sum()
    }

    /// Hashes every chunk that is said to be on disk, but those of an index in `seen`, and adds theirs to it: whether they are
    /// right. What is wrong is not used any more; with `repair`, it is also forgotten on disk.
    ///
    /// # Errors
    /// If it cannot be forgotten.
    pub async fn verify(
        self: &Arc<Self>,
        bulk: &Arc<Bulk>,
        repair: bool,
        seen: &mut HashMap<u32, bool>,
    ) -> Result<Tally, ReadError> {
        let index = |position: &usize| self.layout().chunks[*position].index;
        let said =
            |position: &usize| seen.contains_key(&index(position)) || self.cached().is_journaled(index(position));
        let (present, missing): (Vec<_>, Vec<_>) = self.positions().partition(said);
        let unseen: Vec<_> = present
            .iter()
            .copied()
            .filter(|position| !seen.contains_key(&index(position)))
            .collect();
        self.cached().drop_pages();
        seen.extend(unseen.iter().map(|position| (index(position), true)));
        for wrong in self.hash(unseen, bulk, None).await? {
            seen.insert(index(&wrong), false);
        }
        let is_wrong = |position: &&usize| seen.get(&index(position)) == Some(&false);
        let wrong: Vec<_> = present.iter().filter(is_wrong).copied().collect();
        if let Some(first) = wrong.first().filter(|_| repair) {
            let indexes: Vec<_> = wrong.iter().map(index).collect();
            self.on_disk(*first, move |cached| cached.unclaim(&indexes)).await?;
        }
        let (missing_bytes, corrupt_bytes) = (self.bytes_of(&missing), self.bytes_of(&wrong));
        Ok(Tally {
            good: (present.len() - wrong.len()) as u64,
            good_bytes: self.chunk_bytes() - missing_bytes - corrupt_bytes,
            missing: missing.len() as u64,
            missing_bytes,
            corrupt: wrong.len() as u64,
            corrupt_bytes,
        })
    }

    /// Does something with the cached files where it holds nobody up; `position` is the chunk that an error names.
    pub(super) async fn on_disk(
        self: &Arc<Self>,
        position: usize,
        work: impl FnOnce(&CachedBlob) -> std::io::Result<()> + Send + 'static,
    ) -> Result<(), ReadError> {
        let reader = Arc::clone(self);
        let done = tokio::task::spawn_blocking(move || work(reader.cached())).await;
        let done = done.unwrap_or_else(|error| Err(std::io::Error::other(error)));
        done.map_err(|error| self.error(position, ReadCause::Keep(Arc::new(error))))
    }

    pub(super) fn positions(&self) -> std::ops::Range<usize> {
        0..self.layout().chunks.len()
    }

    fn bytes_of(&self, positions: &[usize]) -> u64 {
        let sizes = positions
            .iter()
            .map(|position| self.layout().chunks[*position].uncompressed_size);
        sizes.map(u64::from).sum()
    }

    /// Whether the chunk is on disk, for this process and for later ones, as far as is known.
    pub(super) fn is_there(&self, position: usize) -> bool {
        self.state(position) != ChunkState::Missing && self.cached().is_journaled(self.layout().chunks[position].index)
    }

    pub(super) fn state(&self, position: usize) -> ChunkState {
        self.cached().state(self.layout().chunks[position].index)
    }

    /// Hashes the chunks at `positions` as they are on disk; gives those that are not right, which count as missing from
    /// now on.
    pub(super) async fn hash(
        self: &Arc<Self>,
        positions: Vec<usize>,
        bulk: &Bulk,
        progress: Option<&Arc<Progress>>,
    ) -> Result<Vec<usize>, ReadError> {
        let aborted = |_| self.error(0, ReadCause::Aborted);
        let (mut wrong, mut under_way) = (Vec::new(), JoinSet::new());
        for slice in self.slices(&positions) {
            let core = bulk.core().await;
            let (reader, progress) = (Arc::clone(self), progress.map(Arc::clone));
            under_way.spawn_blocking(move || {
                let _core = core;
                reader.hash_slice(slice, progress.as_deref())
            });
            while let Some(done) = under_way.try_join_next() {
                wrong.extend(done.map_err(aborted)?);
            }
        }
        while let Some(done) = under_way.join_next().await {
            wrong.extend(done.map_err(aborted)?);
        }
        wrong.sort_unstable();
        Ok(wrong)
    }

    /// Parts of `positions` whose chunks together are about as long as [`SLICE`].
    fn slices(&self, positions: &[usize]) -> Vec<Vec<usize>> {
        let (mut slices, mut bytes) = (Vec::new(), SLICE);
        for position in positions {
            if bytes >= SLICE {
                slices.push(Vec::new());
                bytes = 0;
            }
            if let Some(slice) = slices.last_mut() {
                slice.push(*position);
            }
            bytes += u64::from(self.layout().chunks[*position].uncompressed_size);
        }
        slices
    }

    fn hash_slice(&self, positions: Vec<usize>, progress: Option<&Progress>) -> Vec<usize> {
        let (layout, cached) = (self.layout(), self.cached());
        let mut plain = Vec::new();
        let mut is_wrong = |position: &usize| {
            let chunk = &layout.chunks[*position];
            let epoch = cached.epoch();
            plain.resize(chunk.uncompressed_size as usize, 0);
            let read = cached.read(chunk, 0, &mut plain);
            if read.is_ok() && codec::matches(layout.digester, &plain, &chunk.digest) {
                cached.confirm(chunk.index, epoch);
                if let Some(progress) = progress {
                    progress.add_there(u64::from(chunk.uncompressed_size));
                }
                return false;
            }
            cached.distrust(chunk.index);
            true
        };
        positions.into_iter().filter(|position| is_wrong(position)).collect()
    }
}
