//! The cache keeps its limit while more is read than it may hold.

use std::{
    fs::{self, File},
    io::Read as _,
    os::unix::fs::MetadataExt as _,
    path::Path,
    process::{Command, Output},
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    thread,
    time::Duration,
};

use nydus_store::fixtures::content::Random;
use serde_json::Value;

use crate::common::{BINARY, Lab, Sample, StoreLayer, wait_until};

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
    let large: Vec<_> = (2..10).map(|seed| sample(seed, 9)).collect();
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

/// Neither the bytes of evicted chunks nor the journal are wrong after the daemon was killed at any moment.
#[test]
fn daemon_killed_while_it_evicts_leaves_no_wrong_chunk() {
    let mut lab = Lab::new(LIMITED);
    let sample = sample(1, 12);
    let layer = lab.add(&sample, "image");
    assert!(layer.pull_publishes());
    let mut random = Random::new(1);
    for _ in 0..6 {
        let logged = lab.serve.log().len();
        thread::scope(|scope| {
            // Fails once the daemon is dead.
            scope.spawn(|| {
                for name in sample.names().iter().cycle() {
                    let Ok(mut file) = File::open(layer.diff().join(name)) else {
                        break;
                    };
                    let mut read = Vec::new();
                    if file.read_to_end(&mut read).is_err() {
                        break;
                    }
                    assert!(read == sample.content(name), "{name} reads wrong");
                    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
                }
            });
            wait_until("eviction begins", || {
                lab.log_since(logged).contains("evicted from blob cache").then_some(())
            });
            thread::sleep(Duration::from_millis(random.below(50)));
            lab.serve.process().signal(rustix::process::Signal::KILL);
        });
        lab.serve.kill_and_restart();
        sample.check(&layer);
        sample.drop_pages(&layer);
        assert!(usage(lab.serve.root()) <= LIMIT + LIMIT / 100);
    }
    assert!(!lab.serve.log().contains("dropped corrupt"), "{}", lab.serve.log());
}

#[test]
fn limit_holds_after_a_restart_and_the_latest_image_stays() {
    let mut lab = Lab::new("[cache]\nlimit = \"64MiB\"\nmin_free = \"0%\"\n");
    let samples: Vec<_> = (1..4).map(|seed| sample(seed, 3)).collect();
    let layers: Vec<_> = (0..3).map(|at| lab.add(&samples[at], &format!("image{at}"))).collect();
    for (sample, layer) in samples.iter().zip(&layers) {
        assert!(layer.pull_publishes());
        sample.check(layer);
        sample.drop_pages(layer);
    }
    assert!(usage(lab.serve.root()) > 35 * MIB);
    lab.serve.stop();
    fs::write(lab.serve.config_path(), LIMITED).unwrap();
    lab.serve.launch();
    let fetched = || {
        let stats = samples
            .iter()
            .map(|sample| lab.registry.blob_stats(sample.data_digest()).bytes);
        stats.collect::<Vec<_>>()
    };
    wait_until("the cache keeps its new limit", || {
        (usage(lab.serve.root()) <= LIMIT).then_some(())
    });
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

fn nydus_store(lab: &Lab, args: &[&str]) -> Output {
    let mut command = Command::new(BINARY);
    command.args(args).arg("--root").arg(lab.serve.root());
    command.arg("--config").arg(lab.serve.config_path()).output().unwrap()
}

fn is_pinned(lab: &Lab) -> Value {
    let listed = nydus_store(lab, &["images", "--json"]).stdout;
    serde_json::from_slice::<Value>(&listed).unwrap()[0]["pinned"].clone()
}

#[test]
fn pinned_image_stays_whole_and_may_exceed_the_limit() {
    let mut lab = Lab::new(LIMITED);
    let (pinned, other) = (sample(1, 10), sample(2, 10));
    let (pinned_layer, other_layer) = (lab.add(&pinned, "pinned"), lab.add(&other, "other"));
    let reference = lab.reference("pinned");
    let preseeded = nydus_store(&lab, &["preseed", &format!("docker://{reference}")]);
    let printed = String::from_utf8(preseeded.stderr).unwrap();
    assert!(
        preseeded.status.success() && printed.contains("warning: pinned images take"),
        "{printed}"
    );
    assert_eq!(is_pinned(&lab), true);
    assert!(other_layer.pull_publishes());
    let fetched = || lab.registry.blob_stats(pinned.data_digest()).bytes;
    let before = fetched();
    other.check(&other_layer);
    pinned.check(&pinned_layer);
    assert_eq!(fetched(), before);
    let unpinned = nydus_store(&lab, &["unpin", &reference]);
    assert_eq!(String::from_utf8(unpinned.stdout).unwrap(), format!("{reference}\n"));
    assert_eq!(is_pinned(&lab), false);
    // Above the high watermark, the next write evicts.
    other.drop_pages(&other_layer);
    other.check(&other_layer);
    assert!(usage(lab.serve.root()) <= LIMIT + LIMIT / 100);
    let repinned = nydus_store(&lab, &["pin", &reference]);
    assert!(
        String::from_utf8(repinned.stderr)
            .unwrap()
            .contains("more than the limit of the cache")
    );
    lab.serve.restart();
    assert_eq!(is_pinned(&lab), true);
    pinned.drop_pages(&pinned_layer);
    pinned.check(&pinned_layer);
    let before = lab.registry.blob_stats(pinned.data_digest()).bytes;
    pinned.drop_pages(&pinned_layer);
    other.check(&other_layer);
    pinned.check(&pinned_layer);
    assert_eq!(lab.registry.blob_stats(pinned.data_digest()).bytes, before);
    let unknown = nydus_store(&lab, &["pin", "r.example/unknown:1"]);
    assert_eq!(unknown.status.code(), Some(1));
}
