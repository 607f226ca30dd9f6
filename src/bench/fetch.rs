//! Fetches chunks concurrently, as cache misses do, and times each step.
//!
//! The benchmark is a *closed loop*: each worker fetches a request of the workload, decompresses and verifies its
//! units, optionally writes them to the cache, and only then takes the next request.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use tokio::{sync::Semaphore, task::JoinSet};

use super::{
    report::Row,
    sample::{Samples, TimedStep},
    stop::StopSignal,
    workload::{FetchRequest, RequestSize, Workload},
};
use crate::{
    blob::error::ReadCause,
    registry::{self, Client, Repository, Timing, measure},
};

/// Maximum bytes in memory, compressed and decompressed, at any concurrency.
const MAX_MEMORY_BYTES: usize = 512 << 20;
/// Bytes of one permit of the memory semaphore.
const MEMORY_PERMIT_BYTES: usize = 4096;
/// Consecutive failures after which a run ends, to spare the registry.
const MAX_CONSECUTIVE_FAILURES: u64 = 100;
/// Interval of progress reports.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(200);

/// Source and destination of the chunks.
pub struct Fetcher {
    /// The client. Connecting is measured, so each run should have its own client.
    pub client: Client,
    /// Repository of the blobs.
    pub repository: Repository,
    /// The image's blobs and units.
    pub workload: Arc<Workload>,
    /// Whether to write verified chunks to the image's cache.
    pub fill: bool,
}

/// Parameters of one run.
pub struct FetchRun {
    /// Requests, in order.
    pub requests: Arc<Vec<FetchRequest>>,
    /// The size that units were merged to.
    pub size: RequestSize,
    /// Number of concurrent requests.
    pub concurrency: usize,
    /// Time after which no further request is sent.
    pub duration: Option<Duration>,
    /// Compressed bytes after which no further request is sent.
    pub bytes: Option<u64>,
    /// Whether to repeat `requests`.
    pub repeat: bool,
}

/// Progress of a run.
#[derive(Debug, Clone, Copy)]
pub struct FetchProgress {
    /// Finished share, 0 to 1.
    pub share: f64,
    /// Compressed bytes fetched.
    pub bytes: u64,
    /// Time since the start.
    pub elapsed: Duration,
    /// Median time of a request.
    pub median: Duration,
    /// Failed requests.
    pub failed: u64,
}

/// Why a request failed.
#[derive(Debug, thiserror::Error)]
enum FetchError {
    #[error(transparent)]
    Registry(#[from] registry::Error),
    #[error("blob {blob}, chunk {chunk}: {cause}")]
    Chunk { blob: String, chunk: u32, cause: ReadCause },
    #[error("cancelled")]
    Aborted,
}

/// Measurements that workers add to.
struct Measurements {
    samples: Samples,
    plain_bytes: u64,
    http_requests: u64,
    connections: u64,
}

/// State of an active run, shared by the workers.
struct ActiveRun {
    fetcher: Fetcher,
    run: FetchRun,
    start: Instant,
    next: AtomicUsize,
    asked: AtomicU64,
    memory: Arc<Semaphore>,
    measured: Mutex<Measurements>,
}

/// Times of the steps after fetching.
#[derive(Default)]
struct StepTimes {
    decompress: Duration,
    verify: Duration,
    write: Option<Duration>,
    plain_bytes: u64,
}

/// Executes `run`. A stop request ends it at once; requests in flight do not count.
pub async fn run(fetcher: Fetcher, run: FetchRun, stop: &mut StopSignal, mut show: impl FnMut(FetchProgress)) -> Row {
    let active = Arc::new(ActiveRun {
        fetcher,
        run,
        start: Instant::now(),
        next: AtomicUsize::new(0),
        asked: AtomicU64::new(0),
        memory: Arc::new(Semaphore::new(MAX_MEMORY_BYTES / MEMORY_PERMIT_BYTES)),
        measured: Mutex::new(Measurements {
            samples: Samples::start(),
            plain_bytes: 0,
            http_requests: 0,
            connections: 0,
        }),
    });
    let mut workers = JoinSet::new();
    for _ in 0..active.run.concurrency {
        workers.spawn(Arc::clone(&active).work());
    }
    let (mut tick, mut interrupted) = (tokio::time::interval(PROGRESS_INTERVAL), false);
    loop {
        tokio::select! {
            done = workers.join_next() => if done.is_none() { break },
            _ = tick.tick() => show(active.progress()),
            () = stop.requested() => {
                interrupted = true;
                workers.shutdown().await;
                break;
            }
        }
    }
    interrupted |= active.has_failed();
    active.row(interrupted)
}

impl ActiveRun {
    async fn work(self: Arc<Self>) {
        while let Some(at) = self.next() {
            let memory = self.memory_for(&self.run.requests[at]);
            let _room = Arc::clone(&self.memory).acquire_many_owned(memory).await.ok();
            let start = Instant::now();
            let (outcome, timing) = self.fetch(at).await;
            let total = start.elapsed();
            let bytes = self.run.requests[at].len();
            let mut measured = self.measured.lock();
            measured.http_requests += timing.requests;
            measured.connections += timing.connections;
            match outcome {
                Ok(steps) => {
                    measured.plain_bytes += steps.plain_bytes;
                    measured.samples.succeeded(bytes, timed_steps(total, &timing, &steps));
                }
                Err(failed) => measured.samples.failed(failed.cause(), || failed.to_string()),
            }
        }
    }

