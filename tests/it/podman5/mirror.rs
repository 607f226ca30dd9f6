//! Podman 5 with the daemon's mirror: lazy images run.

use std::{path::Path, time::Duration};

use nydus_store::fixtures::{ImageIndex, NydusMark};
use nydus_utils::compress::Algorithm;

use super::*;
use crate::common::{Access, wait_until};

/// What tells, in the daemon's log, that Podman has taken a layer from the store.
const USED: &str = "layer is used";
const RELEASED: &str = "layer is no longer used";

/// The files of the usual image, as a shell in it sees them.
const READ: &str = "cat /data/hello; sha256sum < /data/numbers";

impl Lab {
    fn with_mirror() -> Self {
        let serve = Serve::shared("[mirror]\nlisten = \"127.0.0.1:0\"\n");
        let registry = DockerRegistry::start();
        Self {
            podman: Podman::five(Some(&serve.store()), registry.host(), Some(&serve.mirror().to_string())),
            serve,
            registry,
            dir: tempfile::tempdir().unwrap(),
        }
    }

    /// With the usual lazy image in the registry; its name and what it is.
    async fn with_lazy() -> (Self, String, BuiltImage) {
        let lab = Self::with_mirror();
        let image = lab.build("lazy", &[lab.system("tree", |_| ())]);
        let reference = lab.push(&image, "lazy").await;
        (lab, reference, image)
    }

    /// With an image of more than 300 MB, uncompressed, so that it has that size in the registry; its name and size.
    async fn with_big() -> (Self, String, u64) {
        let lab = Self::with_mirror();
        let tree = lab.system("tree", |dir| {
            fixtures::big_tree(&dir.join("data/big"), 300 << 20).unwrap()
        });
        let options = BuildOptions {
            compressor: Algorithm::None,
            ..BuildOptions::default()
        };
        let image = fixtures::build(&[tree], &options, &lab.out("big")).unwrap();
        let size = image.blobs.iter().map(|blob| blob.size).sum();
        assert!(size > 300 << 20, "{size}");
        let reference = lab.push(&image, "big").await;
        (lab, reference, size)
    }

    /// What [`READ`] prints.
    fn expected(&self) -> String {
        let numbers = fs::read(self.dir.path().join("tree/data/numbers")).unwrap();
        format!("hello\n{}  -", nydus_store::digest::Digest::of(&numbers).hex())
    }

    fn logged(&self, what: &str) -> usize {
        self.serve.log().matches(what).count()
    }

    /// All requests so far, when no more are coming: the registry writes its log after it has answered.
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

    /// How many images the daemon has open: each has its bootstrap unpacked.
    fn open_images(&self) -> usize {
        fs::read_dir(self.serve.root().join("scratch")).unwrap().count()
    }
}

