//! `nydus-store demo`. It must leave nothing behind, however it ends.

use std::{
    fs::{self, File},
    path::Path,
    process::{Child, Command, Output, Stdio},
    time::Duration,
};

use rustix::process::Signal;
use tempfile::TempDir;

use crate::common::{BINARY, Guard, wait_until};

/// A demo with its temporary files in `dir`.
fn demo(dir: &TempDir, arguments: &[&str]) -> Command {
    let mut command = Command::new(BINARY);
    command
        .arg("demo")
        .args(arguments)
        .env("TMPDIR", dir.path())
        .env_remove("NYDUS_STORE_LOG");
    command
}

/// Runs a demo to its end and returns its output.
fn run_demo(dir: &TempDir, arguments: &[&str]) -> String {
    let Output { status, stdout, stderr } = demo(dir, arguments).output().unwrap();
    let (stdout, stderr) = (
        String::from_utf8_lossy(&stdout).into_owned(),
        String::from_utf8_lossy(&stderr).into_owned(),
    );
    assert!(status.success(), "{status}\n{stdout}{stderr}");
    assert_eq!(stderr, "", "log lines were printed");
    let broad = stdout.lines().find(|line| line.chars().count() > 100);
    assert_eq!(broad, None, "broader than 100 columns");
    stdout
}

fn assert_nothing_is_left(dir: &TempDir) {
    let left: Vec<_> = fs::read_dir(dir.path())
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    assert!(left.is_empty(), "left behind: {left:?}");
    assert_nothing_is_mounted_in(dir.path());
}

fn assert_nothing_is_mounted_in(dir: &Path) {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let ours: Vec<_> = mounts
        .lines()
        .filter(|line| line.contains(dir.to_str().unwrap()))
        .collect();
    assert!(ours.is_empty(), "left mounted: {ours:?}");
}

/// A running demo that prints to a file.
struct RunningDemo {
    process: Guard,
    printed: std::path::PathBuf,
    // Not the demo's directory, which must be empty at the end.
    _dir: TempDir,
}

impl RunningDemo {
    /// Starts it and waits until it prints `heading`.
    fn until(mut command: Command, heading: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let printed = dir.path().join("printed");
        let out = File::create(&printed).unwrap();
        let child: Child = command.stdout(out.try_clone().unwrap()).stderr(out).spawn().unwrap();
        let running = Self {
            process: Guard(child),
            printed,
            _dir: dir,
        };
        wait_until(heading, || running.printed().contains(heading).then_some(()));
        running
    }

    fn printed(&self) -> String {
        fs::read_to_string(&self.printed).unwrap()
    }
}

#[test]
fn demo_reports_that_little_is_fetched() {
    let dir = tempfile::tempdir().unwrap();
    let printed = run_demo(&dir, &[]);
    for statement in [
        "1. Build an image",
        "shows the whole image",
        "found                     342 files",
        "fetched                   0 B in 0 requests,",
        "store                     unmounted",
        "directory                 deleted",
        "Read 12 files",
        "A full pull would have fetched",
    ] {
        let words: Vec<_> = printed.split_whitespace().collect();
        let wanted: Vec<_> = statement.split_whitespace().collect();
        assert!(
            words.windows(wanted.len()).any(|part| part == wanted),
            "no `{statement}` in:\n{printed}"
        );
    }
    assert_eq!(printed.matches(" same\n").count(), 12, "{printed}");
    assert!(!printed.contains("container printed"));
    assert_nothing_is_left(&dir);
}

#[test]
fn demo_with_podman_runs_a_container() {
    let dir = tempfile::tempdir().unwrap();
    let printed = run_demo(&dir, &["--podman"]);
    assert!(printed.contains("Hello from a container"), "{printed}");
    assert!(printed.contains("and ran a container"), "{printed}");
    assert_nothing_is_left(&dir);
}

#[test]
fn interrupted_demo_cleans_up() {
    for heading in ["1. ", "Run a container"] {
        let dir = tempfile::tempdir().unwrap();
        let mut running = RunningDemo::until(demo(&dir, &["--podman"]), heading);
        running.process.signal(Signal::INT);
        let status = running.process.wait(Duration::from_secs(20)).expect("it ends");
        let printed = running.printed();
        assert_eq!(status.code(), Some(1), "{printed}");
        assert!(printed.contains("interrupted"), "{printed}");
        assert!(!printed.contains("A full pull"), "{printed}");
        assert_nothing_is_left(&dir);
    }
}

#[test]
fn killed_demo_leaves_nothing_mounted() {
    let dir = tempfile::tempdir().unwrap();
    // At these headings the program accesses its own file system, or is about to.
    for heading in ["mounted on", "ready to run after", "List all files", "SHA-256\n"] {
        let mut running = RunningDemo::until(demo(&dir, &[]), heading);
        running.process.signal(Signal::KILL);
        running
            .process
            .wait(Duration::from_secs(20))
            .expect("it exits without waiting for its own mount");
        assert_nothing_is_mounted_in(dir.path());
    }
}

#[test]
fn closed_standard_output_ends_the_demo_with_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let mut child = demo(&dir, &[])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(stderr.contains("cannot print"), "{stderr}");
    assert_nothing_is_left(&dir);
}

#[test]
fn missing_requirement_is_reported_before_files_are_created() {
    let dir = tempfile::tempdir().unwrap();
    // Opened before privileges are dropped: other users may lack access to the build directory.
    let mut no_root = Command::new("setpriv");
    no_root.args(["--reuid", "65534", "--clear-groups", "/proc/self/fd/0", "demo"]);
    no_root.stdin(File::open(BINARY).unwrap()).env("TMPDIR", dir.path());
    let mut no_podman = demo(&dir, &["--podman"]);
    no_podman.env("PATH", "/nonexistent");
    for (mut command, said) in [(no_root, "needs root"), (no_podman, "`podman` is not installed")] {
        let output = command.output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{stderr}");
        assert!(stderr.contains(said), "{stderr}");
        assert_eq!(output.stdout, b"");
        assert_nothing_is_left(&dir);
    }
}
