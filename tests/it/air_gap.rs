//! Hosts without a network: a root is filled on one host, copied to another, and Podman runs from it.

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
    common::{BINARY, DockerRegistry, Podman, Release, Serve, output},
    podman::runnable_tree,
};

/// A registry that is nowhere: the address is for documentation (RFC 5737), and has no route here.
const REGISTRY: &str = "192.0.2.1:5000";
const IMAGE: &str = "192.0.2.1:5000/team/app:v1";

/// What is carried to the other host.
struct Seeded {
    image: BuiltImage,
    tree: PathBuf,
    dir: TempDir,
}

impl Seeded {
    /// Builds an image, pushes it, has skopeo put it into an archive, and fills a root from that.
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

    /// As rsync does.
    fn copy_to(&self, root: &Path) {
        let mut copy = Command::new("cp");
        output(
            copy.args(["-a", "--sparse=always"])
                .arg(self.dir.path().join("seeded"))
                .arg(root),
        );
    }

    /// The data blob's file in the cache of a root.
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

/// How many packets had no route, and so how often somebody tried to get out.
fn attempts_to_get_out(process: u32) -> u64 {
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

/// Runs the image where there is no network, and checks that all of it is there.
fn run_without_network(seeded: &Seeded, config: &str, release: Release) -> Serve {
    let mut serve = Serve::prepare_shared(config);
    seeded.copy_to(serve.root());
    serve.launch_without_network();
    let mut podman = Podman::of(release, Some(serve.root()), REGISTRY);
    podman.move_to_network_of(serve.id());
    let shown = podman.run(&["images", "--format", "{{.Repository}}:{{.Tag}} {{.ReadOnly}}"]);
    assert_eq!(shown, format!("{IMAGE} true"));
    let run = ["run", "--rm", "--network", "none"];
    let script = "cat /data/hello && sha256sum < /data/numbers";
    let told = podman.run(&[&run[..], &[IMAGE, "sh", "-ec", script]].concat());
    let sum = output(Command::new("sha256sum").stdin(File::open(seeded.tree.join("data/numbers")).unwrap()));
    assert_eq!(told, format!("hello\n{}", sum.trim_end()));
    let by_digest = format!("192.0.2.1:5000/team/app@{}", seeded.image.manifest_digest());
    let told = podman.run(&[&run[..], &["--pull=never", &by_digest, "cat", "/data/hello"]].concat());
    assert_eq!(told, "hello");
    serve
}

async fn a_seeded_image_runs(release: Release) {
    let seeded = Seeded::new().await;
    let serve = run_without_network(&seeded, "offline = true\n", release);
    assert_eq!(attempts_to_get_out(serve.id()), 0);
    drop(serve);
    // Nobody has to say so: without a route nothing waits.
    run_without_network(&seeded, "", release);
}

#[tokio::test(flavor = "multi_thread")]
async fn podman_4_runs_a_seeded_image() {
    a_seeded_image_runs(Release::Four).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn podman_5_runs_a_seeded_image() {
    a_seeded_image_runs(Release::Five).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_newest_podman_runs_a_seeded_image() {
    a_seeded_image_runs(Release::Newest).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_there_fails_at_once_and_is_named() {
    let seeded = Seeded::new().await;
    for config in ["offline = true\n", ""] {
        let mut serve = Serve::prepare(config);
        seeded.copy_to(serve.root());
        // The map still says that the bytes are there.
        let cached = seeded.cached(serve.root());
        let numbers = fs::read(seeded.tree.join("data/numbers")).unwrap();
        let bytes = fs::read(&cached).unwrap();
        let at = bytes.windows(64).position(|window| window == &numbers[..64]).unwrap();
        let file = File::options().write(true).open(&cached).unwrap();
        file.write_all_at(&[0; 4096], at as u64).unwrap();
        serve.launch_without_network();
        let layer = serve.layer(IMAGE, &seeded.image.bootstrap_blob().unwrap().digest);
        assert_eq!(fs::read(layer.diff().join("data/hello")).unwrap(), b"hello\n");
        let start = Instant::now();
        let error = fs::read(layer.diff().join("data/numbers")).unwrap_err();
        let took = start.elapsed();
        assert_eq!(error.raw_os_error(), Some(libc::EIO), "{error}");
        // Milliseconds in fact; a registry would be waited for a minute.
        assert!(took < Duration::from_secs(12), "{took:?}");
        let log = serve.log();
        let told = |line: &&str| line.contains("failed to read") && line.contains(IMAGE) && line.contains("chunk");
        assert!(log.lines().any(|line| told(&line)), "{log}");
        // Other images are not known, and nobody waits for them either.
        let other = serve.layer("192.0.2.1:5000/team/other:v1", &seeded.image.manifest_digest());
        let start = Instant::now();
        assert!(!other.is_there());
        assert!(start.elapsed() < Duration::from_secs(12));
    }
}
