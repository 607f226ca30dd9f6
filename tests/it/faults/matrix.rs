//! One row of the fault matrix: one fault × all kinds of images × access patterns.
//!
//! Each cell has its own registry. The cells of one access pattern share a daemon. Each cell must satisfy:
//!
//! 1. While the fault lasts, each read returns the correct bytes or EIO, within [`MAX_READ_TIME`].
//! 2. The number of requests is at most a small multiple of chunks × attempts.
//! 3. After the fault, all files are readable without a restart.
//! 4. Afterwards the cache is complete and has no corrupt chunks.
//! 5. Meanwhile an image of a healthy registry is read without delay.

use std::{
    any::Any,
    fs::{self, File},
    os::unix::fs::FileExt as _,
    panic::resume_unwind,
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use bytes::Bytes;
use nydus_rafs::metadata::RafsVersion;
use nydus_store::{
    fixtures::{
        BuildOptions, Conversion, EmbeddedRegistry, Fault, RequestInfo,
        content::Random,
        registry::{FaultHook, RequestKind},
    },
    internals::Digest,
    internals::Tree,
};
use parking_lot::Mutex;
use serde_json::Value;

use crate::common::{BINARY, Sample, Serve, StoreLayer, wait_until};

const CONFIG: &str = "[images]\nnegative_ttl = 0\n\
     [registry]\nconnect_timeout = 1\nread_timeout = 1\nrequest_timeout = 3\nretries = 1\nmax_pause = 1\n\
     circuit_failures = 5\ncircuit_pause = 1\ncircuit_max_pause = 2\n";
/// `request_timeout` in [`CONFIG`].
const REQUEST_TIMEOUT: Duration = Duration::from_secs(3);
/// Attempts per request: one, and `retries` in [`CONFIG`].
const ATTEMPTS: usize = 2;
/// Maximum time of a read. A waiter for a unit in read-ahead waits for twice [`REQUEST_TIMEOUT`], then once for its own
/// request; if that fails, the kernel reads once more. The rest allows for a busy machine.
const MAX_READ_TIME: Duration = Duration::from_secs(5 * 3);
/// How long the fault lasts, unless all reads end earlier.
const FAULT_DURATION: Duration = Duration::from_millis(2500);
const CHUNK: usize = 64 << 10;

/// Required outcome of the reads while the fault lasts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// All reads return the correct bytes.
    AllSucceed,
    /// Each read returns the correct bytes or EIO.
    SomeMayFail,
    /// Like [`Self::SomeMayFail`], and at least one read returns EIO.
    SomeFail,
}

/// An injected fault.
pub enum Injection {
    /// A hook that decides per request.
    Hook(Box<dyn Fn(&HookContext) -> FaultHook + Sync>),
    /// The registry refuses connections.
    Unreachable,
}

/// The registry and readers that a hook of [`Injection::Hook`] is made for.
pub struct HookContext {
    pub url: String,
    /// Number of concurrent readers.
    pub readers: usize,
    /// Its blobs.
    pub blobs: Vec<(Digest, Bytes)>,
}

/// Whether it is a ranged request for a blob, as reads make them.
pub fn is_of_data(request: &RequestInfo) -> bool {
    request.kind == RequestKind::Blob && request.range.is_some()
}

#[derive(Debug, Clone, Copy)]
enum AccessPattern {
    Sequential,
    Random,
}

impl AccessPattern {
    fn readers(self) -> usize {
        match self {
            Self::Sequential => 1,
            Self::Random => 8,
        }
    }
}

/// An image of files of many chunks, and of many files of one chunk.
fn sample(seed: u64, options: &BuildOptions) -> Sample {
    let small: Vec<_> = (0..24).map(|number| format!("small/{number:02}")).collect();
    // A unit of a gzip layer is about 1 MiB.
    let large = if options.conversion == Conversion::Zran {
        6 << 20
    } else {
        1 << 20
    };
    let mut files = vec![("large", large), ("odd", 300_001), ("one", CHUNK)];
    files.extend(small.iter().map(|name| (name.as_str(), 6000)));
    Sample::of(&files, seed, options)
}

