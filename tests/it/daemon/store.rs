//! The store's directories: access, read-only names, look-ups, and what is published.

use std::{
    fs::{self, File},
    os::unix::{fs::PermissionsExt as _, process::CommandExt as _},
    path::Path,
    process::Command,
};

use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use nydus_store::{fixtures::Fault, internals::Digest};

use super::code;
use crate::common::{BINARY, Lab, Sample, output};

#[test]
fn other_users_cannot_access_the_root() {
    let lab = Lab::new("");
    let sample = Sample::new(1);
    let layer = lab.add(&sample, "image");
    sample.check(&layer);
    // The root's own mode must deny access, so its parent is opened.
    fs::set_permissions(lab.serve.root().parent().unwrap(), fs::Permissions::from_mode(0o755)).unwrap();
    let (root, store) = (lab.serve.root(), lab.serve.store());
    for path in [
        root,
        &store,
        &layer.dir(),
        &layer.diff(),
        &layer.diff().join("hello"),
        &root.join("lock"),
    ] {
        let mut command = Command::new("stat");
        command.arg(path).uid(65534).gid(65534);
        let output = command.output().unwrap();
        let is_root = path == root;
        assert_eq!(output.status.success(), is_root, "{}", path.display());
    }
    let mut command = Command::new("ls");
    let output = command.arg(root).uid(65534).gid(65534).output().unwrap();
    assert!(!output.status.success());
    let mut seen = 0;
    for entry in walkdir::WalkDir::new(root).same_file_system(true) {
        let entry = entry.unwrap();
        let metadata = entry.metadata().unwrap();
        let mode = metadata.permissions().mode() & 0o7777;
        let due = if metadata.is_dir() { 0o700 } else { 0o600 };
        assert_eq!(mode, due, "{}: {mode:o}", entry.path().display());
        seen += 1;
    }
    assert!(seen > 10, "{seen}");
    // The directories of the FUSE mount too.
    for path in [
        &store,
        &layer.dir(),
        &lab.serve.overlay(),
        &lab.serve.overlay().join("l"),
    ] {
        let mode = fs::metadata(path).unwrap().permissions().mode() & 0o7777;
        assert_eq!(mode, 0o700, "{}", path.display());
    }
}

#[test]
fn overlay_rejects_writes() {
    let lab = Lab::new("");
    let sample = Sample::new(1);
    let layer = lab.add(&sample, "image");
    sample.check(&layer);
    let (overlay, diff) = (lab.serve.overlay(), layer.diff());
    let listed = |dir: &Path| {
        let mut names: Vec<_> = fs::read_dir(dir)
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        names.sort();
        names
    };
    assert_eq!(listed(&overlay).len(), 3, "two layers and the directory of links");
    assert_eq!(listed(&overlay.join("l")).len(), 2);
    assert_eq!(listed(&layer.dir()), ["diff", "link", "lower"]);
    for dir in [&overlay, &overlay.join("l"), &layer.dir(), &diff] {
        assert_eq!(code(fs::create_dir(dir.join("new"))), Some(libc::EROFS));
        assert_eq!(code(File::create(dir.join("new"))), Some(libc::EROFS));
        assert_eq!(
            code(std::os::unix::fs::symlink("x", dir.join("new"))),
            Some(libc::EROFS)
        );
    }
    let hello = diff.join("hello");
    for path in [&hello, &layer.dir().join("link")] {
        assert_eq!(code(fs::remove_file(path)), Some(libc::EROFS), "{}", path.display());
        assert_eq!(code(fs::rename(path, layer.dir().join("new"))), Some(libc::EROFS));
        let mode = fs::Permissions::from_mode(0o777);
        assert_eq!(code(fs::set_permissions(path, mode)), Some(libc::EROFS));
        assert_eq!(code(File::options().write(true).open(path)), Some(libc::EROFS));
    }
    assert_eq!(code(fs::remove_dir(diff.join("dir"))), Some(libc::EROFS));
    assert_eq!(code(fs::hard_link(&hello, layer.dir().join("new"))), Some(libc::EROFS));
    assert_eq!(fs::read(&hello).unwrap(), sample.content("hello"));
}

#[test]
fn layer_store_look_up_announces_a_pull() {
    let lab = Lab::new("");
    let (sample, other) = (Sample::new(1), Sample::new(2));
    let (layer, broken) = (lab.add(&sample, "image"), lab.add(&other, "other"));
    lab.fault("other", |_| Fault::Status(500));
    let layers = lab.serve.root().join("layers");
    let look_up = |repository: &str, digest: &Digest| {
        let dir = layers.join(BASE64.encode(lab.reference(repository)));
        fs::symlink_metadata(dir.join(digest.to_string()).join("diff"))
    };
    assert_eq!(layer.record(), None);
    assert_eq!(code(look_up("image", &sample.data_digest())), Some(libc::ENOENT));
    assert!(layer.record().is_some(), "the look-up published it");
    assert_eq!(code(look_up("other", &other.data_digest())), Some(libc::ENOENT));
    assert_eq!(broken.record(), None);
    assert_eq!(fs::read_dir(&layers).unwrap().count(), 0);
    assert_eq!(code(File::create(layers.join("new"))), Some(libc::EROFS));
}

