//! Podman 4.3, 5.4 and the newest release with lazy images. Scenarios run with every release; differences are noted
//! there.

use std::{
    fs,
    os::unix::fs::{PermissionsExt as _, symlink},
    path::{Path, PathBuf},
    process::Command,
    sync::atomic::{AtomicUsize, Ordering},
    time::Duration,
};

use nydus_store::{
    fixtures::{self, BuildOptions, BuiltImage, ImageOptions, LayerSource, content},
    internals::Digest,
};
use nydus_utils::compress::Algorithm;
use tempfile::TempDir;

use crate::{
    common::{Access, BINARY, DockerRegistry, Podman, Release, RunPodman as _, Serve, output},
    each_release::on_each_release,
};

mod build;
mod buildah_and_partial;
mod doctor;
mod full_disk;
mod gc;
mod images;
mod incomplete;
mod kinds;
mod neighbours;
mod overlay;
mod records;
mod registered;
mod restart;
mod run;
mod setup;
mod several_releases;
mod shared_data;
mod signed;
mod store;
mod takeover;
mod transfer;
mod userns;

/// A file of the test image with several chunks.
const NUMBERS: &str = "/data/numbers";

/// Logged by the daemon when it has published an image because of an announced pull.
pub const PUBLISHED: &str = "published announced image";

/// A registry, a daemon and a Podman that uses both.
struct PodmanLab {
    // Dropped in this order: Podman's mounts need the store, the store needs the registry.
    podman: Podman,
    release: Release,
    serve: Serve,
    registry: DockerRegistry,
    dir: TempDir,
    made: AtomicUsize,
}

impl PodmanLab {
    fn start(release: Release) -> Self {
        Self::with_daemon(release, Serve::shared(""))
    }

    /// Starts a lab whose daemon runs below a supervisor.
    fn start_supervised(release: Release) -> Self {
        let mut serve = Serve::prepare_shared("");
        serve.launch_with(|command| _ = command.arg("--supervise"));
        Self::with_daemon(release, serve)
    }

    fn with_daemon(release: Release, serve: Serve) -> Self {
        let registry = DockerRegistry::start();
        Self {
            podman: Podman::of(release, Some(serve.root()), registry.host()),
            release,
            serve,
            registry,
            dir: tempfile::tempdir().unwrap(),
            made: AtomicUsize::new(0),
        }
    }

    /// Starts a lab with the usual test image ([`runnable_tree`]) in the registry; returns its reference too.
    async fn with_image(release: Release) -> (Self, String, BuiltImage) {
        let lab = Self::start(release);
        let image = lab.build(&[lab.layer(runnable_tree)], &BuildOptions::default());
        let reference = lab.push(&image, "base", "1").await;
        (lab, reference, image)
    }

    /// A new path, at which nothing exists.
    fn new_path(&self) -> PathBuf {
        self.dir
            .path()
            .join(self.made.fetch_add(1, Ordering::Relaxed).to_string())
    }

    /// A layer made by `make` in a new directory.
    fn layer(&self, make: impl FnOnce(&Path)) -> LayerSource {
        let tree = self.new_path();
        fs::create_dir(&tree).unwrap();
        make(&tree);
        LayerSource::Dir(tree)
    }

    fn build(&self, layers: &[LayerSource], options: &BuildOptions) -> BuiltImage {
        fixtures::build(layers, options, &self.new_path()).unwrap()
    }

    fn build_plain(&self, layers: &[LayerSource]) -> BuiltImage {
        fixtures::plain_image(layers, &ImageOptions::default(), &self.new_path()).unwrap()
    }

    /// Pushes an image to the registry; returns its reference.
    async fn push(&self, image: &BuiltImage, repository: &str, tag: &str) -> String {
        image.push(&self.registry.url(), repository, tag).await.unwrap();
        self.registry.reference(repository, tag)
    }

    /// Starts a lab with an uncompressed image of more than `mib` MiB; returns its reference and its size in bytes.
    async fn with_big_image(release: Release, mib: u64) -> (Self, String, u64) {
        let lab = Self::start(release);
        let tree = lab.layer(|dir| {
            runnable_tree(dir);
            fixtures::big_tree(&dir.join("data/big"), mib << 20).unwrap();
        });
        let options = BuildOptions {
            compressor: Algorithm::None,
            ..BuildOptions::default()
        };
        let image = lab.build(&[tree], &options);
        let size = image.blobs.iter().map(|blob| blob.size).sum();
        assert!(size > mib << 20, "{size}");
        let reference = lab.push(&image, "big", "1").await;
        (lab, reference, size)
    }

    /// Runs a shell script in a new container; returns its output.
    fn sh(&self, image: &str, script: &str) -> String {
        sh(&self.podman, &[], image, script)
    }

