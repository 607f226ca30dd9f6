//! Reads a directory, on whatever file system, in the ways programs do, and times each operation.
//!
//! What is there is found by [`tree`], which follows no symbolic link and stays on one file system. A reader that hangs in the
//! system is left alone after a while, so that every phase ends.

use std::{
    fmt,
    fs::File,
    io::{self, Read as _},
    os::unix::fs::FileExt as _,
    path::Path,
    str::FromStr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use parking_lot::Mutex;

use super::{
    report::Row,
    sample::{Phase, Samples},
    stop::Stop,
};

pub mod caches;
pub mod tree;

use tree::{Entry, Tree};

/// How much is read at a time, except at random.
const BUFFER: usize = 1 << 20;
/// How much is read at a time at random: a page.
const BLOCK: u64 = 4096;
/// How many files are read from at random, the largest ones: they are all open.
const OPEN: usize = 256;
/// How often progress is told and the end looked for.
const TICK: Duration = Duration::from_millis(50);
/// How long readers have to notice that it is over.
const GRACE: Duration = Duration::from_secs(5);

/// A way to read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// Looks at everything, without reading it.
    Walk,
    /// The largest file, from its beginning to its end.
    Seq,
    /// Pages at random.
    Random,
    /// Every file, one after the other.
    All,
    /// Every file, several at a time.
    Parallel,
}

/// Not a way to read.
#[derive(Debug, thiserror::Error)]
#[error("`{0}` is none of walk, seq, random, all and parallel")]
pub struct InvalidWay(String);

impl Way {
    /// All of them, in the order in which they are done.
    pub const ALL: [Self; 5] = [Self::Walk, Self::Seq, Self::Random, Self::All, Self::Parallel];

    /// As it is written.
    pub fn name(self) -> &'static str {
        match self {
            Self::Walk => "walk",
            Self::Seq => "seq",
            Self::Random => "random",
            Self::All => "all",
            Self::Parallel => "parallel",
        }
    }
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Way {
    type Err = InvalidWay;

    fn from_str(text: &str) -> Result<Self, InvalidWay> {
        let found = Self::ALL.into_iter().find(|way| way.name() == text);
        found.ok_or_else(|| InvalidWay(text.to_owned()))
    }
}

/// How to read.
#[derive(Debug, Clone)]
pub struct Settings {
    /// How long is read at random.
    pub duration: Duration,
    /// How long any other way may take.
    pub limit: Duration,
    /// Readers at a time, for [`Way::Parallel`].
    pub threads: usize,
    /// Seed for what is random.
    pub seed: u64,
}

/// How far a phase is.
#[derive(Debug, Clone, Copy)]
pub struct Progress {
    /// Operations done.
    pub operations: u64,
    /// Bytes read.
    pub bytes: u64,
    /// Since the start.
    pub elapsed: Duration,
}

/// What the readers of one phase share.
pub(super) struct Reading {
    samples: Mutex<Samples>,
    next: AtomicUsize,
    end: Instant,
    stop: Stop,
}

/// Looks at everything in `dir`: the row of that, and what there is.
pub fn walk(dir: &Path, settings: &Settings, stop: &Stop, show: impl FnMut(Progress)) -> (Row, Arc<Tree>) {
    let (dir, tree) = (dir.to_owned(), Arc::<Mutex<Tree>>::default());
    let found = Arc::clone(&tree);
    let work = move |reading: &Reading| tree::walk(&dir, reading, |entry| found.lock().add(entry));
    let row = phase(Way::Walk, 1, settings.limit, stop, show, work);
    let tree = std::mem::take(&mut *tree.lock());
    (row, Arc::new(tree))
}

/// Reads what is in `tree` in one way, which is another than [`Way::Walk`].
pub fn read(way: Way, tree: &Arc<Tree>, settings: &Settings, stop: &Stop, show: impl FnMut(Progress)) -> Row {
    let (tree, limit) = (Arc::clone(tree), settings.limit);
    match way {
        Way::Walk | Way::All => phase(way, 1, limit, stop, show, move |reading| all(&tree, reading)),
        Way::Parallel => phase(way, settings.threads, limit, stop, show, move |reading| {
            all(&tree, reading)
        }),
        Way::Seq => phase(way, 1, limit, stop, show, move |reading| sequential(&tree, reading)),
        Way::Random => {
            let seed = settings.seed;
            phase(way, 1, settings.duration, stop, show, move |reading| {
                random(&tree, seed, reading)
            })
        }
    }
}

