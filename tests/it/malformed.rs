//! Malformed images: each is refused with a log line and does not affect other images.

use std::{
    io::Write as _,
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use flate2::{Compression, write::GzEncoder};
use nydus_store::{
    fixtures::{Fault, ImageIndex, NydusMark, image, registry::RequestKind},
    internals::Digest,
};
use sha2::Digest as _;

use crate::common::{Lab, Sample, StoreLayer, bootstrap_layer, descriptor, image_config, manifest_json, wait_until};

const CONFIG: &str = "[images]\nnegative_ttl = 0\nmax_bootstrap_size = 64\n\
     [registry]\nconnect_timeout = 1\nread_timeout = 1\nrequest_timeout = 5\nretries = 0\n";

/// A lab with a valid image that must stay readable.
struct TestBench {
    lab: Lab,
    good: Sample,
    good_layer: StoreLayer,
}

impl TestBench {
    fn new() -> Self {
        let lab = Lab::new(CONFIG);
        let good = Sample::new(1);
        let good_layer = lab.add(&good, "good");
        good.check(&good_layer);
        Self { lab, good, good_layer }
    }

    /// Panics unless the layer is refused, the log contains `why`, and the valid image is readable.
    fn refused(&self, repository: &str, layer: &StoreLayer, why: &str) {
        let (before, start) = (self.lab.serve.log().len(), Instant::now());
        assert!(!layer.pull_publishes(), "{repository} is served");
        assert!(start.elapsed() < Duration::from_secs(20));
        self.lab
            .assert_logged(before, &["WARN", &self.lab.reference(repository), why]);
        self.good.check(&self.good_layer);
        assert!(self.lab.serve.is_running());
    }

    /// Removes the fault; panics unless the repository's valid image is then served.
    fn mended(&self, repository: &str, layer: &StoreLayer) {
        self.lab.clear_fault(repository);
        self.good.check(layer);
    }

    /// Adds the valid image as `repository`, with a fault for requests for `digest`, or for manifests if `None`.
    fn fault(&self, repository: &str, digest: Option<Digest>, fault: Fault) -> StoreLayer {
        self.lab.fault(repository, move |request| {
            let meant = match digest {
                Some(digest) => request.kind == RequestKind::Blob && request.digest == Some(digest),
                None => request.kind == RequestKind::Manifest,
            };
            if meant { fault.clone() } else { Fault::None }
        });
        self.lab.add(&self.good, repository)
    }
}

#[test]
fn malformed_manifests_and_configurations_are_refused() {
    let bench = TestBench::new();
    let good = &bench.good;
    let layer = bench.fault("not-json", None, Fault::Body(b"<html>sign in</html>".to_vec()));
    bench.refused("not-json", &layer, "not JSON");
    bench.mended("not-json", &layer);

    let layer = bench.fault("no-layers", None, Fault::Body(b"{\"schemaVersion\":1}".to_vec()));
    bench.refused("no-layers", &layer, "neither layers nor manifests");
    bench.mended("no-layers", &layer);

    let other = Sample::of(&[("x", 10)], 2, &Sample::options());
    // For the digest of an image not known here yet, the registry serves another manifest.
    let unknown = Sample::of(&[("y", 10)], 3, &Sample::options());
    bench.lab.add(&unknown, "lies");
    let wrong = good.image.manifest.clone();
    bench.lab.fault("lies", move |request| match request.kind {
        RequestKind::Manifest => Fault::Body(wrong.clone()),
        _ => Fault::None,
    });
    let reference = format!("{}/lies@{}", bench.lab.registry.addr(), unknown.image.manifest_digest());
    let layer = bench.lab.serve.layer(&reference, &unknown.bootstrap_digest());
    let before = bench.lab.serve.log().len();
    assert!(!layer.pull_publishes());
    bench.lab.assert_logged(before, &["WARN", &reference, "is corrupt"]);
    bench.lab.clear_fault("lies");
    unknown.check(&layer);

    let mut elsewhere = good.image.clone();
    elsewhere.architecture = "s390x".to_owned();
    let index = ImageIndex::new(&[(&elsewhere, NydusMark::OsFeatures)]).unwrap();
    bench.lab.registry.add_index(&index, "platform", "1").unwrap();
    let layer = bench.lab.layer("platform", good.bootstrap_digest());
    bench.refused("platform", &layer, "no image for linux/");
    let index = ImageIndex::new(&[(&elsewhere, NydusMark::None), (&good.image, NydusMark::None)]).unwrap();
    bench.lab.registry.add_index(&index, "platform", "1").unwrap();
    bench.mended("platform", &layer);

    let nested = nested_index_json(&index);
    bench
        .lab
        .registry
        .add_manifest("nested", Some("1"), image::MEDIA_TYPE_INDEX, nested);
    bench
        .lab
        .registry
        .add_manifest("nested", None, image::MEDIA_TYPE_INDEX, index.index.clone());
    bench.refused(
        "nested",
        &bench.lab.layer("nested", good.bootstrap_digest()),
        "another index",
    );

    let (data, boot) = (good.data_digest(), good.bootstrap_digest());
    let diff_id = good.image.bootstrap_blob().unwrap().diff_id;
    let layers = [descriptor(boot, 10, true), descriptor(boot, 10, true)];
    bench
        .lab
        .add_manifest("two", &layers, &image_config(&[diff_id, diff_id]));
    bench.refused("two", &bench.lab.layer("two", boot), "2 layers as the bootstrap");

    let layers = [descriptor(data, 10, false), descriptor(boot, 10, true)];
    for (repository, config, why) in [
        ("config-not-json", b"garbage".to_vec(), "malformed configuration"),
        (
            "config-short",
            image_config(&[diff_id]),
            "2 layers, the configuration 1 diff IDs",
        ),
        ("config-empty", b"{}".to_vec(), "2 layers, the configuration 0 diff IDs"),
    ] {
        bench.lab.add_manifest(repository, &layers, &config);
        bench.refused(repository, &bench.lab.layer(repository, boot), why);
        let layer = bench.lab.add(good, repository);
        bench.mended(repository, &layer);
    }

    // An image of its own: the valid image's configuration is stored already.
    let layer = bench.lab.add(&other, "config-missing");
    let missing = other.image.config_digest();
    bench.lab.registry.remove_blob("config-missing", missing);
    bench.refused("config-missing", &layer, "the image is incomplete");
    bench.lab.add(&other, "config-missing");
    other.check(&layer);
}

fn nested_index_json(index: &ImageIndex) -> Vec<u8> {
    let entry = serde_json::json!({
        "mediaType": image::MEDIA_TYPE_INDEX, "digest": index.digest(), "size": index.index.len(),
    });
    serde_json::to_vec(&serde_json::json!({"schemaVersion": 2, "manifests": [entry]})).unwrap()
}

#[test]
fn damaged_bootstrap_layers_are_refused() {
    let bench = TestBench::new();
    // Not the valid image, whose bootstrap layer is stored already.
    let other = Sample::new(2);
    let boot = other.bootstrap_digest();
    let half = usize::try_from(other.image.bootstrap_blob().unwrap().size / 2).unwrap();
    for (repository, fault, why) in [
        ("short", Fault::Truncate(half), "blob"),
        ("flipped", Fault::FlipByte(half), "is corrupt"),
        ("missing", Fault::Status(404), "the image is incomplete"),
        ("replaced", Fault::Body(b"something else".to_vec()), "is corrupt"),
        ("stalls", Fault::StallAfter(half), "blob"),
    ] {
        bench.lab.fault_on(repository, boot, fault);
        let layer = bench.lab.add(&other, repository);
        bench.refused(repository, &layer, why);
    }
    for repository in ["short", "flipped", "missing", "replaced", "stalls"] {
        bench.lab.clear_fault(repository);
        other.check(&bench.lab.layer(repository, boot));
    }
}

#[test]
fn malformed_bootstraps_are_refused() {
    let bench = TestBench::new();
    let (lab, good) = (&bench.lab, &bench.good);
    let boot = std::fs::read(good.image.bootstrap_path().unwrap()).unwrap();

    let (layer, _) = bootstrap_layer(&[("image/image.boot", &boot)]);
    let path = lab.with_bootstrap(good, "diff-id", layer, Digest::of(b"other"));
    bench.refused("diff-id", &path, "uncompressed digest is");

    let mut flipped = boot.clone();
    let middle = flipped.len() / 2;
    flipped[1024..1040].fill(0xff);
    let mut damaged = boot.clone();
    damaged[middle..].fill(0xa5);
    let garbage: Vec<u8> = (0..100_000u32).map(|number| (number * 31 % 251) as u8).collect();
    let no_boot: &[(&str, &[u8])] = &[("image/other", b"x"), ("other/image.boot", &boot)];
    for (repository, entries, why) in [
        ("no-boot", no_boot, "no entry image/image.boot"),
        ("empty", &[("image/image.boot", b"")], "bootstrap"),
        ("garbage", &[("image/image.boot", &garbage)], "bootstrap"),
        ("flipped", &[("image/image.boot", &flipped)], "bootstrap"),
        ("damaged", &[("image/image.boot", &damaged)], "bootstrap"),
        ("cut", &[("image/image.boot", &boot[..middle])], "bootstrap"),
    ] {
        let (layer, diff_id) = bootstrap_layer(entries);
        let path = lab.with_bootstrap(good, repository, layer, diff_id);
        bench.refused(repository, &path, why);
    }

    // Not a tar.
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(&garbage).unwrap();
    let path = lab.with_bootstrap(good, "no-tar", encoder.finish().unwrap(), Digest::of(&garbage));
    bench.refused("no-tar", &path, "bootstrap layer");

    // Entries with names outside the target are skipped, and the image is served.
    let outside = lab.serve.root().join("evil");
    let absolute = format!("/{}", outside.display());
    let entries: [(&str, &[u8]); 6] = [
        ("../../../evil", b"x"),
        ("image/../../../evil", b"x"),
        (&absolute[1..], b"x"),
        ("image/..", b"x"),
        ("image/image.boot/x", b"x"),
        ("image/image.boot", &boot),
    ];
    let (layer, diff_id) = bootstrap_layer(&entries);
    good.check(&lab.with_bootstrap(good, "names", layer, diff_id));
    let named_evil = walkdir::WalkDir::new(lab.serve.root().parent().unwrap())
        .into_iter()
        .flatten()
        .any(|entry| entry.file_name() == "evil");
    assert!(!named_evil);
    assert!(lab.serve.is_running());
}

/// A gzip layer with 10 GiB of zeros as `image/image.boot`. The repeated gzip member makes it quick to build.
fn bomb() -> (Vec<u8>, Digest) {
    const MEMBER: usize = 64 << 20;
    const MEMBERS: usize = 160;
    let mut header = tar::Header::new_gnu();
    header.set_size((MEMBER * MEMBERS) as u64);
    header.set_path("image/image.boot").unwrap();
    header.set_cksum();
    let gzip = |bytes: &[u8]| {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::best());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    };
    let mut layer = gzip(header.as_bytes());
    let member = gzip(&vec![0; MEMBER]);
    for _ in 0..MEMBERS {
        layer.extend(&member);
    }
    (layer, Digest::from_bytes(sha2::Sha256::digest(b"never reached").into()))
}

