//! Every Podman with the files that `nydus-store setup` has written.

use super::*;
use crate::common::{Release, copy_program};

/// A registry, a daemon, and the daemon's configuration.
pub struct Host {
    pub serve: Serve,
    pub registry: DockerRegistry,
    pub config: PathBuf,
    dir: TempDir,
}

impl Host {
    pub fn start() -> Self {
        let serve = Serve::shared("");
        let dir = tempfile::tempdir().unwrap();
        let config = dir.path().join("config.toml");
        fs::write(&config, "").unwrap();
        Self {
            serve,
            registry: DockerRegistry::start(),
            config,
            dir,
        }
    }

    /// What a person has said of the registry, which speaks plain HTTP.
    pub fn registries(&self) -> String {
        format!(
            "[[registry]]\nlocation = \"{}\"\ninsecure = true\n",
            self.registry.host()
        )
    }

    /// A Podman with what `setup` writes.
    pub fn podman(&self, version: Release) -> Podman {
        self.podman_of(version, &self.registries())
    }

    /// The same, where a person has said that of registries.
    pub fn podman_of(&self, version: Release, registries: &str) -> Podman {
        let setup = |tree: &Path| {
            if version == Release::Newest {
                // By which setup knows from where this Podman reads the store.
                fs::create_dir_all(tree.join("usr/bin")).unwrap();
                fs::copy("target/podman-testing/usr/bin/podman", tree.join("usr/bin/podman")).unwrap();
            }
            self.serve.set_up(tree, &self.config, &[]);
        };
        let podman = Podman::set_up(version, self.serve.root(), registries, setup);
        if version != Release::Four {
            // Where the script that announces pulls looks for it.
            copy_program(&podman.outside("/usr/local/bin/nydus-store"));
        }
        podman
    }

    /// A lazy image in the registry; its name.
    pub async fn lazy(&self) -> String {
        let tree = self.dir.path().join("tree");
        runnable_tree(&tree);
        let out = self.dir.path().join("out");
        let image = fixtures::build(&[LayerSource::Dir(tree)], &BuildOptions::default(), &out).unwrap();
        image.push(&self.registry.url(), "lazy", "1").await.unwrap();
        self.registry.reference("lazy", "1")
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn lazy_images_run_with_what_setup_writes() {
    let host = Host::start();
    let image = host.lazy().await;
    for version in Release::ALL {
        let used = host.serve.log().matches(PUBLISHED).count();
        let podman = host.podman(version);
        assert_eq!(sh(&podman, &[], &image, "cat /data/hello"), "hello");
        assert!(host.serve.log().matches(PUBLISHED).count() > used);
    }
}

/// The store is root's alone, and no command of another user may fail because of it.
#[tokio::test(flavor = "multi_thread")]
async fn podman_of_other_users_goes_on_as_before() {
    let host = Host::start();
    let lazy = host.lazy().await;
    let plain = fixtures::plain_image(
        &[LayerSource::Dir(host.dir.path().join("tree"))],
        &ImageOptions::default(),
        &host.dir.path().join("plain"),
    );
    plain.unwrap().push(&host.registry.url(), "plain", "1").await.unwrap();
    let plain = host.registry.reference("plain", "1");
    for version in Release::ALL {
        let podman = host.podman(version);
        assert_eq!(sh(&podman, &[], &lazy, "cat /data/hello"), "hello");
        let user = podman.rootless();
        assert_eq!(user.run(&["images", "--quiet"]), "", "{version:?}");
        let told = user.run(&["run", "--rm", "--network", "none", &plain, "cat", "/data/hello"]);
        assert_eq!(told, "hello", "{version:?}");
    }
}

/// The person has the registry's images fetched from elsewhere: Podman does that, and so does the daemon.
#[tokio::test(flavor = "multi_thread")]
async fn lazy_images_run_from_elsewhere() {
    let mut host = Host::start();
    let image = host.lazy().await.replace(host.registry.host(), "moved.test:5000/all");
    let place = host.registry.host();
    let registries =
        format!("[[registry]]\nprefix = \"moved.test:5000/all\"\nlocation = \"{place}\"\ninsecure = true\n");
    let conf = host.dir.path().join("registries.conf");
    fs::write(&conf, &registries).unwrap();
    host.serve.stop();
    host.serve.launch_with(|command| {
        command.env("CONTAINERS_REGISTRIES_CONF", &conf);
    });
    let podman = host.podman_of(Release::Five, &registries);
    assert_eq!(sh(&podman, &[], &image, "cat /data/hello"), "hello");
    assert!(host.serve.log().contains(PUBLISHED));
}