/// Has `work` done by so many threads at a time, until they are through, or it takes too long.
fn phase(
    way: Way,
    threads: usize,
    limit: Duration,
    stop: &Stop,
    mut show: impl FnMut(Progress),
    work: impl Fn(&Reading) + Send + Sync + 'static,
) -> Row {
    let start = Instant::now();
    let reading = Arc::new(Reading {
        samples: Mutex::new(Samples::start()),
        next: AtomicUsize::new(0),
        end: start + limit,
        stop: stop.clone(),
    });
    let work = Arc::new(work);
    let spawn = |_| {
        let (reading, work) = (Arc::clone(&reading), Arc::clone(&work));
        std::thread::spawn(move || work(&reading))
    };
    let readers: Vec<_> = (0..threads.max(1)).map(spawn).collect();
    let mut over = None;
    while readers.iter().any(|reader| !reader.is_finished()) {
        if reading.is_over() && over.get_or_insert_with(Instant::now).elapsed() > GRACE {
            break;
        }
        std::thread::sleep(TICK.min(limit / 10));
        let samples = reading.samples.lock();
        let progress = Progress {
            operations: samples.operations,
            bytes: samples.bytes,
            elapsed: start.elapsed(),
        };
        drop(samples);
        show(progress);
    }
    let stuck = readers.iter().any(|reader| !reader.is_finished());
    // Random reading ends by time; whatever else does has not come to its end.
    let interrupted = stop.is_asked() || stuck || (way != Way::Random && Instant::now() >= reading.end);
    let mut samples = reading.samples.lock();
    if stuck {
        samples.failed("stuck", || format!("a reader did not come back within {GRACE:?}"));
    }
    Row::new(way.name().to_owned(), threads, interrupted, &samples)
}

impl Reading {
    /// Whether nothing more is to be read.
    pub(super) fn is_over(&self) -> bool {
        self.stop.is_asked() || Instant::now() >= self.end
    }

    /// Some bytes came.
    fn came(&self, bytes: usize) {
        self.samples.lock().came(bytes as u64);
    }

    /// An operation that was begun at `start` is done.
    pub(super) fn done(&self, start: Instant) {
        let took = start.elapsed();
        self.samples.lock().succeeded(0, [(Phase::Total, took)]);
    }

    pub(super) fn failed(&self, path: &Path, error: &dyn fmt::Display) {
        let first = || format!("{}: {error}", path.display());
        self.samples.lock().failed("input/output", first);
    }
}

/// Reads whole files, each as one operation; several readers share the files.
fn all(tree: &Tree, reading: &Reading) {
    let mut buffer = vec![0; BUFFER];
    while !reading.is_over() {
        let Some(entry) = tree.files.get(reading.next.fetch_add(1, Ordering::Relaxed)) else {
            return;
        };
        let start = Instant::now();
        match whole(entry, &mut buffer, reading) {
            Ok(true) => reading.done(start),
            Ok(false) => return,
            Err(error) => reading.failed(&entry.path, &error),
        }
    }
}

/// Reads one file; tells whether it came to its end.
fn whole(entry: &Entry, buffer: &mut [u8], reading: &Reading) -> io::Result<bool> {
    let mut file = entry.open()?;
    while !reading.is_over() {
        match file.read(buffer) {
            Ok(0) => return Ok(true),
            Ok(bytes) => reading.came(bytes),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(false)
}

/// Reads the largest file; each piece is an operation.
fn sequential(tree: &Tree, reading: &Reading) {
    let Some(entry) = tree.largest(1).next() else { return };
    let mut buffer = vec![0; BUFFER];
    let mut read = |file: io::Result<File>| -> io::Result<()> {
        let mut file = file?;
        while !reading.is_over() {
            let start = Instant::now();
            match file.read(&mut buffer)? {
                0 => return Ok(()),
                bytes => reading.came(bytes),
            }
            reading.done(start);
        }
        Ok(())
    };
    if let Err(error) = read(entry.open()) {
        reading.failed(&entry.path, &error);
    }
}

/// Reads pages at random; each is an operation. Opening files is none.
fn random(tree: &Tree, seed: u64, reading: &Reading) {
    let mut open = Vec::new();
    let mut blocks = 0;
    for entry in tree.largest(OPEN).filter(|entry| entry.size > 0) {
        match entry.open() {
            Ok(file) => {
                blocks += entry.size.div_ceil(BLOCK);
                open.push((blocks, file, entry));
            }
            Err(error) => reading.failed(&entry.path, &error),
        }
    }
    if open.is_empty() {
        return;
    }
    let (mut random, mut page) = (fastrand::Rng::with_seed(seed), vec![0; BLOCK as usize]);
    while !reading.is_over() {
        let block = random.u64(..blocks);
        // The last one's end is `blocks`, so that there is one.
        let (end, file, entry) = &open[open.partition_point(|(end, ..)| *end <= block)];
        let first = end - entry.size.div_ceil(BLOCK);
        let start = Instant::now();
        match file.read_at(&mut page, (block - first) * BLOCK) {
            Ok(bytes) => {
                reading.came(bytes);
                reading.done(start);
            }
            Err(error) => reading.failed(&entry.path, &error),
        }
    }
}
