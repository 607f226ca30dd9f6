//! What only Podman 5.4 does: it looks layers up by TOC digests, which the mirror adds.

use nydus_store::fixtures::Conversion;

use super::*;
use crate::common::wait_until;

/// The release of all tests here, but where another is named.
const FIVE: Release = Release::Five;

const HELLO: &str = "cat /data/hello";

/// What Podman says of a Nydus layer that it takes for a tar, or for one compressed by zstd, as a chunk at its start is.
const NO_TAR: [&str; 2] = ["invalid tar header", "magic number mismatch"];

#[test]
fn it_is_podman_5_4_with_the_store_in_force() {
    let lab = Lab::start(FIVE);
    let version = lab.podman.run(&["--version"]);
    assert!(version.starts_with("podman version 5.4."), "{version}");
    let format = "{{.Store.GraphDriverName}} {{.Store.GraphRoot}}";
    let info = lab.podman.run(&["info", "--format", format]);
    assert_eq!(info, format!("overlay {}", lab.podman.graph_root().display()));
}

/// Podman 5 asks the store by digests that only the mirror adds, so it pulls.
#[tokio::test(flavor = "multi_thread")]
async fn a_lazy_image_without_the_mirror_fails_and_harms_nothing() {
    let (lab, lazy, _) = Lab::with_image(FIVE).await;
    let plain = lab.build_plain(&[lab.layer(runnable_tree)]);
    let plain = lab.push(&plain, "plain", "1").await;
    let podman = Podman::with_layer_store(FIVE, Some(&lab.serve.store()), lab.registry.host(), None);
    let error = podman.fails(&["run", "--rm", "--network", "none", &lazy, "true"]);
    assert!(NO_TAR.iter().any(|known| error.contains(known)), "{error}");
    assert_eq!(lab.logged(USED), 0);
    assert_eq!(podman.run(&["images", "--all", "--quiet"]), "");
    assert_eq!(sh(&podman, &[], &plain, HELLO), "hello");
    // The daemon goes on serving those who ask by layer digest.
    let four = Podman::with_layer_store(Release::Four, Some(&lab.serve.store()), lab.registry.host(), None);
    assert_eq!(sh(&four, &[], &lazy, HELLO), "hello");
}

/// It is found in the store by tag only, but its layers are tars to anybody.
#[tokio::test(flavor = "multi_thread")]
async fn by_digest_an_image_of_original_layers_is_the_ordinary_one() {
    let lab = Lab::start(FIVE);
    let options = BuildOptions {
        conversion: Conversion::Zran,
        ..BuildOptions::default()
    };
    let built = lab.build(&[lab.layer(runnable_tree)], &options);
    lab.push(&built, "zran", "1").await;
    let image = format!("{}/zran@{}", lab.registry.host(), built.manifest_digest());
    assert_eq!(lab.sh(&image, HELLO), "hello");
    assert_eq!(lab.logged(USED), 0);
}

/// Podman 5 is in a mount namespace of its own, as in a host's container.
#[test]
fn it_sees_the_store_come_and_go() {
    let mut lab = Lab::start(FIVE);
    let is_mounted = |lab: &Lab| {
        let store = lab.serve.store();
        let table = output(lab.podman.program("cat").arg("/proc/self/mountinfo"));
        table
            .lines()
            .filter(|line| line.split(' ').nth(4) == store.to_str())
            .count()
    };
    assert_eq!(is_mounted(&lab), 1);
    lab.serve.stop();
    assert_eq!(is_mounted(&lab), 0);
    lab.serve.start_again();
    assert_eq!(is_mounted(&lab), 1);
    lab.serve.kill_and_restart();
    assert_eq!(is_mounted(&lab), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn podman_4_and_5_on_one_daemon_at_once() {
    let (lab, image, _) = Lab::with_image(FIVE).await;
    let four = Podman::with_layer_store(Release::Four, Some(&lab.serve.store()), lab.registry.host(), None);
    std::thread::scope(|scope| {
        for podman in [&lab.podman, &four] {
            let image = &image;
            scope.spawn(move || {
                for _ in 0..3 {
                    assert_eq!(sh(podman, &[], image, HELLO), "hello");
                    podman.run(&["rmi", image]);
                }
            });
        }
    });
    wait_until("the image is closed", || (lab.open_images() == 0).then_some(()));
    // What one of them lets go of the other may still use.
    for podman in [&lab.podman, &four] {
        podman.run(&["pull", &image]);
    }
    lab.podman.run(&["rmi", &image]);
    assert_eq!(sh(&four, &[], &image, HELLO), "hello");
    four.run(&["rmi", &image]);
    wait_until("the image is closed", || (lab.open_images() == 0).then_some(()));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_ordinary_image_passes_through_the_mirror_unchanged() {
    let lab = Lab::start(FIVE);
    let built = lab.build_plain(&[lab.layer(runnable_tree)]);
    let image = lab.push(&built, "plain", "1").await;
    lab.podman.run(&["pull", &image]);
    let format = "{{.Id}} {{.Digest}}";
    assert_eq!(
        lab.podman.run(&["image", "inspect", "--format", format, &image]),
        format!("{} {}", built.config_digest().hex(), built.manifest_digest())
    );
    lab.podman.run(&["rmi", &image]);
    let by_digest = format!("{}/plain@{}", lab.registry.host(), built.manifest_digest());
    assert_eq!(lab.sh(&by_digest, HELLO), "hello");
}