    /// Index of the next request; `None` if the run is over.
    fn next(&self) -> Option<usize> {
        let run = &self.run;
        if run.duration.is_some_and(|duration| self.start.elapsed() >= duration) || self.has_failed() {
            return None;
        }
        let next = self.next.fetch_add(1, Ordering::Relaxed);
        let at = if run.repeat { next % run.requests.len() } else { next };
        let bytes = run.requests.get(at)?.len();
        let asked = self.asked.fetch_add(bytes, Ordering::Relaxed);
        run.bytes.is_none_or(|most| asked < most).then_some(at)
    }

    fn has_failed(&self) -> bool {
        self.measured.lock().samples.consecutive_failures() >= MAX_CONSECUTIVE_FAILURES
    }

    /// Memory permits for the request's bytes and its longest decompressed unit.
    fn memory_for(&self, request: &FetchRequest) -> u32 {
        let units = &self.fetcher.workload.blobs[request.blob].1;
        let plain = request
            .units
            .iter()
            .map(|unit| units.all()[*unit].extent.uncompressed_size);
        let bytes = request.len() + u64::from(plain.max().unwrap_or(0));
        // At most MEMORY / PAGE, which fits.
        bytes.min(MAX_MEMORY_BYTES as u64).div_ceil(MEMORY_PERMIT_BYTES as u64) as u32
    }

    async fn fetch(self: &Arc<Self>, at: usize) -> (Result<StepTimes, FetchError>, Timing) {
        let Fetcher {
            client,
            repository,
            workload,
            ..
        } = &self.fetcher;
        let request = &self.run.requests[at];
        let (digest, len) = (&workload.blobs[request.blob].0, request.len() as usize);
        let (stored, timing) = measure(client.blob_range(repository, digest, request.start, len)).await;
        let stored = match stored {
            Ok(stored) => stored,
            Err(error) => return (Err(error.into()), timing),
        };
        let active = Arc::clone(self);
        let taken = tokio::task::spawn_blocking(move || active.process(at, &stored));
        (taken.await.unwrap_or(Err(FetchError::Aborted)), timing)
    }

