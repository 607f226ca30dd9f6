//! `nydus-store preseed` and `nydus-store verify`.

use std::{
    fs::{self, File},
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    time::{Duration, Instant},
};

use nydus_rafs::metadata::RafsVersion;
use nydus_store::{
    fixtures::{
        BuildOptions, Conversion, EmbeddedRegistry, Fault, ImageIndex, ImageOptions, LayerSource, ZranManifest,
        content::Random, image::NydusMark, plain_image,
    },
    internals::Digest,
};
use rustix::process::Signal;
use serde_json::Value;

use crate::common::{BINARY, Guard, Lab, Sample, Serve, failure_with, output, text, wait_until};

mod failures;
mod verify;

/// A daemon's root, without a running daemon, and a registry.
struct PreseedSite {
    serve: Serve,
    registry: EmbeddedRegistry,
}

impl PreseedSite {
    /// A daemon on this root is offline.
    fn new() -> Self {
        Self::with_config("offline = true\n")
    }

    fn with_config(config: &str) -> Self {
        Self {
            serve: Serve::prepare(config),
            registry: EmbeddedRegistry::start().unwrap(),
        }
    }

    /// `nydus-store ARGS… --root …`, with the default configuration, which may use registries.
    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(BINARY);
        command.args(args).arg("--root").arg(self.serve.root());
        command
    }

    fn run(&self, args: &[&str]) -> Output {
        self.command(args).output().unwrap()
    }

    fn succeeds(&self, args: &[&str]) -> String {
        output(&mut self.command(args))
    }

    /// Runs it, requires exit status 1, and returns its standard error.
    fn fails(&self, args: &[&str]) -> String {
        failure_with(1, &mut self.command(args))
    }

    fn verify(&self, args: &[&str]) -> (Option<i32>, Value) {
        let output = self.run(&[&["verify", "--json"], args].concat());
        let message = String::from_utf8_lossy(&output.stderr).into_owned();
        let report = serde_json::from_slice(&output.stdout);
        (
            output.status.code(),
            report.unwrap_or_else(|error| panic!("{error}: {message}")),
        )
    }

    /// Names and conditions of all known images, as reported by `verify`.
    fn conditions(&self) -> Vec<(String, String)> {
        let (_, report) = self.verify(&[]);
        let images = report["images"].as_array().unwrap().iter();
        let text = |value: &Value| value.as_str().unwrap().to_owned();
        images
            .map(|image| (text(&image["reference"]), text(&image["condition"])))
            .collect()
    }

    fn cache_file(&self, blob: &Digest) -> PathBuf {
        self.serve.root().join(format!("cache/{}.blob.data", blob.hex()))
    }
}

/// Writes the sample as `name` into an OCI layout; returns the layout as a source.
fn layout(sample: &Sample, name: &str) -> String {
    let dir = sample.dir().join("layout");
    sample.image.write_oci_layout(&dir, name).unwrap();
    format!("oci:{}", text(&dir))
}

/// Writes the sample as `name` into an archive with skopeo; returns the archive as a source.
fn archive(sample: &Sample, name: &str) -> String {
    let (from, file) = (layout(sample, name), sample.dir().join("image.tar"));
    let to = format!("oci-archive:{}:{name}", text(&file));
    output(Command::new("skopeo").args(["copy", "--quiet", &format!("{from}:{name}"), &to]));
    format!("oci-archive:{}", text(&file))
}

/// Inverts the byte in the middle of a file.
fn corrupt(file: &Path) {
    let file = File::options().read(true).write(true).open(file).unwrap();
    let (middle, mut byte) = (file.metadata().unwrap().len() / 2, [0]);
    file.read_exact_at(&mut byte, middle).unwrap();
    file.write_all_at(&[!byte[0]], middle).unwrap();
}

fn kinds() -> Vec<(&'static str, BuildOptions)> {
    let options = Sample::options;
    // With kept meta; otherwise the meta would be in a blob that no manifest lists and no layout contains.
    let zran = BuildOptions {
        conversion: Conversion::Zran,
        ..options()
    };
    let batch = |keep_meta| BuildOptions {
        batch_size: 0x8000,
        keep_meta,
        ..options()
    };
    let v5 = BuildOptions {
        version: RafsVersion::V5,
        ..options()
    };
    vec![
        ("v6", options()),
        ("v5", v5),
        ("batch", batch(true)),
        ("batch-without-meta", batch(false)),
        ("zran", zran),
    ]
}

