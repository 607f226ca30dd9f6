//! Reads the chunks of one blob for one image: the facade that images use.
//!
//! [`BlobReader`] answers from the cache file where it can. It leaves fetching to [`ChunkFetcher`], and what to fetch
//! beforehand to [`super::prefetcher`].

use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicU32, Ordering},
};

use tokio::{runtime::Handle, task::JoinHandle};

use super::{
    atomic_bit_set::AtomicBitSet,
    cache::ChunkState,
    cache_counters::CacheCounters,
    chunk_order::ChunkOrder,
    error::{ReadCause, ReadError},
    fetcher::{ChunkFetcher, CoalescingPolicy},
    layout::BlobLayout,
    prefetcher::{
        self,
        coalesce::Coalescer,
        read_ahead::{PrefetchBackoff, ReadAhead},
    },
    scheduler::{Priority, RegistryScheduler},
    shared::SharedBlob,
    source::Source,
    unit::DecodedUnit,
};
pub use super::{prefetcher::coalesce::SuspendedCoalescing, unit_map::MetaSource};

/// How often a chunk is copied from the cache file while chunks of the blob are evicted, before the caller waits.
const MAX_COPIES: usize = 3;

/// One blob as one image reads it.
pub struct BlobReader {
    fetcher: Arc<ChunkFetcher>,
    read_ahead: Option<Arc<ReadAhead>>,
    /// For each position in the layout, the epoch of the cache in which the chunk was [`ChunkState::Ready`], or 0.
    /// Spares [`Self::read_ready`] the lock of the cache.
    ready: Vec<AtomicU32>,
    /// The chunks that have been read at all.
    seen: AtomicBitSet,
}

/// A chunk that is being fetched.
pub struct PendingChunk(JoinHandle<Result<Arc<DecodedUnit>, ReadError>>);

impl BlobReader {
    /// A reader of the blob that `layout` describes. It reads ahead if `scheduler` does and if called within a runtime.
    pub fn new(
        layout: Arc<BlobLayout>,
        blob: Arc<SharedBlob>,
        source: Arc<dyn Source>,
        scheduler: Arc<RegistryScheduler>,
        meta_source: MetaSource,
    ) -> Arc<Self> {
        let ready = layout.chunks.iter().map(|_| AtomicU32::new(0)).collect();
        let seen = AtomicBitSet::new(layout.chunks.len());
        let runtime = Handle::try_current().ok().filter(|_| scheduler.reads_ahead());
        let Some(runtime) = runtime else {
            return Arc::new(Self {
                fetcher: ChunkFetcher::new(layout, blob, source, scheduler, meta_source, None),
                read_ahead: None,
                ready,
                seen,
            });
        };
        let order = Arc::new(ChunkOrder::new(Arc::clone(&layout)));
        let backoff = Arc::new(PrefetchBackoff::default());
        let coalescer = Arc::new(Coalescer::new(Arc::clone(&order), Arc::clone(&backoff)));
        let policy = Arc::clone(&coalescer) as Arc<dyn CoalescingPolicy>;
        let fetcher = ChunkFetcher::new(layout, blob, source, scheduler, meta_source, Some(policy));
        let read_ahead = ReadAhead::new(Arc::clone(&fetcher), order, coalescer, backoff, runtime);
        Arc::new(Self {
            fetcher,
            read_ahead: Some(read_ahead),
            ready,
            seen,
        })
    }

    /// What the image's bootstrap says of the blob.
    pub fn layout(&self) -> &BlobLayout {
        self.fetcher.layout()
    }

    /// The name of the blob in the cache.
    pub fn cache_name(&self) -> &str {
        self.fetcher.cached().name()
    }

    /// Whether more chunks in the cache would have others evicted.
    pub fn is_cache_nearly_full(&self) -> bool {
        self.fetcher.cached().is_cache_nearly_full()
    }

    /// The layer below, for operations on the whole blob.
    pub fn fetcher(&self) -> &Arc<ChunkFetcher> {
        &self.fetcher
    }

    /// The counters of the cache.
    pub fn counters(&self) -> &CacheCounters {
        self.fetcher.cached().counters()
    }

    /// Uncompressed bytes of the chunks that the image uses.
    pub fn chunk_bytes(&self) -> u64 {
        self.layout().chunk_bytes()
    }

    /// Uncompressed bytes of those chunks that the journal of the cache lists.
    pub fn cached_bytes(&self) -> u64 {
        let chunks = self.layout().chunks.iter();
        let cached = chunks.filter(|chunk| self.fetcher.cached().is_journaled(chunk.index));
        cached.map(|chunk| u64::from(chunk.uncompressed_size)).sum()
    }

    /// Whether the chunk at `position` would have to be fetched from the source.
    pub fn is_missing(&self, position: usize) -> bool {
        self.fetcher.is_missing(position)
    }

    /// Marks the chunk at `position` as read. Returns whether this is the first time.
    pub fn mark_seen(&self, position: usize) -> bool {
        self.seen.insert(position)
    }

