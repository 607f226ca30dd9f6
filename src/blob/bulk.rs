//! What operations on whole blobs share: limits, progress, and hashing what is on disk.

use std::{
    io,
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
    cache::{CachedBlob, ChunkState, Hold},
    codec,
    error::{ReadCause, ReadError},
    fetcher::ChunkFetcher,
    scheduler::{PAGE, acquire, acquire_bytes},
};

/// Bytes in memory: stored ones, in flight or waiting for a core, and one decompressed unit for each request.
const MEMORY: usize = 64 << 20;
/// What each request counts for at least. It bounds their number, since readers use the same connections.
const MIN_REQUEST_MEMORY: usize = MEMORY / 12;
/// Uncompressed bytes that one blocking task hashes.
const HASH_TASK_BYTES: u64 = 8 << 20;

/// Limits of memory and threads, for all operations on whole blobs that share this.
pub struct BulkLimits {
    memory: Arc<Semaphore>,
    cores: Arc<Semaphore>,
}

/// Progress of a download, in bytes.
#[derive(Debug, Default)]
pub struct DownloadProgress {
    /// Uncompressed bytes to be cached in the end; 0 until that is known.
    pub total: AtomicU64,
    /// Uncompressed bytes of chunks that are in the cache and verified.
    pub cached: AtomicU64,
    /// Stored bytes that were fetched.
    pub fetched: AtomicU64,
}

impl Default for BulkLimits {
    fn default() -> Self {
        let cores = std::thread::available_parallelism().map_or(1, NonZero::get);
        Self {
            memory: Arc::new(Semaphore::new(MEMORY / PAGE)),
            cores: Arc::new(Semaphore::new(cores)),
        }
    }
}

impl BulkLimits {
    /// Waits for a core.
    pub(super) async fn acquire_core(&self) -> Option<OwnedSemaphorePermit> {
        acquire(&self.cores).await
    }

    /// Waits for so many bytes of memory.
    pub(super) async fn reserve_memory(&self, bytes: usize) -> Option<OwnedSemaphorePermit> {
        acquire_bytes(&self.memory, bytes.clamp(MIN_REQUEST_MEMORY, MEMORY)).await
    }
}

impl DownloadProgress {
    pub(super) fn add_cached(&self, bytes: u64) {
        self.cached.fetch_add(bytes, Ordering::Relaxed);
    }
}

/// Positions of all chunks that the image uses.
pub(super) fn positions(fetcher: &ChunkFetcher) -> std::ops::Range<usize> {
    0..fetcher.layout().chunks.len()
}

/// Whether the chunk is on disk, for this process and for later ones. It may be unverified.
pub(super) fn is_on_disk(fetcher: &ChunkFetcher, position: usize) -> bool {
    let index = fetcher.layout().chunks[position].index;
    fetcher.state(position) != ChunkState::Missing && fetcher.cached().is_journaled(index)
}

/// Does `work` on the cached blob in a blocking task. `position` is the chunk that an error names.
pub(super) async fn on_disk(
    fetcher: &ChunkFetcher,
    position: usize,
    work: impl FnOnce(&CachedBlob) -> io::Result<()> + Send + 'static,
) -> Result<(), ReadError> {
    let cached = Arc::clone(fetcher.cached());
    let done = tokio::task::spawn_blocking(move || work(&cached)).await;
    let done = done.unwrap_or_else(|error| Err(io::Error::other(error)));
    done.map_err(|error| fetcher.error(position, ReadCause::CacheWrite(Arc::new(error))))
}

/// Prevents the eviction of chunks of the blob as long as the result exists.
pub async fn hold(fetcher: &ChunkFetcher) -> Result<Hold, ReadError> {
    let cached = Arc::clone(fetcher.cached());
    let held = tokio::task::spawn_blocking(move || cached.hold()).await;
    held.map_err(|_| fetcher.error(0, ReadCause::Aborted))
}

/// Hashes the chunks at `positions` as they are on disk. Returns the corrupt ones in order; they are invalidated.
pub(super) async fn hash(
    fetcher: &Arc<ChunkFetcher>,
    positions: Vec<usize>,
    limits: &BulkLimits,
    progress: Option<&Arc<DownloadProgress>>,
) -> Result<Vec<usize>, ReadError> {
    let aborted = |_| fetcher.error(0, ReadCause::Aborted);
    let (mut corrupt, mut tasks) = (Vec::new(), JoinSet::new());
    for slice in slices(fetcher, &positions) {
        let core = limits.acquire_core().await;
        let (fetcher, progress) = (Arc::clone(fetcher), progress.map(Arc::clone));
        tasks.spawn_blocking(move || {
            let _core = core;
            hash_slice(&fetcher, slice, progress.as_deref())
        });
        while let Some(done) = tasks.try_join_next() {
            corrupt.extend(done.map_err(aborted)?);
        }
    }
    while let Some(done) = tasks.join_next().await {
        corrupt.extend(done.map_err(aborted)?);
    }
    corrupt.sort_unstable();
    Ok(corrupt)
}

/// Parts of `positions`, each of about [`HASH_TASK_BYTES`] of chunks.
fn slices(fetcher: &ChunkFetcher, positions: &[usize]) -> Vec<Vec<usize>> {
    let (mut slices, mut bytes) = (Vec::new(), HASH_TASK_BYTES);
    for position in positions {
        if bytes >= HASH_TASK_BYTES {
            slices.push(Vec::new());
            bytes = 0;
        }
        if let Some(slice) = slices.last_mut() {
            slice.push(*position);
        }
        bytes += u64::from(fetcher.layout().chunks[*position].uncompressed_size);
    }
    slices
}

fn hash_slice(fetcher: &ChunkFetcher, positions: Vec<usize>, progress: Option<&DownloadProgress>) -> Vec<usize> {
    let (layout, cached) = (fetcher.layout(), fetcher.cached());
    let mut plain = Vec::new();
    let mut is_corrupt = |position: &usize| {
        let chunk = &layout.chunks[*position];
        let epoch = cached.epoch();
        plain.resize(chunk.uncompressed_size as usize, 0);
        let read = cached.read(chunk, 0, &mut plain);
        if read.is_ok() && codec::matches(layout.digester, &plain, &chunk.digest) {
            cached.mark_verified(chunk.index, epoch);
            if let Some(progress) = progress {
                progress.add_cached(u64::from(chunk.uncompressed_size));
            }
            return false;
        }
        cached.counters().record_corrupt_chunk();
        cached.invalidate(chunk.index);
        true
    };
    positions.into_iter().filter(|position| is_corrupt(position)).collect()
}
