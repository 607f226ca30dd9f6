//! Limits what is fetched at a time, and decides what goes first.
//!
//! *Demand*, which a reader waits for, goes first: it has memory and requests of its own. *Read-ahead* has few requests
//! at a time. The *background* has one request for each registry, which waits while there is demand. Each registry has
//! a [`RegistryScheduler`] of its own, so that a registry that stalls does not delay the readers of others.

use std::{collections::HashMap, num::NonZero, sync::Arc, time::Duration};

use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};

use super::{error::ReadCause, link_estimator::LinkEstimator};
use crate::waits::{WaitGuard, WaitKind, Waits};

/// Bytes of memory for units of one registry that readers wait for, stored and uncompressed bytes together. A larger
/// unit takes all of it.
const MAX_MEMORY: usize = 256 << 20;
/// Bytes of memory that each registry has besides, whatever the others take.
const RESERVED_MEMORY: usize = 32 << 20;
/// As [`MAX_MEMORY`], for all registries together.
const MAX_MEMORY_GLOBAL: usize = 1 << 30;
/// Bytes of memory for what is read from disk. Apart, so that a cached chunk does not wait for a registry.
const MAX_DISK_MEMORY: usize = 64 << 20;
/// The unit in which semaphores count memory, in bytes: a semaphore has fewer permits than there are bytes.
pub(super) const PAGE: usize = 4096;
/// Read-ahead requests at a time to one registry, if it has slots for so many. Each takes up to
/// [`MAX_PREFETCH_MEMORY`], and a copy of a part of it.
const MAX_READ_AHEAD_REQUESTS: usize = 6;
/// The same for all registries together.
const MAX_READ_AHEAD_REQUESTS_GLOBAL: usize = 18;
/// The highest number of waiting fetches at which a response tells the speed of the link: more of them share it, and
/// wait for request slots.
const MAX_LIGHT_DEMAND: usize = 4;
/// Background requests at a time to all registries; each registry has one.
const MAX_BACKGROUND_REQUESTS_GLOBAL: usize = 2;
/// Bytes of memory that one request for several units may take: stored bytes, and the longest unit uncompressed.
pub(super) const MAX_PREFETCH_MEMORY: u64 = 8 << 20;

/// The limits of a process.
pub struct FetchScheduler {
    /// How long a unit may take, including the wait for permits and memory.
    timeout: Duration,
    read_ahead: bool,
    max_read_ahead: usize,
    registries: Mutex<HashMap<String, Arc<RegistryScheduler>>>,
    global: Arc<GlobalLimits>,
}

/// The limits that all readers of one registry share.
pub struct RegistryScheduler {
    host: String,
    timeout: Duration,
    read_ahead: bool,
    memory: Arc<Semaphore>,
    reserved_memory: Arc<Semaphore>,
    disk_memory: Arc<Semaphore>,
    read_ahead_requests: Arc<Semaphore>,
    max_read_ahead: usize,
    background_requests: Arc<Semaphore>,
    /// The speed of the link to the registry.
    pub(super) link: LinkEstimator,
    /// Number of fetches that a reader waits for.
    demand: watch::Sender<usize>,
    global: Arc<GlobalLimits>,
}

/// The limits that all registries share.
struct GlobalLimits {
    memory: Arc<Semaphore>,
    read_ahead_requests: Arc<Semaphore>,
    background_requests: Arc<Semaphore>,
    /// Threads that decompress prefetched units: as many as there are cores.
    cores: Arc<Semaphore>,
    /// The waits of readers.
    waits: Arc<Waits>,
}

/// How urgent a prefetch is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Priority {
    /// A reader will need it soon.
    Ahead,
    /// A reader may need it some time.
    Background,
}

/// Permits of a registry and of all registries together, released when dropped.
pub(super) struct FetchPermit {
    _registry: Option<OwnedSemaphorePermit>,
    _global: Option<OwnedSemaphorePermit>,
}

/// Counts as demand until it is dropped.
struct DemandGuard<'a>(&'a RegistryScheduler);

impl FetchScheduler {
    /// A unit that takes longer than `timeout` fails. `read_ahead` enables read-ahead and coalescing. Sources have
    /// slots for `max_read_ahead` requests of read-ahead at a time. More requests would wait for a slot with their
    /// units in flight already, and readers of these would wait with them.
    pub fn new(timeout: Duration, read_ahead: bool, max_read_ahead: usize) -> Self {
        let cores = std::thread::available_parallelism().map_or(1, NonZero::get);
        let permits = |count| Arc::new(Semaphore::new(count));
        Self {
            timeout,
            read_ahead,
            max_read_ahead: max_read_ahead.clamp(1, MAX_READ_AHEAD_REQUESTS),
            registries: Mutex::default(),
            global: Arc::new(GlobalLimits {
                memory: permits(MAX_MEMORY_GLOBAL / PAGE),
                read_ahead_requests: permits(MAX_READ_AHEAD_REQUESTS_GLOBAL),
                background_requests: permits(MAX_BACKGROUND_REQUESTS_GLOBAL),
                cores: permits(cores),
                waits: Arc::default(),
            }),
        }
    }

    /// What readers of all registries wait for at present.
    pub fn waits(&self) -> &Arc<Waits> {
        &self.global.waits
    }

