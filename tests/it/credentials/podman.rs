//! First pulls of private images: Podman 4.3 with the daemon's own login, newer releases with the pull's credentials.

use nydus_store::fixtures::{self, BuildOptions, LayerSource};

use super::*;
use crate::{
    common::{Podman, Release, RunPodman as _},
    podman::{PUBLISHED, runnable_tree},
};

/// A runnable private image, and a daemon.
struct PrivateHost {
    serve: Serve,
    registry: DockerRegistry,
    dir: TempDir,
    /// The public registry with the same storage.
    _open: DockerRegistry,
}

impl PrivateHost {
    /// Starts a daemon with the auth file `auth.json` in `dir`, which does not exist yet.
    async fn start() -> Self {
        let site = AuthSite::new("other").await;
        let (tree, out) = (site.path("tree"), site.path("out"));
        runnable_tree(&tree);
        let lazy = fixtures::build(&[LayerSource::Dir(tree.clone())], &BuildOptions::default(), &out).unwrap();
        lazy.push(&site.open.url(), "team/lazy", "1").await.unwrap();
        let plain = fixtures::plain_image(&[LayerSource::Dir(tree)], &Default::default(), &site.path("plain")).unwrap();
        plain.push(&site.open.url(), "team/plain", "1").await.unwrap();
        let (registry, files) = (site.private(), config(&[&site.path("auth.json")]));
        Self {
            serve: Serve::shared(&files),
            registry,
            dir: site.dir,
            _open: site.open,
        }
    }

    fn podman(&self, release: Release) -> Podman {
        Podman::of(release, Some(self.serve.root()), self.registry.host())
    }

    fn lazy(&self) -> String {
        self.registry.reference("team/lazy", "1")
    }

    fn published(&self) -> usize {
        self.serve.log().matches(PUBLISHED).count()
    }
}

/// Runs `podman login` with an auth file that the daemon does not read.
fn login(podman: &Podman, registry: &DockerRegistry) -> PathBuf {
    let file = podman.dir().join("login.json");
    let path = file.to_str().unwrap();
    podman.run(&["login", "--authfile", path, "-u", USER, "-p", PASSWORD, registry.host()]);
    file
}

/// Output of `podman run IMAGE cat /data/hello`.
fn hello(podman: &Podman, image: &str) -> String {
    podman.run(&["run", "--rm", "--network", "none", image, "cat", "/data/hello"])
}

/// Podman 4.3 needs this, because it passes no credentials to the daemon.
#[tokio::test(flavor = "multi_thread")]
async fn podman_login_serves_the_daemon() {
    let host = PrivateHost::start().await;
    for release in Release::ALL {
        let podman = host.podman(release);
        let file = login(&podman, &host.registry);
        fs::copy(&file, host.dir.path().join("auth.json")).unwrap();
        let published = host.published();
        podman.run(&["pull", "--authfile", file.to_str().unwrap(), &host.lazy()]);
        assert_eq!(hello(&podman, &host.lazy()), "hello");
        assert!(host.published() > published, "{release:?}");
    }
}

/// The daemon has no login, and the image is unknown to it.
#[tokio::test(flavor = "multi_thread")]
async fn credentials_of_the_first_pull_are_sufficient() {
    for release in [Release::Five, Release::Newest] {
        let mut host = PrivateHost::start().await;
        let (podman, lazy) = (host.podman(release), host.lazy());
        let credentials = format!("{USER}:{PASSWORD}");
        let refused = podman.fails(&["pull", &lazy]);
        assert!(
            refused.contains("unauthorized") || refused.contains("authentication required"),
            "{refused}"
        );
        podman.run(&["pull", "--creds", &credentials, &lazy]);
        assert_eq!(host.published(), 1);
        assert_eq!(hello(&podman, &lazy), "hello");
        assert!(!host.serve.log().contains(PASSWORD));

        // Without a daemon, the helper does not affect pulls.
        let plain = host.registry.reference("team/plain", "1");
        podman.run(&["rmi", "--all", "--force"]);
        host.serve.stop();
        let pulled = podman
            .command(&["pull", "--creds", &credentials, &plain])
            .output()
            .unwrap();
        let errors = String::from_utf8_lossy(&pulled.stderr).into_owned();
        assert!(pulled.status.success() && !errors.contains("auth-helper"), "{errors}");
    }
}
