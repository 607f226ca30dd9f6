//! How much may be fetched at a time and what goes first.
//!
//! A *lane* is what the readers of one registry share, so that one that stalls holds up no other. What somebody waits for
//! (*demand*) goes first: it has memory and requests of its own. *Read-ahead* has a few requests at a time, and what is
//! fetched in the *background* has one, which waits as long as there is demand.

use std::{collections::HashMap, num::NonZero, sync::Arc, time::Duration};

use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};

use super::{error::ReadCause, link_estimator::LinkEstimator};

/// Bytes of units, stored and uncompressed together, that demand may have in memory at a time for one registry. A larger
/// unit has it for itself.
const MEMORY: usize = 256 << 20;
/// What a registry has of that besides, whatever the others take.
const OWN_MEMORY: usize = 32 << 20;
/// The same for all registries.
const MEMORY_IN_ALL: usize = 1 << 30;
/// The same for what is read from disk, which must not wait until a registry answers.
const DISK_MEMORY: usize = 64 << 20;
/// What memory is counted in: a semaphore cannot hold as many permits as there are bytes.
pub(super) const PAGE: usize = 4096;
/// Requests of read-ahead at a time to one registry, if it has places for so many. Each takes up to [`MOST_AHEAD`] of memory,
/// and a copy of a part of it.
const AHEAD: usize = 6;
/// The same to all.
const AHEAD_IN_ALL: usize = 18;
/// Those who wait that are no crowd: there are places for their requests, and they do not share the link with many.
const CALM: usize = 4;
/// Requests in the background at a time to all registries; to each there is one.
const BACKGROUND_IN_ALL: usize = 2;
/// Most bytes, stored and of the longest unit uncompressed, that one request for several units may take.
pub(super) const MOST_AHEAD: u64 = 8 << 20;

/// What the readers of a process share.
pub struct FetchScheduler {
    /// How long a unit may take, waiting for its turn included.
    patience: Duration,
    read_ahead: bool,
    most_ahead: usize,
    lanes: Mutex<HashMap<String, Arc<RegistryScheduler>>>,
    all: Arc<GlobalLimits>,
}

/// What the readers of one registry share, so that one that stalls does not hold up the others.
pub struct RegistryScheduler {
    patience: Duration,
    read_ahead: bool,
    memory: Arc<Semaphore>,
    own_memory: Arc<Semaphore>,
    disk_memory: Arc<Semaphore>,
    ahead: Arc<Semaphore>,
    most_ahead: usize,
    background: Arc<Semaphore>,
    /// How far and fast the registry is.
    pub(super) pace: LinkEstimator,
    /// Units on their way that somebody waits for.
    demand: watch::Sender<usize>,
    all: Arc<GlobalLimits>,
}

/// What the lanes share.
struct GlobalLimits {
    memory: Arc<Semaphore>,
    ahead: Arc<Semaphore>,
    background: Arc<Semaphore>,
    /// What nobody waits for is decompressed on as many threads as there are cores.
    cores: Arc<Semaphore>,
}

/// How urgent it is to fetch something that nobody waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Priority {
    /// It will be wanted soon.
    Ahead,
    /// It may be wanted some day.
    Background,
}

/// Leave to do something, as long as it is held: of the lane, and of all lanes together.
pub(super) struct Turn {
    _lane: Option<OwnedSemaphorePermit>,
    _all: Option<OwnedSemaphorePermit>,
}

/// Counts as demand as long as it is held.
struct Demand<'a>(&'a RegistryScheduler);

impl FetchScheduler {
    /// Nothing fetched yet. A unit that takes longer than `patience` is given up. With `read_ahead`, those who read in order
    /// are fetched for ahead. Sources have places for `most_ahead` requests of read-ahead at a time: what waited for one of
    /// these would be a flight already, and readers would wait with it.
    pub fn new(patience: Duration, read_ahead: bool, most_ahead: usize) -> Self {
        let cores = std::thread::available_parallelism().map_or(1, NonZero::get);
        let permits = |count| Arc::new(Semaphore::new(count));
        Self {
            patience,
            read_ahead,
            most_ahead: most_ahead.clamp(1, AHEAD),
            lanes: Mutex::default(),
            all: Arc::new(GlobalLimits {
                memory: permits(MEMORY_IN_ALL / PAGE),
                ahead: permits(AHEAD_IN_ALL),
                background: permits(BACKGROUND_IN_ALL),
                cores: permits(cores),
            }),
        }
    }

