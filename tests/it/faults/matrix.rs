//! One fault by all kinds of images and ways to read them.
//!
//! Each cell has a registry of its own; the cells of one way to read share a daemon. Demanded of each:
//!
//! 1. While the fault lasts, each read gives the right bytes or EIO, within a few times what the configuration allows.
//! 2. The registry gets no more requests than a small multiple of units × attempts.
//! 3. Once it is over, everything reads right, without a restart.
//! 4. Nothing in the cache is corrupt, and all of it is there.
//! 5. An image of another registry is read meanwhile as if nothing were wrong.

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
    digest::Digest,
    fixtures::{
        BuildOptions, Conversion, EmbeddedRegistry, Fault, RequestInfo,
        content::Random,
        registry::{FaultHook, RequestKind},
    },
    rafs::Tree,
};
use parking_lot::Mutex;
use serde_json::Value;

use crate::common::{BINARY, Sample, Serve, StorePath, wait_until};

const CONFIG: &str = "[images]\nnegative_ttl = 0\n\
     [registry]\nconnect_timeout = 1\nread_timeout = 1\nrequest_timeout = 3\nretries = 1\nmax_pause = 1\n\
     circuit_failures = 5\ncircuit_pause = 1\ncircuit_max_pause = 2\n";
/// As in [`CONFIG`].
const REQUEST_TIMEOUT: Duration = Duration::from_secs(3);
/// Attempts of one request there.
const ATTEMPTS: usize = 2;
/// Longest time of a read: who waits for a unit that is read ahead does so for twice [`REQUEST_TIMEOUT`], and then once for a
/// request of his own; if that fails, the kernel asks once more. The rest is for a busy machine.
const BOUND: Duration = Duration::from_secs(5 * 3);
/// How long the fault lasts, unless all has been read by then.
const LASTS: Duration = Duration::from_millis(2500);
const CHUNK: usize = 64 << 10;

/// What is demanded of reads while the fault lasts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// All give the right bytes.
    Right,
    /// Each gives the right bytes or EIO.
    Either,
    /// The same, and some give EIO.
    Fails,
}

/// What goes wrong.
pub enum Trouble {
    /// Requests to a registry.
    Hook(Box<dyn Fn(&Place) -> FaultHook + Sync>),
    /// The registry is not there.
    Away,
}

/// The registry that a [`Trouble`] is made for.
pub struct Place {
    pub url: String,
    /// How many read at a time.
    pub readers: usize,
    /// What it has.
    pub blobs: Vec<(Digest, Bytes)>,
}

/// Whether it is for bytes of a blob that are needed to read files.
pub fn is_of_data(request: &RequestInfo) -> bool {
    request.kind == RequestKind::Blob && request.range.is_some()
}

#[derive(Debug, Clone, Copy)]
enum Way {
    InOrder,
    HereAndThere,
}

impl Way {
    fn readers(self) -> usize {
        match self {
            Self::InOrder => 1,
            Self::HereAndThere => 8,
        }
    }
}

/// Files of many chunks, and many of one.
fn sample(seed: u64, options: &BuildOptions) -> Sample {
    let small: Vec<_> = (0..24).map(|number| format!("small/{number:02}")).collect();
    // A unit of a gzip layer has about 1 MiB.
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
    // So the registry is needed for the metadata too.
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

/// Runs one row of the matrix. All cells that fail are named.
pub fn run(trouble: Trouble, outcome: Outcome) {
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
        for way in [Way::InOrder, Way::HereAndThere] {
            let (samples, healthy, trouble, failures) = (&samples, &healthy, &trouble, &failures);
            scope.spawn(move || {
                let row = Row::new(way, samples, healthy);
                let failed = row.run(trouble, outcome);
                failures.lock().extend(failed);
            });
        }
    });
    let failures = failures.into_inner();
    assert!(failures.is_empty(), "failed:\n{}", failures.join("\n"));
}

/// All cells of one fault and one way to read.
struct Row<'a> {
    way: Way,
    serve: Serve,
    healthy: &'a Sample,
    elsewhere: EmbeddedRegistry,
    cells: Vec<Mutex<Cell<'a>>>,
    /// In how many cells something has gone wrong.
    biting: Arc<AtomicUsize>,
}

struct Cell<'a> {
    kind: &'static str,
    sample: &'a Sample,
    registry: EmbeddedRegistry,
    layer: StorePath,
}

