//! Requests of pulls and runs: what is fetched, by which client, and when.

use super::{NUMBERS, PodmanLab, Release, blob_paths, on_each_release, total_size};
use crate::common::RunPodman as _;

on_each_release!(
    pull_requests_no_data,
    podman_fetches_only_the_manifest_and_the_configuration,
    second_run_makes_no_requests,
    concurrent_containers_do_not_share_writes,
    pull_after_rmi_fetches_no_data,
    small_command_fetches_under_5_percent_of_a_big_image,
);

async fn pull_requests_no_data(release: Release) {
    let (lab, image, built) = PodmanLab::with_image(release).await;
    let before = lab.accesses().len();
    lab.podman.run(&["pull", &image]);
    let data = &built.blobs[0].digest.to_string();
    let requests = lab.accesses().split_off(before);
    assert!(
        !requests.iter().any(|access| access.path.contains(data)),
        "{requests:#?}"
    );
    let id = lab.podman.run(&["images", "--no-trunc", "--format", "{{.ID}}"]);
    assert_eq!(id, built.config_digest().to_string());
}

async fn podman_fetches_only_the_manifest_and_the_configuration(release: Release) {
    let (lab, image, built) = PodmanLab::with_image(release).await;
    let before = lab.accesses().len();
    assert_eq!(lab.sh(&image, "cat /data/hello"), "hello");
    let mut requests = lab.accesses().split_off(before);
    requests.retain(|access| access.agent.starts_with("containers/"));
    let config = format!("/v2/base/blobs/{}", built.config_digest());
    assert_eq!(blob_paths(&requests), [config]);
}

async fn second_run_makes_no_requests(release: Release) {
    let (lab, image, _) = PodmanLab::with_image(release).await;
    let first = lab.sha256(&image, NUMBERS);
    let before = lab.accesses().len();
    assert_eq!(lab.sha256(&image, NUMBERS), first);
    assert_eq!(lab.accesses().len(), before);
}

async fn concurrent_containers_do_not_share_writes(release: Release) {
    let (lab, image, _) = PodmanLab::with_image(release).await;
    for name in ["one", "two"] {
        lab.keep(name, &image);
    }
    lab.podman
        .run(&["exec", "one", "sh", "-c", "echo changed > /data/hello"]);
    assert_eq!(lab.podman.run(&["exec", "one", "cat", "/data/hello"]), "changed");
    assert_eq!(lab.podman.run(&["exec", "two", "cat", "/data/hello"]), "hello");
}

async fn pull_after_rmi_fetches_no_data(release: Release) {
    let (lab, image, _) = PodmanLab::with_image(release).await;
    let first = lab.sha256(&image, NUMBERS);
    lab.podman.run(&["rmi", &image]);
    let mut requests = lab.our_requests(|| assert_eq!(lab.sha256(&image, NUMBERS), first));
    // The tag is resolved again.
    requests.retain(|access| !access.path.contains("/manifests/"));
    assert!(requests.is_empty(), "{requests:#?}");
}

async fn small_command_fetches_under_5_percent_of_a_big_image(release: Release) {
    let (lab, image, size) = PodmanLab::with_big_image(release, 300).await;
    let before = lab.accesses().len();
    assert_eq!(lab.sh(&image, "echo hi"), "hi");
    lab.accesses();
    let fetched = lab.registry.blob_bytes_since(before);
    assert!(fetched < size / 20, "fetched {fetched} of {size}");
    let kept = total_size(&lab.podman.graph_root());
    assert!(kept < size / 20, "{kept} bytes in the graph root");
}
