//! Other programs of the family, and pulls that are none of ours.

use super::{Lab, PUBLISHED, Release, note, runnable_tree};
use crate::{
    common::{Podman, output},
    each_release::on_each_release,
};

on_each_release!(buildah_announces_pulls);

/// Buildah makes containers only of images whose media types it knows: of known ones.
async fn buildah_announces_pulls(release: Release) {
    // The newer Podmans' trees have a Buildah of their age.
    let (lab, image, _) = Lab::with_image(release).await;
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

/// A pull of zstd:chunked layers that takes only what the host lacks. Returns how many bytes of blobs it takes.
fn partial_pull(lab: &Lab, podman: &Podman, [old, new]: [&str; 2]) -> u64 {
    podman.run(&["pull", old]);
    let before = lab.accesses().len();
    podman.run(&["pull", new]);
    lab.accesses();
    lab.registry.blob_bytes_since(before)
}

/// The store is asked before them, and must not get in their way.
#[tokio::test(flavor = "multi_thread")]
async fn partial_pulls_of_others_cost_the_same() {
    for release in [Release::Five, Release::Newest] {
        let lab = Lab::start(release);
        let base = lab.layer(runnable_tree);
        let mut names = Vec::new();
        for text in ["old", "new"] {
            // One layer, most of which both images have.
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
            partial_pull(&lab, &builder.build(), [&names[0], &names[1]])
        };
        let (with, without) = (partial(true), partial(false));
        assert_eq!(with, without, "{release:?}");
        let whole = super::size_of(super::source_dir(&base));
        assert!(
            without < whole / 4,
            "{release:?}: the pull is partial: {without} of {whole}"
        );
    }
}
