//! `nydus-store bench read`.

use std::{
    fs,
    os::unix::fs::symlink,
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

use nydus_store::fixtures::{EmbeddedRegistry, Fault};
use rustix::process::Signal;

use super::{fails, figure_texts, json, number, text};
use crate::common::{BINARY, Guard, Sample, wait_until};

/// Runs `nydus-store mount NAME MOUNTPOINT` and waits until the sample is mounted.
fn mount_image(name: &str, place: &Path) -> Guard {
    let mut mount = Command::new(BINARY);
    let mount = mount.args(["mount", name, text(place)]).stderr(Stdio::null());
    let mount = Guard(mount.spawn().unwrap());
    wait_until("it is mounted", || place.join("hello").exists().then_some(()));
    mount
}

#[test]
fn bench_read_measures_a_mount() {
    let (registry, sample) = (EmbeddedRegistry::start().unwrap(), Sample::new(68));
    registry.add_image(&sample.image, "app", "1").unwrap();
    let (name, place) = (registry.reference("app", "1"), tempfile::tempdir().unwrap());
    let mut mount = mount_image(&name, place.path());
    let report = json(&[
        "read",
        text(place.path()),
        "--duration",
        "0.3",
        "--threads",
        "3",
        "--drop-caches",
    ]);
    mount.signal(Signal::TERM);
    assert!(mount.wait(Duration::from_secs(20)).unwrap().success());
    let row = |name: &str| {
        let rows = report["rows"].as_array().unwrap();
        rows.iter()
            .find(|row| row["name"] == name)
            .unwrap_or_else(|| panic!("no {name}"))
            .clone()
    };
    let files = sample.names();
    let bytes: u64 = files.iter().map(|name| sample.content(name).len() as u64).sum();
    // The root, one directory and the files.
    assert_eq!(row("walk")["operations"], files.len() + 2);
    for name in ["all", "parallel"] {
        let row = row(name);
        assert_eq!(
            (&row["operations"], &row["bytes"]),
            (&files.len().into(), &bytes.into()),
            "{name}"
        );
    }
    assert_eq!(
        (&row("seq")["bytes"], &row("seq")["failed"]),
        (&(1 << 20).into(), &0.into())
    );
    assert!(number(&row("random")["operations"]) > 0 && row("random")["interrupted"] == false);
    assert_eq!(
        (&row("parallel")["concurrency"], &report["subject"]["file_system"]),
        (&3.into(), &"fuse".into())
    );
}

#[test]
fn only_regular_files_are_read() {
    let dir = tempfile::tempdir().unwrap();
    let (tree, figure) = (dir.path().join("tree"), dir.path().join("a.svg"));
    fs::create_dir_all(tree.join("sub")).unwrap();
    fs::write(dir.path().join("outside"), vec![1; 100_000]).unwrap();
    fs::write(tree.join("sub/file"), vec![2; 5000]).unwrap();
    fs::write(tree.join("empty"), "").unwrap();
    symlink("../outside", tree.join("link")).unwrap();
    symlink("..", tree.join("up")).unwrap();
    let mode = rustix::fs::Mode::from_raw_mode(0o600);
    rustix::fs::mknodat(rustix::fs::CWD, tree.join("fifo"), rustix::fs::FileType::Fifo, mode, 0).unwrap();
    let report = json(&["read", text(&tree), "--duration", "0.2", "--plot", text(&figure)]);
    let row = |name: &str| {
        let rows = report["rows"].as_array().unwrap();
        rows.iter().find(|row| row["name"] == name).unwrap().clone()
    };
    assert_eq!(row("walk")["operations"], 7);
    assert_eq!(
        (&row("all")["operations"], &row("all")["bytes"]),
        (&2.into(), &5000.into())
    );
    let shown = figure_texts(&figure);
    for word in ["Time per operation", "Throughput"] {
        assert!(shown.iter().any(|text| text == word), "{word}: {shown:?}");
    }
    assert!(shown.iter().any(|text| text.starts_with("parallel: ")), "{shown:?}");

    let one = json(&["read", text(&tree), "--phases", "all"]);
    assert_eq!(one["rows"].as_array().unwrap().len(), 1);
    let file = dir.path().join("outside");
    assert!(fails(1, &["read", text(&file)]).contains("not a directory"));
    assert!(fails(1, &["read", "/nowhere"]).contains("cannot read /nowhere"));
    fs::remove_file(tree.join("sub/file")).unwrap();
    fs::remove_file(tree.join("empty")).unwrap();
    assert!(fails(1, &["read", text(&tree), "--phases", "seq"]).contains("no regular file"));
    fails(2, &["read", text(&tree), "--phases", "jump"]);
}

/// Reads of an image whose data the registry denies.
#[test]
fn failures_name_the_first_file() {
    let (registry, sample) = (EmbeddedRegistry::start().unwrap(), Sample::new(69));
    registry.add_image(&sample.image, "app", "1").unwrap();
    let (name, place, data) = (
        registry.reference("app", "1"),
        tempfile::tempdir().unwrap(),
        sample.data_digest(),
    );
    let mut mount = mount_image(&name, place.path());
    registry.set_fault(Some(std::sync::Arc::new(move |request| {
        match request.digest == Some(data) {
            true => Fault::Status(403),
            false => Fault::None,
        }
    })));
    let report = json(&["read", text(place.path()), "--phases", "walk,all"]);
    let message = fails(1, &["read", text(place.path()), "--phases", "all"]);
    mount.signal(Signal::TERM);
    assert!(mount.wait(Duration::from_secs(20)).unwrap().success());
    let row = &report["rows"][1];
    assert_eq!(
        (&row["operations"], &row["failed"]),
        (&0.into(), &sample.names().len().into())
    );
    let first = row["failures"][0]["first"].as_str().unwrap();
    assert!(
        first.starts_with(text(place.path())) && first.contains("Input/output error"),
        "{first}"
    );
    assert!(message.contains("nothing succeeded: "), "{message}");
}