/// Bytes of all files below.
fn size_of(dir: &Path) -> u64 {
    let files = walkdir::WalkDir::new(dir).into_iter().filter_map(Result::ok);
    files
        .filter_map(|entry| entry.metadata().ok())
        .filter(|data| data.is_file())
        .map(|data| data.len())
        .sum()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lazy_image_runs_by_tag_and_runs_again_without_the_registry() {
    let (lab, image, built) = Lab::with_lazy().await;
    let before = lab.accesses().len();
    lab.podman.run(&["pull", &image]);
    assert!(lab.logged(USED) >= built.blobs.len());
    let requests = lab.accesses().split_off(before);
    let data = built.blobs[0].digest.to_string();
    assert!(
        !requests.iter().any(|access| access.path.contains(&data)),
        "{requests:#?}"
    );

    assert_eq!(lab.sh(&image, READ), lab.expected());
    let before = lab.accesses().len();
    assert_eq!(lab.sh(&image, READ), lab.expected());
    assert_eq!(lab.accesses().len(), before);
}

#[tokio::test(flavor = "multi_thread")]
async fn saying_hi_takes_less_than_a_twentieth_of_a_big_image() {
    let (lab, image, size) = Lab::with_big().await;
    let before = lab.accesses().len();
    assert_eq!(lab.sh(&image, "echo hi"), "hi");
    lab.accesses();
    let fetched = lab.registry.blob_bytes_since(before);
    assert!(fetched < size / 20, "fetched {fetched} of {size}");
    let kept = size_of(&lab.podman.graph_root());
    assert!(kept < size / 20, "{kept} bytes in the graph root");
}

#[tokio::test(flavor = "multi_thread")]
async fn two_images_in_containers_that_write() {
    let (lab, first, _) = Lab::with_lazy().await;
    let tree = lab.system("other", |dir| fs::write(dir.join("data/hello"), "another\n").unwrap());
    let second = lab.push(&lab.build("other", &[tree]), "other").await;
    for (name, image) in [("one", &first), ("two", &second)] {
        lab.podman.run(&[
            "run",
            "--detach",
            "--name",
            name,
            "--network",
            "none",
            image,
            "sleep",
            "1000",
        ]);
    }
    lab.podman
        .run(&["exec", "one", "sh", "-c", "echo changed > /data/hello"]);
    for (name, hello) in [("one", "changed"), ("two", "another")] {
        assert_eq!(lab.podman.run(&["exec", name, "cat", "/data/hello"]), hello);
    }
    assert_eq!(lab.sh(&first, READ), lab.expected());
}

#[tokio::test(flavor = "multi_thread")]
async fn rmi_takes_all_uses_back() {
    let (lab, image, built) = Lab::with_lazy().await;
    assert_eq!(lab.sh(&image, READ), lab.expected());
    assert_eq!((lab.logged(RELEASED), lab.open_images()), (0, 1));
    lab.podman.run(&["rmi", &image]);
    wait_until("the image is closed", || (lab.open_images() == 0).then_some(()));
    assert_eq!(lab.logged(RELEASED), built.blobs.len());
    // What it had read is still cached.
    let before = lab.accesses().len();
    assert_eq!(lab.sh(&image, READ), lab.expected());
    let data = built.blobs[0].digest.to_string();
    let requests = lab.accesses().split_off(before);
    assert!(
        !requests.iter().any(|access| access.path.contains(&data)),
        "{requests:#?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn podman_4_and_5_on_one_daemon_at_once() {
    let (lab, image, _) = Lab::with_lazy().await;
    let four = Podman::new(Some(&lab.serve.store()), lab.registry.host());
    std::thread::scope(|scope| {
        for podman in [&lab.podman, &four] {
            let (image, lab) = (&image, &lab);
            scope.spawn(move || {
                for _ in 0..3 {
                    assert_eq!(sh(podman, &[], image, READ), lab.expected());
                    podman.run(&["rmi", image]);
                }
            });
        }
    });
    wait_until("the image is closed", || (lab.open_images() == 0).then_some(()));
    // What one of them lets go of the other may still use.
    for podman in [&lab.podman, &four] {
        podman.run(&["pull", &image]);
    }
    lab.podman.run(&["rmi", &image]);
    assert_eq!(sh(&four, &[], &image, READ), lab.expected());
    four.run(&["rmi", &image]);
    wait_until("the image is closed", || (lab.open_images() == 0).then_some(()));
}

/// Left to itself, Podman would take the first manifest for its platform; the mirror chooses the lazy one.
#[tokio::test(flavor = "multi_thread")]
async fn of_an_index_the_lazy_image_is_taken() {
    let lab = Lab::with_mirror();
    let tree = [lab.system("tree", |_| ())];
    let (lazy, plain) = (lab.build("lazy", &tree), lab.build_plain("plain", &tree));
    let cases = [
        [(&plain, NydusMark::None), (&lazy, NydusMark::OsFeatures)],
        [(&plain, NydusMark::None), (&lazy, NydusMark::ArtifactType)],
        [(&lazy, NydusMark::OsFeatures), (&plain, NydusMark::None)],
    ];
    for (number, entries) in cases.iter().enumerate() {
        let index = ImageIndex::new(entries).unwrap();
        let repository = format!("index{number}");
        index.push(&lab.registry.url(), &repository, "1").await.unwrap();
        let used = lab.logged(USED);
        assert_eq!(lab.sh(&lab.registry.reference(&repository, "1"), READ), lab.expected());
        assert!(lab.logged(USED) > used, "case {number}");
        // Podman would take what it has of the same layers.
        lab.podman.run(&["rmi", "--all", "--force"]);
    }
}

/// A digest names one manifest, byte for byte: the mirror can add nothing to it.
#[tokio::test(flavor = "multi_thread")]
async fn by_digest_a_lazy_image_fails_as_documented() {
    let (lab, tagged, built) = Lab::with_lazy().await;
    let image = format!("{}/lazy@{}", lab.registry.host(), built.manifest_digest());
    for _ in 0..2 {
        let error = lab.podman.fails(&["pull", &image]);
        let known = ["invalid tar header", "magic number mismatch"];
        assert!(known.iter().any(|known| error.contains(known)), "{error}");
        // It works by tag nonetheless, before and after.
        assert_eq!(lab.sh(&tagged, READ), lab.expected());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_ordinary_image_passes_through_the_mirror() {
    let lab = Lab::with_mirror();
    let built = lab.build_plain("plain", &[lab.system("tree", |_| ())]);
    let image = lab.push(&built, "plain").await;
    assert_eq!(lab.sh(&image, READ), lab.expected());
    assert_eq!(lab.logged(USED), 0);
    let id = lab
        .podman
        .run(&["image", "inspect", "--format", "{{.Id}} {{.Digest}}", &image]);
    assert_eq!(
        id,
        format!("{} {}", built.config_digest().hex(), built.manifest_digest())
    );
}

/// The registry is next on Podman's list when the mirror does not answer.
#[tokio::test(flavor = "multi_thread")]
async fn without_the_daemon_ordinary_images_go_on() {
    let mut lab = Lab::with_mirror();
    let image = lab.build_plain("plain", &[lab.system("tree", |_| ())]);
    let image = lab.push(&image, "plain").await;
    lab.serve.stop();
    assert_eq!(lab.sh(&image, READ), lab.expected());
}

#[tokio::test(flavor = "multi_thread")]
async fn images_run_after_the_daemon_came_back() {
    let (mut lab, image, _) = Lab::with_lazy().await;
    assert_eq!(lab.sh(&image, READ), lab.expected());
    lab.serve.restart();
    assert_eq!(lab.sh(&image, READ), lab.expected());
    lab.serve.kill_and_restart();
    assert_eq!(lab.sh(&image, READ), lab.expected());
    lab.podman.run(&["rmi", &image]);
    wait_until("the image is closed", || (lab.open_images() == 0).then_some(()));
}

/// Owners show as inside, and neither a byte of the image is copied nor one fetched that nobody reads.
#[tokio::test(flavor = "multi_thread")]
async fn in_user_namespaces() {
    let (lab, image, size) = Lab::with_big().await;
    lab.podman.run(&["pull", &image]);
    let before = lab.accesses().len();
    let script = "awk '{ print ($2 > 0) }' /proc/self/uid_map; stat -c %u:%g /data/hello /bin; echo more >> /data/hello; \
        chown 10:20 /data/hello; stat -c %u:%g /data/hello; cat /data/hello";
    for options in [
        &["--userns=auto"][..],
        &["--uidmap=0:100000:65536", "--gidmap=0:100000:65536"],
    ] {
        let seen = sh(&lab.podman, options, &image, script);
        assert_eq!(seen, "1\n0:0\n0:0\n10:20\nhello\nmore", "{options:?}");
    }
    lab.accesses();
    let fetched = lab.registry.blob_bytes_since(before);
    assert!(fetched < size / 20, "fetched {fetched} of {size}");
    let kept = size_of(&lab.podman.graph_root());
    assert!(kept < size / 20, "{kept} bytes in the graph root");
}
