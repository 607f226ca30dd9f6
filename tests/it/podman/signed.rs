//! A policy that requires sigstore signatures (containers-policy.json(5)). Podman sees the registry's manifest, so lazy
//! images meet the policy like ordinary ones.

use std::fs;

use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use nydus_store::{
    fixtures::{BuildOptions, BuiltImage, EmbeddedRegistry, image::MEDIA_TYPE_MANIFEST},
    internals::Digest,
};
use rcgen::{KeyPair, SigningKey as _};
use serde_json::json;

use super::{PUBLISHED, PodmanLab, Release, runnable_tree};
use crate::common::{Podman, RunPodman as _};

/// Debian 12 disables sigstore attachments in Podman 4.3.
#[tokio::test(flavor = "multi_thread")]
async fn podman_5_runs_signed_images_only() {
    signed_images_run_and_others_are_refused(Release::Five).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn newest_podman_runs_signed_images_only() {
    signed_images_run_and_others_are_refused(Release::Newest).await;
}

/// Signs an image as cosign does: a manifest tagged by the image's digest holds the signed payload.
fn sign(registry: &EmbeddedRegistry, repository: &str, image: &BuiltImage, key: &KeyPair) {
    let digest = image.manifest_digest();
    let payload = json!({
        "critical": {
            "identity": {"docker-reference": registry.reference(repository, "1")},
            "image": {"docker-manifest-digest": digest},
            "type": "cosign container image signature",
        },
        "optional": null,
    });
    let payload = payload.to_string().into_bytes();
    let signature = BASE64.encode(key.sign(&payload).unwrap());
    let diff_ids = json!({"type": "layers", "diff_ids": [Digest::of(&payload)]});
    let config = json!({"architecture": "", "os": "", "config": {}, "rootfs": diff_ids});
    let config = config.to_string().into_bytes();
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": MEDIA_TYPE_MANIFEST,
        "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": Digest::of(&config), "size": config.len()},
        "layers": [{
            "mediaType": "application/vnd.dev.cosign.simplesigning.v1+json",
            "digest": Digest::of(&payload),
            "size": payload.len(),
            "annotations": {"dev.cosignproject.cosign/signature": signature},
        }],
    });
    registry.add_blob(repository, Digest::of(&payload), payload.into());
    registry.add_blob(repository, Digest::of(&config), config.into());
    let tag = format!("sha256-{}.sig", digest.hex());
    registry.add_manifest(
        repository,
        Some(&tag),
        MEDIA_TYPE_MANIFEST,
        manifest.to_string().into_bytes(),
    );
}

/// Sets Podman's policy: only images of `host` signed with `key` are accepted.
fn require_signatures(podman: &Podman, host: &str, key: &KeyPair) {
    let dir = podman.home().join(".config/containers");
    fs::create_dir_all(dir.join("registries.d")).unwrap();
    let public = podman.dir().join("cosign.pub");
    fs::write(&public, key.public_key_pem()).unwrap();
    let signed = json!([{
        "type": "sigstoreSigned", "keyPath": public, "signedIdentity": {"type": "matchRepository"}
    }]);
    let policy = json!({"default": [{"type": "reject"}], "transports": {"docker": {host: signed}}});
    fs::write(dir.join("policy.json"), policy.to_string()).unwrap();
    let attached = format!("docker:\n  {host}:\n    use-sigstore-attachments: true\n");
    fs::write(dir.join("registries.d/signed.yaml"), attached).unwrap();
}

async fn signed_images_run_and_others_are_refused(release: Release) {
    let mut lab = PodmanLab::start(release);
    let registry = EmbeddedRegistry::start().unwrap();
    let host = registry.addr().to_string();
    lab.podman = Podman::of(release, Some(lab.serve.root()), &host);
    let key = KeyPair::generate().unwrap();
    require_signatures(&lab.podman, &host, &key);
    let layers = [lab.layer(runnable_tree)];
    let (lazy, plain) = (lab.build(&layers, &BuildOptions::default()), lab.build_plain(&layers));
    for (repository, image) in [("lazy", &lazy), ("plain", &plain), ("unsigned", &lazy)] {
        registry.add_image(image, repository, "1").unwrap();
    }
    sign(&registry, "lazy", &lazy, &key);
    sign(&registry, "plain", &plain, &key);
    for repository in ["lazy", "plain"] {
        assert_eq!(
            lab.sh(&registry.reference(repository, "1"), "cat /data/hello"),
            "hello",
            "{repository}"
        );
    }
    assert!(lab.logged(PUBLISHED) > 0);
    let error = lab.podman.fails(&["pull", &registry.reference("unsigned", "1")]);
    assert!(error.contains("signature was required"), "{error}");
}
