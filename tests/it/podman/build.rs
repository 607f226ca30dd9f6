//! Making new images of lazy ones: commit and build.

use std::fs;

use nydus_store::fixtures::{BuildOptions, Conversion};

use super::{Lab, NUMBERS, Release, runnable_tree};
use crate::common::Podman;

on_both!(
    a_committed_container_runs,
    a_committed_container_can_be_pushed_to_those_without_a_store,
    build_from_a_lazy_image,
    commit_on_rafs_blobs_is_more_than_podman_can_do,
    an_exported_container_can_be_imported,
);

/// Original layers: Podman can make images only of layers whose media types it knows.
async fn zran(release: Release) -> (Lab, String) {
    let lab = Lab::start(release);
    let options = BuildOptions {
        conversion: Conversion::Zran,
        ..BuildOptions::default()
    };
    let built = lab.build(&[lab.layer(runnable_tree)], &options);
    let image = lab.push(&built, "source", "1").await;
    (lab, image)
}

/// A container of `image` that has changed something.
fn change(lab: &Lab, image: &str) {
    let script = "echo new > /data/new; rm /data/hello";
    lab.podman.run(&[
        "run",
        "--name",
        "changed",
        "--network",
        "none",
        image,
        "sh",
        "-c",
        script,
    ]);
}

const LOOK: &str = "cat /data/new; test ! -e /data/hello && echo gone";

async fn a_committed_container_runs(release: Release) {
    let (lab, image) = zran(release).await;
    change(&lab, &image);
    lab.podman.run(&["commit", "changed", "localhost/committed"]);
    assert_eq!(lab.sh("localhost/committed", LOOK), "new\ngone");
    assert_eq!(lab.sha256("localhost/committed", NUMBERS), lab.sha256(&image, NUMBERS));
}

async fn a_committed_container_can_be_pushed_to_those_without_a_store(release: Release) {
    let (lab, image) = zran(release).await;
    change(&lab, &image);
    let copy = lab.registry.reference("committed", "1");
    lab.podman.run(&["commit", "changed", &copy]);
    lab.podman.run(&["push", &copy]);
    let elsewhere = Podman::of(Release::Four, None, lab.registry.host());
    let args = ["run", "--rm", "--network", "none", &copy, "sh", "-c", LOOK];
    assert_eq!(elsewhere.run(&args), "new\ngone");
}

async fn build_from_a_lazy_image(release: Release) {
    let (lab, image) = zran(release).await;
    let context = lab.new_path();
    fs::create_dir(&context).unwrap();
    fs::write(context.join("added"), "added\n").unwrap();
    let text = format!("FROM {image}\nCOPY added /data/added\nRUN cat /data/hello /data/added > /data/both\n");
    fs::write(context.join("Containerfile"), text).unwrap();
    let context = context.to_str().unwrap();
    lab.podman
        .run(&["build", "--isolation", "chroot", "--tag", "localhost/built", context]);
    assert_eq!(lab.sh("localhost/built", "cat /data/both"), "hello\nadded");
}

/// Before it makes an image of another, Podman notes what its layers' media types would be if these were compressed.
async fn commit_on_rafs_blobs_is_more_than_podman_can_do(release: Release) {
    let (lab, image, _) = Lab::with_image(release).await;
    change(&lab, &image);
    let error = lab.podman.fails(&["commit", "changed", "localhost/committed"]);
    assert!(error.contains("unsupported MIME type for compression"), "{error}");
}

async fn an_exported_container_can_be_imported(release: Release) {
    let (lab, image, _) = Lab::with_image(release).await;
    change(&lab, &image);
    let archive = lab.new_path();
    let archive = archive.to_str().unwrap();
    lab.podman.run(&["export", "--output", archive, "changed"]);
    lab.podman.run(&["import", archive, "localhost/imported"]);
    assert_eq!(lab.sh("localhost/imported", LOOK), "new\ngone");
    assert_eq!(lab.sha256("localhost/imported", NUMBERS), lab.sha256(&image, NUMBERS));
}
