//! Several Podman releases at once, and newer releases only.

use super::*;

const HELLO: &str = "cat /data/hello";

/// Podman's errors for a Nydus blob: it takes the blob for a tar or, if its first chunk is zstd, for a zstd layer.
const NOT_A_TAR: [&str; 2] = ["invalid tar header", "magic number mismatch"];

/// Without the auth helper, no pull is announced.
#[tokio::test(flavor = "multi_thread")]
async fn lazy_image_without_the_auth_helper_fails_cleanly() {
    for release in [Release::Five, Release::Newest] {
        let (lab, lazy, _) = PodmanLab::with_image(release).await;
        let plain = lab.build_plain(&[lab.layer(runnable_tree)]);
        let plain = lab.push(&plain, "plain", "1").await;
        let podman = Podman::of(release, None, lab.registry.host());
        let error = podman.fails(&["run", "--rm", "--network", "none", &lazy, "true"]);
        assert!(NOT_A_TAR.iter().any(|known| error.contains(known)), "{error}");
        assert_eq!(lab.logged(PUBLISHED), 0);
        assert_eq!(podman.run(&["images", "--all", "--quiet"]), "");
        assert_eq!(sh(&podman, &[], &plain, HELLO), "hello");
        assert_eq!(lab.sh(&lazy, HELLO), "hello");
    }
}

/// CRI-O runs the same check when it starts after an unclean stop, unless `internal_repair` is off.
#[tokio::test(flavor = "multi_thread")]
async fn system_check_reports_lazy_layers_and_changes_nothing() {
    for release in [Release::Five, Release::Newest] {
        let (lab, lazy, _) = PodmanLab::with_image(release).await;
        let plain = lab.build_plain(&[lab.layer(runnable_tree)]);
        let plain = lab.push(&plain, "plain", "1").await;
        let run_both = || [&lazy, &plain].map(|image| lab.sh(image, HELLO));
        assert_eq!(run_both(), ["hello", "hello"]);
        let images = lab.podman.run(&["images", "--all", "--quiet"]);
        let report = lab.podman.fails(&["system", "check"]);
        assert!(report.contains("damage detected"), "{report}");
        assert_eq!(lab.podman.run(&["images", "--all", "--quiet"]), images);
        assert_eq!(run_both(), ["hello", "hello"]);
    }
}

/// Newer releases run in their own mount namespace, as in a container.
#[test]
fn mounts_propagate_to_other_mount_namespaces() {
    let mut lab = PodmanLab::start(Release::Five);
    let is_mounted = |lab: &PodmanLab| {
        let overlay = lab.serve.overlay();
        let table = output(lab.podman.program("cat").arg("/proc/self/mountinfo"));
        table
            .lines()
            .filter(|line| line.split(' ').nth(4) == overlay.to_str())
            .count()
    };
    assert_eq!(is_mounted(&lab), 1);
    lab.serve.stop();
    assert_eq!(is_mounted(&lab), 0);
    lab.serve.launch();
    assert_eq!(is_mounted(&lab), 1);
    lab.serve.kill_and_restart();
    assert_eq!(is_mounted(&lab), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn all_releases_share_one_daemon() {
    let (lab, image, _) = PodmanLab::with_image(Release::Four).await;
    let others = [Release::Five, Release::Newest];
    let others = others.map(|release| Podman::of(release, Some(lab.serve.root()), lab.registry.host()));
    std::thread::scope(|scope| {
        for podman in others.iter().chain([&lab.podman]) {
            let image = &image;
            scope.spawn(move || {
                for _ in 0..3 {
                    assert_eq!(sh(podman, &[], image, HELLO), "hello");
                    podman.run(&["rmi", image]);
                }
            });
        }
    });
}

/// Processes of these releases do not remember layers of an additional *layer* store.
#[tokio::test(flavor = "multi_thread")]
async fn pulled_layers_are_known_to_the_next_command() {
    let (lab, image, _) = PodmanLab::with_image(Release::Newest).await;
    lab.podman.run(&["pull", &image]);
    lab.create_hello("made", &image);
    assert_eq!(lab.podman.run(&["images", "--format", "{{.ReadOnly}}"]), "false");
    assert_eq!(lab.podman.run(&["start", "--attach", "made"]), "hello");
    let before = lab.accesses().len();
    assert_eq!(lab.sh(&image, HELLO), "hello");
    assert_eq!(lab.accesses().len(), before, "the image is not pulled again");
}
