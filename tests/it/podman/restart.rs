//! Restarts and crashes of the daemon while Podman keeps its images.

use super::{NUMBERS, PodmanLab, Release, on_each_release, runnable_tree};
use crate::common::{Access, RunPodman as _};

on_each_release!(
    image_runs_after_restart_without_requests,
    image_runs_after_crash_without_requests,
    unread_data_is_fetched_after_restart,
    stopped_container_starts_after_restart,
    rmi_works_after_restart,
    rmi_and_new_pull_work_after_crash,
    cached_image_runs_without_the_registry,
    lazy_image_fails_without_the_daemon_and_recovers,
    ordinary_images_run_without_the_daemon,
);

fn manifests(requests: &[Access]) -> usize {
    requests
        .iter()
        .filter(|access| access.path.contains("/manifests/"))
        .count()
}

/// Starts a lab, runs an image, then restarts the daemon with `restart`. Returns the image and the hash of [`NUMBERS`].
async fn restarted_lab(release: Release, restart: impl FnOnce(&mut PodmanLab)) -> (PodmanLab, String, String) {
    let (mut lab, image, _) = PodmanLab::with_image(release).await;
    let numbers = lab.sha256(&image, NUMBERS);
    restart(&mut lab);
    (lab, image, numbers)
}

async fn image_runs_after_restart_without_requests(release: Release) {
    let (lab, image, numbers) = restarted_lab(release, |lab| lab.serve.restart()).await;
    let requests = lab.our_requests(|| assert_eq!(lab.sha256(&image, NUMBERS), numbers));
    assert!(requests.is_empty(), "{requests:#?}");
}

async fn image_runs_after_crash_without_requests(release: Release) {
    let (lab, image, numbers) = restarted_lab(release, |lab| lab.serve.kill_and_restart()).await;
    let requests = lab.our_requests(|| assert_eq!(lab.sha256(&image, NUMBERS), numbers));
    assert!(requests.is_empty(), "{requests:#?}");
}

async fn unread_data_is_fetched_after_restart(release: Release) {
    let (mut lab, image, _) = PodmanLab::with_image(release).await;
    lab.podman.run(&["pull", &image]);
    lab.serve.restart();
    let requests = lab.our_requests(|| assert_eq!(lab.sh(&image, "cat /data/hello"), "hello"));
    assert!(!requests.is_empty());
    assert_eq!(manifests(&requests), 0, "{requests:#?}");
}

async fn stopped_container_starts_after_restart(release: Release) {
    let (mut lab, image, _) = PodmanLab::with_image(release).await;
    let script = "cat /data/hello; echo changed > /data/hello";
    lab.run_named("kept", &image, script);
    lab.serve.restart();
    assert_eq!(lab.podman.run(&["start", "--attach", "kept"]), "changed");
}

async fn rmi_works_after_restart(release: Release) {
    let (lab, image, _) = restarted_lab(release, |lab| lab.serve.restart()).await;
    lab.podman.run(&["rmi", &image]);
    assert_eq!(lab.podman.run(&["images", "--quiet"]), "");
}

async fn rmi_and_new_pull_work_after_crash(release: Release) {
    let (lab, image, numbers) = restarted_lab(release, |lab| lab.serve.kill_and_restart()).await;
    lab.podman.run(&["rmi", &image]);
    assert_eq!(lab.sha256(&image, NUMBERS), numbers);
}

async fn cached_image_runs_without_the_registry(release: Release) {
    let (mut lab, image, numbers) = restarted_lab(release, |_| ()).await;
    lab.registry.stop();
    lab.serve.restart();
    assert_eq!(lab.sha256(&image, NUMBERS), numbers);
}

async fn lazy_image_fails_without_the_daemon_and_recovers(release: Release) {
    let (mut lab, image, _) = PodmanLab::with_image(release).await;
    lab.podman.run(&["pull", &image]);
    lab.serve.stop();
    lab.podman.fails(&["run", "--rm", "--network", "none", &image, "true"]);
    lab.serve.launch();
    assert_eq!(lab.sh(&image, "cat /data/hello"), "hello");
}

/// With the daemon stopped, and with the daemon killed.
async fn ordinary_images_run_without_the_daemon(release: Release) {
    let (mut lab, lazy, _) = PodmanLab::with_image(release).await;
    let plain = lab.build_plain(&[lab.layer(runnable_tree)]);
    let plain = lab.push(&plain, "plain", "1").await;
    lab.keep("lazy", &lazy);
    lab.podman.run(&["kill", "lazy"]);
    let ends: [fn(&mut PodmanLab); 2] = [|lab| lab.serve.stop(), |lab| lab.serve.kill()];
    for end in ends {
        end(&mut lab);
        assert_eq!(lab.sh(&plain, "cat /data/hello"), "hello");
        let shown = lab.podman.run(&["images", "--format", "{{.Repository}}"]);
        assert_eq!(shown.lines().count(), 2, "{shown}");
        assert_eq!(lab.podman.run(&["ps", "--all", "--format", "{{.Names}}"]), "lazy");
        lab.podman.run(&["rmi", &plain]);
        let error = lab.podman.fails(&["run", "--rm", "--network", "none", &lazy, "true"]);
        assert!(!error.contains("panic"), "{error}");
        lab.serve.launch();
        assert_eq!(lab.sh(&lazy, "cat /data/hello"), "hello");
    }
    assert_eq!(lab.podman.run(&["start", "lazy"]), "lazy");
    assert_eq!(lab.podman.run(&["exec", "lazy", "cat", "/data/hello"]), "hello");
}
