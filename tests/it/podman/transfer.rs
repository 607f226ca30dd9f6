//! Taking lazy images elsewhere: push, copy, save.

use nydus_store::{
    digest::Digest,
    fixtures::{BuildOptions, BuiltImage, Conversion},
};
use serde_json::Value;

use super::{Lab, NUMBERS, Release, note, podman, runnable_tree, serve};
use crate::common::{DockerRegistry, Podman, output};

on_both!(
    the_store_gives_each_layer_as_it_is_in_the_registry,
    push_where_the_data_already_is_gives_a_lazy_image,
    push_elsewhere_of_rafs_blobs_is_more_than_podman_can_do,
    save_of_rafs_blobs_is_more_than_podman_can_do,
    push_of_original_layers_gives_the_ordinary_image,
    save_of_original_layers_gives_the_ordinary_image,
    save_of_original_layers_as_a_docker_archive_fails_and_harms_nothing,
);

/// The manifest of that tag.
async fn manifest(registry: &DockerRegistry, repository: &str, tag: &str) -> Value {
    let url = format!("{}/v2/{repository}/manifests/{tag}", registry.url());
    let accept = "application/vnd.oci.image.manifest.v1+json,application/vnd.docker.distribution.manifest.v2+json";
    let request = reqwest::Client::new().get(url).header("accept", accept);
    let answer = request.send().await.unwrap().error_for_status().unwrap();
    serde_json::from_slice(&answer.bytes().await.unwrap()).unwrap()
}

fn layer_digests(manifest: &Value) -> Vec<String> {
    let layers = manifest["layers"].as_array().unwrap();
    layers
        .iter()
        .map(|layer| layer["digest"].as_str().unwrap().to_owned())
        .collect()
}

fn digests(image: &BuiltImage) -> Vec<String> {
    image.blobs.iter().map(|blob| blob.digest.to_string()).collect()
}

fn run(podman: &Podman, image: &str, script: &str) -> String {
    podman.run(&["run", "--rm", "--network", "none", image, "sh", "-c", script])
}

async fn two_layers(release: Release, options: &BuildOptions) -> (Lab, String, BuiltImage) {
    let lab = Lab::start(release);
    let layers = [
        lab.layer(runnable_tree),
        lab.layer(note("second", "of the second layer")),
    ];
    let built = lab.build(&layers, options);
    let image = lab.push(&built, "source", "1").await;
    (lab, image, built)
}

fn zran() -> BuildOptions {
    BuildOptions {
        conversion: Conversion::Zran,
        ..BuildOptions::default()
    }
}

