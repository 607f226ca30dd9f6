//! A power cut at any moment: a recorded sequence of changes is replayed up to each of its steps, with what a disk may
//! have kept of the changes that were not synced.
//!
//! The recording is of the real daemon. The cuts are checked in this process, by the parts of the daemon that open a
//! root and read images; some by the daemon itself.

use std::{
    any::Any,
    collections::{BTreeMap, HashSet},
    fs,
    hash::{DefaultHasher, Hash as _, Hasher as _},
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
    sync::{
        atomic::{AtomicUsize, Ordering},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

use nydus_store::{fixtures::content::Random, internals::Digest};
use parking_lot::Mutex;
use rustix::mount::{MountFlags, UnmountFlags};

use crate::common::Serve;

mod check;
mod disk;
mod recording;
mod scenario;

use check::{Checker, Expected};
use disk::{Disk, Remains, Survival};
use recording::{Change, Step, now};
use scenario::Scenario;

/// How long cuts are checked; `NYDUS_POWER_CUT_SECONDS` changes it.
const SECONDS: u64 = 40;
/// Number of threads that check. They mostly wait for one another: more than cores.
const THREADS: u64 = 6;
/// After so many problems, no more cuts are checked.
const MAX_PROBLEMS: usize = 20;
/// The steps are checked in so many turns, each of which goes through the whole recording.
const TURNS: usize = 16;
/// Number of cuts after which the daemon itself runs.
const DAEMONS: usize = 4;
/// What survives. What is random is drawn more than once.
const SURVIVALS: [Survival; 8] = [
    Survival::Synced,
    Survival::Everything,
    Survival::Names,
    Survival::Lengths,
    Survival::Pages,
    Survival::Pages,
    Survival::Sectors,
    Survival::Sectors,
];

/// A power cut and what it left.
struct Cut {
    /// Number of steps before it.
    after: usize,
    survival: Survival,
    remains: Remains,
    expected: BTreeMap<Digest, Expected>,
}

impl Cut {
    /// A number that differs for cuts of which different things are checked.
    fn identity(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        (&self.remains, &self.expected).hash(&mut hasher);
        hasher.finish()
    }
}

/// Cuts after those numbers of steps, in order.
fn cuts<'a>(scenario: &'a Scenario, chosen: &'a HashSet<usize>, seed: u64) -> impl Iterator<Item = Cut> + 'a {
    let (mut disk, mut random) = (Disk::new(), Random::new(seed));
    scenario.steps.iter().enumerate().flat_map(move |(position, step)| {
        disk.apply(&step.change);
        let after = position + 1;
        let survivals: &[Survival] = if chosen.contains(&after) { &SURVIVALS } else { &[] };
        let cut = |survival: &Survival| Cut {
            after,
            survival: *survival,
            remains: disk.cut(*survival, &mut random),
            expected: scenario.expected_after(after),
        };
        survivals.iter().map(cut).collect::<Vec<_>>()
    })
}

/// A file system in memory, where syncs cost nothing.
struct MemoryDir(tempfile::TempDir);

impl MemoryDir {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        rustix::mount::mount("tmpfs", dir.path(), "tmpfs", MountFlags::empty(), None).unwrap();
        Self(dir)
    }
}

impl Drop for MemoryDir {
    fn drop(&mut self) {
        rustix::mount::unmount(self.0.path(), UnmountFlags::DETACH).ok();
    }
}

/// Checks cuts on several threads, and collects what is wrong.
struct Checks<'a> {
    scenario: &'a Scenario,
    checker: Checker,
    seed: u64,
    deadline: Instant,
    checked: AtomicUsize,
    files: AtomicUsize,
    seen: Mutex<HashSet<u64>>,
    problems: Mutex<Vec<String>>,
}