const FILES: [(&str, usize); 5] = [
    ("a", 10),
    ("b", 5000),
    ("dir/c", 64 << 10),
    ("dir/d", 3 << 20),
    ("dir/e", 100_001),
];

#[test]
fn preseeded_images_of_every_kind_need_no_registry() {
    let mut site = PreseedSite::new();
    let mut samples = Vec::new();
    for (number, (kind, options)) in kinds().into_iter().enumerate() {
        let sample = Sample::of(&FILES, number as u64, &options);
        let (seen, read) = (format!("127.0.0.1:1/{kind}:dir"), format!("127.0.0.1:1/{kind}:tar"));
        site.succeeds(&["preseed", &layout(&sample, "v1"), "--as", &seen]);
        let told = site.succeeds(&["preseed", &archive(&sample, "v1"), "--as", &read]);
        assert!(told.contains("nothing to fetch"), "{kind}: {told}");
        samples.push((sample, seen, read));
    }
    assert!(site.conditions().iter().all(|(_, condition)| condition == "complete"));
    site.serve.launch();
    for (sample, seen, read) in &samples {
        for name in [seen, read] {
            sample.check(&site.serve.layer(name, &sample.bootstrap_digest()));
        }
    }
}

#[test]
fn preseed_fetches_each_byte_once() {
    let mut site = PreseedSite::new();
    let small = BuildOptions {
        conversion: Conversion::Zran,
        keep_meta: false,
        zran_manifest: ZranManifest::Reference,
        ..Sample::options()
    };
    let (one, two) = (Sample::new(1), Sample::of(&FILES, 2, &small));
    site.registry.add_image(&one.image, "one", "1").unwrap();
    site.registry.add_image(&two.image, "two", "1").unwrap();
    let name = |repository: &str| site.registry.reference(repository, "1");
    let source = |repository: &str| format!("docker://{}", name(repository));
    let told = site.succeeds(&["preseed", &source("one"), &source("two")]);
    assert_eq!(told.matches("complete").count(), 2, "{told}");
    let data = site.registry.blob_stats(one.data_digest());
    assert!(data.bytes <= one.data_bytes().len() as u64, "{data:?}");

    site.registry.reset();
    let told = site.succeeds(&["preseed", &source("one"), &source("two")]);
    assert_eq!(told.matches("nothing to fetch").count(), 2, "{told}");
    // Only the tags are requested.
    assert_eq!(site.registry.log().len(), 2, "{:?}", site.registry.log());

    let names = ["one", "two"].map(name);
    drop(site.registry);
    site.serve.launch();
    for (name, sample) in names.iter().zip([&one, &two]) {
        sample.check(&site.serve.layer(name, &sample.bootstrap_digest()));
    }
}

#[test]
fn running_daemon_preseeds_verifies_and_repairs() {
    let mut lab = Lab::with_daemon(Serve::prepare(""));
    let (sample, other) = (Sample::new(3), Sample::new(4));
    let layer = lab.add(&sample, "a");
    lab.serve.launch();
    let name = lab.reference("a");
    let run = |args: &[&str]| {
        let mut command = Command::new(BINARY);
        command.args(args).arg("--root").arg(lab.serve.root());
        command
    };
    // A part is cached already, and in use.
    assert_eq!(fs::read(layer.diff().join("small")).unwrap(), sample.content("small"));
    output(&mut run(&["preseed", &format!("docker://{name}")]));
    output(&mut run(&["preseed", &archive(&other, "127.0.0.1:1/team/other:v1")]));
    let blob = lab.registry.blob_stats(sample.data_digest());
    assert!(blob.bytes <= sample.data_bytes().len() as u64 + (128 << 10), "{blob:?}");
    lab.registry.reset();
    sample.check(&layer);
    other.check(&lab.serve.layer("127.0.0.1:1/team/other:v1", &other.bootstrap_digest()));
    assert_eq!(lab.registry.log().len(), 0, "{:?}", lab.registry.log());

    // Damage under a running daemon is found, never served, and fetched again.
    corrupt(
        &lab.serve
            .root()
            .join(format!("cache/{}.blob.data", sample.data_digest().hex())),
    );
    let found = run(&["verify", &name]).output().unwrap();
    assert_eq!(found.status.code(), Some(1), "{found:?}");
    let found = output(&mut run(&["verify", &name, "--repair"]));
    assert!(
        found.contains("1 chunks are corrupt") && found.contains("dropped"),
        "{found}"
    );
    sample.drop_pages(&layer);
    sample.check(&layer);
    let found = output(&mut run(&["verify", &name]));
    assert!(found.contains(": complete"), "{found}");
}

