//! Fetches chunks as a reader's misses do, so many at a time, and times each step.
//!
//! Each worker takes the next request of the workload, fetches its bytes, decompresses and verifies what is in them, writes it
//! to the cache if that is wanted, and only then takes another one: what is measured is a *closed loop*, as so many readers
//! make it.

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
    sample::{Phase, Samples},
    stop::Stop,
    workload::{Request, RequestSize, Workload},
};
use crate::{
    blob::error::ReadCause,
    registry::{self, Client, Repository, Timing, measure},
};

/// Bytes that may be in memory, stored and decompressed, whatever the concurrency.
const MEMORY: usize = 512 << 20;
/// What memory is counted in.
const PAGE: usize = 4096;
/// After so many failures without a success between them, a run is given up: the registry is not to be stormed.
const MOST_FAILURES: u64 = 100;
/// How often progress is told.
const TICK: Duration = Duration::from_millis(200);

/// Where chunks come from and go to.
pub struct Fetcher {
    /// Whom to ask; its connections are part of what is measured, so that each run had better have its own.
    pub client: Client,
    /// The repository that has the blobs.
    pub repository: Repository,
    /// The image's data.
    pub workload: Arc<Workload>,
    /// Whether verified chunks are written to the image's cache.
    pub fill: bool,
}

/// One run.
pub struct Run {
    /// What to ask for, in that order.
    pub requests: Arc<Vec<Request>>,
    /// How that was merged.
    pub size: RequestSize,
    /// Requests at a time.
    pub concurrency: usize,
    /// When no further request is sent.
    pub duration: Option<Duration>,
    /// After how many stored bytes no further request is sent.
    pub bytes: Option<u64>,
    /// Whether to start again at the end of `requests`.
    pub again: bool,
}

/// How far a run is.
#[derive(Debug, Clone, Copy)]
pub struct Progress {
    /// How much of it is over, from 0 to 1.
    pub share: f64,
    /// Stored bytes that came.
    pub bytes: u64,
    /// Since the start.
    pub elapsed: Duration,
    /// The median of what requests took.
    pub median: Duration,
    /// Requests that failed.
    pub failed: u64,
}