impl Checks<'_> {
    /// Checks the chosen cuts; returns whether there may be more.
    fn run(&self, chosen: &HashSet<usize>) -> bool {
        let (sender, queue) = mpsc::sync_channel::<Cut>(4);
        let queue = Mutex::new(queue);
        thread::scope(|scope| {
            for number in 0..THREADS {
                let queue = &queue;
                scope.spawn(move || {
                    let (dir, mut random) = (MemoryDir::new(), Random::new(self.seed + number));
                    loop {
                        let Ok(cut) = queue.lock().recv() else { break };
                        self.check(&cut, dir.0.path(), &mut random);
                    }
                });
            }
            let all = cuts(self.scenario, chosen, self.seed);
            let new = all.filter(|cut| self.seen.lock().insert(cut.identity()));
            for cut in new.take_while(|_| self.go_on()) {
                sender.send(cut).unwrap();
            }
            drop(sender);
        });
        self.go_on()
    }

    fn go_on(&self) -> bool {
        Instant::now() < self.deadline && self.problems.lock().len() < MAX_PROBLEMS
    }

    fn check(&self, cut: &Cut, dir: &Path, random: &mut Random) {
        let root = dir.join("root");
        cut.remains.write_to(dir);
        let checked = catch_unwind(AssertUnwindSafe(|| self.checker.check(&root, &cut.expected, random)));
        match checked {
            Ok(files) => _ = self.files.fetch_add(files, Ordering::Relaxed),
            Err(panic) => self.problems.lock().push(self.describe(cut, panic.as_ref())),
        }
        self.checked.fetch_add(1, Ordering::Relaxed);
        fs::remove_dir_all(root).ok();
    }

    /// Also leaves the root as it was after the cut.
    fn describe(&self, cut: &Cut, panic: &(dyn Any + Send)) -> String {
        let kept = tempfile::Builder::new().prefix("power-cut-").tempdir().unwrap().keep();
        cut.remains.write_to(&kept);
        let text = panic.downcast_ref::<String>().map(String::as_str);
        let text = text.or(panic.downcast_ref::<&str>().copied()).unwrap_or("?");
        let (after, all, left) = (cut.after, self.scenario.steps.len(), kept.display());
        let step = self.scenario.steps[after - 1].change.to_string();
        format!(
            "after step {after} of {all} ({step}), {:?} survives, see {left}: {text}",
            cut.survival
        )
    }
}

#[test]
fn root_is_right_after_a_power_cut_at_any_moment() {
    let scenario = Scenario::record();
    let seed = now().as_nanos() as u64;
    let seconds = std::env::var("NYDUS_POWER_CUT_SECONDS").map_or(SECONDS, |seconds| seconds.parse().unwrap());
    let start = Instant::now();
    let checks = Checks {
        scenario: &scenario,
        checker: Checker::new(scenario.samples.iter().map(|(_, sample)| sample)),
        seed,
        deadline: start + Duration::from_secs(seconds),
        checked: AtomicUsize::new(0),
        files: AtomicUsize::new(0),
        seen: Mutex::default(),
        problems: Mutex::default(),
    };
    let order = in_order_of_importance(&scenario.steps, seed);
    let turns = order.chunks(order.len().div_ceil(TURNS));
    let complete = turns.take_while(|steps| checks.run(&steps.iter().copied().collect()));
    let turns = complete.count();
    println!(
        "{} steps, {turns} of {TURNS} turns, {} cuts, {} files read, {:?}, seed {seed}",
        scenario.steps.len(),
        checks.checked.load(Ordering::Relaxed),
        checks.files.load(Ordering::Relaxed),
        start.elapsed(),
    );
    let problems = checks.problems.into_inner();
    assert!(problems.is_empty(), "seed {seed}:\n{}", problems.join("\n"));
    assert!(checks.checked.into_inner() > 100, "too few cuts");
    run_daemons(&scenario, seed);
}

/// The numbers of steps before a cut: first those around syncs and changes of names, then those between writes. Each of
/// both in random order.
fn in_order_of_importance(steps: &[Step], seed: u64) -> Vec<usize> {
    let is_write = |step: &Step| matches!(step.change, Change::Write { .. });
    let is_between_writes = |after: usize| steps[after - 1..].iter().take(2).all(is_write);
    let is_cut = |after: &usize| !matches!(steps[after - 1].change, Change::BeginSync { .. });
    let mut random = Random::new(seed);
    let mut order: Vec<_> = (1..=steps.len()).filter(is_cut).collect();
    order.sort_by_cached_key(|after| (is_between_writes(*after), random.number()));
    order
}

/// Lets the daemon serve what some cuts left, and reads all images.
fn run_daemons(scenario: &Scenario, seed: u64) {
    let order = in_order_of_importance(&scenario.steps, seed + 1);
    let chosen = order.into_iter().take(DAEMONS).collect();
    // Each of these survivals comes twice.
    let random = cuts(scenario, &chosen, seed).filter(|cut| cut.survival == Survival::Sectors);
    for cut in random.step_by(2) {
        let mut serve = Serve::prepare("");
        cut.remains.write_to(serve.root().parent().unwrap());
        serve.launch();
        for (name, sample) in &scenario.samples {
            sample.check(&scenario.layer(name, &serve));
        }
    }
}
