//! The shortest end-to-end run: a daemon, a registry, Podman, and a container that reads little.

use nydus_store::fixtures::{self, BuildOptions, LayerSource};

use crate::common::{DockerRegistry, Podman, Release, RunPodman as _, Serve};

#[tokio::test(flavor = "multi_thread")]
async fn podman_runs_an_image_that_was_not_downloaded() {
    let dir = tempfile::tempdir().unwrap();
    let tree = dir.path().join("tree");
    std::fs::create_dir_all(tree.join("bin")).unwrap();
    fixtures::demo_tree(&tree.join("data"), 100, 1).unwrap();
    std::fs::copy("/bin/busybox", tree.join("bin/sh")).unwrap();
    let image = fixtures::build(
        &[LayerSource::Dir(tree)],
        &BuildOptions::default(),
        &dir.path().join("out"),
    )
    .unwrap();
    let registry = DockerRegistry::start();
    image.push(&registry.url(), "smoke", "1").await.unwrap();
    let serve = Serve::start();
    let podman = Podman::of(Release::Four, Some(serve.root()), registry.host());
    let reference = registry.reference("smoke", "1");
    let before = registry.accesses().len();
    assert_eq!(
        podman.run(&["run", "--rm", "--network", "none", &reference, "sh", "-c", "echo hi"]),
        "hi"
    );
    let fetched = registry.blob_bytes_since(before);
    let whole: u64 = image.blobs.iter().map(|blob| blob.size).sum();
    assert!(fetched < whole, "fetched {fetched} of {whole}");
    assert!(serve.is_running());
}
