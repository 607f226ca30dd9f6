//! Podman 5.4, of Debian 13, on the same daemon.

use std::{
    fs,
    os::unix::fs::{PermissionsExt as _, symlink},
    path::{Path, PathBuf},
    process::Command,
};

use nydus_store::fixtures::{self, BuildOptions, BuiltImage, ImageOptions, LayerSource, content};
use tempfile::TempDir;

use crate::common::{DockerRegistry, Podman, Serve, output};

mod doctor;
mod mirror;
mod setup;

/// A registry, a daemon and a Podman 5 that uses both.
struct Lab {
    // Dropped in this order: Podman's mounts need the store, the store needs the registry.
    podman: Podman,
    serve: Serve,
    registry: DockerRegistry,
    dir: TempDir,
}

impl Lab {
    /// Without the mirror.
    fn start() -> Self {
        let serve = Serve::shared("");
        let registry = DockerRegistry::start();
        Self {
            podman: Podman::five(Some(&serve.store()), registry.host(), None),
            serve,
            registry,
            dir: tempfile::tempdir().unwrap(),
        }
    }

    /// A layer of what `make` puts into a directory, beside a small system.
    fn system(&self, name: &str, make: impl FnOnce(&Path)) -> LayerSource {
        let tree = self.dir.path().join(name);
        runnable_tree(&tree);
        make(&tree);
        LayerSource::Dir(tree)
    }

    fn out(&self, name: &str) -> PathBuf {
        self.dir.path().join(format!("{name}.out"))
    }

    fn build(&self, name: &str, layers: &[LayerSource]) -> BuiltImage {
        fixtures::build(layers, &BuildOptions::default(), &self.out(name)).unwrap()
    }

    fn build_plain(&self, name: &str, layers: &[LayerSource]) -> BuiltImage {
        fixtures::plain_image(layers, &ImageOptions::default(), &self.out(name)).unwrap()
    }

    /// Puts an image into the registry; its name.
    async fn push(&self, image: &BuiltImage, repository: &str) -> String {
        image.push(&self.registry.url(), repository, "1").await.unwrap();
        self.registry.reference(repository, "1")
    }

    /// What a new container of the image prints when it runs a shell script.
    fn sh(&self, image: &str, script: &str) -> String {
        sh(&self.podman, &[], image, script)
    }
}

/// What a new container of the image prints when it runs a shell script; with more options for `podman run`.
fn sh(podman: &Podman, options: &[&str], image: &str, script: &str) -> String {
    let args = [
        &["run", "--rm", "--network", "none"],
        options,
        &[image, "sh", "-ec", script],
    ]
    .concat();
    podman.run(&args)
}

/// A small system: BusyBox and some data.
fn runnable_tree(dir: &Path) {
    for name in ["bin", "data", "etc", "proc", "sys", "tmp"] {
        fs::create_dir_all(dir.join(name)).unwrap();
    }
    fs::set_permissions(dir.join("tmp"), fs::Permissions::from_mode(0o1777)).unwrap();
    fs::copy("/bin/busybox", dir.join("bin/busybox")).expect("busybox-static is installed (scripts/test installs it)");
    for applet in output(Command::new("/bin/busybox").arg("--list")).lines() {
        if applet != "busybox" {
            symlink("busybox", dir.join("bin").join(applet)).unwrap();
        }
    }
    fs::write(dir.join("etc/passwd"), "root:x:0:0::/root:/bin/sh\n").unwrap();
    fs::write(dir.join("etc/group"), "root:x:0:\n").unwrap();
    fs::write(dir.join("data/hello"), "hello\n").unwrap();
    content::write_mixed(&dir.join("data/numbers"), 3_500_000, &mut content::Random::new(7)).unwrap();
}