/// Why a request failed.
#[derive(Debug, thiserror::Error)]
enum Failed {
    #[error(transparent)]
    Registry(#[from] registry::Error),
    #[error("blob {blob}, chunk {chunk}: {cause}")]
    Chunk { blob: String, chunk: u32, cause: ReadCause },
    #[error("the work was given up")]
    Aborted,
}

/// What is measured while requests are under way.
struct Measured {
    samples: Samples,
    plain_bytes: u64,
    http_requests: u64,
    connections: u64,
}

/// A run under way.
struct UnderWay {
    fetcher: Fetcher,
    run: Run,
    start: Instant,
    next: AtomicUsize,
    asked: AtomicU64,
    memory: Arc<Semaphore>,
    measured: Mutex<Measured>,
}

/// What the steps after fetching took.
#[derive(Default)]
struct Steps {
    decompress: Duration,
    verify: Duration,
    write: Option<Duration>,
    plain_bytes: u64,
}

/// Does `run`. Asked to stop, it ends at once, and what is under way does not count.
pub async fn run(fetcher: Fetcher, run: Run, stop: &mut Stop, mut show: impl FnMut(Progress)) -> Row {
    let under_way = Arc::new(UnderWay {
        fetcher,
        run,
        start: Instant::now(),
        next: AtomicUsize::new(0),
        asked: AtomicU64::new(0),
        memory: Arc::new(Semaphore::new(MEMORY / PAGE)),
        measured: Mutex::new(Measured {
            samples: Samples::start(),
            plain_bytes: 0,
            http_requests: 0,
            connections: 0,
        }),
    });
    let mut workers = JoinSet::new();
    for _ in 0..under_way.run.concurrency {
        workers.spawn(Arc::clone(&under_way).work());
    }
    let (mut tick, mut interrupted) = (tokio::time::interval(TICK), false);
    loop {
        tokio::select! {
            done = workers.join_next() => if done.is_none() { break },
            _ = tick.tick() => show(under_way.progress()),
            () = stop.asked() => {
                interrupted = true;
                workers.shutdown().await;
                break;
            }
        }
    }
    interrupted |= under_way.gives_up();
    under_way.row(interrupted)
}

impl UnderWay {
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
                    measured.samples.succeeded(bytes, parts(total, &timing, &steps));
                }
                Err(failed) => measured.samples.failed(failed.cause(), || failed.to_string()),
            }
        }
    }

    /// Position of the next request, if there is to be one.
    fn next(&self) -> Option<usize> {
        let run = &self.run;
        if run.duration.is_some_and(|duration| self.start.elapsed() >= duration) || self.gives_up() {
            return None;
        }
        let next = self.next.fetch_add(1, Ordering::Relaxed);
        let at = if run.again { next % run.requests.len() } else { next };
        let bytes = run.requests.get(at)?.len();
        let asked = self.asked.fetch_add(bytes, Ordering::Relaxed);
        run.bytes.is_none_or(|most| asked < most).then_some(at)
    }

    fn gives_up(&self) -> bool {
        self.measured.lock().samples.failed_in_a_row() >= MOST_FAILURES
    }

    /// What it takes to have the request's bytes, and its longest unit decompressed, in memory; in pages.
    fn memory_for(&self, request: &Request) -> u32 {
        let units = &self.fetcher.workload.blobs[request.blob].1;
        let plain = request
            .units
            .iter()
            .map(|unit| units.all()[*unit].unit.uncompressed_size);
        let bytes = request.len() + u64::from(plain.max().unwrap_or(0));
        // At most MEMORY / PAGE, which fits.
        bytes.min(MEMORY as u64).div_ceil(PAGE as u64) as u32
    }

    async fn fetch(self: &Arc<Self>, at: usize) -> (Result<Steps, Failed>, Timing) {
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
        let under_way = Arc::clone(self);
        let taken = tokio::task::spawn_blocking(move || under_way.take(at, &stored));
        (taken.await.unwrap_or(Err(Failed::Aborted)), timing)
    }

    /// Decompresses, verifies and perhaps keeps what is in the request's bytes.
    fn take(&self, at: usize, stored: &[u8]) -> Result<Steps, Failed> {
        let request = &self.run.requests[at];
        let units = &self.fetcher.workload.blobs[request.blob].1;
        let mut steps = Steps::default();
        for unit in &request.units {
            let plan = &units.all()[*unit];
            let failed = |cause| Failed::Chunk {
                blob: units.layout().id.clone(),
                chunk: plan
                    .members
                    .first()
                    .map_or(0, |(position, _)| units.layout().chunks[*position].index),
                cause,
            };
            let from = (plan.unit.compressed_offset - request.start) as usize;
            let stored = &stored[from..from + plan.unit.compressed_size as usize];
            let start = Instant::now();
            let plain = units.decompress(plan, stored).map_err(failed)?;
            let decompressed = Instant::now();
            let right = units.verify(plan, &plain).map_err(failed)?;
            let verified = Instant::now();
            steps.decompress += decompressed - start;
            steps.verify += verified - decompressed;
            if self.fetcher.fill {
                units.keep(&plain, &right).map_err(failed)?;
                *steps.write.get_or_insert_default() += verified.elapsed();
            }
            steps.plain_bytes += u64::from(plan.unit.uncompressed_size);
        }
        Ok(steps)
    }

    fn progress(&self) -> Progress {
        let measured = self.measured.lock();
        let samples = &measured.samples;
        let (run, elapsed) = (&self.run, self.start.elapsed());
        let whole = || run.requests.iter().map(Request::len).sum::<u64>();
        let goal = run.bytes.or((!run.again).then(whole));
        let by_bytes = goal.map_or(0.0, |goal| samples.bytes as f64 / goal.max(1) as f64);
        let by_time = run
            .duration
            .map_or(0.0, |duration| elapsed.as_secs_f64() / duration.as_secs_f64());
        let median = samples.latency.get(&Phase::Total).map(|total| total.percentile(50.0));
        Progress {
            share: by_bytes.max(by_time).clamp(0.0, 1.0),
            bytes: samples.bytes,
            elapsed,
            median: median.unwrap_or_default(),
            failed: samples.failures().iter().map(|failure| failure.count).sum(),
        }
    }

    fn row(&self, interrupted: bool) -> Row {
        let Run { concurrency, size, .. } = &self.run;
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

/// The parts of a request's time.
fn parts(total: Duration, timing: &Timing, steps: &Steps) -> impl Iterator<Item = (Phase, Duration)> {
    let connect = (timing.connections > 0).then_some(timing.connect);
    [
        (Phase::Total, Some(total)),
        (Phase::Connect, connect),
        (Phase::FirstByte, Some(timing.first_byte)),
        (Phase::Transfer, Some(timing.transfer)),
        (Phase::Decompress, Some(steps.decompress)),
        (Phase::Verify, Some(steps.verify)),
        (Phase::Write, steps.write),
    ]
    .into_iter()
    .filter_map(|(phase, took)| Some((phase, took?)))
}

impl Failed {
    /// The kind of failure.
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
                _ => "invalid answer",
            },
            Self::Chunk { cause, .. } => match cause {
                ReadCause::Digest => "wrong digest",
                ReadCause::Decompress(_) | ReadCause::Inflate(_) => "damaged",
                ReadCause::Keep(_) => "not written",
                _ => "unreadable",
            },
            Self::Aborted => "given up",
        }
    }
}
