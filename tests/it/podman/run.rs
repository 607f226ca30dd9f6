//! Requests of pulls and runs: what is fetched, by which client, and when.

use super::{NUMBERS, PodmanLab, Release, blob_paths, on_each_release, total_size};

on_each_release!(
    pull_asks_for_no_data,
    podman_itself_fetches_only_the_manifest_and_the_configuration,
    running_again_asks_the_registry_for_nothing,
    two_containers_at_once_do_not_see_each_others_writes,
    pulling_again_after_rmi_fetches_no_data,
    saying_hi_takes_less_than_a_twentieth_of_a_big_image,
);

async fn pull_asks_for_no_data(release: Release) {
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

async fn podman_itself_fetches_only_the_manifest_and_the_configuration(release: Release) {
    let (lab, image, built) = PodmanLab::with_image(release).await;
    let before = lab.accesses().len();
    assert_eq!(lab.sh(&image, "cat /data/hello"), "hello");
    let mut requests = lab.accesses().split_off(before);
    requests.retain(|access| access.agent.starts_with("containers/"));
    let config = format!("/v2/base/blobs/{}", built.config_digest());
    assert_eq!(blob_paths(&requests), [config]);
}

async fn running_again_asks_the_registry_for_nothing(release: Release) {
    let (lab, image, _) = PodmanLab::with_image(release).await;
    let first = lab.sha256(&image, NUMBERS);
    let before = lab.accesses().len();
    assert_eq!(lab.sha256(&image, NUMBERS), first);
    assert_eq!(lab.accesses().len(), before);
}

async fn two_containers_at_once_do_not_see_each_others_writes(release: Release) {
    let (lab, image, _) = PodmanLab::with_image(release).await;
    for name in ["one", "two"] {
        lab.keep(name, &image);
    }
    lab.podman
        .run(&["exec", "one", "sh", "-c", "echo changed > /data/hello"]);
    assert_eq!(lab.podman.run(&["exec", "one", "cat", "/data/hello"]), "changed");
    assert_eq!(lab.podman.run(&["exec", "two", "cat", "/data/hello"]), "hello");
}

async fn pulling_again_after_rmi_fetches_no_data(release: Release) {
    let (lab, image, _) = PodmanLab::with_image(release).await;
    let first = lab.sha256(&image, NUMBERS);
    lab.podman.run(&["rmi", &image]);
    let mut requests = lab.our_requests(|| assert_eq!(lab.sha256(&image, NUMBERS), first));
    // The tag is resolved again.
    requests.retain(|access| !access.path.contains("/manifests/"));
    assert!(requests.is_empty(), "{requests:#?}");
}

async fn saying_hi_takes_less_than_a_twentieth_of_a_big_image(release: Release) {
    let (lab, image, size) = PodmanLab::with_big_image(release, 300).await;
    let before = lab.accesses().len();
    assert_eq!(lab.sh(&image, "echo hi"), "hi");
    lab.accesses();
    let fetched = lab.registry.blob_bytes_since(before);
    assert!(fetched < size / 20, "fetched {fetched} of {size}");
    let kept = total_size(&lab.podman.graph_root());
    assert!(kept < size / 20, "{kept} bytes in the graph root");
}