#[test]
fn preseed_selects_the_nydus_image_of_an_index() {
    let mut site = PreseedSite::with_config("offline = true\n");
    let sample = Sample::new(5);
    let tree = sample.dir().join("plain");
    fs::create_dir(&tree).unwrap();
    fs::write(tree.join("file"), "plain").unwrap();
    let layers = [LayerSource::Dir(tree)];
    let plain = plain_image(&layers, &ImageOptions::default(), &sample.dir().join("plain-image")).unwrap();
    let index = ImageIndex::new(&[(&plain, NydusMark::None), (&sample.image, NydusMark::OsFeatures)]).unwrap();
    site.registry.add_index(&index, "index", "1").unwrap();
    let name = site.registry.reference("index", "1");
    site.succeeds(&["preseed", &format!("docker://{name}")]);
    drop(site.registry);
    site.serve.launch();
    sample.check(&site.serve.layer(&name, &sample.bootstrap_digest()));
}

/// Only `podman pull` unpacks ordinary layers.
#[test]
fn image_with_ordinary_layers_on_top_is_refused() {
    let site = PreseedSite::new();
    let sample = Sample::new(5);
    let topped = add_with_ordinary_layer(&site.registry, &sample, b"a layer");
    for (command, source) in [("preseed", format!("docker://{topped}")), ("pull", topped)] {
        let message = site.fails(&[command, &source]);
        assert!(
            message.contains("ordinary layers on top") && message.contains("podman pull"),
            "{message}"
        );
    }
}

/// Adds the sample with an ordinary layer on top to the registry; returns its reference.
fn add_with_ordinary_layer(registry: &EmbeddedRegistry, sample: &Sample, upper: &[u8]) -> String {
    let mut manifest: Value = serde_json::from_slice(&sample.image.manifest).unwrap();
    let mut config: Value = serde_json::from_slice(&sample.image.config).unwrap();
    let digest = Digest::of(upper);
    config["rootfs"]["diff_ids"]
        .as_array_mut()
        .unwrap()
        .push(digest.to_string().into());
    let config = serde_json::to_vec(&config).unwrap();
    manifest["config"]["digest"] = Digest::of(&config).to_string().into();
    manifest["config"]["size"] = config.len().into();
    manifest["layers"].as_array_mut().unwrap().push(serde_json::json!({
        "mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": digest, "size": upper.len()
    }));
    registry.add_image(&sample.image, "topped", "base").unwrap();
    registry.add_blob("topped", Digest::of(&config), config.into());
    registry.add_blob("topped", digest, upper.to_vec().into());
    let kind = "application/vnd.oci.image.manifest.v1+json";
    registry.add_manifest("topped", Some("1"), kind, serde_json::to_vec(&manifest).unwrap());
    registry.reference("topped", "1")
}

