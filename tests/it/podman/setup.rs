//! Podman 4 and 5 with the files that `nydus-store setup` has written.

use std::sync::Arc;

use nydus_store::fixtures::{EmbeddedRegistry, Fault, RequestInfo};
use parking_lot::Mutex;

use super::*;
use crate::common::Release;

const USED: &str = "layer is used";

/// A registry, a daemon, and the daemon's configuration with the mirror's port.
pub struct Host {
    pub serve: Serve,
    pub registry: DockerRegistry,
    pub config: PathBuf,
    dir: TempDir,
}

impl Host {
    pub fn start() -> Self {
        let serve = Serve::shared("[mirror]\nlisten = \"127.0.0.1:0\"\n");
        let dir = tempfile::tempdir().unwrap();
        let config = dir.path().join("config.toml");
        fs::write(&config, format!("[mirror]\nlisten = \"{}\"\n", serve.mirror())).unwrap();
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

    /// `nydus-store setup` for this daemon.
    pub fn setup(&self, tree: &Path, args: &[&str]) {
        self.serve.set_up(tree, &self.config, args);
    }

    /// A Podman with what `setup` writes for `registry`.
    pub fn podman(&self, version: Release, registry: &str) -> Podman {
        Podman::set_up(version, self.serve.root(), &self.registries(), |tree| {
            self.setup(tree, &["--registry", registry]);
        })
    }

    /// A Podman 4, which can do without the mirror, with what `setup` writes for no registry.
    pub fn podman_without_registries(&self) -> Podman {
        let setup = |tree: &Path| self.setup(tree, &[]);
        Podman::set_up(Release::Four, self.serve.root(), &self.registries(), setup)
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
    for version in [Release::Four, Release::Five] {
        let used = host.serve.log().matches(USED).count();
        let podman = host.podman(version, host.registry.host());
        assert_eq!(sh(&podman, &[], &image, "cat /data/hello"), "hello");
        assert!(host.serve.log().matches(USED).count() > used);
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
    fs::write(
        &host.config,
        format!("[mirror]\nlisten = \"{}\"\n", host.serve.mirror()),
    )
    .unwrap();
    let podman = Podman::set_up(Release::Five, host.serve.root(), &registries, |tree| {
        host.setup(tree, &["--registry", "moved.test:5000"]);
    });
    assert_eq!(sh(&podman, &[], &image, "cat /data/hello"), "hello");
    assert!(host.serve.log().contains(USED));
}

/// A domain stands for the registries below it that are known: here one that the person has an entry for.
#[tokio::test(flavor = "multi_thread")]
async fn lazy_images_run_from_a_domain() {
    let host = Host::start();
    let image = host.lazy().await;
    let podman = host.podman(Release::Five, "*.0.0.1");
    assert_eq!(sh(&podman, &[], &image, "cat /data/hello"), "hello");
    assert!(host.serve.log().contains(USED));
}

/// Why setup makes an entry for each registry of a domain: Podman replaces all of the registry's name by the mirror's
/// location, so that a mirror cannot tell which registry is meant.
#[tokio::test(flavor = "multi_thread")]
async fn podman_does_not_tell_a_mirror_which_registry_of_a_domain_is_meant() {
    let asked: Arc<Mutex<Vec<String>>> = Arc::default();
    let registry = EmbeddedRegistry::start().unwrap();
    let log = Arc::clone(&asked);
    registry.set_fault(Some(Arc::new(move |request: &RequestInfo| {
        log.lock().push(request.path.clone());
        Fault::None
    })));
    let reference = registry.reference("", "");
    let (host, _) = reference.split_once('/').unwrap();
    let podman = Podman::set_up(
        Release::Five,
        tempfile::tempdir().unwrap().path(),
        &format!(
            "[[registry]]\nprefix = \"*.domain.invalid\"\n[[registry.mirror]]\nlocation = \"{host}/below_domain.invalid\"\n\
             insecure = true\n"
        ),
        |_| (),
    );
    for name in ["one.domain.invalid/team/app:1", "two.domain.invalid/team/app:1"] {
        podman.fails(&["pull", name]);
        let asked = std::mem::take(&mut *asked.lock());
        let manifest = "/v2/below_domain.invalid/team/app/manifests/1";
        assert!(asked.iter().any(|path| path == manifest), "{asked:?}");
        assert!(
            !asked.iter().any(|path| path.contains("one") || path.contains("two")),
            "{asked:?}"
        );
    }
    // And with a port in the name, there would be no pulling at all.
    let error = podman.fails(&["pull", "one.domain.invalid:5000/team/app:1"]);
    assert!(error.contains("rewriting reference"), "{error}");
    assert!(asked.lock().is_empty());
}

/// Why setup tells of a host's other ports, and why each is to be named.
#[test]
fn a_host_s_entry_is_taken_for_its_ports_too() {
    let host = Host::start();
    let pull = |registries: &[&str]| {
        let podman = Podman::set_up(Release::Five, host.serve.root(), "", |tree| {
            registries
                .iter()
                .for_each(|registry| host.setup(tree, &["--registry", registry]));
        });
        podman.fails(&["pull", "one.domain.invalid:5000/team/app:1"])
    };
    let error = pull(&["one.domain.invalid"]);
    assert!(error.contains("rewriting reference"), "{error}");
    let error = pull(&["one.domain.invalid", "one.domain.invalid:5000"]);
    assert!(
        error.contains("one.domain.invalid_5000") && !error.contains("rewriting"),
        "{error}"
    );
}