fn kinds() -> [(&'static str, BuildOptions); 4] {
    let options = Sample::options;
    let v5 = BuildOptions {
        version: RafsVersion::V5,
        ..options()
    };
    // Without kept meta, the blob meta is fetched from the registry too.
    let batch = BuildOptions {
        batch_size: 32 << 10,
        keep_meta: false,
        ..options()
    };
    let zran = BuildOptions {
        conversion: Conversion::Zran,
        ..options()
    };
    [("v5", v5), ("v6", options()), ("batch", batch), ("zran", zran)]
}

/// Runs one row of the matrix. Panics with the names of all failed cells.
pub fn run(injection: Injection, outcome: Outcome) {
    let samples: Vec<_> = thread::scope(|scope| {
        let builds: Vec<_> = kinds()
            .into_iter()
            .zip(1..)
            .map(|((kind, options), seed)| scope.spawn(move || (kind, sample(seed, &options))))
            .collect();
        builds.into_iter().map(|build| build.join().unwrap()).collect()
    });
    let healthy = sample(100, &Sample::options());
    let failures = Mutex::new(Vec::new());
    thread::scope(|scope| {
        for pattern in [AccessPattern::Sequential, AccessPattern::Random] {
            let (samples, healthy, injection, failures) = (&samples, &healthy, &injection, &failures);
            scope.spawn(move || {
                let row = Row::new(pattern, samples, healthy);
                let failed = row.run(injection, outcome);
                failures.lock().extend(failed);
            });
        }
    });
    let failures = failures.into_inner();
    assert!(failures.is_empty(), "failed:\n{}", failures.join("\n"));
}

/// All cells of one fault and one access pattern.
struct Row<'a> {
    pattern: AccessPattern,
    serve: Serve,
    healthy: &'a Sample,
    elsewhere: EmbeddedRegistry,
    cells: Vec<Mutex<Cell<'a>>>,
    /// Number of cells in which the fault has occurred.
    faulty_cells: Arc<AtomicUsize>,
}

struct Cell<'a> {
    kind: &'static str,
    sample: &'a Sample,
    registry: EmbeddedRegistry,
    layer: StoreLayer,
}

