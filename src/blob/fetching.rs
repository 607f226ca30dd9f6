//! How much may be fetched at a time, and counts of what was.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::error::ReadCause;

/// Bytes of units, stored and uncompressed together, that may be in memory at a time for one registry. A larger unit
/// has it for itself.
const MEMORY: usize = 256 << 20;
/// The same for what is read from disk, which must not wait until a registry answers.
const DISK_MEMORY: usize = 64 << 20;
/// What memory is counted in: a semaphore cannot hold as many permits as there are bytes.
const PAGE: usize = 4096;

/// What the readers of a process share.
pub struct Fetching {
    /// How long a unit may take, waiting for its turn included.
    patience: Duration,
    lanes: Mutex<HashMap<String, Arc<Lane>>>,
    counters: Arc<Counters>,
}

/// What the readers of one registry share, so that one that stalls does not hold up the others.
pub struct Lane {
    patience: Duration,
    memory: Arc<Semaphore>,
    disk_memory: Arc<Semaphore>,
    counters: Arc<Counters>,
}

#[derive(Default)]
struct Counters {
    units: AtomicU64,
    bytes: AtomicU64,
}

/// Counts since the start of the process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
pub struct FetchCounts {
    /// Units fetched; a unit that several readers wait for counts once.
    pub units: u64,
    /// Stored bytes of these units.
    pub bytes: u64,
}

impl Fetching {
    /// Nothing fetched yet. A unit that takes longer than `patience` is given up.
    pub fn new(patience: Duration) -> Self {
        Self {
            patience,
            lanes: Mutex::default(),
            counters: Arc::default(),
        }
    }

    /// The lane of a registry.
    pub fn lane(&self, registry: &str) -> Arc<Lane> {
        let mut lanes = self.lanes.lock();
        lanes.retain(|_, lane| Arc::strong_count(lane) > 1);
        let new = || {
            let room = |bytes: usize| Arc::new(Semaphore::new(bytes / PAGE));
            let counters = Arc::clone(&self.counters);
            Arc::new(Lane {
                patience: self.patience,
                memory: room(MEMORY),
                disk_memory: room(DISK_MEMORY),
                counters,
            })
        };
        Arc::clone(lanes.entry(registry.to_owned()).or_insert_with(new))
    }

    /// What was fetched so far.
    pub fn counts(&self) -> FetchCounts {
        FetchCounts {
            units: self.counters.units.load(Ordering::Relaxed),
            bytes: self.counters.bytes.load(Ordering::Relaxed),
        }
    }
}

impl Lane {
    /// Does `work` for as long as a unit may take, waiting for its turn included.
    pub(super) async fn patiently<T>(&self, work: impl Future<Output = Result<T, ReadCause>>) -> Result<T, ReadCause> {
        let outcome = tokio::time::timeout(self.patience, work).await;
        outcome.unwrap_or(Err(ReadCause::TimedOut(self.patience.as_secs())))
    }

    /// Waits until there is room for so many bytes of what is fetched.
    pub(super) async fn room_for(&self, bytes: usize) -> Option<OwnedSemaphorePermit> {
        room(&self.memory, bytes.min(MEMORY)).await
    }

    /// Waits until there is room for so many bytes of what is on disk.
    pub(super) async fn room_from_disk(&self, bytes: usize) -> Option<OwnedSemaphorePermit> {
        room(&self.disk_memory, bytes.min(DISK_MEMORY)).await
    }

    /// Counts a unit that was fetched.
    pub(super) fn count(&self, stored: usize) {
        self.counters.units.fetch_add(1, Ordering::Relaxed);
        self.counters.bytes.fetch_add(stored as u64, Ordering::Relaxed);
    }
}

/// `None` is never the case: the semaphore is not closed.
async fn room(memory: &Arc<Semaphore>, bytes: usize) -> Option<OwnedSemaphorePermit> {
    // At most MEMORY / PAGE, which fits.
    let pages = bytes.div_ceil(PAGE) as u32;
    Arc::clone(memory).acquire_many_owned(pages).await.ok()
}
