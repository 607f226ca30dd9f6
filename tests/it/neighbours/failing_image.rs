//! An image that fails again and again: what it costs the log and the registry.

use std::fs;

use nydus_store::fixtures::Fault;

use crate::common::{Lab, Sample, wait_until};

/// Number of attempts to read.
const ATTEMPTS: usize = 300;

/// Number of errors in the log that contain `words`.
fn errors(lab: &Lab, words: &str) -> usize {
    let log = lab.serve.log();
    log.lines()
        .filter(|line| line.contains("ERROR ") && line.contains(words))
        .count()
}

#[test]
fn corrupt_chunk_is_logged_and_fetched_rarely() {
    let lab = Lab::new("[fetch]\nread_ahead = false\nprefetch = false\n");
    let sample = Sample::new(1);
    let layer = lab.add(&sample, "image");
    assert!(layer.pull_publishes());
    lab.fault_on("image", sample.data_digest(), Fault::FlipByte(0));
    let before = lab.registry.request_count();
    for _ in 0..ATTEMPTS {
        let error = fs::read(layer.diff().join("one")).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EIO));
    }
    let requests = lab.registry.request_count() - before;
    println!("{requests} requests for {ATTEMPTS} reads");
    // Two for each attempt, until the chunk is in quarantine.
    assert!(requests < ATTEMPTS as u64, "{requests} requests");
    let logged = errors(&lab, "failed to read file");
    assert!((1..10).contains(&logged), "{logged} errors");
    lab.clear_fault("image");
    wait_until("the chunk is fetched again", || fs::read(layer.diff().join("one")).ok());
    sample.check(&layer);
}

/// A published image whose metadata is damaged here and gone from the registry.
#[test]
fn tree_that_cannot_be_loaded_is_logged_rarely() {
    let mut lab = Lab::new("");
    let sample = Sample::new(1);
    let layer = lab.add(&sample, "image");
    sample.check(&layer);
    lab.serve.stop();
    let bootstrap = sample.bootstrap_digest();
    for entry in fs::read_dir(lab.serve.root().join("images/content")).unwrap() {
        let path = entry.unwrap().path();
        if path.to_string_lossy().contains(&bootstrap.hex()) {
            fs::remove_file(path).unwrap();
        }
    }
    lab.registry.remove_blob("image", bootstrap);
    lab.serve.launch();
    let diff = lab
        .serve
        .overlay()
        .join(layer.record().unwrap()["id"].as_str().unwrap())
        .join("diff");
    for _ in 0..ATTEMPTS {
        let error = diff.metadata().unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EIO));
    }
    let logged = errors(&lab, "failed to load layer tree");
    assert!((1..10).contains(&logged), "{logged} errors");
    lab.add(&sample, "image");
    sample.check(&layer);
}
