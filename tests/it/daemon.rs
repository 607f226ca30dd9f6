//! The daemon's life cycle: start, refusal to start, signals, mounts, logs.

use std::{
    fs::{self, File},
    io,
    os::unix::{fs::PermissionsExt as _, net::UnixDatagram, process::CommandExt as _},
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use nydus_store::{fixtures::Fault, internals::Digest};
use rustix::{
    mount::{MountFlags, UnmountFlags},
    process::Signal,
};

use crate::common::{BINARY, Lab, Sample, Serve, StoreLayer, copy_program, failure_with, wait_until};

mod store;

/// Number of a daemon's mounts: the layers' files and the layer store.
const MOUNTS: usize = 2;

fn mounts_below(dir: &Path) -> usize {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let dir = dir.to_str().unwrap();
    table.lines().filter(|line| line.contains(dir)).count()
}

/// Runs a command that must exit with status 1 and returns its standard error.
fn fails(command: &mut Command) -> String {
    failure_with(1, command)
}

/// The error number of a failed call.
fn code(result: io::Result<impl Sized>) -> Option<i32> {
    result.err().and_then(|error| error.raw_os_error())
}

#[test]
fn second_daemon_on_a_root_is_refused() {
    let serve = Serve::start();
    let error = fails(&mut serve.command());
    assert!(error.contains(&format!("process {}", serve.id())), "{error}");
    assert!(error.contains(serve.root().to_str().unwrap()), "{error}");
    assert!(
        fs::metadata(serve.store()).unwrap().is_dir(),
        "the first daemon keeps running"
    );
}

#[test]
fn root_with_foreign_files_is_refused() {
    let serve = Serve::prepare("");
    fs::create_dir_all(serve.root()).unwrap();
    fs::set_permissions(serve.root(), fs::Permissions::from_mode(0o755)).unwrap();
    fs::write(serve.root().join("letters"), "").unwrap();
    let error = fails(&mut serve.command());
    assert!(error.contains("letters") && error.contains("--root"), "{error}");
    assert_eq!(
        fs::metadata(serve.root()).unwrap().permissions().mode() & 0o777,
        0o755,
        "the mode was changed"
    );
}

/// An overlay holds its own reference to the lower mount, so unmounting the store succeeds.
#[test]
fn daemon_stops_while_an_overlay_uses_the_store() {
    let mut lab = Lab::new("");
    let sample = Sample::new(1);
    let layer = lab.add(&sample, "image");
    sample.check(&layer);
    let dir = tempfile::tempdir().unwrap();
    rustix::mount::mount("tmpfs", dir.path(), "tmpfs", MountFlags::empty(), None).unwrap();
    let place = |name: &str| dir.path().join(name);
    for name in ["upper", "work", "merged"] {
        fs::create_dir(place(name)).unwrap();
    }
    // Mount options need colons and commas escaped; the store's paths may contain colons only.
    let (lower, upper, work) = (layer.diff(), place("upper"), place("work"));
    let lower = lower.to_str().unwrap().replace(':', "\\:");
    let options = format!(
        "lowerdir={lower},upperdir={},workdir={}",
        upper.display(),
        work.display()
    );
    let options = std::ffi::CString::new(options).unwrap();
    rustix::mount::mount(
        "overlay",
        place("merged"),
        "overlay",
        MountFlags::empty(),
        options.as_c_str(),
    )
    .unwrap();
    assert_eq!(
        fs::read(place("merged").join("hello")).unwrap(),
        sample.content("hello")
    );
    let start = Instant::now();
    lab.serve.stop();
    let took = start.elapsed();
    rustix::mount::unmount(place("merged"), UnmountFlags::DETACH).unwrap();
    rustix::mount::unmount(dir.path(), UnmountFlags::DETACH).unwrap();
    assert!(took < Duration::from_secs(10), "{took:?}");
    lab.assert_logged(0, &["WARN", "stopped while containers were using the store"]);
}

#[test]
fn mounts_of_killed_daemon_are_replaced() {
    let mut lab = Lab::new("");
    let sample = Sample::new(1);
    let layer = lab.add(&sample, "image");
    for _ in 0..3 {
        sample.check(&layer);
        lab.serve.kill_and_restart();
        assert_eq!(mounts_below(lab.serve.root()), MOUNTS);
    }
    // Stacked mounts, one of which is in use.
    let held = File::open(layer.diff()).unwrap();
    lab.serve.kill_and_restart();
    sample.check(&layer);
    drop(held);
    lab.serve.stop();
    assert_eq!(mounts_below(lab.serve.root()), 0);
}

#[test]
fn foreign_mount_is_refused_and_kept() {
    for place in [Serve::store, Serve::overlay] {
        let serve = Serve::prepare("");
        let place = place(&serve);
        fs::create_dir_all(&place).unwrap();
        rustix::mount::mount("tmpfs", &place, "tmpfs", MountFlags::empty(), None).unwrap();
        let error = fails(&mut serve.command());
        let still_there = mounts_below(serve.root());
        rustix::mount::unmount(&place, UnmountFlags::DETACH).unwrap();
        assert!(error.contains("tmpfs") && error.contains("unmount it first"), "{error}");
        assert_eq!(still_there, 1);
    }
}

#[test]
fn sigterm_and_sigint_stop_the_daemon_cleanly() {
    for signal in [Signal::TERM, Signal::INT] {
        let mut serve = Serve::start();
        serve.process().signal(signal);
        let status = serve.wait();
        assert!(status.success(), "{status}: {}", serve.log());
        assert_eq!(mounts_below(serve.root()), 0);
        assert!(serve.log().contains("stopped"), "{}", serve.log());
    }
}

#[test]
fn daemon_stops_with_open_files_and_requests_in_flight() {
    let mut lab = Lab::new("");
    let sample = Sample::new(1);
    let layer = lab.add(&sample, "image");
    sample.check(&layer);
    // Holds a file open, with a read and a look-up in flight.
    let open = File::open(layer.diff().join("hello")).unwrap();
    let other = Sample::new(2);
    let other_layer = lab.add(&other, "other");
    assert!(other_layer.pull_publishes());
    lab.fault("other", |_| Fault::Stall);
    lab.fault("third", |_| Fault::Stall);
    let before = lab.registry.request_count();
    let path = other_layer.diff().join("one");
    let third = lab.layer("third", other.bootstrap_digest());
    let readers = [
        std::thread::spawn(move || fs::read(path).is_err()),
        std::thread::spawn(move || !third.pull_publishes()),
    ];
    wait_until("both requests are in flight", || {
        (lab.registry.request_count() >= before + 2).then_some(())
    });
    let start = Instant::now();
    lab.serve.stop();
    assert!(start.elapsed() < Duration::from_secs(10), "{:?}", start.elapsed());
    assert_eq!(mounts_below(lab.serve.root()), 0);
    lab.assert_logged(0, &["WARN", "stopped while containers were using the store"]);
    for reader in readers {
        assert!(reader.join().unwrap());
    }
    drop(open);
}

#[test]
fn daemon_exits_when_its_mount_is_removed_externally() {
    let mut serve = Serve::start();
    rustix::mount::unmount(serve.overlay(), UnmountFlags::empty()).unwrap();
    // Another file system takes its place.
    rustix::mount::mount("tmpfs", serve.overlay(), "tmpfs", MountFlags::empty(), None).unwrap();
    let status = serve.wait();
    let left = mounts_below(serve.root());
    rustix::mount::unmount(serve.overlay(), UnmountFlags::DETACH).ok();
    assert_eq!(status.code(), Some(1), "{}", serve.log());
    assert!(
        serve.log().contains("another process unmounted the file system"),
        "{}",
        serve.log()
    );
    assert!(!serve.log().contains("containers were using"), "{}", serve.log());
    assert_eq!(left, 1, "the other mount stays");
}

#[test]
fn readiness_is_notified_after_the_store_is_mounted() {
    let mut serve = Serve::prepare("");
    let socket_path = serve.config_path().with_extension("notify");
    let socket = UnixDatagram::bind(&socket_path).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let store = serve.overlay();
    let receive = |socket: &UnixDatagram| {
        let mut buffer = [0; 1000];
        let len = socket.recv(&mut buffer).unwrap();
        String::from_utf8_lossy(&buffer[..len]).into_owned()
    };
    let receiver = std::thread::spawn(move || {
        let mut stored = Vec::new();
        // Descriptors are stored before and after that.
        while !receive(&socket).lines().any(|line| line == "READY=1") {
            stored.push(());
        }
        let works =
            fs::read_dir(store.join("l")).is_ok_and(|entries| entries.count() == 0) && mounts_below(&store) == 1;
        (stored.len(), works, socket)
    });
    serve.launch_with(|command| {
        command.env("NOTIFY_SOCKET", &socket_path);
    });
    let (stored, works, socket) = receiver.join().unwrap();
    assert!(stored >= 3, "{stored} descriptors are stored");
    assert!(works, "READY=1 was sent before the store was mounted");
    serve.stop();
    while !receive(&socket).starts_with("STOPPING=1") {}
}

#[test]
fn configuration_error_names_file_and_line() {
    for (config, words) in [
        ("[registry]\nretries = 1\nretires = 2\n", ["line 3", "retires"]),
        ("[fuse]\n\nthreads = \"many\"\n", ["line 3", "threads"]),
        ("[fuse]\nthreads = 65\n", ["fuse.threads", "from 1 to 64"]),
        ("[images]\nnegative_ttl = -1\n", ["line 2", "negative_ttl"]),
        ("[fuse\n", ["line 1", "fuse"]),
    ] {
        let serve = Serve::prepare(config);
        let error = fails(&mut serve.command());
        for word in words {
            assert!(error.contains(word), "{word}: {error}");
        }
        assert!(error.contains(serve.config_path().to_str().unwrap()), "{error}");
        assert!(!serve.root().exists(), "the root is not created");
    }
    let serve = Serve::prepare("");
    fs::remove_file(serve.config_path()).unwrap();
    let error = fails(&mut serve.command());
    assert!(error.contains(serve.config_path().to_str().unwrap()), "{error}");
}

#[test]
fn serve_requires_root() {
    // Other users may lack access to the build directory.
    let dir = tempfile::tempdir().unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o777)).unwrap();
    let binary = dir.path().join("nydus-store");
    copy_program(&binary);
    let mut command = Command::new(&binary);
    command.args(["serve", "--root"]).arg(dir.path().join("root"));
    let error = fails(command.uid(65534).gid(65534));
    assert!(error.contains("needs root"), "{error}");
    assert!(!dir.path().join("root").exists());
}

