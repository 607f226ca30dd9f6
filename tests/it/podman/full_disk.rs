//! Images that are new to the host start although the disk of the root is full.

use std::{
    fs::{self, File},
    io::Write as _,
    path::Path,
};

use nydus_store::fixtures::BuildOptions;

use super::{PodmanLab, Release, on_each_release, runnable_tree};
use crate::common::{Podman, Serve, wait_until};

on_each_release!(new_image_runs_on_a_full_disk);

fn fill(path: &Path) {
    let mut file = File::create(path).unwrap();
    for len in [1 << 20, 4096] {
        let block = vec![1; len];
        while file.write_all(&block).is_ok() {}
    }
}

async fn new_image_runs_on_a_full_disk(release: Release) {
    let mut lab = PodmanLab::start(release);
    lab.serve = Serve::prepare_on_tmpfs("", 96 << 20);
    lab.serve.launch();
    lab.podman = Podman::of(release, Some(lab.serve.root()), lab.registry.host());
    let image = lab.build(&[lab.layer(runnable_tree)], &BuildOptions::default());
    let first = lab.push(&image, "first", "1").await;
    let filler = lab.serve.root().join("filler");
    fill(&filler);
    assert_eq!(lab.sh(&first, "cat /data/hello"), "hello");
    fs::remove_file(filler).unwrap();
    wait_until("metadata is stored", || {
        let log = lab.serve.log();
        log.contains("stored image metadata that was kept in memory")
            .then_some(())
    });
    lab.serve.restart();
    assert_eq!(lab.sh(&first, "cat /data/hello"), "hello");
}
