//! Buildah, and partial pulls of ordinary images.

use super::{PUBLISHED, PodmanLab, Release, note, runnable_tree};
use crate::{
    common::{Podman, RunPodman as _, output},
    each_release::on_each_release,
};

on_each_release!(buildah_announces_pulls);

/// Buildah makes containers only from images with media types it knows, so the image is pulled by name.
async fn buildah_announces_pulls(release: Release) {
    // The trees of newer Podmans contain the Buildah of that Debian.
    let (lab, image, _) = PodmanLab::with_image(release).await;
    let buildah = |args: &[&str]| output(lab.podman.program("buildah").args(args));
    buildah(&["pull", &image]);
    assert!(lab.logged(PUBLISHED) > 0);
    assert_eq!(lab.sh(&image, "cat /data/hello"), "hello");
    lab.podman.run(&["rmi", &image]);
    lab.nydus_store(&["pull", &image]);
    let container = buildah(&["from", &image]);
    let mounted = buildah(&["mount", container.trim()]);
    let hello = lab.podman.outside(&format!("{}/data/hello", mounted.trim()));
    assert_eq!(std::fs::read_to_string(hello).unwrap(), "hello\n");
}

/// Pulls `old`, then `new`, whose zstd:chunked layers are fetched partially; returns the bytes of blobs of the second
/// pull.
fn bytes_of_partial_pull(lab: &PodmanLab, podman: &Podman, [old, new]: [&str; 2]) -> u64 {
    podman.run(&["pull", old]);
    let before = lab.accesses().len();
    podman.run(&["pull", new]);
    lab.accesses();
    lab.registry.blob_bytes_since(before)
}

/// containers/storage consults the additional store before a partial pull.
#[tokio::test(flavor = "multi_thread")]
async fn partial_pull_fetches_the_same_with_and_without_the_store() {
    for release in [Release::Five, Release::Newest] {
        let lab = PodmanLab::start(release);
        let base = lab.layer(runnable_tree);
        let mut names = Vec::new();
        for text in ["old", "new"] {
            // One layer that the images share for the most part.
            let layer = lab.layer(|dir| {
                runnable_tree(dir);
                note("version", text)(dir);
            });
            let plain = lab.push(&lab.build_plain(&[layer]), "plain", text).await;
            let chunked = lab.registry.reference("chunked", text);
            lab.podman.run(&["pull", &plain]);
            let push = ["push", "--compression-format", "zstd:chunked", "--force-compression"];
            lab.podman.run(&[&push[..], &[&plain, &chunked]].concat());
            names.push(chunked);
        }
        let partial = |root: bool| {
            let builder = Podman::builder(release)
                .registry(lab.registry.host())
                .storage_options("pull_options = {enable_partial_images = \"true\"}\n");
            let builder = if root { builder.root(lab.serve.root()) } else { builder };
            bytes_of_partial_pull(&lab, &builder.build(), [&names[0], &names[1]])
        };
        let (with, without) = (partial(true), partial(false));
        assert_eq!(with, without, "{release:?}");
        let whole = super::total_size(super::source_dir(&base));
        assert!(
            without < whole / 4,
            "{release:?}: the pull is partial: {without} of {whole}"
        );
    }
}