#[test]
fn links_resolve_to_layers_and_data_blobs_reject_stacking() {
    let lab = Lab::new("");
    let sample = Sample::new(1);
    let top = lab.add(&sample, "image");
    let data = lab.layer("image", sample.data_digest());
    assert!(top.pull_publishes());
    let read = |layer: &StoreLayer, name: &str| fs::read_to_string(layer.dir().join(name));
    let link = read(&top, "link").unwrap();
    assert!(
        link.len() == 26
            && link
                .bytes()
                .all(|byte| byte.is_ascii_uppercase() || byte.is_ascii_digit())
    );
    let target = fs::read_link(lab.serve.overlay().join("l").join(&link)).unwrap();
    assert_eq!(
        target,
        Path::new("..").join(top.dir().file_name().unwrap()).join("diff")
    );
    let lower = read(&top, "lower").unwrap();
    let lower = lab.serve.overlay().join(&lower);
    assert_eq!(lower.canonicalize().unwrap(), data.diff());
    assert_eq!(fs::read_dir(data.diff()).unwrap().count(), 0);
    for name in ["link", "lower"] {
        assert_eq!(code(read(&data, name)), Some(libc::EIO), "{name}");
    }
    lab.assert_logged(0, &["WARN", "refused to stack a layer on a data blob"]);
}

