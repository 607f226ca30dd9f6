//! New images from lazy ones: commit, build, export.

use std::fs;

use super::{NUMBERS, PodmanLab, Release, on_each_release};
use crate::common::RunPodman as _;

on_each_release!(
    committed_container_runs,
    known_image_is_a_base_for_builds,
    build_copies_from_a_known_image,
    podman_cannot_commit_on_rafs_blobs,
    exported_container_can_be_imported,
);

/// Starts a lab with an image known by name. Podman builds only from manifests with media types it knows.
async fn lab_with_known_image(release: Release) -> (PodmanLab, String) {
    let (lab, image, _) = PodmanLab::with_image(release).await;
    lab.nydus_store(&["pull", &image]);
    (lab, image)
}

/// Runs a container named `changed` that changes files.
fn change(lab: &PodmanLab, image: &str) {
    let script = "echo new > /data/new; rm /data/hello";
    lab.run_named("changed", image, script);
}

const SHOW_CHANGES: &str = "cat /data/new; test ! -e /data/hello && echo gone";

async fn committed_container_runs(release: Release) {
    let (lab, image) = lab_with_known_image(release).await;
    change(&lab, &image);
    lab.podman.run(&["commit", "changed", "localhost/committed"]);
    assert_eq!(lab.sh("localhost/committed", SHOW_CHANGES), "new\ngone");
    assert_eq!(lab.sha256("localhost/committed", NUMBERS), lab.sha256(&image, NUMBERS));
}

fn build(lab: &PodmanLab, containerfile: &str) {
    let context = lab.new_path();
    fs::create_dir(&context).unwrap();
    fs::write(context.join("added"), "added\n").unwrap();
    fs::write(context.join("Containerfile"), containerfile).unwrap();
    let context = context.to_str().unwrap();
    lab.podman
        .run(&["build", "--isolation", "chroot", "--tag", "localhost/built", context]);
}

async fn known_image_is_a_base_for_builds(release: Release) {
    let (lab, image) = lab_with_known_image(release).await;
    let before = lab.accesses().len();
    build(
        &lab,
        &format!("FROM {image}\nCOPY added /data/added\nRUN cat /data/hello /data/added > /data/both\n"),
    );
    assert_eq!(lab.sh("localhost/built", "cat /data/both"), "hello\nadded");
    lab.accesses();
    let fetched = lab.registry.blob_bytes_since(before);
    assert!(fetched < 3_000_000, "unread data was fetched: {fetched} bytes");
}

async fn build_copies_from_a_known_image(release: Release) {
    let (lab, image) = lab_with_known_image(release).await;
    build(
        &lab,
        &format!("FROM scratch\nCOPY --from={image} /data/hello /hello\nCOPY --from={image} /bin /bin\n"),
    );
    assert_eq!(lab.sh("localhost/built", "cat /hello"), "hello");
}

/// Before a commit, Podman determines the compressed media types of the base image's layers.
async fn podman_cannot_commit_on_rafs_blobs(release: Release) {
    let (lab, image, _) = PodmanLab::with_image(release).await;
    change(&lab, &image);
    let error = lab.podman.fails(&["commit", "changed", "localhost/committed"]);
    assert!(error.contains("unsupported MIME type for compression"), "{error}");
}

async fn exported_container_can_be_imported(release: Release) {
    let (lab, image, _) = PodmanLab::with_image(release).await;
    change(&lab, &image);
    let archive = lab.new_path();
    let archive = archive.to_str().unwrap();
    lab.podman.run(&["export", "--output", archive, "changed"]);
    lab.podman.run(&["import", archive, "localhost/imported"]);
    assert_eq!(lab.sh("localhost/imported", SHOW_CHANGES), "new\ngone");
    assert_eq!(lab.sha256("localhost/imported", NUMBERS), lab.sha256(&image, NUMBERS));
}
