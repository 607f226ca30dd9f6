//! `nydus-store mount` and `nydus-store inspect`.

use std::{
    fs,
    os::unix::fs::MetadataExt as _,
    path::Path,
    process::{Command, Output, Stdio},
    time::Duration,
};

use nydus_rafs::metadata::RafsVersion;
use nydus_store::fixtures::{
    BuildOptions, BuiltImage, CompareOptions, Conversion, EmbeddedRegistry, ImageOptions, LayerSource, TreeSpec, build,
    compare_trees, make_tree, plain_image,
};
use rustix::process::Signal;

use crate::common::{BINARY, Guard, text, wait_until};

fn run(args: &[&str]) -> Output {
    Command::new(BINARY).args(args).output().unwrap()
}

/// Runs it, requires this exit status and an empty standard output, and returns its standard error.
fn fails(status: i32, args: &[&str]) -> String {
    let output = run(args);
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(status), "{args:?}: {message}");
    assert!(output.stdout.is_empty(), "{args:?}");
    message
}

fn build_image(dir: &Path, options: &BuildOptions) -> BuiltImage {
    let tree = dir.join("tree");
    if !tree.exists() {
        let spec = TreeSpec {
            chunk_size: 0x10000,
            ..TreeSpec::for_tar()
        };
        make_tree(&tree, &spec).unwrap();
    }
    let out = tempfile::tempdir_in(dir).unwrap().keep();
    build(&[LayerSource::Dir(tree)], options, &out).unwrap()
}

fn options(version: RafsVersion) -> BuildOptions {
    BuildOptions {
        version,
        chunk_size: 0x10000,
        prefetch: vec!["/files/small".to_owned(), "/dirs".to_owned()],
        ..BuildOptions::default()
    }
}

/// Mounts the image with these arguments, compares it with `tree`, and stops the process with `signal`.
fn assert_mounts(image: &str, more: &[&str], tree: &Path, signal: Signal) {
    let place = tempfile::tempdir().unwrap();
    let before = place.path().metadata().unwrap().dev();
    let mut command = Command::new(BINARY);
    command.args(["mount", image, text(place.path())]).args(more);
    let mut process = Guard(command.stderr(Stdio::null()).spawn().unwrap());
    let mounted = || place.path().metadata().is_ok_and(|metadata| metadata.dev() != before);
    wait_until("it is mounted", || mounted().then_some(()));
    let found = compare_trees(tree, place.path(), &CompareOptions::default()).unwrap();
    assert!(found.is_empty(), "{image}: {found:#?}");
    let stat = rustix::fs::statvfs(place.path()).unwrap();
    assert!(stat.f_files > 600 && stat.f_blocks > 0);
    process.signal(signal);
    let status = process.wait(Duration::from_secs(10)).expect("it ends");
    assert!(status.success(), "{status}");
    assert!(!mounted());
}

#[test]
fn mount_shows_an_image_or_a_local_bootstrap() {
    let dir = tempfile::tempdir().unwrap();
    let registry = EmbeddedRegistry::start().unwrap();
    let tree = dir.path().join("tree");
    for (version, signal) in [(RafsVersion::V5, Signal::INT), (RafsVersion::V6, Signal::TERM)] {
        let image = build_image(dir.path(), &options(version));
        registry.add_image(&image, "image", "1").unwrap();
        assert_mounts(&registry.reference("image", "1"), &[], &tree, signal);
        let bootstrap = image.bootstrap_path().unwrap();
        let blobs = bootstrap.parent().unwrap().join("blobs");
        assert_mounts(text(bootstrap), &["--blobs", text(&blobs)], &tree, signal);
        let layout = dir.path().join(format!("layout-{version:?}"));
        image.write_oci_layout(&layout, "1").unwrap();
        assert_mounts(text(bootstrap), &["--blobs", text(&layout)], &tree, signal);
    }
}

/// The blob meta with the positions of batched chunks is in the bootstrap layer, and is read on demand.
#[test]
fn mount_shows_a_batched_image() {
    let dir = tempfile::tempdir().unwrap();
    let registry = EmbeddedRegistry::start().unwrap();
    let batch = BuildOptions {
        batch_size: 0x10000,
        ..options(RafsVersion::V6)
    };
    let image = build_image(dir.path(), &batch);
    registry.add_image(&image, "image", "1").unwrap();
    assert_mounts(
        &registry.reference("image", "1"),
        &[],
        &dir.path().join("tree"),
        Signal::INT,
    );
}

