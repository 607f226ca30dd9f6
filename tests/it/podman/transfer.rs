//! Transfer of lazy images: push, copy, save.

use nydus_store::fixtures::{BuildOptions, BuiltImage};
use serde_json::Value;

use super::{PodmanLab, Release, note, on_each_release, runnable_tree};
use crate::common::{DockerRegistry, RunPodman as _, output};

on_each_release!(podman_cannot_push_rafs_blobs, podman_cannot_save_rafs_blobs,);

/// Fetches the manifest of a tag.
async fn fetch_manifest(registry: &DockerRegistry, repository: &str, tag: &str) -> Value {
    let url = format!("{}/v2/{repository}/manifests/{tag}", registry.url());
    let accept = "application/vnd.oci.image.manifest.v1+json,application/vnd.docker.distribution.manifest.v2+json";
    let request = reqwest::Client::new().get(url).header("accept", accept);
    let answer = request.send().await.unwrap().error_for_status().unwrap();
    serde_json::from_slice(&answer.bytes().await.unwrap()).unwrap()
}

async fn lab_with_two_layers(release: Release, options: &BuildOptions) -> (PodmanLab, String, BuiltImage) {
    let lab = PodmanLab::start(release);
    let layers = [
        lab.layer(runnable_tree),
        lab.layer(note("second", "of the second layer")),
    ];
    let built = lab.build(&layers, options);
    let image = lab.push(&built, "source", "1").await;
    (lab, image, built)
}

#[tokio::test(flavor = "multi_thread")]
async fn skopeo_copy_keeps_the_manifest() {
    let (lab, image, built) = lab_with_two_layers(Release::Four, &BuildOptions::default()).await;
    let other = DockerRegistry::start();
    let mut skopeo = lab.podman.program("skopeo");
    skopeo.args(["copy", "--src-tls-verify=false", "--dest-tls-verify=false"]);
    skopeo.args([&format!("docker://{image}")]);
    output(skopeo.arg(format!("docker://{}", other.reference("copy", "1"))));
    let original: Value = serde_json::from_slice(&built.manifest).unwrap();
    assert_eq!(fetch_manifest(&other, "copy", "1").await, original);
}

/// Podman has no media type for a compressed RAFS blob.
async fn podman_cannot_push_rafs_blobs(release: Release) {
    let (lab, image, _) = lab_with_two_layers(release, &BuildOptions::default()).await;
    lab.podman.run(&["pull", &image]);
    let error = lab
        .podman
        .fails(&["push", &image, &lab.registry.reference("elsewhere", "1")]);
    // Or it takes a blob whose first chunk is zstd for a zstd layer.
    let known = [
        "unsupported MIME type for compression",
        "magic number mismatch",
        "input/output error",
    ];
    assert!(known.iter().any(|known| error.contains(known)), "{error}");
    assert!(lab.serve.is_running());
}

async fn podman_cannot_save_rafs_blobs(release: Release) {
    let (lab, image, _) = lab_with_two_layers(release, &BuildOptions::default()).await;
    lab.podman.run(&["pull", &image]);
    let archive = lab.new_path();
    let archive = archive.to_str().unwrap();
    for format in ["oci-archive", "docker-archive"] {
        lab.podman
            .fails(&["save", "--format", format, "--output", archive, &image]);
    }
    assert_eq!(lab.sh(&image, "cat /data/hello"), "hello", "the image is intact");
}