impl<'a> Row<'a> {
    fn new(pattern: AccessPattern, samples: &'a [(&'static str, Sample)], healthy: &'a Sample) -> Self {
        let serve = Serve::with_config(CONFIG);
        let cell = |(kind, sample): &'a (&'static str, Sample)| {
            let registry = EmbeddedRegistry::start().unwrap();
            registry.add_image(&sample.image, "image", "1").unwrap();
            let layer = serve.layer(&registry.reference("image", "1"), &sample.bootstrap_digest());
            Mutex::new(Cell {
                kind,
                sample,
                registry,
                layer,
            })
        };
        let cells = samples.iter().map(cell).collect();
        let elsewhere = EmbeddedRegistry::start().unwrap();
        elsewhere.add_image(&healthy.image, "image", "1").unwrap();
        Self {
            pattern,
            serve,
            healthy,
            elsewhere,
            cells,
            faulty_cells: Arc::default(),
        }
    }

    /// Runs all cells; returns the failures.
    fn run(&self, injection: &Injection, outcome: Outcome) -> Vec<String> {
        let failed = |name: &str, panic: Box<dyn Any + Send>| {
            let text = panic.downcast_ref::<String>().cloned();
            let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
            format!("{name}, {:?}: {}", self.pattern, text.unwrap_or_default())
        };
        let mut failures: Vec<_> = thread::scope(|scope| {
            let cells = self.cells.iter().map(|cell| {
                let run = move || cell.lock().run(self.pattern, injection, outcome, &self.faulty_cells);
                (cell.lock().kind, scope.spawn(run))
            });
            let mut cells: Vec<_> = cells.collect();
            cells.push(("healthy", scope.spawn(|| self.read_healthy())));
            let ended = cells.into_iter().map(|(name, cell)| (name, cell.join()));
            ended
                .filter_map(|(name, ended)| ended.err().map(|panic| failed(name, panic)))
                .collect()
        });
        if failures.is_empty() {
            failures.extend(self.damage());
        }
        failures
    }

    fn read_healthy(&self) {
        let layer = self.serve.layer(
            &self.elsewhere.reference("image", "1"),
            &self.healthy.bootstrap_digest(),
        );
        let all = || self.faulty_cells.load(Ordering::Relaxed) == self.cells.len();
        wait_until("the fault has occurred in every cell", || all().then_some(()));
        let start = Instant::now();
        self.healthy.check(&layer);
        assert!(start.elapsed() < 2 * REQUEST_TIMEOUT, "it took {:?}", start.elapsed());
    }

    /// Describes damage to the cache or a panic of the daemon, after all cells have ended.
    fn damage(&self) -> Option<String> {
        let mut command = Command::new(BINARY);
        command.args(["verify", "--json", "--root"]).arg(self.serve.root());
        let output = command.output().unwrap();
        let report: Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
        let images = report["images"].as_array().map(Vec::as_slice).unwrap_or_default();
        let whole = images.iter().filter(|image| image["condition"] == "complete").count();
        let log = self.serve.log();
        let sound = output.status.success() && whole == self.cells.len() + 1 && !log.contains("panicked");
        (!sound).then(|| format!("{:?}: {report}\n{log}", self.pattern))
    }
}

