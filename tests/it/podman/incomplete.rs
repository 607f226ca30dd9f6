//! An image that cannot be served fails to pull, even if other images published its data blobs. It is never incomplete.

use std::{fs, sync::Arc};

use nydus_store::{
    fixtures::{
        BuildOptions, BuiltImage, EmbeddedRegistry, Fault, RequestInfo,
        image::{BlobKind, MEDIA_TYPE_MANIFEST},
    },
    internals::Digest,
};
use nydus_utils::compress::Algorithm;

use super::{PodmanLab, Release, note, on_each_release, runnable_tree};
use crate::common::{Podman, RunPodman as _, Serve, bootstrap_layer, descriptor, image_config, manifest_json};

on_each_release!(
    image_without_bootstrap_fails_although_its_data_is_published,
    sixteen_concurrent_first_pulls_succeed,
    rejecting_policy_fails_the_pull,
);

/// Error of containers/storage when it unpacks a layer on a data blob.
const UNPACK_REFUSED: &str = "input/output error";

/// Image B has A's data blob and another bootstrap layer, which the daemon cannot fetch at first.
async fn image_without_bootstrap_fails_although_its_data_is_published(release: Release) {
    // Podman accepts an uncompressed blob until it unpacks it; it rejects a zstd blob earlier.
    for compressor in [Algorithm::None, Algorithm::Zstd] {
        let config = "[images]\nresolve_timeout = 1\nnegative_ttl = 0\n[registry]\nretries = 0\n";
        let mut lab = PodmanLab::start(release);
        lab.serve = Serve::shared(config);
        let registry = EmbeddedRegistry::start().unwrap();
        lab.podman = Podman::of(release, Some(lab.serve.root()), &registry.addr().to_string());
        let options = BuildOptions {
            compressor,
            ..BuildOptions::default()
        };
        let image = lab.build(&[lab.layer(runnable_tree)], &options);
        registry.add_image(&image, "a", "1").unwrap();
        let bootstrap = add_with_other_bootstrap(&registry, &image, "b");
        let (a, b) = (registry.reference("a", "1"), registry.reference("b", "1"));
        let script = "! test -e /image && cat /data/hello";
        assert_eq!(lab.sh(&a, script), "hello");
        for fault in [Fault::Stall, Fault::Status(503)] {
            registry.set_fault(Some(Arc::new(move |request: &RequestInfo| {
                let is_ours = |agent: &String| agent.starts_with("nydus-store/");
                let is_hit = request.digest == Some(bootstrap) && request.user_agent.as_ref().is_some_and(is_ours);
                if is_hit { fault.clone() } else { Fault::None }
            })));
            let error = lab.podman.fails(&["pull", &b]);
            let known = [UNPACK_REFUSED, "invalid tar header", "magic number mismatch"];
            assert!(known.iter().any(|known| error.contains(known)), "{error}");
            assert_eq!(lab.podman.run(&["images", "--all", "--quiet"]).lines().count(), 1);
        }
        registry.set_fault(None);
        assert_eq!(lab.sh(&b, script), "hello");
        assert_eq!(lab.sh(&a, script), "hello");
    }
}

/// Adds an image with the same data blob and another bootstrap layer to the registry; returns that layer's digest.
fn add_with_other_bootstrap(registry: &EmbeddedRegistry, image: &BuiltImage, repository: &str) -> Digest {
    let data = image.blobs.iter().find(|blob| blob.kind == BlobKind::Data).unwrap();
    let boot = fs::read(image.bootstrap_path().unwrap()).unwrap();
    let (layer, diff_id) = bootstrap_layer(&[("image/image.boot", &boot), ("image/other", b"other")]);
    let (digest, config) = (Digest::of(&layer), image_config(&[data.diff_id, diff_id]));
    let layers = [
        descriptor(data.digest, data.size as usize, false),
        descriptor(digest, layer.len(), true),
    ];
    let manifest = manifest_json(&layers, Digest::of(&config), config.len());
    registry.add_blob(repository, data.digest, fs::read(&data.path).unwrap().into());
    registry.add_blob(repository, digest, layer.into());
    registry.add_blob(repository, Digest::of(&config), config.into());
    registry.add_manifest(repository, Some("1"), MEDIA_TYPE_MANIFEST, manifest);
    digest
}

/// With layers from an additional layer store, Podman 4.3 would deadlock.
async fn sixteen_concurrent_first_pulls_succeed(release: Release) {
    let lab = PodmanLab::start(release);
    let mut images = Vec::new();
    for number in 0..16 {
        let text: &'static str = format!("{number}").leak();
        let layers = [lab.layer(runnable_tree), lab.layer(note("number", text))];
        let built = lab.build(&layers, &BuildOptions::default());
        images.push((lab.push(&built, "many", text).await, text));
    }
    std::thread::scope(|scope| {
        for (image, _) in &images {
            let lab = &lab;
            scope.spawn(move || lab.podman.run(&["pull", image]));
        }
    });
    for (image, text) in &images[..4] {
        assert_eq!(lab.sh(image, "cat /number"), *text);
    }
    assert_eq!(lab.podman.run(&["images", "--quiet"]).lines().count(), 16);
}

async fn rejecting_policy_fails_the_pull(release: Release) {
    let (lab, image, _) = PodmanLab::with_image(release).await;
    let podman = Podman::builder(release)
        .root(lab.serve.root())
        .registry(lab.registry.host())
        .policy(r#"{"default":[{"type":"reject"}]}"#)
        .build();
    let error = podman.fails(&["pull", &image]);
    assert!(error.contains("rejected by policy"), "{error}");
    assert_eq!(lab.sh(&image, "cat /data/hello"), "hello");
}
