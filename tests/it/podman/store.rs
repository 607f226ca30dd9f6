//! What stays published after `podman rmi`, and the daemon's memory.

use std::fs;

use nydus_store::fixtures::BuildOptions;

use super::{NUMBERS, PodmanLab, Release, on_each_release, runnable_tree};
use crate::common::RunPodman as _;

on_each_release!(
    rmi_keeps_published_layers_and_cache,
    memory_of_twenty_removed_images_is_freed,
);

async fn rmi_keeps_published_layers_and_cache(release: Release) {
    let (lab, image, built) = PodmanLab::with_image(release).await;
    lab.sha256(&image, NUMBERS);
    lab.podman.run(&["rmi", &image]);
    assert_eq!(lab.podman.run(&["images", "--all", "--quiet"]), "");
    assert_eq!(
        fs::read_dir(lab.serve.overlay().join("l")).unwrap().count(),
        built.blobs.len()
    );
    let cache = lab.serve.root().join("cache");
    assert!(cache.join(format!("{}.blob.data", built.blob_ids[0])).exists());
}

/// The daemon drops a tree when the kernel has forgotten its nodes, as under memory pressure.
async fn memory_of_twenty_removed_images_is_freed(release: Release) {
    let lab = PodmanLab::start(release);
    let mut after_first = 0;
    for number in 0..20 {
        let layer = lab.layer(|dir| {
            runnable_tree(dir);
            fs::write(dir.join("data/hello"), format!("hello {number}\n")).unwrap();
            fs::create_dir(dir.join("data/many")).unwrap();
            for file in 0..500 {
                fs::write(dir.join(format!("data/many/{file}")), format!("{number}")).unwrap();
            }
        });
        let built = lab.build(&[layer], &BuildOptions::default());
        let image = lab.push(&built, "many", &number.to_string()).await;
        let files = lab.sh(&image, "cat /data/hello; ls -l /data/many | wc -l");
        assert_eq!(files, format!("hello {number}\n501"));
        lab.podman.run(&["rmi", &image]);
        fs::write("/proc/sys/vm/drop_caches", "2").unwrap();
        if number == 2 {
            after_first = lab.serve.resident_bytes();
        }
    }
    let grown = lab.serve.resident_bytes().saturating_sub(after_first);
    assert!(grown < 24 << 20, "grown by {grown} bytes");
}