async fn the_store_gives_each_layer_as_it_is_in_the_registry(release: Release) {
    let (lab, image, built) = two_layers(release, &BuildOptions::default()).await;
    for blob in &built.blobs {
        let bytes = std::fs::read(lab.serve.layer(&image, &blob.digest).blob()).unwrap();
        assert_eq!(Digest::of(&bytes), blob.digest);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn skopeo_copies_between_registries_and_nothing_changes() {
    let (lab, image, built) = two_layers(Release::Four, &BuildOptions::default()).await;
    let other = DockerRegistry::start();
    let mut skopeo = lab.podman.program("skopeo");
    skopeo.args(["copy", "--src-tls-verify=false", "--dest-tls-verify=false"]);
    skopeo.args([&format!("docker://{image}")]);
    output(skopeo.arg(format!("docker://{}", other.reference("copy", "1"))));
    let original: Value = serde_json::from_slice(&built.manifest).unwrap();
    assert_eq!(manifest(&other, "copy", "1").await, original);
}

/// Podman drops the annotations of layers, so the bootstrap has to be known without.
async fn push_where_the_data_already_is_gives_a_lazy_image(release: Release) {
    let (lab, image, built) = two_layers(release, &BuildOptions::default()).await;
    let copy = lab.registry.reference("source", "2");
    lab.podman.run(&["pull", &image]);
    if release == Release::Five {
        // Which also wants to name the type of what it does not compress.
        let error = lab.podman.fails(&["push", &image, &copy]);
        assert!(error.contains("unsupported MIME type for decompression"), "{error}");
        return;
    }
    lab.podman.run(&["push", &image, &copy]);
    let pushed = layer_digests(&manifest(&lab.registry, "source", "2").await);
    assert_eq!(pushed[..2], digests(&built)[..2]);

    let serve = serve();
    let elsewhere = podman(release, &serve, &lab.registry);
    let before = lab.accesses().len();
    assert_eq!(run(&elsewhere, &copy, "cat /second"), "of the second layer");
    lab.accesses();
    assert!(lab.registry.blob_bytes_since(before) < built.blobs[0].size);
}

/// Podman would have to name the media type of a RAFS blob that it compresses, and has no name for it.
async fn push_elsewhere_of_rafs_blobs_is_more_than_podman_can_do(release: Release) {
    let (lab, image, _) = two_layers(release, &BuildOptions::default()).await;
    lab.podman.run(&["pull", &image]);
    let error = lab
        .podman
        .fails(&["push", &image, &lab.registry.reference("elsewhere", "1")]);
    // Or it takes a blob that begins with a chunk of zstd for one that is compressed as a whole.
    let known = ["unsupported MIME type for compression", "magic number mismatch"];
    assert!(known.iter().any(|known| error.contains(known)), "{error}");
    assert!(lab.serve.is_running());
}

async fn save_of_rafs_blobs_is_more_than_podman_can_do(release: Release) {
    let (lab, image, _) = two_layers(release, &BuildOptions::default()).await;
    lab.podman.run(&["pull", &image]);
    let archive = lab.new_path();
    let archive = archive.to_str().unwrap();
    for format in ["oci-archive", "docker-archive"] {
        lab.podman
            .fails(&["save", "--format", format, "--output", archive, &image]);
    }
    assert_eq!(
        lab.sh(&image, "cat /data/hello"),
        "hello",
        "the image has come to no harm"
    );
}

/// Podman compresses layers anew, so what arrives is the ordinary image, with the bootstrap as a file in it.
async fn push_of_original_layers_gives_the_ordinary_image(release: Release) {
    let (lab, image, built) = two_layers(release, &zran()).await;
    let other = DockerRegistry::start();
    lab.podman.run(&["pull", &image]);
    lab.podman
        .run(&["push", "--tls-verify=false", &image, &other.reference("copy", "1")]);
    let pushed = manifest(&other, "copy", "1").await;
    assert_eq!(pushed["config"]["digest"], built.config_digest().to_string());

    let elsewhere = Podman::of(Release::Four, None, other.host());
    let copy = other.reference("copy", "1");
    assert_eq!(run(&elsewhere, &copy, "cat /second"), "of the second layer");
    let numbers = lab.sha256(&image, NUMBERS);
    assert!(run(&elsewhere, &copy, &format!("sha256sum {NUMBERS}")).contains(&numbers));
}

async fn save_of_original_layers_gives_the_ordinary_image(release: Release) {
    let (lab, image, _) = two_layers(release, &zran()).await;
    lab.podman.run(&["pull", &image]);
    let archive = lab.new_path();
    let archive = archive.to_str().unwrap();
    lab.podman
        .run(&["save", "--format", "oci-archive", "--output", archive, &image]);
    let elsewhere = Podman::of(Release::Four, None, lab.registry.host());
    elsewhere.run(&["load", "--input", archive]);
    assert_eq!(run(&elsewhere, &image, "cat /second"), "of the second layer");
}

/// A docker-archive takes tars whose exact lengths are known beforehand, and a bootstrap does not tell these.
async fn save_of_original_layers_as_a_docker_archive_fails_and_harms_nothing(release: Release) {
    let (lab, image, _) = two_layers(release, &zran()).await;
    lab.podman.run(&["pull", &image]);
    let archive = lab.new_path();
    let archive = archive.to_str().unwrap();
    lab.podman
        .fails(&["save", "--format", "docker-archive", "--output", archive, &image]);
    assert_eq!(lab.sh(&image, "cat /data/hello"), "hello");
}
