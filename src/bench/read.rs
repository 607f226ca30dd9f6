//! Reads a directory on any file system with several access patterns, and times each operation.
//!
//! [`file_list`] lists the files; it follows no symbolic links and stays on one file system. A phase abandons readers
//! that hang in a system call, so that every phase ends.

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
    sample::{Samples, TimedStep},
    stop::StopSignal,
};

pub mod caches;
pub mod file_list;

use file_list::{FileList, ListedFile};

/// Bytes of one read, except at random.
const READ_BYTES: usize = 1 << 20;
/// Bytes of one random read: a page.
const RANDOM_READ_BYTES: u64 = 4096;
/// Number of files for random reads, the largest ones. All of them are open at once.
const MAX_OPEN_FILES: usize = 256;
/// Interval of progress reports and of checks for the end.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(50);
/// Time after a phase's end after which a reader counts as stuck.
const STUCK_AFTER: Duration = Duration::from_secs(5);

/// A phase of the benchmark: an access pattern.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReadPhase {
    /// lstat of every entry.
    Walk,
    /// Sequential read of the largest file.
    Seq,
    /// Random pages of the largest files.
    Random,
    /// Every file, one after the other.
    All,
    /// Every file, in several threads.
    Parallel,
}

/// The text is not a phase.
#[derive(Debug, thiserror::Error)]
#[error("invalid phase `{0}`: expected walk, seq, random, all or parallel")]
pub struct InvalidReadPhase(String);

impl ReadPhase {
    /// All phases, in order of execution.
    pub const ALL: [Self; 5] = [Self::Walk, Self::Seq, Self::Random, Self::All, Self::Parallel];

    /// The name on the command line.
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

impl fmt::Display for ReadPhase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for ReadPhase {
    type Err = InvalidReadPhase;

    fn from_str(text: &str) -> Result<Self, InvalidReadPhase> {
        let found = Self::ALL.into_iter().find(|phase| phase.name() == text);
        found.ok_or_else(|| InvalidReadPhase(text.to_owned()))
    }
}

/// Settings of all phases.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Length of [`ReadPhase::Random`].
    pub duration: Duration,
    /// Maximum length of each other phase.
    pub limit: Duration,
    /// Reader threads of [`ReadPhase::Parallel`].
    pub threads: usize,
    /// Seed of the random pages.
    pub seed: u64,
}

/// Progress of a phase.
#[derive(Debug, Clone, Copy)]
pub struct ReadProgress {
    /// Finished operations.
    pub operations: u64,
    /// Bytes read.
    pub bytes: u64,
    /// Time since the start.
    pub elapsed: Duration,
}

/// State that the readers of one phase share.
pub(super) struct PhaseState {
    samples: Mutex<Samples>,
    next: AtomicUsize,
    end: Instant,
    stop: StopSignal,
}

/// Runs [`ReadPhase::Walk`] in `dir`. Returns its row and the regular files.
pub fn walk(
    dir: &Path,
    settings: &Settings,
    stop: &StopSignal,
    show: impl FnMut(ReadProgress),
) -> (Row, Arc<FileList>) {
    let (dir, list) = (dir.to_owned(), Arc::<Mutex<FileList>>::default());
    let found = Arc::clone(&list);
    let work = move |reading: &PhaseState| file_list::walk(&dir, reading, |entry| found.lock().add(entry));
    let row = run_phase(ReadPhase::Walk, 1, settings.limit, stop, show, work);
    let list = std::mem::take(&mut *list.lock());
    (row, Arc::new(list))
}

/// Reads what is in `list` in one way, which is another than [`ReadPhase::Walk`].
pub fn read(
    phase: ReadPhase,
    list: &Arc<FileList>,
    settings: &Settings,
    stop: &StopSignal,
    show: impl FnMut(ReadProgress),
) -> Row {
    let (list, limit) = (Arc::clone(list), settings.limit);
    match phase {
        ReadPhase::Walk | ReadPhase::All => run_phase(phase, 1, limit, stop, show, move |reading| all(&list, reading)),
        ReadPhase::Parallel => run_phase(phase, settings.threads, limit, stop, show, move |reading| {
            all(&list, reading);
        }),
        ReadPhase::Seq => run_phase(phase, 1, limit, stop, show, move |reading| sequential(&list, reading)),
        ReadPhase::Random => {
            let seed = settings.seed;
            run_phase(phase, 1, settings.duration, stop, show, move |reading| {
                random(&list, seed, reading);
            })
        }
    }
}