    /// Decompresses, verifies and optionally caches the units in `stored`.
    fn process(&self, at: usize, stored: &[u8]) -> Result<StepTimes, FetchError> {
        let request = &self.run.requests[at];
        let units = &self.fetcher.workload.blobs[request.blob].1;
        let mut steps = StepTimes::default();
        for unit in &request.units {
            let plan = &units.all()[*unit];
            let failed = |cause| FetchError::Chunk {
                blob: units.layout().id.clone(),
                chunk: plan
                    .members
                    .first()
                    .map_or(0, |(position, _)| units.layout().chunks[*position].index),
                cause,
            };
            let from = (plan.extent.compressed_offset - request.start) as usize;
            let stored = &stored[from..from + plan.extent.compressed_size as usize];
            let start = Instant::now();
            let plain = units.decompress(plan, stored).map_err(failed)?;
            let decompressed = Instant::now();
            let right = units.verify(plan, &plain).map_err(failed)?;
            let verified = Instant::now();
            steps.decompress += decompressed - start;
            steps.verify += verified - decompressed;
            if self.fetcher.fill {
                units.write(&plain, &right).map_err(failed)?;
                *steps.write.get_or_insert_default() += verified.elapsed();
            }
            steps.plain_bytes += u64::from(plan.extent.uncompressed_size);
        }
        Ok(steps)
    }

    fn progress(&self) -> FetchProgress {
        let measured = self.measured.lock();
        let samples = &measured.samples;
        let (run, elapsed) = (&self.run, self.start.elapsed());
        let whole = || run.requests.iter().map(FetchRequest::len).sum::<u64>();
        let goal = run.bytes.or((!run.repeat).then(whole));
        let by_bytes = goal.map_or(0.0, |goal| samples.bytes as f64 / goal.max(1) as f64);
        let by_time = run
            .duration
            .map_or(0.0, |duration| elapsed.as_secs_f64() / duration.as_secs_f64());
        let median = samples
            .latency
            .get(&TimedStep::Total)
            .map(|total| total.percentile(50.0));
        FetchProgress {
            share: by_bytes.max(by_time).clamp(0.0, 1.0),
            bytes: samples.bytes,
            elapsed,
            median: median.unwrap_or_default(),
            failed: samples.failures().iter().map(|failure| failure.count).sum(),
        }
    }

    fn row(&self, interrupted: bool) -> Row {
        let FetchRun { concurrency, size, .. } = &self.run;
        let measured = self.measured.lock();
        let name = format!("{concurrency} × {size}");
        Row {
            request_size: Some(size.to_string()),
            plain_bytes: Some(measured.plain_bytes),
            http_requests: Some(measured.http_requests),
            connections: Some(measured.connections),
            ..Row::new(name, *concurrency, interrupted, &measured.samples)
        }
    }
}

/// The times of a request's steps.
fn timed_steps(total: Duration, timing: &Timing, steps: &StepTimes) -> impl Iterator<Item = (TimedStep, Duration)> {
    let connect = (timing.connections > 0).then_some(timing.connect);
    [
        (TimedStep::Total, Some(total)),
        (TimedStep::Connect, connect),
        (TimedStep::FirstByte, Some(timing.first_byte)),
        (TimedStep::Transfer, Some(timing.transfer)),
        (TimedStep::Decompress, Some(steps.decompress)),
        (TimedStep::Verify, Some(steps.verify)),
        (TimedStep::Write, steps.write),
    ]
    .into_iter()
    .filter_map(|(phase, took)| Some((phase, took?)))
}

impl FetchError {
    /// The kind of failure, for counting.
    fn cause(&self) -> &'static str {
        use registry::Error as E;
        match self {
            Self::Registry(error) => match error {
                E::NotFound { .. } => "not found",
                E::Unauthorized { .. } => "unauthorized",
                E::Denied { .. } => "denied",
                E::Offline { .. } => "offline",
                E::Unreachable { .. } => "unreachable",
                E::UntrustedCertificate { .. } => "untrusted",
                E::Timeout { .. } => "timeout",
                E::Interrupted { .. } => "interrupted",
                E::Status { status: 429, .. } => "status 429",
                E::Status { status: 500..=599, .. } => "status 5xx",
                E::Status { .. } => "other status",
                E::ShortBody { .. } => "short body",
                E::WrongRange { .. } => "wrong range",
                _ => "invalid response",
            },
            Self::Chunk { cause, .. } => match cause {
                ReadCause::Digest => "wrong digest",
                ReadCause::Decompress(_) | ReadCause::Inflate(_) => "damaged",
                ReadCause::CacheWrite(_) => "not written",
                _ => "unreadable",
            },
            Self::Aborted => "cancelled",
        }
    }
}
