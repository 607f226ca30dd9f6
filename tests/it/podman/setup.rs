//! Every Podman release with the files written by `nydus-store setup`.

use super::*;
use crate::common::{Release, copy_program};

/// A registry, a daemon, and the configuration file that `setup` and `doctor` read.
pub struct SetUpHost {
    pub serve: Serve,
    pub registry: DockerRegistry,
    pub config: PathBuf,
    dir: TempDir,
}

impl SetUpHost {
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

    /// The user's registries.conf: the registry speaks plain HTTP.
    pub fn registries(&self) -> String {
        format!(
            "[[registry]]\nlocation = \"{}\"\ninsecure = true\n",
            self.registry.host()
        )
    }

    /// A Podman with the files written by `setup`.
    pub fn podman(&self, release: Release) -> Podman {
        self.podman_of(release, &self.registries())
    }

    /// Like [`Self::podman`], with this registries.conf of the user.
    pub fn podman_of(&self, release: Release, registries: &str) -> Podman {
        let setup = |tree: &Path| {
            if release == Release::Newest {
                // By this binary, setup recognises that Podman reads storage.rootful.conf.d.
                fs::create_dir_all(tree.join("usr/bin")).unwrap();
                fs::copy("target/podman-testing/usr/bin/podman", tree.join("usr/bin/podman")).unwrap();
            }
            self.serve.set_up(tree, &self.config, &[]);
        };
        let podman = Podman::set_up(release, self.serve.root(), registries, setup);
        if release != Release::Four {
            // The auth helper script runs this path.
            copy_program(&podman.outside("/usr/local/bin/nydus-store"));
        }
        podman
    }

    /// Pushes a lazy image; returns its reference.
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
async fn lazy_image_runs_with_files_written_by_setup() {
    let host = SetUpHost::start();
    let image = host.lazy().await;
    for release in Release::ALL {
        let used = host.serve.log().matches(PUBLISHED).count();
        let podman = host.podman(release);
        assert_eq!(sh(&podman, &[], &image, "cat /data/hello"), "hello");
        assert!(host.serve.log().matches(PUBLISHED).count() > used);
    }
}

/// Only root may access the store; commands of other users must not fail because of it.
#[tokio::test(flavor = "multi_thread")]
async fn rootless_podman_is_unaffected_by_setup() {
    let host = SetUpHost::start();
    let lazy = host.lazy().await;
    let plain = fixtures::plain_image(
        &[LayerSource::Dir(host.dir.path().join("tree"))],
        &ImageOptions::default(),
        &host.dir.path().join("plain"),
    );
    plain.unwrap().push(&host.registry.url(), "plain", "1").await.unwrap();
    let plain = host.registry.reference("plain", "1");
    for release in Release::ALL {
        let podman = host.podman(release);
        assert_eq!(sh(&podman, &[], &lazy, "cat /data/hello"), "hello");
        let user = podman.rootless();
        assert_eq!(user.run(&["images", "--quiet"]), "", "{release:?}");
        let told = user.run(&["run", "--rm", "--network", "none", &plain, "cat", "/data/hello"]);
        assert_eq!(told, "hello", "{release:?}");
    }
}

/// The user's registries.conf relocates the registry; Podman and the daemon both follow it.
#[tokio::test(flavor = "multi_thread")]
async fn lazy_image_runs_from_a_relocated_registry() {
    let mut host = SetUpHost::start();
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
