//! Containers in user namespaces.

use std::{
    fs,
    os::unix::fs::{PermissionsExt as _, chown},
};

use nydus_store::fixtures::BuildOptions;

use super::{PodmanLab, Release, on_each_release, runnable_tree, sh, total_size};
use crate::common::RunPodman as _;

on_each_release!(
    owners_are_mapped_without_copies_or_fetches,
    ordinary_image_shows_the_same_owners,
    image_of_33_layers_runs_with_mapped_ids,
    concurrent_containers_have_their_own_ids,
);

const IDS: [&str; 2] = ["--uidmap=0:100000:65536", "--gidmap=0:100000:65536"];

/// Id mappings to test. `--userns=auto` needs subordinate ids, which the host of Podman 4 lacks.
fn options(release: Release) -> Vec<&'static [&'static str]> {
    match release {
        Release::Four => vec![&IDS],
        Release::Five | Release::Newest => vec![&IDS, &["--userns=auto"]],
    }
}

/// Pulls the image with Podman 4. Pulled by its `run --uidmap`, the image would get directories with the inner owner,
/// which the mapped root cannot access.
fn pull_with_podman_4(lab: &PodmanLab, image: &str) {
    if lab.release == Release::Four {
        lab.podman.run(&["pull", image]);
    }
}

/// Prints whether ids are mapped, owners of files, and a file after changes.
const SHOW_IDS: &str = "awk '{ print ($2 > 0) }' /proc/self/uid_map; stat -c %u:%g /data/hello /bin; \
    echo more >> /data/hello; chown 10:20 /data/hello; stat -c %u:%g /data/hello; cat /data/hello";
const EXPECTED_IDS: &str = "1\n0:0\n0:0\n10:20\nhello\nmore";

async fn owners_are_mapped_without_copies_or_fetches(release: Release) {
    let (lab, image, size) = PodmanLab::with_big_image(release, 120).await;
    pull_with_podman_4(&lab, &image);
    let before = lab.accesses().len();
    for options in options(release) {
        assert_eq!(sh(&lab.podman, options, &image, SHOW_IDS), EXPECTED_IDS, "{options:?}");
    }
    lab.accesses();
    let fetched = lab.registry.blob_bytes_since(before);
    assert!(fetched < size / 20, "fetched {fetched} of {size}");
    let kept = total_size(&lab.podman.graph_root());
    assert!(kept < size / 20, "{kept} bytes in the graph root");
}

async fn ordinary_image_shows_the_same_owners(release: Release) {
    let lab = PodmanLab::start(release);
    let image = lab.build_plain(&[lab.layer(runnable_tree)]);
    let image = lab.push(&image, "plain", "1").await;
    for options in options(release) {
        assert_eq!(sh(&lab.podman, options, &image, SHOW_IDS), EXPECTED_IDS, "{options:?}");
    }
}

/// With so many layers the mount options get too long, and Podman mounts in a child with another working directory.
async fn image_of_33_layers_runs_with_mapped_ids(release: Release) {
    let lab = PodmanLab::start(release);
    let mut layers = vec![lab.layer(runnable_tree)];
    let numbered = |number: u8| lab.layer(|dir| fs::write(dir.join("last"), format!("layer {number}")).unwrap());
    layers.extend((1..=32).map(numbered));
    let image = lab
        .push(&lab.build(&layers, &BuildOptions::default()), "many", "1")
        .await;
    pull_with_podman_4(&lab, &image);
    let seen = sh(&lab.podman, &IDS, &image, "cat /last; stat -c ' %u:%g' /last");
    assert_eq!(seen, "layer 32 0:0");
}

/// Setuid programs run as their owner inside the container. BusyBox's `su` reports an owner other than root.
async fn concurrent_containers_have_their_own_ids(release: Release) {
    let lab = PodmanLab::start(release);
    let tree = lab.layer(|dir| {
        runnable_tree(dir);
        for (name, owner) in [("roots", 0), ("users", 1000)] {
            fs::create_dir(dir.join(name)).unwrap();
            let path = dir.join(name).join("su");
            fs::copy("/bin/busybox", &path).unwrap();
            chown(&path, Some(owner), Some(owner)).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o4755)).unwrap();
        }
    });
    let image = lab.build(&[tree], &BuildOptions::default());
    let image = lab.push(&image, "setuid", "1").await;
    lab.podman.run(&["pull", &image]);
    let script = "stat -c %u:%g:%a /roots/su /users/su; \
        for owner in roots users; do /$owner/su -c true < /dev/null 2>&1 | grep -c 'must be suid' || true; done";
    let runs = |ids: &[String]| {
        let mut options: Vec<_> = ids.iter().map(String::as_str).collect();
        options.push("--user=7:7");
        let seen = sh(&lab.podman, &options, &image, script);
        assert_eq!(seen, "0:0:4755\n1000:1000:4755\n0\n1", "{options:?}");
    };
    std::thread::scope(|scope| {
        for first in [100_000, 200_000, 300_000] {
            let ids = ["uid", "gid"].map(|kind| format!("--{kind}map=0:{first}:65536"));
            let runs = &runs;
            scope.spawn(move || runs(&ids));
        }
        // Another container without a mapping.
        runs(&[]);
    });
}