impl<'a> Row<'a> {
    fn new(way: Way, samples: &'a [(&'static str, Sample)], healthy: &'a Sample) -> Self {
        let serve = Serve::with_config(CONFIG);
        let cell = |(kind, sample): &'a (&'static str, Sample)| {
            let registry = EmbeddedRegistry::start().unwrap();
            registry.add_image(&sample.image, "image", "1").unwrap();
            let layer = serve.layer(&registry.reference("image", "1"), &sample.key());
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
            way,
            serve,
            healthy,
            elsewhere,
            cells,
            biting: Arc::default(),
        }
    }

    /// What failed.
    fn run(&self, trouble: &Trouble, outcome: Outcome) -> Vec<String> {
        let failed = |name: &str, panic: Box<dyn Any + Send>| {
            let text = panic.downcast_ref::<String>().cloned();
            let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
            format!("{name}, {:?}: {}", self.way, text.unwrap_or_default())
        };
        let mut failures: Vec<_> = thread::scope(|scope| {
            let cells = self.cells.iter().map(|cell| {
                let run = move || cell.lock().run(self.way, trouble, outcome, &self.biting);
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
        let layer = self
            .serve
            .layer(&self.elsewhere.reference("image", "1"), &self.healthy.key());
        let all = || self.biting.load(Ordering::Relaxed) == self.cells.len();
        wait_until("all registries are in trouble", || all().then_some(()));
        let start = Instant::now();
        self.healthy.check(&layer);
        assert!(start.elapsed() < 2 * REQUEST_TIMEOUT, "it took {:?}", start.elapsed());
    }

    /// What is wrong with the cache or the daemon now that all has been read.
    fn damage(&self) -> Option<String> {
        let mut command = Command::new(BINARY);
        command.args(["verify", "--json", "--root"]).arg(self.serve.root());
        let output = command.output().unwrap();
        let report: Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
        let images = report["images"].as_array().map(Vec::as_slice).unwrap_or_default();
        let whole = images.iter().filter(|image| image["condition"] == "complete").count();
        let log = self.serve.log();
        let sound = output.status.success() && whole == self.cells.len() + 1 && !log.contains("panicked");
        (!sound).then(|| format!("{:?}: {report}\n{log}", self.way))
    }
}

impl Cell<'_> {
    fn run(&mut self, way: Way, trouble: &Trouble, outcome: Outcome, biting: &Arc<AtomicUsize>) {
        assert!(self.layer.is_there());
        let before = self.registry.log().len();
        self.begin(way, trouble, biting);
        let reads = self.read(way);
        let requests = self.registry.log().len() - before;
        self.end(trouble);

        assert!(outcome != Outcome::Right || reads.failed == 0, "{reads:?}");
        assert!(outcome != Outcome::Fails || reads.failed > 0, "{reads:?}");
        let bound = self.most_requests();
        assert!(requests <= bound, "{requests} requests, and not {bound}, for {reads:?}");
        self.sample.drop_pages(&self.layer);
        wait_until("everything reads right", || self.reads_right().then_some(()));
    }

    /// Has things go wrong from now on.
    fn begin(&mut self, way: Way, trouble: &Trouble, biting: &Arc<AtomicUsize>) {
        match trouble {
            Trouble::Hook(make) => {
                let (hook, biting) = (make(&self.place(way)), Arc::clone(biting));
                let bites = AtomicBool::new(false);
                self.registry.set_fault(Some(Arc::new(move |request| {
                    let fault = hook(request);
                    if !matches!(fault, Fault::None) && !bites.swap(true, Ordering::Relaxed) {
                        biting.fetch_add(1, Ordering::Relaxed);
                    }
                    fault
                })));
            }
            Trouble::Away => {
                self.registry.leave().unwrap();
                biting.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    fn end(&mut self, trouble: &Trouble) {
        self.registry.set_fault(None);
        if matches!(trouble, Trouble::Away) {
            self.registry.come_back().unwrap();
        }
    }

    fn place(&self, way: Way) -> Place {
        let blobs = self.sample.image.all_blobs();
        Place {
            url: self.registry.url(),
            readers: way.readers(),
            blobs: blobs
                .map(|blob| (blob.digest, fs::read(&blob.path).unwrap().into()))
                .collect(),
        }
    }

    /// Each chunk is read once or, here and there, twice. If that fails, the kernel asks a second time. Some is read ahead.
    fn most_requests(&self) -> usize {
        let tree = Tree::load(self.sample.image.bootstrap_path().unwrap()).unwrap();
        let chunks: usize = tree.blobs().iter().map(|blob| blob.chunks.len()).sum();
        4 * chunks * ATTEMPTS + 16
    }

    fn read(&self, way: Way) -> Reads {
        let mut pieces = self.pieces();
        if let Way::HereAndThere = way {
            pieces.extend_from_within(..);
            shuffle(&mut pieces);
        }
        let (next, pieces) = (AtomicUsize::new(0), &pieces);
        thread::scope(|scope| {
            let readers = (0..way.readers()).map(|_| scope.spawn(|| self.read_pieces(pieces, &next, way)));
            let readers: Vec<_> = readers.collect();
            let reads = readers.into_iter().map(thread::ScopedJoinHandle::join);
            let reads = reads.map(|reads| reads.unwrap_or_else(|panic| resume_unwind(panic)));
            reads.fold(Reads::default(), Reads::and)
        })
    }

    /// Names of files, and offsets.
    fn pieces(&self) -> Vec<(String, usize)> {
        let names = self.sample.names().into_iter();
        let of_file = |name: String| {
            let len = self.sample.content(&name).len();
            (0..len).step_by(CHUNK).map(move |offset| (name.clone(), offset))
        };
        names.flat_map(of_file).collect()
    }

    /// Reads pieces from the one that is `next` on.
    fn read_pieces(&self, pieces: &[(String, usize)], next: &AtomicUsize, way: Way) -> Reads {
        let mut reads = Reads::default();
        let end = Instant::now() + LASTS;
        while Instant::now() < end
            && let Some((name, offset)) = pieces.get(next.fetch_add(1, Ordering::Relaxed))
        {
            let content = self.sample.content(name);
            let expected = &content[*offset..content.len().min(offset + CHUNK)];
            let file = File::open(self.layer.diff().join(name)).unwrap();
            if let Way::HereAndThere = way {
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
            assert!(took < BOUND, "{name} at {offset}: {took:?}");
            reads.longest = reads.longest.max(took);
        }
        reads
    }

    /// Whether every file can be read. Wrong bytes are never right.
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

/// How reads ended.
#[derive(Debug, Default)]
struct Reads {
    right: usize,
    failed: usize,
    longest: Duration,
}

impl Reads {
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
