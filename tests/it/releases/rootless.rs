//! Rootless Podman with the /etc/containers of root's Podman.

use std::{fs, os::unix::fs::PermissionsExt as _, path::Path};

use super::EmptyStoreHost;
use crate::{
    common::{Podman, Release, RunPodman as _},
    each_release::on_each_release,
};

on_each_release!(ordinary_user_pulls_and_runs);

/// Root's Podman, with the image store of `host` configured in `/etc/containers/NAME`.
fn named_in(release: Release, host: &EmptyStoreHost, name: &str) -> Podman {
    let store = host.root().join("store");
    let builder = Podman::builder(release)
        .root(host.root())
        .registry(host.registry.host());
    builder.set_up(|tree| {
        let file = tree.join("etc/containers").join(name);
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        let text = fs::read_to_string(&file).unwrap_or_else(|_| "[storage.options]\n".to_owned());
        fs::write(
            file,
            format!("{text}additionalimagestores = [\"{}\"]\n", store.display()),
        )
        .unwrap();
    })
}

/// Whether Podman uses this image store.
fn has_store(podman: &Podman, store: &Path) -> bool {
    let options = podman.run(&["info", "--format", "{{json .Store.GraphOptions}}"]);
    options.contains(store.to_str().unwrap())
}

async fn ordinary_user_pulls_and_runs(release: Release) {
    let host = EmptyStoreHost::new().await;
    let podman = Podman::builder(release).registry(host.registry.host()).set_up(|_| ());
    let user = podman.rootless();
    let (image, home) = (host.image(), user.home());
    let info = user.run(&["info", "--format", "{{.Host.Security.Rootless}} {{.Store.GraphRoot}}"]);
    assert_eq!(info, format!("true {}/.local/share/containers/storage", home.display()));
    user.run(&["pull", &image]);
    assert_eq!(user.run(&["images", "--format", "{{.Names}}"]), format!("[{image}]"));
    let script = "id -u; awk '$1 == 0 { print $2 }' /proc/self/uid_map; cat /data/hello";
    let told = user.run(&["run", "--rm", "--network", "none", &image, "sh", "-ec", script]);
    assert_eq!(told, "0\n2000\nhello");
    // Root's storage is separate.
    assert_eq!(podman.run(&["images", "--quiet"]), "");
}

/// The newest Podman applies image stores in storage.conf to every user.
#[tokio::test(flavor = "multi_thread")]
async fn private_store_in_storage_conf_fails_rootless_commands_of_the_newest_only() {
    let host = EmptyStoreHost::new().await;
    fs::set_permissions(host.root(), fs::Permissions::from_mode(0o700)).unwrap();
    for release in Release::ALL {
        let podman = named_in(release, &host, "storage.conf");
        assert!(has_store(&podman, &host.root().join("store")), "{release:?}");
        let user = podman.rootless();
        if release == Release::Newest {
            let error = user.fails(&["images"]);
            assert!(error.contains("can't stat imageStore dir"), "{error}");
            assert!(error.contains("permission denied"), "{error}");
        } else {
            user.run(&["images"]);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn store_in_storage_rootful_conf_d_is_used_by_root_only() {
    let host = EmptyStoreHost::new().await;
    fs::set_permissions(host.root(), fs::Permissions::from_mode(0o700)).unwrap();
    let podman = named_in(Release::Newest, &host, "storage.rootful.conf.d/50-nydus-store.conf");
    assert!(has_store(&podman, &host.root().join("store")));
    let user = podman.rootless();
    assert_eq!(user.run(&["images", "--quiet"]), "");
    let image = host.image();
    let told = user.run(&["run", "--rm", "--network", "none", &image, "cat", "/data/hello"]);
    assert_eq!(told, "hello");
}