#[test]
fn unknown_names_give_enoent_without_requests() {
    let lab = Lab::new("");
    let sample = Sample::new(1);
    let layer = lab.add(&sample, "image");
    sample.check(&layer);
    let requests = lab.registry.request_count();
    let layers = lab.serve.root().join("layers");
    let unpadded = BASE64.encode("alpine:3");
    for name in [
        "x",
        "....",
        "%2e%2e",
        "use",
        unpadded.trim_end_matches('='),
        &BASE64.encode("registry.example/UPPER"),
        &BASE64.encode("a b"),
        &BASE64.encode("../../etc/passwd"),
        &BASE64.encode([0xff, 0xfe, 0]),
        &"A".repeat(255),
    ] {
        for dir in [&layers, &lab.serve.overlay(), &lab.serve.overlay().join("l")] {
            assert_eq!(code(fs::metadata(dir.join(name))), Some(libc::ENOENT), "{name}");
            let below = dir.join(name).join(sample.bootstrap_digest().to_string());
            assert_eq!(code(fs::metadata(below)), Some(libc::ENOENT), "{name}");
        }
    }
    let reference = BASE64.encode(lab.reference("image"));
    for name in [
        "x",
        "sha256:00",
        "sha512:00",
        "diff",
        "info",
        "use",
        &sample.bootstrap_digest().hex(),
    ] {
        let path = layers.join(&reference).join(name);
        assert_eq!(code(fs::metadata(path)), Some(libc::ENOENT), "{name}");
    }
    for name in ["x", "use", "Diff", "diff2", "merged", "work"] {
        assert_eq!(code(fs::metadata(layer.dir().join(name))), Some(libc::ENOENT), "{name}");
    }
    assert_eq!(code(fs::metadata(layer.diff().join("no/such"))), Some(libc::ENOENT));
    assert_eq!(
        code(fs::metadata(layer.diff().join("x".repeat(255)))),
        Some(libc::ENOENT)
    );
    assert_eq!(lab.registry.request_count(), requests, "no requests");
}

#[test]
fn references_of_all_forms_are_served() {
    let lab = Lab::new("");
    let sample = Sample::new(1);
    let host = lab.registry.addr();
    for (repository, tag) in [("a/b/c/d", "v1.2_3-x"), ("plain", "latest")] {
        lab.registry.add_image(&sample.image, repository, tag).unwrap();
    }
    let digest = sample.image.manifest_digest();
    for reference in [
        format!("{host}/a/b/c/d:v1.2_3-x"),
        format!("{host}/a/b/c/d@{digest}"),
        format!("{host}/a/b/c/d:v1.2_3-x@{digest}"),
        format!("{host}/plain"),
        format!("{host}/plain:latest"),
        format!("localhost:{}/plain", host.port()),
    ] {
        sample.check(&lab.serve.layer(&reference, &sample.bootstrap_digest()));
    }
    // A data blob's layer has an empty directory.
    let data = lab.serve.layer(&format!("{host}/plain"), &sample.data_digest());
    assert!(data.pull_publishes());
    assert_eq!(fs::read_dir(data.diff()).unwrap().count(), 0);
}

#[test]
fn published_image_needs_no_registry_after_restart() {
    let mut lab = Lab::new("");
    let sample = Sample::new(1);
    lab.add(&sample, "image");
    let digest = sample.image.manifest_digest();
    let by_tag = lab.reference("image");
    let by_digest = format!("{}/image@{digest}", lab.registry.addr());
    // A tag may have moved, so an announcement by tag costs one request.
    for (reference, requests) in [(by_digest, 0), (by_tag, 1)] {
        let layer = lab.serve.layer(&reference, &sample.bootstrap_digest());
        sample.check(&layer);
        lab.serve.restart();
        lab.registry.reset();
        sample.check(&layer);
        assert_eq!(lab.registry.log().len(), 0, "a published image needs no requests");
        assert!(layer.announce_pull());
        let log = lab.registry.log();
        assert!(
            log.iter().all(|request| request.path.contains("/manifests/")),
            "{log:#?}"
        );
        assert_eq!(log.len(), requests, "{log:#?}");
    }
}

/// A known tag is resolved again by HEAD, where possible.
#[test]
fn known_tag_is_resolved_by_get_where_head_is_refused() {
    let lab = Lab::new("");
    let sample = Sample::new(1);
    let layer = lab.add(&sample, "image");
    let image = lab.reference("image");
    let pull = || {
        let mut command = Command::new(BINARY);
        output(command.args(["pull", &image, "--root"]).arg(lab.serve.root()))
    };
    pull();
    lab.fault("image", |request| match request.method.as_str() {
        "HEAD" => Fault::Status(405),
        _ => Fault::None,
    });
    lab.registry.reset();
    pull();
    let log = lab.registry.log().into_iter();
    let of_manifest = log.filter(|request| request.path.contains("/manifests/"));
    let methods: Vec<_> = of_manifest.map(|request| request.method).collect();
    assert_eq!(methods, ["HEAD", "GET"]);
    sample.check(&layer);
}