#[test]
fn failed_sources_are_reported_and_the_others_preseeded() {
    let site = PreseedSite::new();
    let (good, damaged, lacking) = (Sample::new(6), Sample::new(7), Sample::new(8));
    let blob = |sample: &Sample| {
        sample
            .dir()
            .join("layout/blobs/sha256")
            .join(sample.data_digest().hex())
    };
    let good_layout = layout(&good, "registry.example/good:v1");
    let damaged_layout = layout(&damaged, "registry.example/damaged:v1");
    corrupt(&blob(&damaged));
    let lacking_layout = layout(&lacking, "registry.example/lacking:v1");
    fs::remove_file(blob(&lacking)).unwrap();
    let message = site.fails(&["preseed", &damaged_layout, &lacking_layout, &good_layout]);
    for words in ["digest mismatch", "no blob sha256:", "2 of 3 failed"] {
        assert!(message.contains(words), "{words}: {message}");
    }
    let good_name = "registry.example/good:v1".to_owned();
    assert_eq!(site.conditions(), [(good_name.clone(), "complete".to_owned())]);

    // With the blob repaired, preseed succeeds.
    fs::write(blob(&damaged), damaged.data_bytes()).unwrap();
    let told = site.succeeds(&["preseed", &damaged_layout]);
    assert!(told.contains("complete"), "{told}");

    let nameless = layout(&good, "v1");
    let plain = plain_image(
        &[LayerSource::Dir(good.tree.clone())],
        &ImageOptions::default(),
        &good.dir().join("plain"),
    );
    let plain_dir = good.dir().join("plain-layout");
    plain
        .unwrap()
        .write_oci_layout(&plain_dir, "registry.example/plain:1")
        .unwrap();
    let gzipped = good.dir().join("compressed.tar");
    fs::write(&gzipped, [0x1f, 0x8b, 8, 0, 0, 0, 0, 0]).unwrap();
    let empty = tempfile::tempdir().unwrap();
    let plain = format!("oci:{}", text(&plain_dir));
    let archive = format!("oci-archive:{}", text(&gzipped));
    let nothing = format!("oci:{}", text(empty.path()));
    for (source, words) in [
        (nameless.as_str(), "has several images"),
        (&format!("{nameless}:v1"), "use --as REF"),
        (
            &format!("{nameless}:v2"),
            "has no image named `v2`; it has `registry.example/good:v1`, `v1`",
        ),
        (&plain, "not a Nydus image"),
        (&archive, "decompress it first"),
        (&nothing, "is not an OCI layout"),
        ("oci:/nonexistent", "is not an OCI layout"),
    ] {
        let message = site.fails(&["preseed", source]);
        assert!(message.contains(words), "{source}: {message}");
    }
    // It is waited for as long as `request_timeout`.
    let short = site.serve.config_path().with_file_name("short.toml");
    fs::write(&short, "[registry]\nrequest_timeout = 1\n").unwrap();
    let nobody = ["preseed", "docker://127.0.0.1:1/nobody:1", "--config", text(&short)];
    let message = site.fails(&nobody);
    assert!(message.contains("cannot connect"), "{message}");
    let usage = site.run(&["preseed", "dir:/tmp"]);
    assert_eq!(usage.status.code(), Some(2));
    let usage = site.run(&["preseed", &plain, &archive, "--as", "registry.example/a"]);
    assert_eq!(usage.status.code(), Some(2));
}

#[test]
fn corrupt_blob_is_rejected_and_nothing_is_recorded() {
    let lab = Lab::with_daemon(Serve::prepare("offline = true\n"));
    let sample = Sample::new(10);
    lab.add(&sample, "lie");
    let data = sample.data_digest().to_string();
    lab.fault("lie", move |request| {
        if request.path.ends_with(&data) {
            Fault::FlipByte(1000)
        } else {
            Fault::None
        }
    });
    let source = format!("docker://{}", lab.reference("lie"));
    let preseed = || {
        let mut command = Command::new(BINARY);
        command.args(["preseed", &source, "--root"]).arg(lab.serve.root());
        command
    };
    let refused = preseed().output().unwrap();
    assert_eq!(refused.status.code(), Some(1));
    let message = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(message.contains("digest") || message.contains("damaged"), "{message}");
    let noted = fs::read_dir(lab.serve.root().join("images/references")).unwrap();
    assert_eq!(noted.count(), 0, "an incomplete image is recorded");
    lab.clear_fault("lie");
    output(&mut preseed());
    let mut lab = lab;
    lab.serve.launch();
    sample.check(&lab.layer("lie", sample.bootstrap_digest()));
}

