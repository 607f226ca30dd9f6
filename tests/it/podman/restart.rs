//! Restarts and crashes of the daemon while Podman keeps its images.

use std::path::Path;

use super::{NUMBERS, PodmanLab, Release, on_each_release, runnable_tree};
use crate::common::{Access, RunPodman as _, output, wait_until};

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
    containers_start_again_after_a_reboot,
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

/// What a reboot leaves: the graph root and the daemon's root, but no process, no mount and no run root.
fn reboot(lab: &mut PodmanLab) {
    let containers = lab.podman.run(&["ps", "--all", "--quiet", "--no-trunc"]);
    lab.podman.run(&["kill", "--all"]);
    lab.serve.kill();
    for mount in [lab.serve.overlay(), lab.serve.root().join("layers")] {
        rustix::mount::unmount(&mount, rustix::mount::UnmountFlags::DETACH).unwrap();
    }
    // The graph root's own mounts end with the machine too.
    let graph = lab.podman.dir().join("graph");
    let unmount = format!(
        "cut -d ' ' -f 5 /proc/self/mountinfo | grep '^{}' | sort -r | xargs -r umount -l 2>&1 || true",
        graph.display()
    );
    output(lab.podman.program("sh").args(["-c", &unmount]));
    let of_runtimes = containers
        .lines()
        .flat_map(|id| ["/run/runc", "/run/crun"].map(|dir| Path::new(dir).join(id)));
    for dir in ["run", "libpod"]
        .map(|dir| lab.podman.dir().join(dir))
        .into_iter()
        .chain(of_runtimes)
    {
        // Podman is still cleaning up after its containers.
        wait_until("the directory of the running system is gone", || {
            let removed = lab.podman.program("rm").arg("-rf").arg(&dir).output().unwrap();
            removed.status.success().then_some(())
        });
    }
}

/// Podman may start before the daemon, and the registry may be down.
async fn containers_start_again_after_a_reboot(release: Release) {
    for (is_daemon_first, has_registry) in [(true, true), (true, false), (false, true), (false, false)] {
        let (mut lab, lazy, _) = PodmanLab::with_image(release).await;
        let plain = lab.build_plain(&[lab.layer(runnable_tree)]);
        let plain = lab.push(&plain, "plain", "1").await;
        let numbers = lab.sha256(&lazy, NUMBERS);
        lab.keep("lazy", &lazy);
        lab.keep("plain", &plain);
        lab.podman
            .run(&["exec", "lazy", "sh", "-c", "cat /data/hello > /data/copy"]);
        reboot(&mut lab);
        if !has_registry {
            lab.registry.stop();
        }
        if !is_daemon_first {
            // The directory below the mount is a valid store, and all but lazy images works.
            assert_eq!(lab.podman.run(&["start", "plain"]), "plain");
            assert_eq!(lab.sh(&plain, "cat /data/hello"), "hello");
            assert!(lab.podman.run(&["ps", "--all"]).contains("lazy"));
            let error = lab.podman.fails(&["start", "lazy"]);
            assert!(!error.contains("panic"), "{error}");
        }
        lab.serve.launch();
        assert_eq!(lab.podman.run(&["start", "lazy"]), "lazy");
        let shown = lab.podman.run(&[
            "exec",
            "lazy",
            "sh",
            "-c",
            &format!("cat /data/copy; sha256sum {NUMBERS}"),
        ]);
        assert!(shown.starts_with("hello") && shown.contains(&numbers), "{shown}");
        if has_registry {
            assert_eq!(lab.sh(&lazy, "cat /data/hello"), "hello");
        }
        lab.podman.run(&["kill", "--all"]);
    }
}
