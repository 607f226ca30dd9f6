//! The cache keeps its limit while more is read than it may hold.

use std::{
    fs,
    os::unix::fs::MetadataExt as _,
    path::Path,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    thread,
    time::Duration,
};

use crate::common::{Lab, Sample, StoreLayer};

const MIB: u64 = 1 << 20;
const LIMIT: u64 = 32 * MIB;
const LIMITED: &str = "[cache]\nlimit = \"32MiB\"\nmin_free = \"0%\"\n";

/// Disk space of what the limit of the cache applies to.
pub fn usage(root: &Path) -> u64 {
    let dirs = ["cache", "images/content", "images/references", "traces"].map(|dir| root.join(dir));
    let files = dirs.iter().flat_map(|dir| fs::read_dir(dir).unwrap());
    // Files may vanish meanwhile.
    let files = files.filter_map(|file| file.unwrap().metadata().ok());
    files.map(|file| file.blocks() * 512).sum()
}

/// An image of files of 4 MiB.
fn sample(seed: u64, files: usize) -> Sample {
    let names: Vec<_> = (0..files).map(|number| format!("{number:02}")).collect();
    let files: Vec<_> = names.iter().map(|name| (name.as_str(), 4 << 20)).collect();
    Sample::of(&files, seed, &Sample::options())
}

/// Runs `work` while another thread watches the disk space below `root`. Returns the largest.
fn highest_usage_during(root: &Path, work: impl FnOnce()) -> u64 {
    let (is_over, highest) = (AtomicBool::new(false), AtomicU64::new(0));
    thread::scope(|scope| {
        scope.spawn(|| {
            while !is_over.load(Ordering::Relaxed) {
                highest.fetch_max(usage(root), Ordering::Relaxed);
                thread::sleep(Duration::from_millis(5));
            }
        });
        work();
        is_over.store(true, Ordering::Relaxed);
    });
    highest.into_inner()
}

fn check_twice(sample: &Sample, layer: &StoreLayer) {
    for _ in 0..2 {
        sample.check(layer);
        sample.drop_pages(layer);
    }
}

#[test]
fn images_larger_than_the_limit_are_read_within_the_limit() {
    let lab = Lab::new(LIMITED);
    let hot = sample(1, 1);
    let hot_layer = lab.add(&hot, "hot");
    assert!(hot_layer.pull_publishes());
    hot.check(&hot_layer);
    let large: Vec<_> = (2..5).map(|seed| sample(seed, 12)).collect();
    let layers: Vec<_> = large
        .iter()
        .map(|sample| lab.add(sample, &format!("large{}", sample.data_digest().hex())))
        .collect();
    assert!(layers.iter().all(StoreLayer::pull_publishes));
    let fetched_hot = lab.registry.blob_stats(hot.data_digest()).bytes;
    let highest = highest_usage_during(lab.serve.root(), || {
        let is_over = AtomicBool::new(false);
        thread::scope(|scope| {
            // Used all the time, and therefore never evicted.
            scope.spawn(|| {
                while !is_over.load(Ordering::Relaxed) {
                    hot.drop_pages(&hot_layer);
                    hot.check(&hot_layer);
                }
            });
            let readers: Vec<_> = large
                .iter()
                .zip(&layers)
                .map(|(sample, layer)| scope.spawn(move || check_twice(sample, layer)))
                .collect();
            for reader in readers {
                reader.join().unwrap();
            }
            is_over.store(true, Ordering::Relaxed);
        });
    });
    assert!(highest <= LIMIT + LIMIT / 100, "{highest} bytes");
    assert!(highest > LIMIT / 2, "{highest} bytes");
    assert_eq!(lab.registry.blob_stats(hot.data_digest()).bytes, fetched_hot);
    lab.assert_logged(0, &["evicted from blob cache"]);
    assert!(!lab.serve.log().contains("dropped corrupt"), "{}", lab.serve.log());
}

#[test]
fn limit_holds_after_a_restart_and_the_latest_image_stays() {
    let mut lab = Lab::new("[cache]\nlimit = \"64MiB\"\nmin_free = \"0%\"\n");
    let samples: Vec<_> = (1..4).map(|seed| sample(seed, 4)).collect();
    let layers: Vec<_> = (0..3).map(|at| lab.add(&samples[at], &format!("image{at}"))).collect();
    for (sample, layer) in samples.iter().zip(&layers) {
        assert!(layer.pull_publishes());
        sample.check(layer);
        sample.drop_pages(layer);
    }
    assert!(usage(lab.serve.root()) > 48 * MIB);
    lab.serve.stop();
    fs::write(lab.serve.config_path(), LIMITED).unwrap();
    lab.serve.launch();
    let fetched = || {
        let stats = samples
            .iter()
            .map(|sample| lab.registry.blob_stats(sample.data_digest()).bytes);
        stats.collect::<Vec<_>>()
    };
    let before = fetched();
    samples[2].check(&layers[2]);
    samples[0].check(&layers[0]);
    samples[2].drop_pages(&layers[2]);
    samples[2].check(&layers[2]);
    let after = fetched();
    assert_eq!(before[2], after[2]);
    assert!(
        usage(lab.serve.root()) <= LIMIT + LIMIT / 100,
        "{}",
        usage(lab.serve.root())
    );
}
