//! Hosts without a network: a root is preseeded, copied to another host, and Podman runs images from it.

use std::{
    fs::{self, File},
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use nydus_store::fixtures::{self, BuildOptions, BuiltImage, LayerSource, image::BlobKind};
use tempfile::TempDir;

use crate::{
    common::{BINARY, DockerRegistry, Podman, Release, RunPodman as _, Serve, output},
    each_release::on_each_release,
    podman::runnable_tree,
};

on_each_release!(preseeded_image_runs_without_a_network);

/// An unreachable registry: an address for documentation (RFC 5737).
const UNREACHABLE_REGISTRY: &str = "192.0.2.1:5000";
const IMAGE: &str = "192.0.2.1:5000/team/app:v1";

/// A preseeded root.
struct PreseededRoot {
    image: BuiltImage,
    tree: PathBuf,
    dir: TempDir,
}

impl PreseededRoot {
    /// Builds and pushes an image, copies it into an archive with skopeo, and preseeds a root from the archive.
    async fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (tree, out) = (dir.path().join("tree"), dir.path().join("out"));
        fs::create_dir(&tree).unwrap();
        runnable_tree(&tree);
        let image = fixtures::build(&[LayerSource::Dir(tree.clone())], &BuildOptions::default(), &out).unwrap();
        let registry = DockerRegistry::start();
        image.push(&registry.url(), "team/app", "v1").await.unwrap();
        let archive = format!("oci-archive:{}", dir.path().join("app.tar").display());
        let from = format!("docker://{}", registry.reference("team/app", "v1"));
        let copy = [
            "copy",
            "--quiet",
            "--src-tls-verify=false",
            &from,
            &format!("{archive}:{IMAGE}"),
        ];
        output(Command::new("skopeo").args(copy));
        drop(registry);
        let mut preseed = Command::new(BINARY);
        preseed
            .args(["preseed", &archive, "--root"])
            .arg(dir.path().join("seeded"));
        output(&mut preseed);
        Self { image, tree, dir }
    }

    /// Copies the preseeded root, with holes kept.
    fn copy_to(&self, root: &Path) {
        let mut copy = Command::new("cp");
        output(
            copy.args(["-a", "--sparse=always"])
                .arg(self.dir.path().join("seeded"))
                .arg(root),
        );
    }

    /// The data blob's cache file below `root`.
    fn cached(&self, root: &Path) -> PathBuf {
        let data = self
            .image
            .blobs
            .iter()
            .find(|blob| blob.kind == BlobKind::Data)
            .unwrap();
        root.join(format!("cache/{}.blob.data", data.digest.hex()))
    }
}

/// Number of packets without a route in the network namespace of `process`: attempts to leave the host.
fn packets_without_route(process: u32) -> u64 {
    let snmp = fs::read_to_string(format!("/proc/{process}/net/snmp")).unwrap();
    let mut lines = snmp.lines().filter(|line| line.starts_with("Ip: "));
    let (names, values) = (lines.next().unwrap(), lines.next().unwrap());
    let mut fields = names.split(' ').zip(values.split(' '));
    fields
        .find(|(name, _)| *name == "OutNoRoutes")
        .unwrap()
        .1
        .parse()
        .unwrap()
}

/// Runs the image without a network and checks its files.
fn run_without_network(preseeded: &PreseededRoot, config: &str, release: Release) -> Serve {
    let mut serve = Serve::prepare_shared(config);
    preseeded.copy_to(serve.root());
    serve.launch_without_network();
    let mut podman = Podman::of(release, Some(serve.root()), UNREACHABLE_REGISTRY);
    podman.join_network_of(serve.id());
    let shown = podman.run(&["images", "--format", "{{.Repository}}:{{.Tag}} {{.ReadOnly}}"]);
    assert_eq!(shown, format!("{IMAGE} true"));
    let run = ["run", "--rm", "--network", "none"];
    let script = "cat /data/hello && sha256sum < /data/numbers";
    let told = podman.run(&[&run[..], &[IMAGE, "sh", "-ec", script]].concat());
    let sum = output(Command::new("sha256sum").stdin(File::open(preseeded.tree.join("data/numbers")).unwrap()));
    assert_eq!(told, format!("hello\n{}", sum.trim_end()));
    let by_digest = format!("192.0.2.1:5000/team/app@{}", preseeded.image.manifest_digest());
    let told = podman.run(&[&run[..], &["--pull=never", &by_digest, "cat", "/data/hello"]].concat());
    assert_eq!(told, "hello");
    serve
}

async fn preseeded_image_runs_without_a_network(release: Release) {
    let preseeded = PreseededRoot::new().await;
    let serve = run_without_network(&preseeded, "offline = true\n", release);
    assert_eq!(packets_without_route(serve.id()), 0);
    drop(serve);
    // Also without `offline = true`: connections without a route fail at once.
    run_without_network(&preseeded, "", release);
}

#[tokio::test(flavor = "multi_thread")]
async fn missing_chunks_and_images_fail_quickly_and_are_logged() {
    let preseeded = PreseededRoot::new().await;
    for config in ["offline = true\n", ""] {
        let mut serve = Serve::prepare(config);
        preseeded.copy_to(serve.root());
        // The chunk journal still claims these chunks.
        let cached = preseeded.cached(serve.root());
        let numbers = fs::read(preseeded.tree.join("data/numbers")).unwrap();
        let bytes = fs::read(&cached).unwrap();
        let at = bytes.windows(64).position(|window| window == &numbers[..64]).unwrap();
        let file = File::options().write(true).open(&cached).unwrap();
        file.write_all_at(&[0; 4096], at as u64).unwrap();
        serve.launch_without_network();
        let layer = serve.layer(IMAGE, &preseeded.image.bootstrap_blob().unwrap().digest);
        assert_eq!(fs::read(layer.diff().join("data/hello")).unwrap(), b"hello\n");
        let start = Instant::now();
        let error = fs::read(layer.diff().join("data/numbers")).unwrap_err();
        let took = start.elapsed();
        assert_eq!(error.raw_os_error(), Some(libc::EIO), "{error}");
        // Usually milliseconds; an unanswered request would take a minute.
        assert!(took < Duration::from_secs(12), "{took:?}");
        let log = serve.log();
        let told = |line: &&str| line.contains("failed to read") && line.contains(IMAGE) && line.contains("chunk");
        assert!(log.lines().any(|line| told(&line)), "{log}");
        // Look-ups of unknown images fail as quickly.
        let other = serve.layer("192.0.2.1:5000/team/other:v1", &preseeded.image.manifest_digest());
        let start = Instant::now();
        assert!(!other.pull_publishes());
        assert!(start.elapsed() < Duration::from_secs(12));
    }
}