#[test]
fn unusable_arguments_are_reported() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let registry = EmbeddedRegistry::start().unwrap();
    fs::create_dir(at("mnt")).unwrap();
    fs::create_dir(at("tree")).unwrap();
    fs::write(at("garbage"), vec![7; 10_000]).unwrap();
    fs::write(at("empty"), "").unwrap();
    let fifo = rustix::fs::Mode::from_raw_mode(0o600);
    rustix::fs::mknodat(rustix::fs::CWD, at("fifo"), rustix::fs::FileType::Fifo, fifo, 0).unwrap();
    let plain = plain_image(&[LayerSource::Dir(at("tree"))], &ImageOptions::default(), &at("plain")).unwrap();
    registry.add_image(&plain, "plain", "1").unwrap();
    let (ordinary, missing) = (registry.reference("plain", "1"), registry.reference("none", "1"));
    for (image, expected) in [
        (text(&at("garbage")), "not a RAFS bootstrap"),
        (text(&at("empty")), "not a RAFS bootstrap"),
        (text(&at("fifo")), "is a named pipe, not a bootstrap"),
        (text(&at("mnt")), "is a directory, not a bootstrap"),
        (text(&at("missing")), "cannot access bootstrap"),
        (&ordinary, "not a Nydus image"),
        (&missing, "cannot use"),
        ("two words", "neither a file nor an image reference"),
    ] {
        for args in [&["inspect", image][..], &["mount", image, text(&at("mnt"))]] {
            let message = fails(1, args);
            assert!(message.contains(expected), "{args:?}: {message}");
            assert!(message.matches("not a RAFS").count() <= 1, "repeated: {message}");
        }
    }
    for (place, expected) in [("nowhere", "No such file"), ("garbage", "not a directory")] {
        let message = fails(1, &["mount", &ordinary, text(&at(place))]);
        assert!(
            message.contains("cannot mount on") && message.contains(expected),
            "{message}"
        );
    }
    for args in [
        &["mount"][..],
        &["mount", "a"],
        &["inspect"],
        &["inspect", "a", "b"],
        &["inspect", "--no", "a"],
        &["no"],
    ] {
        fails(2, args);
    }
}

#[test]
fn inspect_reports_layers_blobs_and_inodes() {
    let dir = tempfile::tempdir().unwrap();
    let registry = EmbeddedRegistry::start().unwrap();
    let zran = BuildOptions {
        conversion: Conversion::Zran,
        ..options(RafsVersion::V6)
    };
    let batch = BuildOptions {
        batch_size: 0x8000,
        ..options(RafsVersion::V6)
    };
    for (name, version, packing, options) in [
        ("v5", 5, "chunk", options(RafsVersion::V5)),
        ("v6", 6, "chunk", options(RafsVersion::V6)),
        ("zran", 6, "zran", zran),
        ("batch", 6, "batch", batch),
    ] {
        let image = build_image(dir.path(), &options);
        registry.add_image(&image, name, "1").unwrap();
        let reference = registry.reference(name, "1");
        let remote = json(&reference);
        assert_eq!(remote["manifest"], image.manifest_digest().to_string());
        let layers = remote["layers"].as_array().unwrap();
        assert_eq!(layers.len(), image.blobs.len());
        for (layer, blob) in layers.iter().zip(&image.blobs) {
            assert_eq!(
                (&layer["digest"], &layer["size"]),
                (&blob.digest.to_string().into(), &blob.size.into())
            );
            assert_eq!(
                layer["bootstrap"],
                blob.annotations.contains_key("containerd.io/snapshot/nydus-bootstrap")
            );
        }
        let local = json(text(image.bootstrap_path().unwrap()));
        assert!(local.get("manifest").is_none() && local["layers"].as_array().unwrap().is_empty());
        for report in [&remote, &local] {
            let kind = (report["version"].as_u64(), report["chunk_size"].as_u64());
            assert_eq!(kind, (Some(version), Some(0x10000)), "{name}");
            let digester = if packing == "zran" { "sha256" } else { "blake3" };
            assert_eq!(report["digester"], digester, "{name}");
            let compressor = if packing == "zran" { "gzip" } else { "zstd" };
            let blob = &report["blobs"][0];
            assert_eq!(
                (&blob["id"], &blob["packing"]),
                (&image.blob_ids[0].clone().into(), &packing.into())
            );
            assert_eq!(blob["compressor"], compressor);
            assert!(blob["compressed_size"].as_u64() > Some(0) && blob["uncompressed_size"].as_u64() > Some(0));
            assert!(blob["chunks_used"].as_u64() > Some(0) && report["chunks"] == blob["chunks_used"]);
            assert!(!report["features"].as_array().unwrap().is_empty());
            assert_eq!(
                report["prefetch_paths"],
                serde_json::json!(["/files/small", "/dirs"]),
                "{name}"
            );
            let kinds = &report["kinds"];
            assert_eq!(
                (&kinds["char_devices"], &kinds["block_devices"], &kinds["fifos"]),
                (&2.into(), &1.into(), &1.into())
            );
            assert_eq!((&kinds["symlinks"], &report["hard_links"]), (&6.into(), &3.into()));
        }
        let output = String::from_utf8(run(&["inspect", &reference]).stdout).unwrap();
        assert!(output.lines().all(|line| line.len() <= 120), "{output}");
        assert!(
            output.contains(&format!("RAFS v{version}")) && output.contains("/files/small"),
            "{output}"
        );
        for blob in image.blobs.iter().filter(|blob| {
            !layers
                .iter()
                .any(|layer| layer["bootstrap"] == true && layer["digest"] == blob.digest.to_string())
        }) {
            assert_eq!(registry.blob_stats(blob.digest).requests, 0, "{name}: data was fetched");
        }
    }
}

fn json(image: &str) -> serde_json::Value {
    let output = run(&["inspect", "--json", image]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}
