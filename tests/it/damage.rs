//! Damaged files of the daemon and full disks: readers still get the correct bytes.

use std::{
    fs::{self, File},
    io::Write as _,
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
    time::Duration,
};

use nydus_store::fixtures::{BuildOptions, Fault, content::Random};
use rustix::mount::{MountFlags, UnmountFlags};

use crate::common::{Guard, Lab, Sample, Serve, wait_until};

/// Name of a damage, or a file-name ending to damage, and how.
type Damage = (&'static str, fn(&Path));

fn files_ending_in(dir: &Path, ending: &str) -> Vec<PathBuf> {
    let all = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    let found: Vec<_> = all.filter(|path| path.to_string_lossy().ends_with(ending)).collect();
    assert!(!found.is_empty(), "no {ending} in {}", dir.display());
    found
}

fn resize(path: &Path, len: impl Fn(u64) -> u64) {
    let file = File::options().write(true).open(path).unwrap();
    file.set_len(len(file.metadata().unwrap().len())).unwrap();
}

fn flip(path: &Path) {
    let mut bytes = fs::read(path).unwrap();
    for at in (0..bytes.len()).step_by(1000) {
        bytes[at] ^= 0x55;
    }
    fs::write(path, bytes).unwrap();
}

/// Overwrites it with zeros, as after a power failure.
fn blank(path: &Path) {
    let len = fs::metadata(path).unwrap().len();
    fs::write(path, vec![0; usize::try_from(len).unwrap()]).unwrap();
}

fn garbage(path: &Path) {
    let mut bytes = vec![0; 4099];
    Random::new(1).fill(&mut bytes);
    fs::write(path, bytes).unwrap();
}

fn append(path: &Path) {
    let mut file = File::options().append(true).open(path).unwrap();
    file.write_all(&[0xee; 5000]).unwrap();
}

fn remove(path: &Path) {
    fs::remove_file(path).unwrap();
}

#[test]
fn damaged_cache_files_are_repaired() {
    let mut lab = Lab::new("");
    let sample = Sample::new(1);
    let layer = lab.add(&sample, "image");
    sample.check(&layer);
    let cache = lab.serve.root().join("cache");
    let (data, map) = (".blob.data", ".blob.claims");
    let damages: &[(&str, &[Damage])] = &[
        ("nothing", &[]),
        ("flipped data", &[(data, flip)]),
        ("blank data", &[(data, blank)]),
        ("cut data", &[(data, |path| resize(path, |len| len / 2))]),
        ("empty data", &[(data, |path| resize(path, |_| 0))]),
        ("extended data", &[(data, append)]),
        ("garbage data", &[(data, garbage)]),
        ("garbage map", &[(map, garbage)]),
        ("garbage map and blank data", &[(map, garbage), (data, blank)]),
        ("cut map", &[(map, |path| resize(path, |len| len - 3))]),
        ("empty map", &[(map, |path| resize(path, |_| 0))]),
        ("extended map", &[(map, append)]),
        ("no data", &[(data, remove)]),
        ("no map", &[(map, remove)]),
        ("neither", &[(data, remove), (map, remove)]),
    ];
    let paths = files_ending_in(&cache, "").into_iter();
    let whole: Vec<_> = paths.map(|path| (path.clone(), fs::read(path).unwrap())).collect();
    for (what, damage) in damages {
        lab.serve.stop();
        for (path, bytes) in &whole {
            fs::write(path, bytes).unwrap();
        }
        for (ending, apply) in *damage {
            files_ending_in(&cache, ending).iter().for_each(|path| apply(path));
        }
        lab.serve.launch();
        let before = lab.registry.request_count();
        sample.check(&layer);
        // The next process finds the cache repaired and fetches nothing.
        lab.serve.restart();
        let repaired = lab.registry.request_count();
        sample.check(&layer);
        assert_eq!(lab.registry.request_count(), repaired, "{what}: fetched twice");
        assert_eq!(
            repaired == before,
            matches!(*what, "nothing" | "extended data" | "extended map"),
            "{what}"
        );
    }
}

/// The blob meta comes from the blob, not from the bootstrap layer.
#[test]
fn cached_blob_meta_needs_no_registry() {
    let options = BuildOptions {
        batch_size: 64 << 10,
        keep_meta: false,
        ..Sample::options()
    };
    let names: Vec<_> = (0..60).map(|number| format!("file-{number}")).collect();
    let sizes: Vec<_> = names.iter().map(|name| (name.as_str(), 3000)).collect();
    let sample = Sample::of(&sizes, 1, &options);
    let mut lab = Lab::new("[registry]\nretries = 0\n");
    let layer = lab.add(&sample, "image");
    sample.check(&layer);
    let cache = lab.serve.root().join("cache");

    lab.fault("image", |_| Fault::Status(503));
    lab.serve.restart();
    sample.check(&layer);
    lab.clear_fault("image");

    for apply in [flip, blank, garbage, append, remove] {
        lab.serve.stop();
        files_ending_in(&cache, ".blob.meta")
            .iter()
            .for_each(|path| apply(path));
        files_ending_in(&cache, ".blob.data")
            .iter()
            .for_each(|path| blank(path));
        lab.serve.launch();
        sample.check(&layer);
        assert_eq!(
            files_ending_in(&cache, ".blob.meta").len(),
            1,
            "the blob meta is cached again"
        );
    }
}

#[test]
fn damaged_image_files_are_repaired() {
    let mut lab = Lab::new("");
    let sample = Sample::new(1);
    let layer = lab.add(&sample, "image");
    sample.check(&layer);
    let images = lab.serve.root().join("images");
    let damages: [Damage; 6] = [
        ("flipped", flip),
        ("blank", blank),
        ("cut", |path| resize(path, |len| len / 2)),
        ("empty", |path| resize(path, |_| 0)),
        ("extended", append),
        ("removed", remove),
    ];
    for place in ["content", "references"] {
        for (what, apply) in damages {
            lab.serve.stop();
            files_ending_in(&images.join(place), "")
                .iter()
                .for_each(|path| apply(path));
            lab.serve.launch();
            assert!(layer.announce_pull());
            sample.check(&layer);
            lab.serve.restart();
            let repaired = lab.registry.request_count();
            sample.check(&layer);
            assert_eq!(lab.registry.request_count(), repaired, "{what} {place} are repaired");
        }
    }
    // Well-formed records with wrong contents.
    let other = Sample::new(2);
    for manifests in [
        vec![],
        vec![other.image.manifest_digest()],
        vec![sample.bootstrap_digest()],
    ] {
        lab.serve.stop();
        let known = serde_json::json!({"reference": "x", "manifests": manifests});
        for path in files_ending_in(&images.join("references"), ".json") {
            fs::write(path, serde_json::to_vec(&known).unwrap()).unwrap();
        }
        lab.serve.launch();
        assert!(layer.announce_pull());
        sample.check(&layer);
    }
}

/// While running, the daemon trusts verified chunks until it finds the file truncated. Chunks are then fetched again on
/// demand.
#[test]
fn truncated_cache_file_is_fetched_again_while_running() {
    let lab = Lab::new("");
    let sample = Sample::new(1);
    let layer = lab.add(&sample, "image");
    sample.check(&layer);
    // In use, so that the daemon keeps its state of the file.
    let _held = File::open(layer.diff()).unwrap();
    for path in files_ending_in(&lab.serve.root().join("cache"), ".blob.data") {
        resize(&path, |_| 0);
    }
    fs::write("/proc/sys/vm/drop_caches", "3").unwrap();
    sample.check(&layer);
}

/// A small tmpfs, unmounted on drop.
struct SmallDisk(PathBuf);

impl SmallDisk {
    fn mount(dir: &Path, kib: u64) -> Self {
        fs::create_dir_all(dir).unwrap();
        let options = std::ffi::CString::new(format!("size={kib}k")).unwrap();
        rustix::mount::mount("tmpfs", dir, "tmpfs", MountFlags::empty(), options.as_c_str()).unwrap();
        Self(dir.to_owned())
    }

    /// Fills the remaining space.
    fn fill(&self) {
        let file = File::create(self.0.join("ballast")).unwrap();
        for step in [1 << 20, 4096] {
            let mut at = file.metadata().unwrap().len();
            while let Ok(written) = file.write_at(&vec![1; step], at) {
                at += written as u64;
            }
        }
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        rustix::mount::unmount(&self.0, UnmountFlags::DETACH).ok();
    }
}

#[test]
fn full_disk_does_not_stop_readers() {
    let mut lab = Lab::with_daemon(Serve::prepare(
        "[images]\nnegative_ttl = 0\n[fetch]\nread_ahead = false\n",
    ));
    let disk = SmallDisk::mount(lab.serve.root(), 8 << 10);
    lab.serve.launch();
    let (sample, other) = (Sample::new(1), Sample::new(2));
    let layer = lab.add(&sample, "image");
    assert!(layer.pull_publishes());
    // Held open as by a container: an unused tree is dropped, and loading it again needs disk space.
    let held = File::open(layer.diff()).unwrap();
    assert_eq!(fs::read(layer.diff().join("hello")).unwrap(), sample.content("hello"));
    disk.fill();
    let before = lab.serve.log().len();
    for _ in 0..3 {
        sample.check(&layer);
        fs::write("/proc/sys/vm/drop_caches", "3").unwrap();
    }
    lab.assert_logged(before, &["ERROR", "failed to write to blob cache", "free disk space"]);
    // A chunk that cannot be cached is fetched once per read.
    let large = File::open(layer.diff().join("large")).unwrap();
    fs::write("/proc/sys/vm/drop_caches", "3").unwrap();
    let asked = lab.registry.request_count();
    let mut bytes = vec![0; 1 << 20];
    large.read_exact_at(&mut bytes, 0).unwrap();
    assert!(bytes == sample.content("large"));
    let asked = lab.registry.request_count() - asked;
    assert!(asked <= 16, "{asked} requests for 16 chunks");
    let words = lab.log_since(before).matches("free disk space").count();
    assert_eq!(words, 1, "{}", lab.log_since(before));

    // Another image cannot be stored.
    let other_layer = lab.add(&other, "other");
    let before = lab.serve.log().len();
    if other_layer.pull_publishes() {
        other.check(&other_layer);
    } else {
        lab.assert_logged(before, &["WARN", &lab.reference("other"), "No space left"]);
    }
    sample.check(&layer);
    assert!(lab.serve.is_running());
    drop(held);

    // A start on a full disk works, or reports the disk.
    lab.serve.stop();
    disk.fill();
    let log = File::create(lab.serve.log_path()).unwrap();
    let mut process = Guard(lab.serve.command().stderr(log).spawn().unwrap());
    let ended = wait_until("it serves or exits", || {
        let ended = process.wait(Duration::ZERO).map(Some);
        ended.or_else(|| lab.serve.log().contains("serving").then_some(None))
    });
    if ended.is_some_and(|status| !status.success()) {
        lab.assert_logged(0, &[lab.serve.root().to_str().unwrap(), "No space left"]);
    }
    drop(process);
    fs::remove_file(disk.0.join("ballast")).unwrap();
    lab.serve.launch();
    sample.check(&layer);
    other.check(&other_layer);
    lab.serve.stop();
}