    /// Whether the chunk at `position` was evicted since it was last read; true only once. What follows it was probably
    /// evicted too, and is to be read ahead again.
    pub fn notice_eviction(&self, position: usize) -> bool {
        let ready = &self.ready[position];
        let known = ready.load(Ordering::Acquire);
        if known == 0 || known == self.fetcher.cached().epoch() || !self.is_missing(position) {
            return false;
        }
        ready.swap(0, Ordering::AcqRel) != 0
    }

    /// Tells read-ahead of the first access to the chunk at `position`. `is_first_of_request` tells whether it is the
    /// first such chunk of its request.
    pub fn on_first_access(&self, position: usize, is_first_of_request: bool) {
        if let Some(read_ahead) = &self.read_ahead {
            read_ahead.on_first_access(position, is_first_of_request);
        }
    }

    /// Cancels read-ahead that was requested but has not been sent yet.
    pub fn cancel_read_ahead(&self) {
        if let Some(read_ahead) = &self.read_ahead {
            read_ahead.cancel();
        }
    }

    /// Suspends coalescing, as when a trace tells what will be read. Counted: it lasts until all returned values are
    /// dropped.
    pub fn suspend_coalescing(&self) -> SuspendedCoalescing {
        let read_ahead = self.read_ahead.as_ref();
        read_ahead.map_or_else(SuspendedCoalescing::none, |read_ahead| read_ahead.coalescer().suspend())
    }

    /// Fetches those of the chunks at `positions` that are missing, before a reader needs them. Ends early once
    /// `cancelled` is set. Leaves out units that take much memory.
    ///
    /// # Errors
    /// The first failure ends it. Corruption is none with [`Priority::Ahead`], since it may concern a single chunk.
    pub async fn prefetch(
        &self,
        positions: &[usize],
        priority: Priority,
        cancelled: &AtomicBool,
    ) -> Result<(), ReadCause> {
        prefetcher::prefetch(&self.fetcher, positions, priority, cancelled).await
    }

    /// Fills `into` from the chunk at `position` of the layout, if the chunk is on disk and verified. Does not wait.
    pub fn read_ready(&self, position: usize, offset: u32, into: &mut [u8]) -> bool {
        let (chunk, cached) = (&self.layout().chunks[position], self.fetcher.cached());
        let within = u64::from(offset) + into.len() as u64 <= u64::from(chunk.uncompressed_size);
        for _ in 0..MAX_COPIES {
            let epoch = cached.epoch();
            if !within || !self.is_ready(position, epoch) {
                return false;
            }
            if let Err(error) = cached.read(chunk, offset, into) {
                cached.on_unreadable(chunk, &error);
                self.ready[position].store(0, Ordering::Release);
                return false;
            }
            // Otherwise the chunk may have been evicted meanwhile; see `super::eviction`.
            if cached.is_epoch(epoch) {
                cached.touch(chunk);
                return true;
            }
        }
        false
    }

    /// Fills `into` from the chunk at `position` of the layout, fetching it if it is missing, or waiting for `started`.
    pub async fn read(
        &self,
        position: usize,
        started: Option<PendingChunk>,
        offset: u32,
        into: &mut [u8],
    ) -> Result<(), ReadError> {
        let decoded = match started {
            Some(PendingChunk(task)) => {
                let ended = task.await;
                ended.unwrap_or_else(|_| Err(self.fetcher.error(position, ReadCause::Aborted)))?
            }
            None if self.read_ready(position, offset, into) => {
                self.counters().record_hits(1, into.len());
                return Ok(());
            }
            None => self.fetcher.chunk(position).await?,
        };
        let (chunk, range) = (
            &self.layout().chunks[position],
            offset as usize..offset as usize + into.len(),
        );
        self.fetcher.cached().touch(chunk);
        let plain = decoded.chunk(chunk);
        match plain.and_then(|plain| plain.get(range)) {
            Some(plain) => into.copy_from_slice(plain),
            None => return Err(self.fetcher.error(position, ReadCause::Digest)),
        }
        match decoded.is_from_cache {
            true => self.counters().record_hits(1, into.len()),
            false => self.counters().record_miss(into.len()),
        }
        Ok(())
    }

    /// Starts to fetch the chunk at `position` without waiting for it; `None` if it is ready.
    pub fn start(&self, position: usize) -> Option<PendingChunk> {
        if self.is_ready(position, self.fetcher.cached().epoch()) {
            return None;
        }
        let fetcher = Arc::clone(&self.fetcher);
        Some(PendingChunk(tokio::spawn(async move { fetcher.chunk(position).await })))
    }

    /// Whether the chunk at `position` is on disk and verified; `epoch` is the current epoch of the cache.
    fn is_ready(&self, position: usize, epoch: u32) -> bool {
        let ready = &self.ready[position];
        if ready.load(Ordering::Acquire) == epoch {
            return true;
        }
        let is_ready = self.fetcher.state(position) == ChunkState::Ready;
        if is_ready {
            ready.store(epoch, Ordering::Release);
        }
        is_ready
    }
}