    /// The scheduler of a registry.
    pub fn registry(&self, host: &str) -> Arc<RegistryScheduler> {
        let mut registries = self.registries.lock();
        registries.retain(|_, registry| Arc::strong_count(registry) > 1);
        let new = || {
            let permits = |count| Arc::new(Semaphore::new(count));
            Arc::new(RegistryScheduler {
                host: host.to_owned(),
                timeout: self.timeout,
                read_ahead: self.read_ahead,
                memory: permits(MAX_MEMORY / PAGE),
                reserved_memory: permits(RESERVED_MEMORY / PAGE),
                disk_memory: permits(MAX_DISK_MEMORY / PAGE),
                read_ahead_requests: permits(self.max_read_ahead),
                max_read_ahead: self.max_read_ahead,
                background_requests: permits(1),
                link: LinkEstimator::default(),
                demand: watch::Sender::new(0),
                global: Arc::clone(&self.global),
            })
        };
        Arc::clone(registries.entry(host.to_owned()).or_insert_with(new))
    }
}

impl RegistryScheduler {
    /// Does `work` within the time-out of a unit, which includes the wait for permits and memory.
    pub(super) async fn with_timeout<T>(
        &self,
        work: impl Future<Output = Result<T, ReadCause>>,
    ) -> Result<T, ReadCause> {
        let outcome = tokio::time::timeout(self.timeout, work).await;
        outcome.unwrap_or(Err(ReadCause::TimedOut(self.timeout.as_secs())))
    }

    /// Time-out of a coalesced request, after which the wanted unit is fetched alone. It is half of the time-out of a
    /// request, so that there is time left.
    pub(super) fn coalesced_timeout(&self) -> Duration {
        self.timeout / 4
    }

    /// Whether the registry has so few request slots that none is spent on coalescing.
    pub(super) fn has_few_requests(&self) -> bool {
        self.max_read_ahead < 2
    }

    /// Whether read-ahead and coalescing are enabled.
    pub(super) fn reads_ahead(&self) -> bool {
        self.read_ahead
    }

    /// Waits for so many bytes of memory, for a unit that a reader waits for.
    pub(super) async fn reserve_memory(&self, bytes: usize) -> FetchPermit {
        // A semaphore never has as many permits as `u32::MAX`, so that such a request fails here.
        let pages = u32::try_from(bytes.div_ceil(PAGE)).unwrap_or(u32::MAX);
        if let Ok(reserved) = Arc::clone(&self.reserved_memory).try_acquire_many_owned(pages) {
            return FetchPermit {
                _registry: Some(reserved),
                _global: None,
            };
        }
        let bytes = bytes.min(MAX_MEMORY);
        FetchPermit {
            _registry: acquire_bytes(&self.memory, bytes).await,
            _global: acquire_bytes(&self.global.memory, bytes).await,
        }
    }

    /// Waits for so many bytes of memory, for what is read from disk.
    pub(super) async fn reserve_disk_memory(&self, bytes: usize) -> Option<OwnedSemaphorePermit> {
        acquire_bytes(&self.disk_memory, bytes.min(MAX_DISK_MEMORY)).await
    }

    /// Waits for the permit to send a prefetch request.
    pub(super) async fn acquire_prefetch(&self, priority: Priority) -> FetchPermit {
        if priority == Priority::Ahead {
            return FetchPermit {
                _registry: acquire(&self.read_ahead_requests).await,
                _global: acquire(&self.global.read_ahead_requests).await,
            };
        }
        loop {
            // Waits before it takes the permits, which other registries need too.
            self.no_demand().await;
            let permit = FetchPermit {
                _registry: acquire(&self.background_requests).await,
                _global: acquire(&self.global.background_requests).await,
            };
            if *self.demand.borrow() == 0 {
                return permit;
            }
        }
    }

    /// Waits until no reader waits for this registry.
    async fn no_demand(&self) {
        // An error means that the scheduler is gone, and its demand with it.
        self.demand.subscribe().wait_for(|count| *count == 0).await.ok();
    }

    /// Whether so few readers wait for this registry that the link, and not the other readers, limits a response.
    pub(super) fn is_lightly_loaded(&self) -> bool {
        *self.demand.borrow() <= MAX_LIGHT_DEMAND
    }

    /// Waits for a core to decompress prefetched units on.
    pub(super) async fn acquire_core(&self) -> Option<OwnedSemaphorePermit> {
        acquire(&self.global.cores).await
    }

    /// Lists a reader's wait for a chunk until the result is dropped.
    pub(super) fn begin_wait(&self, blob: &str, chunk: u32) -> WaitGuard<'_> {
        let what = format!("chunk {chunk} of blob {blob} from {}", self.host);
        self.global.waits.begin(WaitKind::Chunk, what)
    }

    /// Does `work` that a reader waits for, and counts it as demand meanwhile.
    pub(super) async fn as_demand<T>(&self, work: impl Future<Output = T>) -> T {
        self.demand.send_modify(|count| *count += 1);
        let _demand = DemandGuard(self);
        work.await
    }
}

impl Drop for DemandGuard<'_> {
    fn drop(&mut self) {
        self.0.demand.send_modify(|count| *count -= 1);
    }
}

/// Waits for so many bytes of a semaphore that counts in [`PAGE`]s; `bytes` must not exceed what it has. Never returns
/// `None`: the semaphore is not closed.
pub(super) async fn acquire_bytes(memory: &Arc<Semaphore>, bytes: usize) -> Option<OwnedSemaphorePermit> {
    // Fits: it is at most the number of permits.
    let pages = bytes.div_ceil(PAGE) as u32;
    Arc::clone(memory).acquire_many_owned(pages).await.ok()
}

/// Waits for one permit. Never returns `None`, likewise.
pub(super) async fn acquire(permits: &Arc<Semaphore>) -> Option<OwnedSemaphorePermit> {
    Arc::clone(permits).acquire_owned().await.ok()
}
