//! Reads ahead of sequential readers, and pauses after failures.

use std::{
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use tokio::runtime::Handle;

use super::{
    coalesce::Coalescer,
    prefetch,
    sequential_detector::{ReadAheadRequest, SequentialDetector},
};
use crate::blob::{
    chunk_order::{ChunkOrder, uncompressed_end},
    fetcher::ChunkFetcher,
    scheduler::Priority,
};

/// Pause of read-ahead and coalescing after a failure: the registry does not answer, or the cache cannot be written
/// to. Doubles with each failure in a row.
pub(super) const FIRST_PAUSE: Duration = Duration::from_millis(500);
/// The longest such pause.
const MAX_PAUSE: Duration = Duration::from_secs(10);

/// Watches the accesses to one blob, and prefetches ahead of sequential ones.
pub(in crate::blob) struct ReadAhead {
    fetcher: Arc<ChunkFetcher>,
    order: Arc<ChunkOrder>,
    coalescer: Arc<Coalescer>,
    backoff: Arc<PrefetchBackoff>,
    detector: Mutex<SequentialDetector>,
    runtime: Handle,
}

/// Suspends read-ahead and coalescing of a blob after failures.
#[derive(Default)]
pub(in crate::blob) struct PrefetchBackoff(Mutex<Pause>);

#[derive(Default)]
struct Pause {
    until: Option<Instant>,
    /// Length of the last pause; zero after a success.
    last: Duration,
}

impl ReadAhead {
    /// Reads ahead on `runtime` with `fetcher`, which coalesces by `coalescer`.
    pub(in crate::blob) fn new(
        fetcher: Arc<ChunkFetcher>,
        order: Arc<ChunkOrder>,
        coalescer: Arc<Coalescer>,
        backoff: Arc<PrefetchBackoff>,
        runtime: Handle,
    ) -> Arc<Self> {
        Arc::new(Self {
            fetcher,
            order,
            coalescer,
            backoff,
            detector: Mutex::default(),
            runtime,
        })
    }

    /// What chooses the units that a reader's own request also fetches.
    pub(in crate::blob) fn coalescer(&self) -> &Coalescer {
        &self.coalescer
    }

    /// The chunk at `position` is read for the first time. `is_first_of_request` tells whether it is the first such
    /// chunk of its request. Starts to prefetch if the access is sequential.
    pub(in crate::blob) fn on_first_access(self: &Arc<Self>, position: usize, is_first_of_request: bool) {
        let chunk = &self.order.layout().chunks[position];
        self.coalescer.on_first_access(position, chunk.uncompressed_size);
        if !self.backoff.is_over() {
            return;
        }
        let range = chunk.uncompressed_offset..uncompressed_end(chunk);
        let Some(request) = self.detector.lock().on_access(range, is_first_of_request) else {
            return;
        };
        let read_ahead = Arc::clone(self);
        self.runtime.spawn(async move { read_ahead.run(request).await });
    }

    /// Cancels all that was requested but has not been sent yet.
    pub(in crate::blob) fn cancel(&self) {
        self.detector.lock().cancel();
    }

    async fn run(&self, request: ReadAheadRequest) {
        let positions = self.order.ending_in(request.range);
        match prefetch(&self.fetcher, &positions, Priority::Ahead, &request.cancelled).await {
            Ok(()) if request.cancelled.load(Ordering::Relaxed) => {}
            Ok(()) => self.backoff.on_success(),
            Err(cause) => {
                tracing::debug!(blob = %self.fetcher.cached().name(), error = %cause, "failed to read ahead");
                self.backoff.on_failure();
                // The detector counts chunks as requested that will not come.
                self.cancel();
            }
        }
    }
}

impl PrefetchBackoff {
    /// Whether prefetching is not suspended at present.
    pub(in crate::blob) fn is_over(&self) -> bool {
        self.0.lock().is_over()
    }

    /// Prefetched units have come and are in the cache.
    pub(in crate::blob) fn on_success(&self) {
        self.0.lock().last = Duration::ZERO;
    }

    /// Prefetched units have not come, or could not be written to the cache.
    pub(in crate::blob) fn on_failure(&self) {
        self.0.lock().on_failure();
    }
}

impl Pause {
    fn is_over(&mut self) -> bool {
        self.until.take_if(|until| *until <= Instant::now());
        self.until.is_none()
    }

    /// Failures during a pause do not prolong it: requests that were sent together fail together.
    fn on_failure(&mut self) {
        if self.is_over() {
            self.last = (self.last * 2).clamp(FIRST_PAUSE, MAX_PAUSE);
            self.until = Some(Instant::now() + self.last);
        }
    }
}