    /// Starts a container that keeps running.
    fn keep(&self, name: &str, image: &str) {
        let args = [
            "run",
            "--detach",
            "--name",
            name,
            "--network",
            "none",
            image,
            "sleep",
            "1000",
        ];
        self.podman.run(&args);
    }

    /// Creates a container named `name` that prints `/data/hello` when it starts.
    fn create_hello(&self, name: &str, image: &str) {
        let create = ["create", "--name", name, "--network", "none"];
        self.podman.run(&[&create[..], &[image, "cat", "/data/hello"]].concat());
    }

    /// Runs a shell script in a new container named `name`, which stays after its end.
    fn run_named(&self, name: &str, image: &str, script: &str) {
        let run = ["run", "--name", name, "--network", "none"];
        self.podman.run(&[&run[..], &[image, "sh", "-ec", script]].concat());
    }

    /// SHA-256 of a file in hexadecimal, computed in a new container.
    fn sha256(&self, image: &str, path: &str) -> String {
        let line = self.sh(image, &format!("sha256sum {path}"));
        line.split(' ').next().unwrap().to_owned()
    }

    /// All requests so far. Waits until no more appear, because the registry logs a request after its response.
    fn accesses(&self) -> Vec<Access> {
        let mut seen = self.registry.accesses();
        loop {
            std::thread::sleep(Duration::from_millis(50));
            let now = self.registry.accesses();
            if now.len() == seen.len() {
                return now;
            }
            seen = now;
        }
    }

    /// Requests of the daemon during `what`.
    fn our_requests(&self, what: impl FnOnce()) -> Vec<Access> {
        let before = self.accesses().len();
        what();
        let mut requests = self.accesses().split_off(before);
        requests.retain(|access| access.agent.starts_with("nydus-store/"));
        requests
    }

    /// Number of times the daemon has logged `what`.
    fn logged(&self, what: &str) -> usize {
        self.serve.log().matches(what).count()
    }

    /// Runs a subcommand of `nydus-store` on the daemon's root; returns its output.
    fn nydus_store(&self, args: &[&str]) -> String {
        output(Command::new(BINARY).args(args).arg("--root").arg(self.serve.root()))
    }
}

/// Runs a shell script in a new container, with more options of `podman run`; returns its output.
pub fn sh(podman: &Podman, options: &[&str], image: &str, script: &str) -> String {
    let args = [
        &["run", "--rm", "--network", "none"],
        options,
        &[image, "sh", "-ec", script],
    ];
    podman.run(&args.concat())
}

/// Total size in bytes of all files below `dir`.
fn total_size(dir: &Path) -> u64 {
    let files = walkdir::WalkDir::new(dir).into_iter().filter_map(Result::ok);
    files
        .filter_map(|entry| entry.metadata().ok())
        .filter(fs::Metadata::is_file)
        .map(|data| data.len())
        .sum()
}

/// Paths of the requests for blobs.
fn blob_paths(requests: &[Access]) -> Vec<&str> {
    let paths = requests.iter().map(|access| access.path.as_str());
    paths.filter(|path| path.contains("/blobs/")).collect()
}

/// A small system: BusyBox and some data.
pub fn runnable_tree(dir: &Path) {
    for name in ["bin", "data", "etc", "proc", "root", "sys", "tmp"] {
        fs::create_dir_all(dir.join(name)).unwrap();
    }
    fs::set_permissions(dir.join("tmp"), fs::Permissions::from_mode(0o1777)).unwrap();
    fs::copy("/bin/busybox", dir.join("bin/busybox")).expect("busybox-static is installed (scripts/test installs it)");
    for applet in output(Command::new("/bin/busybox").arg("--list")).lines() {
        if applet != "busybox" {
            symlink("busybox", dir.join("bin").join(applet)).unwrap();
        }
    }
    fs::write(
        dir.join("etc/passwd"),
        "root:x:0:0::/root:/bin/sh\nuser:x:1000:1000::/:/bin/sh\n",
    )
    .unwrap();
    fs::write(dir.join("etc/group"), "root:x:0:\nuser:x:1000:\n").unwrap();
    fs::write(dir.join("data/hello"), "hello\n").unwrap();
    content::write_mixed(&dir.join("data/numbers"), 3_500_000, &mut content::Random::new(7)).unwrap();
}

/// A layer of one small file.
fn note(name: &'static str, text: &'static str) -> impl FnOnce(&Path) {
    move |dir| fs::write(dir.join(name), text).unwrap()
}

/// SHA-256 of a file of a layer's source in hexadecimal.
fn sha256_in(layer: &LayerSource, path: &str) -> String {
    Digest::of(&fs::read(source_dir(layer).join(path.trim_start_matches('/'))).unwrap()).hex()
}

/// The directory or tar that a layer is made from.
fn source_dir(layer: &LayerSource) -> &Path {
    match layer {
        LayerSource::Dir(path) | LayerSource::Tar(path) => path,
    }
}