    /// The lane of a registry.
    pub fn lane(&self, registry: &str) -> Arc<RegistryScheduler> {
        let mut lanes = self.lanes.lock();
        lanes.retain(|_, lane| Arc::strong_count(lane) > 1);
        let new = || {
            let permits = |count| Arc::new(Semaphore::new(count));
            Arc::new(RegistryScheduler {
                patience: self.patience,
                read_ahead: self.read_ahead,
                memory: permits(MEMORY / PAGE),
                own_memory: permits(OWN_MEMORY / PAGE),
                disk_memory: permits(DISK_MEMORY / PAGE),
                ahead: permits(self.most_ahead),
                most_ahead: self.most_ahead,
                background: permits(1),
                pace: LinkEstimator::default(),
                demand: watch::Sender::new(0),
                all: Arc::clone(&self.all),
            })
        };
        Arc::clone(lanes.entry(registry.to_owned()).or_insert_with(new))
    }
}

impl RegistryScheduler {
    /// Does `work` for as long as a unit may take, waiting for its turn included.
    pub(super) async fn patiently<T>(&self, work: impl Future<Output = Result<T, ReadCause>>) -> Result<T, ReadCause> {
        let outcome = tokio::time::timeout(self.patience, work).await;
        outcome.unwrap_or(Err(ReadCause::TimedOut(self.patience.as_secs())))
    }

    /// How long an answer that brings more than what somebody waits for may take, before he asks for that alone: half of what a
    /// request may, so that there is time left.
    pub(super) fn share(&self) -> Duration {
        self.patience / 4
    }

    /// Whether the registry has so few places for requests that they are for what somebody waits for.
    pub(super) fn is_narrow(&self) -> bool {
        self.most_ahead < 2
    }

    /// Whether to fetch ahead of those who read in order.
    pub(super) fn reads_ahead(&self) -> bool {
        self.read_ahead
    }

    /// Waits until there is room for so many bytes of what is fetched because somebody waits for it.
    pub(super) async fn room_for(&self, bytes: usize) -> Turn {
        // At most OWN_MEMORY / PAGE fit, so that it is no harm if there are more.
        let pages = u32::try_from(bytes.div_ceil(PAGE)).unwrap_or(u32::MAX);
        if let Ok(own) = Arc::clone(&self.own_memory).try_acquire_many_owned(pages) {
            return Turn {
                _lane: Some(own),
                _all: None,
            };
        }
        let bytes = bytes.min(MEMORY);
        Turn {
            _lane: room(&self.memory, bytes).await,
            _all: room(&self.all.memory, bytes).await,
        }
    }

    /// Waits until there is room for so many bytes of what is on disk.
    pub(super) async fn room_from_disk(&self, bytes: usize) -> Option<OwnedSemaphorePermit> {
        room(&self.disk_memory, bytes.min(DISK_MEMORY)).await
    }

    /// Waits for leave to send a request for what nobody waits for.
    pub(super) async fn turn(&self, urgency: Priority) -> Turn {
        if urgency == Priority::Ahead {
            return Turn {
                _lane: one(&self.ahead).await,
                _all: one(&self.all.ahead).await,
            };
        }
        loop {
            // Before the turn is taken, which others want too.
            self.no_demand().await;
            let turn = Turn {
                _lane: one(&self.background).await,
                _all: one(&self.all.background).await,
            };
            if *self.demand.borrow() == 0 {
                return turn;
            }
        }
    }

    /// Waits until nobody waits for anything of this registry.
    async fn no_demand(&self) {
        // An error means that the lane is gone, and its demand with it.
        self.demand.subscribe().wait_for(|units| *units == 0).await.ok();
    }

    /// Whether so few wait for anything of this registry that what they wait for is the registry, and not each other.
    pub(super) fn is_calm(&self) -> bool {
        *self.demand.borrow() <= CALM
    }

    /// Waits for a core on which to decompress what nobody waits for.
    pub(super) async fn core(&self) -> Option<OwnedSemaphorePermit> {
        one(&self.all.cores).await
    }

    /// Does `work`, for which somebody waits.
    pub(super) async fn on_demand<T>(&self, work: impl Future<Output = T>) -> T {
        self.demand.send_modify(|units| *units += 1);
        let _demand = Demand(self);
        work.await
    }
}

impl Drop for Demand<'_> {
    fn drop(&mut self) {
        self.0.demand.send_modify(|units| *units -= 1);
    }
}

/// Waits for so many bytes of a semaphore that counts in [`PAGE`]s and has as many. `None` is never the case: it is not closed.
pub(super) async fn room(memory: &Arc<Semaphore>, bytes: usize) -> Option<OwnedSemaphorePermit> {
    // At most what there is of it, which fits.
    let pages = bytes.div_ceil(PAGE) as u32;
    Arc::clone(memory).acquire_many_owned(pages).await.ok()
}

/// Waits for one of a semaphore. `None` is never the case here either.
pub(super) async fn one(permits: &Arc<Semaphore>) -> Option<OwnedSemaphorePermit> {
    Arc::clone(permits).acquire_owned().await.ok()
}
