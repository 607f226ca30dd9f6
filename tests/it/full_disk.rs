//! Roots on a disk that is full or read-only: what is published is served, new images start, and the daemon recovers by
//! itself.

use std::{
    fs::{self, File},
    io::{self, Write as _},
    path::PathBuf,
    process::Command,
};

use rustix::mount::{MountFlags, mount_remount};

use crate::common::{BINARY, Lab, Sample, Serve, failure_with, wait_until};

const DISK_BYTES: u64 = 96 << 20;

/// A daemon whose root is a small file system.
fn small_lab() -> Lab {
    let mut serve = Serve::prepare_on_tmpfs("[fetch]\nread_ahead = false\n", DISK_BYTES);
    serve.launch();
    Lab::with_daemon(serve)
}

/// Fills the file system of the root. Returns the file that takes its space.
fn fill(lab: &Lab) -> PathBuf {
    let path = lab.serve.root().join("filler");
    let mut file = File::create(&path).unwrap();
    for len in [1 << 20, 4096, 1] {
        let block = vec![1; len];
        while file.write_all(&block).is_ok() {}
    }
    let error = file.write_all(&[1; 8192]).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::StorageFull);
    path
}

/// Runs `nydus-store auth-helper`, requires exit status 1, and returns its standard error.
fn announce_by_helper(lab: &Lab, repository: &str) -> String {
    let mut command = Command::new(BINARY);
    command.arg("auth-helper").arg("--root").arg(lab.serve.root());
    let (input, mut logins) = io::pipe().unwrap();
    write!(logins, "{{\"{}\": {{}}}}", lab.reference(repository)).unwrap();
    drop(logins);
    failure_with(1, command.stdin(input))
}

fn count(lab: &Lab, words: &str) -> usize {
    lab.serve.log().lines().filter(|line| line.contains(words)).count()
}

#[test]
fn new_images_start_on_a_full_disk_and_are_stored_later() {
    let mut lab = small_lab();
    let samples: Vec<_> = (1..4).map(Sample::new).collect();
    let known = lab.add(&samples[0], "known");
    samples[0].check(&known);
    let filler = fill(&lab);
    let new: Vec<_> = [("first", 1), ("second", 2)]
        .map(|(name, number)| (lab.add(&samples[number], name), &samples[number]))
        .into();
    for (layer, sample) in &new {
        assert!(layer.pull_publishes(), "{}", lab.serve.log());
        sample.check(layer);
        sample.drop_pages(layer);
        sample.check(layer);
    }
    samples[0].drop_pages(&known);
    samples[0].check(&known);
    for words in ["disk is full; using the space", "failed to store image metadata"] {
        assert_eq!(count(&lab, words), 1, "{words}:\n{}", lab.serve.log());
    }
    assert_eq!(count(&lab, "failed to read file"), 0);

    fs::remove_file(filler).unwrap();
    wait_until("metadata is stored", || {
        (count(&lab, "stored image metadata that was kept in memory") == 1).then_some(())
    });
    lab.serve.restart();
    // What was kept in memory is on disk.
    for name in ["known", "first", "second"] {
        lab.fault(name, |request| match request.range {
            Some(_) => nydus_store::fixtures::Fault::None,
            None => nydus_store::fixtures::Fault::Status(404),
        });
    }
    for (layer, sample) in &new {
        sample.check(layer);
    }
}

/// The reserve is used up, so that Podman could not see the image.
#[test]
fn pull_that_cannot_be_recorded_fails_with_the_reason() {
    let lab = small_lab();
    lab.add(&Sample::new(1), "new");
    File::create(lab.serve.root().join("reserve")).unwrap();
    fill(&lab);
    let told = announce_by_helper(&lab, "new");
    assert!(
        told.contains("cannot serve") && told.contains("No space left on device"),
        "{told}"
    );
}

#[test]
fn daemon_starts_on_a_full_disk() {
    let mut lab = small_lab();
    let (known_sample, new_sample) = (Sample::new(1), Sample::new(2));
    let known = lab.add(&known_sample, "known");
    assert!(known.pull_publishes());
    lab.serve.stop();
    fill(&lab);
    lab.serve.launch();
    known_sample.check(&known);
    let new = lab.add(&new_sample, "new");
    new_sample.check(&new);
}

#[test]
fn daemon_serves_what_is_published_on_a_read_only_disk() {
    let mut lab = small_lab();
    let (known_sample, new_sample) = (Sample::new(1), Sample::new(2));
    let known = lab.add(&known_sample, "known");
    let uncached_sample = Sample::new(3);
    let uncached = lab.add(&uncached_sample, "uncached");
    known_sample.check(&known);
    assert!(uncached.pull_publishes());
    lab.serve.stop();
    let root = lab.serve.root().to_owned();
    mount_remount(&root, MountFlags::RDONLY, c"").unwrap();
    lab.serve.launch();
    assert!(known.is_served() && uncached.is_served(), "{}", lab.serve.log());
    known_sample.check(&known);
    uncached_sample.check(&uncached);
    assert_eq!(count(&lab, "failed to create control socket"), 1, "{}", lab.serve.log());
    let new = lab.add(&new_sample, "new");
    assert!(!new.pull_publishes());
    let told = announce_by_helper(&lab, "new");
    assert!(told.contains("is on a read-only file system"), "{told}");

    mount_remount(&root, MountFlags::empty(), c"").unwrap();
    wait_until("the socket is there", || {
        (count(&lab, "created control socket") == 1).then_some(())
    });
    assert!(new.pull_publishes(), "{}", lab.serve.log());
    new_sample.check(&new);
    lab.serve.restart();
    new_sample.check(&new);
    known_sample.check(&known);
}
