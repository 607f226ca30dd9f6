//! Many concurrent readers.

use std::{
    collections::{HashMap, HashSet},
    fs,
    os::unix::fs::FileExt as _,
    sync::{
        Barrier,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use nydus_store::{
    fixtures::{Fault, content::Random},
    internals::Tree,
};

use crate::common::{Lab, Sample, StoreLayer};

const THREADS: usize = 64;

/// Without read-ahead, so that requests can be counted.
const NO_READ_AHEAD: &str = "[fetch]\nread_ahead = false\n";

/// Panics unless each chunk was requested exactly once and no other data was.
fn assert_fetched_once(lab: &Lab, sample: &Sample) {
    let tree = Tree::load(sample.image.bootstrap_path().unwrap()).unwrap();
    let chunks = &tree.blobs()[0].chunks;
    let log = lab.registry.log();
    let ranges: Vec<_> = log
        .iter()
        .filter(|request| request.digest == Some(sample.data_digest()))
        .map(|request| request.range.clone().unwrap())
        .collect();
    let unique: HashSet<_> = ranges.iter().collect();
    let mut twice = HashMap::<_, usize>::new();
    ranges.iter().for_each(|range| *twice.entry(range).or_default() += 1);
    twice.retain(|_, count| *count > 1);
    assert_eq!(unique.len(), ranges.len(), "requested more than once: {twice:?}");
    let bytes: u64 = chunks.iter().map(|chunk| u64::from(chunk.compressed_size)).sum();
    assert_eq!(lab.registry.blob_stats(sample.data_digest()).bytes, bytes);
}

#[test]
fn concurrent_readers_fetch_each_chunk_once() {
    let lab = Lab::new(NO_READ_AHEAD);
    let samples: Vec<_> = (0..8).map(Sample::new).collect();
    let layers: Vec<_> = samples
        .iter()
        .enumerate()
        .map(|(number, sample)| lab.add(sample, &format!("image-{number}")))
        .collect();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        // Meanwhile pulls are announced, and the kernel drops dentries and inodes.
        for part in 0..2 {
            let (layers, done) = (&layers, &done);
            scope.spawn(move || {
                let mut random = Random::new(part);
                while !done.load(Ordering::Relaxed) {
                    let layer: &StoreLayer = &layers[random.below(8) as usize];
                    assert!(layer.announce_pull());
                    assert!(layer.record().unwrap()["diff-digest"].is_string());
                }
            });
        }
        let dropper = scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                fs::write("/proc/sys/vm/drop_caches", "2").unwrap();
                std::thread::sleep(Duration::from_millis(100));
            }
        });
        let readers: Vec<_> = (0..THREADS)
            .map(|thread| {
                let (samples, layers) = (&samples, &layers);
                scope.spawn(move || {
                    let mut random = Random::new(1000 + thread as u64);
                    for round in 0..12 {
                        let image = if round < 8 {
                            (thread + round) % 8
                        } else {
                            random.below(8) as usize
                        };
                        let (sample, layer) = (&samples[image], &layers[image]);
                        let names = sample.names();
                        let name = &names[random.below(names.len() as u64) as usize];
                        let expected = sample.content(name);
                        let file = fs::File::open(layer.diff().join(name)).unwrap();
                        let at = random.below(expected.len() as u64) as usize;
                        let mut part = vec![0; (expected.len() - at).min(50_000)];
                        file.read_exact_at(&mut part, at as u64).unwrap();
                        assert!(part == expected[at..at + part.len()], "{name} of {image} at {at}");
                    }
                })
            })
            .collect();
        let results: Vec<_> = readers.into_iter().map(std::thread::ScopedJoinHandle::join).collect();
        done.store(true, Ordering::Relaxed);
        dropper.join().unwrap();
        assert!(results.iter().all(Result::is_ok));
    });
    for (sample, layer) in samples.iter().zip(&layers) {
        sample.check(layer);
        assert_fetched_once(&lab, sample);
    }
    let bootstraps = lab.registry.log();
    let whole = bootstraps
        .iter()
        .filter(|request| request.path.contains("/blobs/") && request.range.is_none());
    assert_eq!(whole.count(), 16, "each configuration and bootstrap is requested once");
    assert!(!lab.serve.log().contains("panicked"), "{}", lab.serve.log());
}

#[test]
fn concurrent_readers_of_one_chunk_share_one_request() {
    let lab = Lab::new(NO_READ_AHEAD);
    let sample = Sample::new(1);
    let layer = lab.add(&sample, "image");
    assert!(layer.pull_publishes());
    lab.fault("image", |request| match request.range {
        Some(_) => Fault::Delay(Duration::from_millis(500)),
        None => Fault::None,
    });
    let barrier = Barrier::new(THREADS);
    std::thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| {
                let file = fs::File::open(layer.diff().join("one")).unwrap();
                barrier.wait();
                let mut bytes = vec![0; 64 << 10];
                file.read_exact_at(&mut bytes, 0).unwrap();
                assert!(bytes == sample.content("one"));
            });
        }
    });
    assert_eq!(lab.registry.blob_stats(sample.data_digest()).requests, 1);
}

#[test]
fn concurrent_look_ups_of_one_image_share_one_load() {
    let lab = Lab::new("");
    let sample = Sample::new(1);
    let layer = lab.add(&sample, "image");
    lab.fault("image", |_| Fault::Delay(Duration::from_millis(200)));
    std::thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| assert!(layer.announce_pull()));
        }
    });
    let mut log = lab.registry.log();
    // Each announcement resolves the tag; only the content is shared.
    log.retain(|request| request.path.contains("/blobs/"));
    assert_eq!(log.len(), 2, "configuration and bootstrap: {log:#?}");
}