#[test]
fn preseed_resumes_after_a_kill_at_any_point() {
    let site = PreseedSite::new();
    let files: Vec<_> = (0..200).map(|number| (format!("dir/{number}"), 150_000)).collect();
    let files: Vec<_> = files.iter().map(|(name, len)| (name.as_str(), *len)).collect();
    let sample = Sample::of(&files, 11, &Sample::options());
    let source = archive(&sample, "registry.example/killed:v1");
    let whole = PreseedSite::new();
    let start = Instant::now();
    whole.succeeds(&["preseed", &source]);
    let takes = start.elapsed();
    let references = site.serve.root().join("images/references");
    let mut random = Random::new(start.elapsed().as_nanos() as u64);
    for _ in 0..10 {
        let mut command = site.command(&["preseed", &source]);
        let mut process = Guard(command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap());
        std::thread::sleep(Duration::from_nanos(random.below(takes.as_nanos() as u64)));
        process.signal(Signal::KILL);
        let ended = process.wait(Duration::from_secs(10)).expect("it ends");
        // Records that are being written have names that start with a dot.
        let is_note = |entry: fs::DirEntry| !entry.file_name().to_string_lossy().starts_with('.');
        let noted = fs::read_dir(&references).is_ok_and(|entries| entries.flatten().any(is_note));
        assert!(
            !noted || all_complete(&site),
            "{ended}: recorded before the image was complete"
        );
    }
    site.succeeds(&["preseed", &source]);
    let cached = |site: &PreseedSite| fs::read(site.cache_file(&sample.data_digest())).unwrap();
    assert!(cached(&site) == cached(&whole), "the caches differ");
    assert!(all_complete(&site));
    let left = fs::read_dir(site.serve.root().join("images/content")).unwrap();
    let unfinished = left.filter(|entry| entry.as_ref().unwrap().file_name().to_string_lossy().starts_with('.'));
    assert_eq!(unfinished.count(), 0, "partial files are left");
}

fn all_complete(site: &PreseedSite) -> bool {
    let conditions = site.conditions();
    !conditions.is_empty() && conditions.iter().all(|(_, condition)| condition == "complete")
}

#[test]
fn interrupted_preseed_reports_it() {
    // In its own process, and in the daemon.
    for launch in [false, true] {
        let mut serve = Serve::prepare("");
        if launch {
            serve.launch();
        }
        let (lab, sample) = (Lab::with_daemon(serve), Sample::new(12));
        lab.add(&sample, "slow");
        let data = sample.data_digest().to_string();
        let wanted = data.clone();
        lab.fault("slow", move |request| {
            if request.path.ends_with(&wanted) {
                Fault::Stall
            } else {
                Fault::None
            }
        });
        let source = format!("docker://{}", lab.reference("slow"));
        let mut command = Command::new(BINARY);
        command.args(["preseed", &source, "--root"]).arg(lab.serve.root());
        let mut process = Guard(command.stderr(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap());
        wait_until("it requests data", || {
            let asked = lab.registry.log();
            asked.iter().any(|request| request.path.ends_with(&data)).then_some(())
        });
        process.signal(Signal::INT);
        let status = process.wait(Duration::from_secs(5)).expect("it ends at once");
        assert_eq!(status.code(), Some(1));
        let mut message = String::new();
        std::io::Read::read_to_string(process.0.stderr.as_mut().unwrap(), &mut message).unwrap();
        assert!(message.contains("interrupted"), "{message}");
        if launch {
            wait_until("the daemon gives it up", || {
                lab.serve.log().contains("cancelled job").then_some(())
            });
        }
    }
}

#[test]
fn full_disk_fails_preseed() {
    let mut site = PreseedSite::new();
    let sample = Sample::new(16);
    let source = archive(&sample, "registry.example/full:v1");
    fs::create_dir_all(site.serve.root()).unwrap();
    let small = rustix::mount::mount(
        "tmpfs",
        site.serve.root(),
        "tmpfs",
        rustix::mount::MountFlags::empty(),
        c"size=600k",
    );
    small.unwrap();
    let message = site.fails(&["preseed", &source]);
    assert!(message.contains("No space left"), "{message}");
    rustix::mount::unmount(site.serve.root(), rustix::mount::UnmountFlags::empty()).unwrap();
    site.succeeds(&["preseed", &source]);
    site.serve.launch();
    sample.check(&site.serve.layer("registry.example/full:v1", &sample.bootstrap_digest()));
}