impl Cell<'_> {
    fn run(
        &mut self,
        pattern: AccessPattern,
        injection: &Injection,
        outcome: Outcome,
        faulty_cells: &Arc<AtomicUsize>,
    ) {
        assert!(self.layer.pull_publishes());
        let before = self.registry.log().len();
        self.begin(pattern, injection, faulty_cells);
        let reads = self.read(pattern);
        let requests = self.registry.log().len() - before;
        self.end(injection);

        assert!(outcome != Outcome::AllSucceed || reads.failed == 0, "{reads:?}");
        assert!(outcome != Outcome::SomeFail || reads.failed > 0, "{reads:?}");
        let bound = self.max_requests();
        assert!(requests <= bound, "{requests} requests, and not {bound}, for {reads:?}");
        self.sample.drop_pages(&self.layer);
        wait_until("all files are readable", || self.reads_right().then_some(()));
    }

    /// Injects the fault.
    fn begin(&mut self, pattern: AccessPattern, injection: &Injection, faulty_cells: &Arc<AtomicUsize>) {
        match injection {
            Injection::Hook(make) => {
                let (hook, faulty_cells) = (make(&self.context(pattern)), Arc::clone(faulty_cells));
                let has_occurred = AtomicBool::new(false);
                self.registry.set_fault(Some(Arc::new(move |request| {
                    let fault = hook(request);
                    if !matches!(fault, Fault::None) && !has_occurred.swap(true, Ordering::Relaxed) {
                        faulty_cells.fetch_add(1, Ordering::Relaxed);
                    }
                    fault
                })));
            }
            Injection::Unreachable => {
                self.registry.leave().unwrap();
                faulty_cells.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    fn end(&mut self, injection: &Injection) {
        self.registry.set_fault(None);
        if matches!(injection, Injection::Unreachable) {
            self.registry.come_back().unwrap();
        }
    }

    fn context(&self, pattern: AccessPattern) -> HookContext {
        let blobs = self.sample.image.all_blobs();
        HookContext {
            url: self.registry.url(),
            readers: pattern.readers(),
            blobs: blobs
                .map(|blob| (blob.digest, fs::read(&blob.path).unwrap().into()))
                .collect(),
        }
    }

    /// Chunks are read once, or twice with random access. The kernel repeats failed reads once. The rest is read-ahead.
    fn max_requests(&self) -> usize {
        let tree = Tree::load(self.sample.image.bootstrap_path().unwrap()).unwrap();
        let chunks: usize = tree.blobs().iter().map(|blob| blob.chunks.len()).sum();
        4 * chunks * ATTEMPTS + 16
    }

    fn read(&self, pattern: AccessPattern) -> ReadResults {
        let mut blocks = self.blocks();
        if let AccessPattern::Random = pattern {
            blocks.extend_from_within(..);
            shuffle(&mut blocks);
        }
        let (next, blocks) = (AtomicUsize::new(0), &blocks);
        thread::scope(|scope| {
            let readers = (0..pattern.readers()).map(|_| scope.spawn(|| self.read_blocks(blocks, &next, pattern)));
            let readers: Vec<_> = readers.collect();
            let reads = readers.into_iter().map(thread::ScopedJoinHandle::join);
            let reads = reads.map(|reads| reads.unwrap_or_else(|panic| resume_unwind(panic)));
            reads.fold(ReadResults::default(), ReadResults::and)
        })
    }

    /// Blocks of up to [`CHUNK`] bytes to read: file names and offsets.
    fn blocks(&self) -> Vec<(String, usize)> {
        let names = self.sample.names().into_iter();
        let of_file = |name: String| {
            let len = self.sample.content(&name).len();
            (0..len).step_by(CHUNK).map(move |offset| (name.clone(), offset))
        };
        names.flat_map(of_file).collect()
    }

    /// Reads blocks from index `next` on, until none is left or [`FAULT_DURATION`] is over.
    fn read_blocks(&self, blocks: &[(String, usize)], next: &AtomicUsize, pattern: AccessPattern) -> ReadResults {
        let mut reads = ReadResults::default();
        let end = Instant::now() + FAULT_DURATION;
        while Instant::now() < end
            && let Some((name, offset)) = blocks.get(next.fetch_add(1, Ordering::Relaxed))
        {
            let content = self.sample.content(name);
            let expected = &content[*offset..content.len().min(offset + CHUNK)];
            let file = File::open(self.layer.diff().join(name)).unwrap();
            if let AccessPattern::Random = pattern {
                rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::Random).unwrap();
            }
            let (start, mut bytes) = (Instant::now(), vec![0; expected.len()]);
            match file.read_exact_at(&mut bytes, *offset as u64) {
                Ok(()) => {
                    assert!(bytes == expected, "{name} reads wrong at {offset}");
                    reads.right += 1;
                }
                Err(error) => {
                    assert_eq!(error.raw_os_error(), Some(libc::EIO), "{name} at {offset}: {error}");
                    reads.failed += 1;
                }
            }
            let took = start.elapsed();
            assert!(took < MAX_READ_TIME, "{name} at {offset}: {took:?}");
            reads.longest = reads.longest.max(took);
        }
        reads
    }

    /// Whether every file is readable. Panics on wrong bytes.
    fn reads_right(&self) -> bool {
        self.sample.names().iter().all(|name| {
            let read = fs::read(self.layer.diff().join(name));
            read.is_ok_and(|bytes| {
                assert!(bytes == self.sample.content(name), "{name} reads wrong afterwards");
                true
            })
        })
    }
}

/// Results of reads.
#[derive(Debug, Default)]
struct ReadResults {
    right: usize,
    failed: usize,
    longest: Duration,
}

impl ReadResults {
    fn and(self, other: Self) -> Self {
        Self {
            right: self.right + other.right,
            failed: self.failed + other.failed,
            longest: self.longest.max(other.longest),
        }
    }
}

fn shuffle<T>(items: &mut [T]) {
    let mut random = Random::new(7);
    for last in (1..items.len()).rev() {
        items.swap(last, random.below(last as u64 + 1) as usize);
    }
}
