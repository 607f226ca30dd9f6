//! Images known by name, which need no pull and no registry.

use nydus_store::fixtures::BuildOptions;
use serde_json::Value;

use super::{NUMBERS, PodmanLab, Release, note, on_each_release, runnable_tree};
use crate::common::{BINARY, Podman, RunPodman as _, failure_with};

on_each_release!(
    known_image_runs_without_a_pull,
    preseeded_image_runs_without_a_registry,
    name_moves_to_a_new_image_and_can_be_removed,
    image_in_use_by_a_container_cannot_be_removed,
    podman_commands_keep_a_known_image,
);

const RUN_WITHOUT_PULL: [&str; 5] = ["run", "--rm", "--pull=never", "--network", "none"];

fn run_hello(lab: &PodmanLab, image: &str) -> String {
    lab.podman
        .run(&[&RUN_WITHOUT_PULL[..], &[image, "cat", "/data/hello"]].concat())
}

/// Runs `nydus-store`, requires exit status 1, and returns its standard error.
fn refused(lab: &PodmanLab, args: &[&str]) -> String {
    let mut command = std::process::Command::new(BINARY);
    failure_with(1, command.args(args).arg("--root").arg(lab.serve.root()))
}

async fn known_image_runs_without_a_pull(release: Release) {
    let (lab, image, built) = PodmanLab::with_image(release).await;
    let requests = lab.our_requests(|| assert!(lab.nydus_store(&["pull", &image]).starts_with(&image)));
    let data = built.blobs[0].digest.to_string();
    assert!(
        !requests.iter().any(|access| access.path.contains(&data)),
        "{requests:#?}"
    );
    let before = lab.accesses().len();
    let shown = lab.podman.run(&[
        "images",
        "--format",
        "{{.Repository}}:{{.Tag}} {{.Digest}} {{.ReadOnly}}",
    ]);
    assert_eq!(shown, format!("{image} {} true", built.manifest_digest()));
    assert_eq!(
        lab.podman.run(&["images", "--no-trunc", "--quiet"]),
        built.config_digest().to_string()
    );
    assert_eq!(run_hello(&lab, &image), "hello");
    let by_digest = format!("{}/base@{}", lab.registry.host(), built.manifest_digest());
    assert_eq!(run_hello(&lab, &by_digest), "hello");
    let asked = lab.accesses().split_off(before);
    assert!(
        asked.iter().all(|access| access.agent.starts_with("nydus-store/")),
        "{asked:#?}"
    );
}

async fn preseeded_image_runs_without_a_registry(release: Release) {
    let (mut lab, image, _) = PodmanLab::with_image(release).await;
    let numbers = lab.sha256(&image, NUMBERS);
    lab.podman.run(&["rmi", &image]);
    lab.nydus_store(&["preseed", &format!("docker://{image}")]);
    lab.registry.stop();
    lab.serve.restart();
    assert_eq!(run_hello(&lab, &image), "hello");
    assert_eq!(lab.sha256(&image, NUMBERS), numbers);
    let listed: Value = serde_json::from_str(&lab.nydus_store(&["images", "--json"])).unwrap();
    assert_eq!(listed[0]["cached"][0], listed[0]["cached"][1]);
    assert_eq!(listed[0]["pinned"], true);
    assert!(lab.nydus_store(&["images"]).contains("100%"));
}

async fn name_moves_to_a_new_image_and_can_be_removed(release: Release) {
    let (lab, image, _) = PodmanLab::with_image(release).await;
    lab.nydus_store(&["pull", &image]);
    let new = lab.build(
        &[lab.layer(runnable_tree), lab.layer(note("new", "new"))],
        &BuildOptions::default(),
    );
    lab.push(&new, "base", "1").await;
    lab.nydus_store(&["pull", &image]);
    assert_eq!(
        lab.podman.run(&["images", "--no-trunc", "--quiet"]),
        new.config_digest().to_string()
    );
    assert_eq!(lab.nydus_store(&["rm", &image]), format!("{image}\n"));
    assert_eq!(lab.podman.run(&["images", "--all", "--quiet"]), "");
    let left = std::fs::read_dir(lab.serve.overlay().join("l")).unwrap().count();
    assert_eq!(left, 0, "unneeded layers are withdrawn");
    let error = refused(&lab, &["rm", &image]);
    assert!(error.contains("no image is named"), "{error}");
    // A pull creates an image in Podman's own storage.
    assert_eq!(lab.sh(&image, "cat /new"), "new");
    assert_eq!(lab.podman.run(&["images", "--format", "{{.ReadOnly}}"]), "false");
}

async fn image_in_use_by_a_container_cannot_be_removed(release: Release) {
    let (lab, image, _) = PodmanLab::with_image(release).await;
    let config = format!("[store]\ngraph_roots = [\"{}\"]\n", lab.podman.graph_root().display());
    std::fs::write(lab.serve.config_path(), config).unwrap();
    let mut lab = lab;
    lab.serve.restart();
    lab.nydus_store(&["pull", &image]);
    lab.create_hello("made", &image);
    let error = refused(&lab, &["rm", &image]);
    assert!(error.contains("is in use by container layer"), "{error}");
    assert_eq!(lab.podman.run(&["start", "--attach", "made"]), "hello");
    lab.podman.run(&["rm", "made"]);
    lab.nydus_store(&["rm", &image]);
    // Layers of an image pulled by Podman stay published while Podman has the image.
    assert_eq!(lab.sh(&image, "cat /data/hello"), "hello");
    lab.nydus_store(&["pull", &image]);
    lab.nydus_store(&["rm", &image]);
    assert_eq!(lab.sh(&image, "cat /data/hello"), "hello");
}

async fn podman_commands_keep_a_known_image(release: Release) {
    let (mut lab, image, _) = PodmanLab::with_image(release).await;
    // In its own mount namespace: `system reset` removes directories shared by all Podmans of the host.
    let apart = Podman::builder(release)
        .root(lab.serve.root())
        .registry(lab.registry.host())
        .userns();
    lab.podman = apart.build();
    lab.nydus_store(&["pull", &image]);
    let error = lab.podman.fails(&["rmi", &image]);
    assert!(error.contains("read-only image"), "{error}");
    lab.podman.run(&["tag", &image, "localhost/mine:1"]);
    assert_eq!(run_hello(&lab, "localhost/mine:1"), "hello");
    lab.podman.run(&["system", "prune", "--all", "--force"]);
    assert_eq!(run_hello(&lab, &image), "hello");
    // Pulls the same name into Podman's own storage.
    lab.podman.run(&["pull", &image]);
    assert_eq!(run_hello(&lab, &image), "hello");
    lab.podman.run(&["system", "reset", "--force"]);
    assert_eq!(run_hello(&lab, &image), "hello");
    assert!(lab.podman.run(&["images"]).contains("base"));
}
