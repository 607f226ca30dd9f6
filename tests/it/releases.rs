//! The Podman releases under test and the harness's options for them, without a daemon.

use std::{fs, os::unix::fs::PermissionsExt as _, path::Path, process::Command};

use nydus_store::fixtures::{ImageOptions, LayerSource, plain_image};
use tempfile::TempDir;

use crate::{
    common::{BINARY, DockerRegistry, Podman, Release, RunPodman as _, Serve, empty_image_store, output},
    each_release::on_each_release,
    podman::{runnable_tree, sh},
};

mod rootless;

on_each_release!(
    ordinary_image_runs_beside_empty_stores,
    user_namespaces_get_their_own_ids,
    signature_policy_is_enforced,
);

/// A registry with an ordinary image, and a daemon's root with empty stores.
struct EmptyStoreHost {
    registry: DockerRegistry,
    root: TempDir,
}

impl EmptyStoreHost {
    async fn new() -> Self {
        let (registry, root, dir) = (
            DockerRegistry::start(),
            tempfile::tempdir().unwrap(),
            tempfile::tempdir().unwrap(),
        );
        empty_image_store(&root.path().join("store"));
        fs::create_dir(root.path().join("layers")).unwrap();
        let tree = dir.path().join("tree");
        runnable_tree(&tree);
        let layers = [LayerSource::Dir(tree)];
        let image = plain_image(&layers, &ImageOptions::default(), &dir.path().join("image")).unwrap();
        image.push(&registry.url(), "plain", "1").await.unwrap();
        Self { registry, root }
    }

    fn root(&self) -> &Path {
        self.root.path()
    }

    fn image(&self) -> String {
        self.registry.reference("plain", "1")
    }
}

#[test]
fn each_release_has_its_declared_version() {
    let version = |release| {
        let podman = Podman::of(release, None, "127.0.0.1:1");
        let line = podman.run(&["--version"]);
        let version = line.strip_prefix("podman version ").unwrap();
        let mut numbers = version.split('.').map(|number| number.parse::<u32>().unwrap());
        (numbers.next().unwrap(), numbers.next().unwrap())
    };
    assert_eq!(version(Release::Four), (4, 3));
    assert_eq!(version(Release::Five), (5, 4));
    assert!(version(Release::Newest) >= (5, 5), "{:?}", version(Release::Newest));
}

async fn ordinary_image_runs_beside_empty_stores(release: Release) {
    let host = EmptyStoreHost::new().await;
    let podman = Podman::of(release, Some(host.root()), host.registry.host());
    // The auth helper finds no daemon, which must not fail the pull.
    let image = host.image();
    assert_eq!(sh(&podman, &[], &image, "cat /data/hello"), "hello");
    let format = "{{.Store.GraphDriverName}} {{.Store.GraphRoot}}";
    let info = podman.run(&["info", "--format", format]);
    assert_eq!(info, format!("overlay {}", podman.graph_root().display()));
    let options = podman.run(&["info", "--format", "{{json .Store.GraphOptions}}"]);
    let store = host.root().join("store");
    assert!(options.contains(store.to_str().unwrap()), "{options}");
    assert_eq!(podman.run(&["images", "--format", "{{.Repository}} {{.ReadOnly}}"]), {
        format!("{}/plain false", host.registry.host())
    });
}

async fn user_namespaces_get_their_own_ids(release: Release) {
    let host = EmptyStoreHost::new().await;
    let podman = Podman::builder(release).registry(host.registry.host()).userns().build();
    let image = host.image();
    let first_id = "awk '$1 == 0 { print $2 }' /proc/self/uid_map; stat -c %u /data/hello";
    podman.run(&["pull", &image]);
    assert_eq!(sh(&podman, &["--userns=auto"], &image, first_id), "2147483647\n0");
    let given = ["--uidmap=0:100000:65536", "--gidmap=0:100000:65536"];
    assert_eq!(sh(&podman, &given, &image, first_id), "100000\n0");
}

async fn signature_policy_is_enforced(release: Release) {
    let host = EmptyStoreHost::new().await;
    let podman = Podman::builder(release)
        .registry(host.registry.host())
        .policy(r#"{"default":[{"type":"reject"}]}"#)
        .build();
    let error = podman.fails(&["pull", &host.image()]);
    assert!(error.contains("rejected by policy"), "{error}");
}

/// Podman 4.3 does not support the auth helper.
#[tokio::test(flavor = "multi_thread")]
async fn pull_runs_the_auth_helper() {
    let host = EmptyStoreHost::new().await;
    for release in [Release::Five, Release::Newest] {
        let podman = Podman::of(release, Some(host.root()), host.registry.host());
        let script = fs::read_to_string(podman.helper()).unwrap();
        assert!(script.contains(host.root().to_str().unwrap()), "{script}");
        let told = podman.dir().join("told");
        fs::write(podman.helper(), format!("#!/bin/sh\nexec cat >'{}'\n", told.display())).unwrap();
        fs::set_permissions(podman.helper(), fs::Permissions::from_mode(0o755)).unwrap();
        podman.run(&["pull", &host.image()]);
        let told: serde_json::Value = serde_json::from_slice(&fs::read(&told).unwrap()).unwrap();
        assert!(told.get(host.image()).is_some(), "{release:?}: {told}");
    }
}

#[test]
fn program_runs_in_the_mount_namespace_of_podman() {
    for release in Release::ALL {
        let podman = Podman::builder(release).userns().build();
        let version = output(podman.program(BINARY).arg("--version"));
        assert!(version.starts_with("nydus-store "), "{version}");
    }
}

/// Mounts change like this when the daemon restarts.
#[test]
fn later_mounts_propagate_to_the_mount_namespace() {
    let serve = Serve::prepare_shared("");
    let overlay = serve.root().join("store/overlay");
    empty_image_store(&serve.root().join("store"));
    let podmans = Release::ALL.map(|release| Podman::builder(release).root(serve.root()).userns().build());
    let seen = || {
        podmans
            .each_ref()
            .map(|podman| output(podman.program("ls").arg(&overlay)))
    };
    for _ in 0..2 {
        assert_eq!(seen(), ["l\n"; 3]);
        output(Command::new("mount").args(["-t", "tmpfs", "tmpfs"]).arg(&overlay));
        fs::write(overlay.join("mounted"), "").unwrap();
        assert_eq!(seen(), ["mounted\n"; 3]);
        output(Command::new("umount").arg("--lazy").arg(&overlay));
    }
}
