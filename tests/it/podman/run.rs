//! What running costs: what is fetched, by whom, and when.

use nydus_store::fixtures::{self, BuildOptions};

use super::{Lab, NUMBERS, blobs, runnable_tree};

#[tokio::test(flavor = "multi_thread")]
async fn pull_asks_for_no_data() {
    let (lab, image, built) = Lab::with_image().await;
    let before = lab.accesses().len();
    lab.podman.run(&["pull", &image]);
    let data = &built.blobs[0].digest.to_string();
    let requests = lab.accesses().split_off(before);
    assert!(
        !requests.iter().any(|access| access.path.contains(data)),
        "{requests:#?}"
    );
    let id = built.config_digest().hex();
    assert_eq!(
        lab.podman.run(&["images", "--no-trunc", "--format", "{{.ID}}"]),
        format!("sha256:{id}")
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn podman_itself_fetches_only_the_manifest_and_the_configuration() {
    let (lab, image, built) = Lab::with_image().await;
    let before = lab.accesses().len();
    assert_eq!(lab.sh(&image, "cat /data/hello"), "hello");
    let mut requests = lab.accesses().split_off(before);
    requests.retain(|access| access.agent.starts_with("containers/"));
    let config = format!("/v2/base/blobs/{}", built.config_digest());
    assert_eq!(blobs(&requests), [config]);
}

#[tokio::test(flavor = "multi_thread")]
async fn running_again_asks_the_registry_for_nothing() {
    let (lab, image, _) = Lab::with_image().await;
    let first = lab.sha256(&image, NUMBERS);
    let before = lab.accesses().len();
    assert_eq!(lab.sha256(&image, NUMBERS), first);
    assert_eq!(lab.accesses().len(), before);
}

#[tokio::test(flavor = "multi_thread")]
async fn two_containers_at_once_do_not_see_each_others_writes() {
    let (lab, image, _) = Lab::with_image().await;
    for name in ["one", "two"] {
        lab.podman.run(&[
            "run",
            "--detach",
            "--name",
            name,
            "--network",
            "none",
            &image,
            "sleep",
            "1000",
        ]);
    }
    lab.podman
        .run(&["exec", "one", "sh", "-c", "echo changed > /data/hello"]);
    assert_eq!(lab.podman.run(&["exec", "one", "cat", "/data/hello"]), "changed");
    assert_eq!(lab.podman.run(&["exec", "two", "cat", "/data/hello"]), "hello");
}

#[tokio::test(flavor = "multi_thread")]
async fn pulling_again_after_rmi_fetches_no_data() {
    let (lab, image, _) = Lab::with_image().await;
    let first = lab.sha256(&image, NUMBERS);
    lab.podman.run(&["rmi", &image]);
    let requests = lab.our_requests(|| assert_eq!(lab.sha256(&image, NUMBERS), first));
    assert!(requests.is_empty(), "{requests:#?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn saying_hi_takes_less_than_a_twentieth_of_a_big_image() {
    let lab = Lab::start();
    let tree = lab.layer(|dir| {
        runnable_tree(dir);
        fixtures::big_tree(&dir.join("data/big"), 300 << 20).unwrap();
    });
    // Uncompressed, so that the image in the registry has its full size.
    let options = BuildOptions {
        compressor: nydus_utils::compress::Algorithm::None,
        ..BuildOptions::default()
    };
    let built = lab.build(&[tree], &options);
    let size: u64 = built.blobs.iter().map(|blob| blob.size).sum();
    assert!(size > 300 << 20, "{size}");
    let image = lab.push(&built, "big", "1").await;
    let before = lab.accesses().len();
    assert_eq!(lab.sh(&image, "echo hi"), "hi");
    lab.accesses();
    let fetched = lab.registry.blob_bytes_since(before);
    assert!(fetched < size / 20, "fetched {fetched} of {size}");
}
