//! Registries that are away: for less than a minute, which costs time, and for longer, which costs errors.

use std::{
    fs::{self, File},
    os::unix::fs::FileExt as _,
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
    thread,
    time::{Duration, Instant},
};

use nydus_store::{
    fixtures::{EmbeddedRegistry, content::Random},
    internals::Digest,
};

use crate::common::{BINARY, DockerRegistry, Sample, Serve, StoreLayer, output, wait_until};

const READERS: usize = 8;
/// Each reader reads blocks of this length.
const BLOCK: usize = 64 << 10;
const FILES: usize = 40;
const FILE_LEN: usize = 1 << 20;
/// How long a registry takes to restart.
const OUTAGE: Duration = Duration::from_secs(12);

/// An image of many megabytes, of which read-ahead gets little at a time.
fn large_sample() -> Sample {
    let names: Vec<_> = (0..FILES).map(|number| format!("file-{number:02}")).collect();
    let files: Vec<_> = names.iter().map(|name| (name.as_str(), FILE_LEN)).collect();
    Sample::of(&files, 1, &Sample::options())
}

fn push(registry: &DockerRegistry, sample: &Sample, repository: &str) {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime
        .block_on(sample.image.push(&registry.url(), repository, "1"))
        .unwrap();
}

fn layer_of(serve: &Serve, registry: &DockerRegistry, sample: &Sample) -> StoreLayer {
    serve.layer(&registry.reference("app", "1"), &sample.bootstrap_digest())
}

/// Reads random blocks until `stop` is set, and at least one. Counts them in `done`.
fn read_blocks(sample: &Sample, layer: &StoreLayer, seed: u64, stop: &AtomicBool, done: &AtomicUsize) {
    let mut random = Random::new(seed);
    loop {
        let name = format!("file-{:02}", random.below(FILES as u64));
        let offset = random.below((FILE_LEN / BLOCK) as u64) as usize * BLOCK;
        let file = File::open(layer.diff().join(&name)).unwrap();
        rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::Random).unwrap();
        let mut bytes = vec![0; BLOCK];
        file.read_exact_at(&mut bytes, offset as u64)
            .unwrap_or_else(|error| panic!("{name} at {offset}: {error}"));
        assert!(
            bytes == sample.content(&name)[offset..offset + BLOCK],
            "{name} reads wrong"
        );
        done.fetch_add(1, Ordering::Relaxed);
        if stop.load(Ordering::Relaxed) {
            return;
        }
    }
}

#[test]
fn registry_that_restarts_costs_its_readers_time_and_no_errors() {
    let (mut registry, sample) = (DockerRegistry::start(), large_sample());
    push(&registry, &sample, "app");
    let serve = Serve::with_config("[fetch]\nread_ahead = false\n");
    let layer = layer_of(&serve, &registry, &sample);
    assert!(layer.pull_publishes());
    let (healthy, elsewhere) = (Sample::new(2), EmbeddedRegistry::start().unwrap());
    elsewhere.add_image(&healthy.image, "b", "1").unwrap();
    let (stop, done) = (AtomicBool::new(false), AtomicUsize::new(0));
    thread::scope(|scope| {
        for seed in 0..READERS as u64 {
            let (sample, layer, stop, done) = (&sample, &layer, &stop, &done);
            scope.spawn(move || read_blocks(sample, layer, seed, stop, done));
        }
        wait_until("readers read", || (done.load(Ordering::Relaxed) > 20).then_some(()));
        registry.stop();
        let stopped = Instant::now();
        // Meanwhile another registry's image is published and read.
        let other = serve.layer(&elsewhere.reference("b", "1"), &healthy.bootstrap_digest());
        healthy.check(&other);
        thread::sleep(OUTAGE.saturating_sub(stopped.elapsed()));
        let before = done.load(Ordering::Relaxed);
        registry.restart("");
        wait_until("readers go on", || {
            (done.load(Ordering::Relaxed) > before + 2 * READERS).then_some(())
        });
        stop.store(true, Ordering::Relaxed);
    });
    sample.check(&layer);
    let log = serve.log();
    let count = |words: &str| log.lines().filter(|line| line.contains(words)).count();
    assert_eq!(count("opened circuit: host does not answer"), 1, "{log}");
    assert_eq!(count("recovered: host answers again"), 1, "{log}");
    assert_eq!(count("failed to read file"), 0, "{log}");
    let cause = log.lines().find(|line| line.contains("opened circuit")).unwrap();
    assert!(cause.contains("refused") || cause.contains("reset"), "{cause}");
}

#[test]
fn registry_that_stays_away_fails_reads_in_time_and_later_ones_at_once() {
    const TIMEOUT: Duration = Duration::from_secs(4);
    let (mut registry, sample) = (DockerRegistry::start(), large_sample());
    push(&registry, &sample, "app");
    let serve = Serve::with_config(
        "[registry]\nrequest_timeout = 4\ncircuit_max_pause = 3600\ncircuit_pause = 3600\n[fetch]\nread_ahead = false\n",
    );
    let layer = layer_of(&serve, &registry, &sample);
    assert!(layer.pull_publishes());
    let read = |name: &str| fs::read(layer.diff().join(name)).unwrap_err().raw_os_error();
    registry.stop();
    let start = Instant::now();
    assert_eq!(read("file-00"), Some(libc::EIO));
    // The kernel reads once more after a failed read-ahead.
    assert!(start.elapsed() < 5 * TIMEOUT, "{:?}", start.elapsed());
    wait_until("the outage counts as a long one", || {
        read("file-01");
        serve.log().contains("host is still away").then_some(())
    });
    let start = Instant::now();
    for name in ["file-02", "file-03", "file-04"] {
        assert_eq!(read(name), Some(libc::EIO));
    }
    assert!(start.elapsed() < TIMEOUT, "{:?}", start.elapsed());
    let log = serve.log();
    let failed = |line: &&str| line.contains("failed to read file") && line.contains("refused");
    assert!(log.lines().any(|line| failed(&line)), "the cause is told:\n{log}");
}

#[test]
fn jobs_ride_out_a_restart_of_the_registry() {
    let (mut registry, sample) = (DockerRegistry::start(), large_sample());
    push(&registry, &sample, "app");
    push(&registry, &Sample::new(2), "other");
    let serve = Serve::start();
    let run = |args: &[&str]| {
        let mut command = std::process::Command::new(BINARY);
        command.args(args).arg("--root").arg(serve.root());
        command
    };
    registry.stop();
    let seeded = registry.reference("app", "1");
    let pulled = registry.reference("other", "1");
    thread::scope(|scope| {
        let seeding = scope.spawn(|| output(&mut run(&["preseed", &format!("docker://{seeded}")])));
        let pulling = scope.spawn(|| output(&mut run(&["pull", &pulled])));
        thread::sleep(Duration::from_secs(5));
        assert!(!seeding.is_finished() && !pulling.is_finished());
        registry.restart("");
        seeding.join().unwrap();
        pulling.join().unwrap();
    });
    assert!(serve.layer(&seeded, &Digest::of(b"")).is_served());
}