/// Runs `work` in `threads` threads until all end or `limit` is over.
fn run_phase(
    phase: ReadPhase,
    threads: usize,
    limit: Duration,
    stop: &StopSignal,
    mut show: impl FnMut(ReadProgress),
    work: impl Fn(&PhaseState) + Send + Sync + 'static,
) -> Row {
    let start = Instant::now();
    let reading = Arc::new(PhaseState {
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
        if reading.is_over() && over.get_or_insert_with(Instant::now).elapsed() > STUCK_AFTER {
            break;
        }
        std::thread::sleep(PROGRESS_INTERVAL.min(limit / 10));
        let samples = reading.samples.lock();
        let progress = ReadProgress {
            operations: samples.operations,
            bytes: samples.bytes,
            elapsed: start.elapsed(),
        };
        drop(samples);
        show(progress);
    }
    let stuck = readers.iter().any(|reader| !reader.is_finished());
    // `Random` always ends by time; other phases are incomplete then.
    let interrupted = stop.is_requested() || stuck || (phase != ReadPhase::Random && Instant::now() >= reading.end);
    let mut samples = reading.samples.lock();
    if stuck {
        samples.failed("stuck", || format!("a reader did not return within {STUCK_AFTER:?}"));
    }
    Row::new(phase.name().to_owned(), threads, interrupted, &samples)
}

impl PhaseState {
    /// Whether the phase is over, by time or by a stop request.
    pub(super) fn is_over(&self) -> bool {
        self.stop.is_requested() || Instant::now() >= self.end
    }

    /// Counts bytes of an unfinished operation.
    fn record_bytes(&self, bytes: usize) {
        self.samples.lock().record_bytes(bytes as u64);
    }

    /// Counts an operation that started at `start`.
    pub(super) fn done(&self, start: Instant) {
        let took = start.elapsed();
        self.samples.lock().succeeded(0, [(TimedStep::Total, took)]);
    }

    pub(super) fn failed(&self, path: &Path, error: &dyn fmt::Display) {
        let first = || format!("{}: {error}", path.display());
        self.samples.lock().failed("input/output", first);
    }
}

/// Reads whole files; each file is an operation. Several readers share the list.
fn all(list: &FileList, reading: &PhaseState) {
    let mut buffer = vec![0; READ_BYTES];
    while !reading.is_over() {
        let Some(entry) = list.files.get(reading.next.fetch_add(1, Ordering::Relaxed)) else {
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

/// Reads one file. Returns whether it reached the end.
fn whole(entry: &ListedFile, buffer: &mut [u8], reading: &PhaseState) -> io::Result<bool> {
    let mut file = entry.open()?;
    while !reading.is_over() {
        match file.read(buffer) {
            Ok(0) => return Ok(true),
            Ok(bytes) => reading.record_bytes(bytes),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(false)
}

/// Reads the largest file; each read is an operation.
fn sequential(list: &FileList, reading: &PhaseState) {
    let Some(entry) = list.largest(1).next() else { return };
    let mut buffer = vec![0; READ_BYTES];
    let mut read = |file: io::Result<File>| -> io::Result<()> {
        let mut file = file?;
        while !reading.is_over() {
            let start = Instant::now();
            match file.read(&mut buffer)? {
                0 => return Ok(()),
                bytes => reading.record_bytes(bytes),
            }
            reading.done(start);
        }
        Ok(())
    };
    if let Err(error) = read(entry.open()) {
        reading.failed(&entry.path, &error);
    }
}

/// Reads random pages; each read is an operation. Opening files does not count.
fn random(list: &FileList, seed: u64, reading: &PhaseState) {
    let mut open = Vec::new();
    let mut blocks = 0;
    for entry in list.largest(MAX_OPEN_FILES).filter(|entry| entry.size > 0) {
        match entry.open() {
            Ok(file) => {
                blocks += entry.size.div_ceil(RANDOM_READ_BYTES);
                open.push((blocks, file, entry));
            }
            Err(error) => reading.failed(&entry.path, &error),
        }
    }
    if open.is_empty() {
        return;
    }
    let (mut random, mut page) = (fastrand::Rng::with_seed(seed), vec![0; RANDOM_READ_BYTES as usize]);
    while !reading.is_over() {
        let block = random.u64(..blocks);
        // `block` is below `blocks`, the end of the last file, so the index is valid.
        let (end, file, entry) = &open[open.partition_point(|(end, ..)| *end <= block)];
        let first = end - entry.size.div_ceil(RANDOM_READ_BYTES);
        let start = Instant::now();
        match file.read_at(&mut page, (block - first) * RANDOM_READ_BYTES) {
            Ok(bytes) => {
                reading.record_bytes(bytes);
                reading.done(start);
            }
            Err(error) => reading.failed(&entry.path, &error),
        }
    }
}