#[test]
fn trace_log_contains_no_credentials() {
    const PASSWORD: &str = "correct-horse-battery";
    let mut lab = Lab::with_daemon(Serve::prepare(""));
    let sample = Sample::new(1);
    let layer = lab.add(&sample, "private");
    let basic = BASE64.encode(format!("someone:{PASSWORD}"));
    let expected = format!("Basic {basic}");
    lab.fault("private", move |request| {
        if request.authorization.as_deref() == Some(&expected) {
            return Fault::None;
        }
        Fault::Respond {
            status: 401,
            headers: vec![("www-authenticate".to_owned(), "Basic realm=\"private\"".to_owned())],
            body: Vec::new(),
        }
    });
    let auth_file = lab.serve.config_path().with_extension("auth.json");
    let auths = serde_json::json!({"auths": {lab.registry.addr().to_string(): {"auth": &basic}}});
    fs::write(&auth_file, auths.to_string()).unwrap();
    let config = format!("[registry]\nauth_files = [\"{}\"]\n", auth_file.display());
    fs::write(lab.serve.config_path(), config).unwrap();
    lab.serve.launch_with(|command| {
        let path = command
            .get_args()
            .skip_while(|arg| *arg != "--root")
            .nth(1)
            .unwrap()
            .to_owned();
        let config = command
            .get_args()
            .skip_while(|arg| *arg != "--config")
            .nth(1)
            .unwrap()
            .to_owned();
        *command = Command::new(BINARY);
        command
            .args(["--log", "trace", "serve", "--root"])
            .arg(path)
            .arg("--config")
            .arg(config);
    });
    sample.check(&layer);
    // Nor does it log rejected credentials.
    lab.fault("private", |_| Fault::Status(401));
    lab.layer("private", Digest::of(b"other")).pull_publishes();
    lab.serve.stop();
    let log = lab.serve.log();
    assert!(log.contains("TRACE"), "trace lines are logged");
    for secret in [PASSWORD, &basic] {
        assert!(
            !log.contains(secret),
            "{}",
            log.lines().find(|line| line.contains(secret)).unwrap()
        );
    }
}