#[test]
fn gzip_bomb_is_refused_at_the_size_limit() {
    let bench = TestBench::new();
    let (layer, diff_id) = bomb();
    assert!(layer.len() < 11 << 20, "{}", layer.len());
    let path = bench.lab.with_bootstrap(&bench.good, "bomb", layer.clone(), diff_id);
    bench.refused("bomb", &path, "unpacks to more than 67108864 bytes");
    assert!(
        bench.lab.serve.resident_bytes() < 300 << 20,
        "{}",
        bench.lab.serve.resident_bytes()
    );

    // The default limit of 1 GiB takes longer to reach. The failure is cached, so it is reached once.
    let lab = Lab::new("[images]\nnegative_ttl = 600\nresolve_timeout = 300\n");
    let path = lab.with_bootstrap(&bench.good, "bomb", layer, diff_id);
    assert!(!path.pull_publishes());
    lab.assert_logged(0, &[&lab.reference("bomb"), "unpacks to more than 1073741824 bytes"]);
    let start = Instant::now();
    for _ in 0..20 {
        assert!(!path.pull_publishes());
    }
    assert!(start.elapsed() < Duration::from_secs(15), "{:?}", start.elapsed());
    let scratch = walkdir::WalkDir::new(lab.serve.root().join("scratch"))
        .into_iter()
        .count();
    assert_eq!(scratch, 1, "the unpacked part is deleted");
}

