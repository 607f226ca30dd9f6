//! Private images with Podman: 4.3, and 5.4 with the mirror and with `additional-layer-store-auth-helper`.

use nydus_store::fixtures::{self, BuildOptions, LayerSource};

use super::*;
use crate::{
    common::{Podman, Release},
    podman::runnable_tree,
};

/// What tells, in the daemon's log, that Podman has taken a layer from the store.
const USED: &str = "layer is used";

/// A private image that can run, and a daemon.
pub(super) struct Host {
    pub(super) serve: Serve,
    pub(super) registry: DockerRegistry,
    config: PathBuf,
    pub(super) dir: TempDir,
    /// The same images, for all.
    pub(super) open: DockerRegistry,
}

impl Host {
    /// The daemon has the auth file `auth.json` in `dir`, which is missing.
    pub(super) async fn start() -> Self {
        let site = Site::new("other").await;
        let (tree, out) = (site.path("tree"), site.path("out"));
        runnable_tree(&tree);
        let lazy = fixtures::build(&[LayerSource::Dir(tree.clone())], &BuildOptions::default(), &out).unwrap();
        lazy.push(&site.open.url(), "team/lazy", "1").await.unwrap();
        let plain = fixtures::plain_image(&[LayerSource::Dir(tree)], &Default::default(), &site.path("plain")).unwrap();
        plain.push(&site.open.url(), "team/plain", "1").await.unwrap();
        let (registry, config) = (site.private(), site.path("config.toml"));
        let files = super::config(&[&site.path("auth.json")]);
        let serve = Serve::shared(&format!("{files}[mirror]\nlisten = \"127.0.0.1:0\"\n"));
        fs::write(&config, format!("[mirror]\nlisten = \"{}\"\n", serve.mirror())).unwrap();
        Self {
            serve,
            registry,
            config,
            dir: site.dir,
            open: site.open,
        }
    }

    /// A Podman with what `setup` writes.
    pub(super) fn podman(&self, release: Release, args: &[&str]) -> Podman {
        let registries = format!(
            "[[registry]]\nlocation = \"{}\"\ninsecure = true\n",
            self.registry.host()
        );
        Podman::set_up(release, self.serve.root(), &registries, |tree| {
            let args = [&["--registry", self.registry.host()], args].concat();
            self.serve.set_up(tree, &self.config, &args);
        })
    }

    pub(super) fn lazy(&self) -> String {
        self.registry.reference("team/lazy", "1")
    }

    pub(super) fn used(&self) -> usize {
        self.serve.log().matches(USED).count()
    }
}

/// Logs in, to an auth file that only this Podman knows of.
fn login(podman: &Podman, registry: &DockerRegistry) -> PathBuf {
    let file = podman.dir().join("login.json");
    let path = file.to_str().unwrap();
    podman.run(&["login", "--authfile", path, "-u", USER, "-p", PASSWORD, registry.host()]);
    file
}

/// Podman's answer to `podman run IMAGE cat /data/hello`.
pub(super) fn hello(podman: &Podman, image: &str) -> String {
    podman.run(&["run", "--rm", "--network", "none", image, "cat", "/data/hello"])
}

#[tokio::test(flavor = "multi_thread")]
async fn a_login_of_podman_serves_the_daemon_too() {
    let host = Host::start().await;
    for release in [Release::Four, Release::Five] {
        let podman = host.podman(release, &[]);
        let file = login(&podman, &host.registry);
        fs::copy(&file, host.dir.path().join("auth.json")).unwrap();
        let used = host.used();
        podman.run(&["pull", "--authfile", file.to_str().unwrap(), &host.lazy()]);
        assert_eq!(hello(&podman, &host.lazy()), "hello");
        assert!(host.used() > used, "{release:?}");
    }
}

/// The daemon knows of no login. Podman 5.4 asks the mirror first, for which it has no credentials, and tells the helper
/// what it has got from the registry itself with; by then it has the manifest that knows nothing of the store. So it is the
/// next pull that is lazy, and so are all after it.
#[tokio::test(flavor = "multi_thread")]
async fn podman_5_hands_over_what_it_pulls_with() {
    let mut host = Host::start().await;
    let podman = host.podman(Release::Five, &["--auth-helper"]);
    fs::copy(BINARY, podman.outside("/usr/local/bin/nydus-store")).unwrap();
    let file = login(&podman, &host.registry);
    let (file, lazy) = (file.to_str().unwrap(), host.lazy());
    let first = podman.fails(&["pull", "--authfile", file, &lazy]);
    assert!(!first.contains("auth-helper"), "{first}");
    let log = host.serve.log();
    assert!(log.contains("Podman has handed over credentials"), "{log}");
    podman.run(&["pull", "--authfile", file, &lazy]);
    assert_eq!(hello(&podman, &lazy), "hello");
    assert!(host.used() > 0);
    assert!(!host.serve.log().contains(PASSWORD));

    // Without a daemon the helper is in nobody's way.
    let plain = host.registry.reference("team/plain", "1");
    podman.run(&["rmi", "--all", "--force"]);
    host.serve.stop();
    let pulled = podman.command(&["pull", "--authfile", file, &plain]).output().unwrap();
    let errors = String::from_utf8_lossy(&pulled.stderr).into_owned();
    assert!(pulled.status.success() && !errors.contains("auth-helper"), "{errors}");
}

/// Podman 4.3 does not know the key, and does not mind it.
#[tokio::test(flavor = "multi_thread")]
async fn podman_4_does_not_mind_the_helper() {
    let host = Host::start().await;
    let podman = host.podman(Release::Four, &["--auth-helper"]);
    let file = login(&podman, &host.registry);
    fs::copy(&file, host.dir.path().join("auth.json")).unwrap();
    podman.run(&["pull", "--authfile", file.to_str().unwrap(), &host.lazy()]);
    assert_eq!(hello(&podman, &host.lazy()), "hello");
    assert!(host.used() > 0);
}
