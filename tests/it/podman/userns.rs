//! Containers in user namespaces.

use std::{
    fs,
    os::unix::fs::{PermissionsExt as _, chown},
};

use nydus_store::fixtures::BuildOptions;

use super::{Lab, Release, on_each_release, runnable_tree, sh, size_of};

on_each_release!(
    owners_show_as_inside_and_nothing_is_copied_or_fetched,
    an_ordinary_image_does_the_same,
    many_layers,
    containers_with_other_ids_at_once,
);

const IDS: [&str; 2] = ["--uidmap=0:100000:65536", "--gidmap=0:100000:65536"];

/// `--userns=auto` takes ids that the host of Podman 4 has not set aside.
fn options(release: Release) -> Vec<&'static [&'static str]> {
    match release {
        Release::Four => vec![&IDS],
        Release::Five | Release::Newest => vec![&IDS, &["--userns=auto"]],
    }
}

/// Podman 4 has to pull before: an image that `run --uidmap` pulls itself gets directories with the inner owner, into which
/// the mapping then does not lead.
fn pulled(lab: &Lab, image: &str) {
    if lab.release == Release::Four {
        lab.podman.run(&["pull", image]);
    }
}

/// Prints that there are other ids outside, owners, and what becomes of files that are changed.
const LOOK: &str = "awk '{ print ($2 > 0) }' /proc/self/uid_map; stat -c %u:%g /data/hello /bin; \
    echo more >> /data/hello; chown 10:20 /data/hello; stat -c %u:%g /data/hello; cat /data/hello";
const SEEN: &str = "1\n0:0\n0:0\n10:20\nhello\nmore";

async fn owners_show_as_inside_and_nothing_is_copied_or_fetched(release: Release) {
    let (lab, image, size) = Lab::with_big_image(release, 120).await;
    pulled(&lab, &image);
    let before = lab.accesses().len();
    for options in options(release) {
        assert_eq!(sh(&lab.podman, options, &image, LOOK), SEEN, "{options:?}");
    }
    lab.accesses();
    let fetched = lab.registry.blob_bytes_since(before);
    assert!(fetched < size / 20, "fetched {fetched} of {size}");
    let kept = size_of(&lab.podman.graph_root());
    assert!(kept < size / 20, "{kept} bytes in the graph root");
}

async fn an_ordinary_image_does_the_same(release: Release) {
    let lab = Lab::start(release);
    let image = lab.build_plain(&[lab.layer(runnable_tree)]);
    let image = lab.push(&image, "plain", "1").await;
    for options in options(release) {
        assert_eq!(sh(&lab.podman, options, &image, LOOK), SEEN, "{options:?}");
    }
}

/// So many that Podman leaves the mounting to a child, in its own directory, because the options get too long.
async fn many_layers(release: Release) {
    let lab = Lab::start(release);
    let mut layers = vec![lab.layer(runnable_tree)];
    let numbered = |number: u8| lab.layer(|dir| fs::write(dir.join("last"), format!("layer {number}")).unwrap());
    layers.extend((1..=32).map(numbered));
    let image = lab
        .push(&lab.build(&layers, &BuildOptions::default()), "many", "1")
        .await;
    pulled(&lab, &image);
    let seen = sh(&lab.podman, &IDS, &image, "cat /last; stat -c ' %u:%g' /last");
    assert_eq!(seen, "layer 32 0:0");
}

/// Each runs setuid programs of the image, as whom they belong to inside. BusyBox's `su` says if that is not root.
async fn containers_with_other_ids_at_once(release: Release) {
    let lab = Lab::start(release);
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
        // And one without, beside them.
        runs(&[]);
    });
}