#[test]
fn damaged_data_blobs_give_eio() {
    let bench = TestBench::new();
    for (number, (repository, fault)) in [
        ("truncated", Fault::Truncate(10)),
        ("flipped", Fault::FlipByte(20)),
        ("missing", Fault::Status(404)),
        ("failing", Fault::Status(500)),
        ("denied", Fault::Status(403)),
        ("other", Fault::Body(vec![0; 100])),
        ("silent", Fault::Stall),
    ]
    .into_iter()
    .enumerate()
    {
        // One image each: all repositories of one image would be tried.
        let other = Sample::new(10 + number as u64);
        let data = other.data_digest();
        let layer = bench.lab.add(&other, repository);
        bench.lab.fault_on(repository, data, fault);
        assert!(layer.pull_publishes(), "a look-up needs no data");
        let (before, start) = (bench.lab.serve.log().len(), Instant::now());
        let error = std::fs::read(layer.diff().join("one")).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EIO), "{repository}: {error}");
        assert!(start.elapsed() < Duration::from_secs(20), "{repository}");
        bench
            .lab
            .assert_logged(before, &["ERROR", &bench.lab.reference(repository), &data.hex()]);
        bench.good.check(&bench.good_layer);
        bench.lab.clear_fault(repository);
        // Time-outs in a row have opened the circuit of the host, which is probed a second later.
        wait_until("the host is asked again", || {
            std::fs::read(layer.diff().join("one")).ok()
        });
        other.check(&layer);
        // The next case must not find cached chunks.
        bench.clear_cache();
    }

    // A corrupt response is retried, and the read succeeds.
    let other = Sample::new(3);
    let data = other.data_digest();
    let layer = bench.lab.add(&other, "once");
    let first = AtomicBool::new(true);
    bench.lab.fault("once", move |request| {
        if request.digest == Some(data) && first.swap(false, Ordering::Relaxed) {
            Fault::FlipByte(0)
        } else {
            Fault::None
        }
    });
    other.check(&layer);

    // The registry's blob is shorter than the manifest says: chunks in the existing part are served.
    let other = Sample::new(4);
    let (data, whole) = (other.data_digest(), other.data_bytes());
    let layer = bench.lab.add(&other, "promised");
    let half = whole.len() / 2;
    bench
        .lab
        .registry
        .add_blob("promised", data, whole[..half].to_vec().into());
    let results: Vec<_> = other
        .names()
        .iter()
        .map(|name| std::fs::read(layer.diff().join(name)))
        .collect();
    assert!(results.iter().any(Result::is_err));
    for (name, result) in other.names().iter().zip(results) {
        match result {
            Ok(read) => assert!(read == other.content(name), "{name} reads wrong"),
            Err(error) => assert_eq!(error.raw_os_error(), Some(libc::EIO), "{error}"),
        }
    }
    bench.lab.registry.add_blob("promised", data, whole.into());
    other.check(&layer);
}

impl TestBench {
    /// Truncates the cache files of all blobs but the valid image's.
    fn clear_cache(&self) {
        for entry in std::fs::read_dir(self.lab.serve.root().join("cache")).unwrap() {
            let path = entry.unwrap().path();
            let is_good = path.to_string_lossy().contains(&self.good.data_digest().hex());
            if !is_good && path.to_string_lossy().ends_with(".blob.data") {
                std::fs::File::options()
                    .write(true)
                    .open(path)
                    .unwrap()
                    .set_len(0)
                    .unwrap();
            }
        }
        // Drops the page cache too.
        std::fs::write("/proc/sys/vm/drop_caches", "3").unwrap();
    }
}

#[test]
fn tag_of_a_refused_image_is_resolved_again() {
    let bench = TestBench::new();
    let wrong = manifest_json(
        &[descriptor(bench.good.bootstrap_digest(), 1, true)],
        Digest::of(b"no"),
        2,
    );
    let layer = bench.fault("tag", None, Fault::Body(wrong));
    bench.refused("tag", &layer, "the image is incomplete");
    bench.mended("tag", &layer);
}