#[test]
fn it_is_podman_5_4_with_the_store_in_force() {
    let lab = Lab::start();
    let version = lab.podman.run(&["--version"]);
    assert!(version.starts_with("podman version 5.4."), "{version}");
    let info = lab
        .podman
        .run(&["info", "--format", "{{.Store.GraphDriverName}} {{.Store.GraphRoot}}"]);
    assert_eq!(info, format!("overlay {}", lab.podman.graph_root().display()));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_ordinary_image_is_pulled_the_ordinary_way() {
    let lab = Lab::start();
    let image = lab.build_plain("plain", &[lab.system("tree", |_| ())]);
    let image = lab.push(&image, "plain").await;
    assert_eq!(lab.sh(&image, "cat /data/hello"), "hello");
    lab.podman.run(&[
        "run",
        "--detach",
        "--name",
        "kept",
        "--network",
        "none",
        &image,
        "sleep",
        "1000",
    ]);
    assert_eq!(
        lab.podman
            .run(&["exec", "kept", "sh", "-c", "echo new > /data/new; cat /data/new"]),
        "new"
    );
    lab.podman.run(&["stop", "--time", "0", "kept"]);
    lab.podman.run(&["start", "kept"]);
    assert_eq!(lab.podman.run(&["exec", "kept", "cat", "/data/new"]), "new");
    lab.podman.run(&["rm", "--force", "--time", "0", "kept"]);
    lab.podman.run(&["rmi", &image]);
    assert!(!lab.serve.log().contains("layer is used"));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_ordinary_image_in_user_namespaces() {
    let lab = Lab::start();
    let image = lab.build_plain("plain", &[lab.system("tree", |_| ())]);
    let image = lab.push(&image, "plain").await;
    let script = "stat -c %u:%g /data/hello; awk '{ print ($2 > 0) }' /proc/self/uid_map";
    for options in [
        &["--userns=auto"][..],
        &["--uidmap=0:100000:65536", "--gidmap=0:100000:65536"],
    ] {
        assert_eq!(sh(&lab.podman, options, &image, script), "0:0\n1", "{options:?}");
    }
}

/// Podman 5 asks the store by digests that only the mirror adds, so it pulls, and a Nydus layer is no tar. It is taken for
/// one of zstd if it begins with a chunk of that.
#[tokio::test(flavor = "multi_thread")]
async fn a_lazy_image_without_the_mirror_fails_and_harms_nothing() {
    let lab = Lab::start();
    let tree = [lab.system("tree", |_| ())];
    let (lazy, plain) = (lab.build("lazy", &tree), lab.build_plain("plain", &tree));
    let (lazy, plain) = (lab.push(&lazy, "lazy").await, lab.push(&plain, "plain").await);
    let error = lab.podman.fails(&["run", "--rm", "--network", "none", &lazy, "true"]);
    let known = ["invalid tar header", "magic number mismatch"];
    assert!(known.iter().any(|known| error.contains(known)), "{error}");
    assert!(!lab.serve.log().contains("layer is used"));
    assert_eq!(lab.podman.run(&["images", "--all", "--quiet"]), "");
    assert_eq!(lab.sh(&plain, "cat /data/hello"), "hello");
    // The daemon goes on serving those who ask by layer digest.
    let four = Podman::new(Some(&lab.serve.store()), lab.registry.host());
    assert_eq!(sh(&four, &[], &lazy, "cat /data/hello"), "hello");
}

/// Podman 5 is in a mount namespace of its own, as in a host's container.
#[tokio::test(flavor = "multi_thread")]
async fn it_sees_the_store_come_and_go() {
    let mut lab = Lab::start();
    let is_mounted = |lab: &Lab| {
        let store = lab.serve.store();
        let table = output(lab.podman.program("cat").arg("/proc/self/mountinfo"));
        table
            .lines()
            .filter(|line| line.split(' ').nth(4) == store.to_str())
            .count()
    };
    assert_eq!(is_mounted(&lab), 1);
    lab.serve.stop();
    assert_eq!(is_mounted(&lab), 0);
    lab.serve.start_again();
    assert_eq!(is_mounted(&lab), 1);
    lab.serve.kill_and_restart();
    assert_eq!(is_mounted(&lab), 1);
}
