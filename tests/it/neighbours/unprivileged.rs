//! What an ordinary user of the host gets of a daemon: nothing.

use std::{
    fs::{self, File, OpenOptions, Permissions},
    io::{self, Write as _},
    os::{
        fd::AsFd as _,
        unix::{
            fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _, chown, symlink},
            net::{UnixDatagram, UnixStream},
            process::CommandExt as _,
        },
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use nydus_store::{fixtures::Fault, internals::Digest};
use rustix::{
    fs::Mode,
    mount::UnmountFlags,
    process::{Pid, PidfdFlags, PidfdGetfdFlags, Signal},
};
use serde_json::json;

use super::{as_user, metrics_on};
use crate::common::{BINARY, Lab, Sample, Serve, StoreLayer, free_port, output};

const PASSWORD: &str = "pass-w0rd";

/// A daemon below a supervisor, with a public image that is registered, and a private one that was pulled.
struct Site {
    lab: Lab,
    private: Sample,
    private_layer: StoreLayer,
    port: u16,
}

impl Site {
    fn start() -> Self {
        let port = free_port();
        let config = format!("[registry]\nauth_files = []\n[metrics]\nlisten = \"127.0.0.1:{port}\"\n");
        let mut serve = Serve::prepare(&config);
        // What surrounds the root is open to all, and so is the root, until the daemon takes it.
        fs::create_dir(serve.root()).unwrap();
        for dir in [serve.root(), serve.root().parent().unwrap()] {
            fs::set_permissions(dir, Permissions::from_mode(0o755)).unwrap();
        }
        serve.launch_with(|command| {
            command.arg("--supervise");
            // No mode may depend on the mask.
            // SAFETY: between fork and exec, the closure makes only a system call.
            unsafe {
                command.pre_exec(|| {
                    rustix::process::umask(Mode::empty());
                    Ok(())
                })
            };
        });
        let lab = Lab::with_daemon(serve);
        let (public, private) = (Sample::new(1), Sample::new(2));
        public.check(&lab.add(&public, "public"));
        lab.nydus_store(&["pull", &lab.reference("public")]);
        let private_layer = lab.add(&private, "private");
        lab.fault("private", |request| {
            match request.authorization.as_ref() == Some(&authorization()) {
                true => Fault::None,
                false => Fault::Respond {
                    status: 401,
                    headers: vec![("WWW-Authenticate".to_owned(), "Basic realm=\"test\"".to_owned())],
                    body: Vec::new(),
                },
            }
        });
        let site = Self {
            lab,
            private,
            private_layer,
            port,
        };
        site.log_in();
        site.private.check(&site.private_layer);
        site
    }

    /// Announces a pull of the private image, as Podman does.
    fn log_in(&self) {
        let logins = json!({self.lab.reference("private"): {"username": "me", "password": PASSWORD}});
        let mut helper = Command::new(BINARY);
        helper.args(["auth-helper", "--root"]).arg(self.lab.serve.root());
        let mut child = helper.stdin(Stdio::piped()).spawn().unwrap();
        child
            .stdin
            .take()
            .unwrap()
            .write_all(logins.to_string().as_bytes())
            .unwrap();
        assert!(child.wait().unwrap().success(), "{}", self.lab.serve.log());
    }

    fn root(&self) -> &Path {
        self.lab.serve.root()
    }

    /// The supervisor and the daemon.
    fn processes(&self) -> [u32; 2] {
        [self.lab.serve.id(), self.lab.serve.supervised_id().unwrap()]
    }

    /// All paths below the root, also those in the mounts.
    fn paths(&self) -> Vec<PathBuf> {
        let files = walkdir::WalkDir::new(self.root()).min_depth(1).into_iter();
        // `lower` of a data blob and the like cannot be read by root either.
        files.filter_map(Result::ok).map(walkdir::DirEntry::into_path).collect()
    }
}

/// The header that lets in whoever has the password.
fn authorization() -> String {
    format!("Basic {}", BASE64.encode(format!("me:{PASSWORD}")))
}

impl Lab {
    /// Runs a subcommand of `nydus-store` on the daemon's root.
    pub(super) fn nydus_store(&self, args: &[&str]) -> String {
        output(Command::new(BINARY).args(args).arg("--root").arg(self.serve.root()))
    }
}

/// Panics unless `done` failed because of permissions.
#[track_caller]
fn refused<T>(what: impl std::fmt::Debug, done: io::Result<T>) {
    let kind = done.err().map(|error| error.kind());
    assert_eq!(kind, Some(io::ErrorKind::PermissionDenied), "{what:?}");
}

#[test]
fn files_of_a_root_are_private_whatever_the_umask() {
    let site = Site::start();
    let entries = walkdir::WalkDir::new(site.root()).same_file_system(true).into_iter();
    let mut kinds = [0; 3];
    for entry in entries.map(Result::unwrap) {
        let (data, path) = (entry.metadata().unwrap(), entry.path());
        let kind = data.file_type();
        let number = usize::from(kind.is_file()) + 2 * usize::from(kind.is_socket());
        assert!(kind.is_dir() || number > 0, "{} is {kind:?}", path.display());
        let expected = if kind.is_dir() { 0o700 } else { 0o600 };
        assert_eq!(data.mode() & 0o7777, expected, "{}", path.display());
        assert_eq!((data.uid(), data.gid()), (0, 0), "{}", path.display());
        kinds[number] += 1;
    }
    let [directories, files, sockets] = kinds;
    println!("{directories} directories, {files} files, {sockets} sockets");
    assert!(directories > 10 && files > 10 && sockets == 2, "{kinds:?}");
    // The directories in the mounts, down to where the images' own modes begin.
    let overlay = site.lab.serve.overlay();
    let layers = fs::read_dir(&overlay).unwrap().map(|entry| entry.unwrap().path());
    for dir in layers.chain([overlay, site.root().join("layers")]) {
        assert_eq!(dir.metadata().unwrap().mode() & 0o7777, 0o700, "{}", dir.display());
    }
}

#[test]
fn ordinary_user_can_do_nothing_below_a_root() {
    let site = Site::start();
    let paths = site.paths();
    let is_below_mount = |path: &&PathBuf| path.starts_with(site.private_layer.diff());
    assert!(paths.iter().filter(is_below_mount).count() > 5);
    println!("{} paths", paths.len());
    let fuse = fs::metadata(site.lab.serve.overlay()).unwrap();
    let connection = format!("/sys/fs/fuse/connections/{}", rustix::fs::minor(fuse.dev()));
    as_user(|| {
        // Known to everybody: that there is a root.
        assert!(site.root().metadata().unwrap().is_dir());
        refused(site.root(), fs::read_dir(site.root()));
        refused("new file", File::create(site.root().join("new")));
        refused("mode", fs::set_permissions(site.root(), Permissions::from_mode(0o777)));
        refused("owner", chown(site.root(), Some(super::USER_ID), None));
        for path in &paths {
            is_closed(path);
        }
        for mount in [site.lab.serve.overlay(), site.root().join("layers")] {
            let unmounted = rustix::mount::unmount(&mount, UnmountFlags::DETACH);
            refused(mount, unmounted.map_err(io::Error::from));
        }
        for file in ["abort", "waiting"] {
            let file = Path::new(&connection).join(file);
            // The file system may not be mounted.
            if file.parent().is_some_and(Path::exists) {
                refused(&file, OpenOptions::new().write(true).open(&file));
            }
        }
    });
    site.private.check(&site.private_layer);
}

/// Panics unless the calling thread can do nothing with `path`, which exists.
fn is_closed(path: &Path) {
    refused(path, path.symlink_metadata());
    refused(path, File::open(path));
    refused(path, OpenOptions::new().write(true).open(path));
    refused(path, fs::read_dir(path));
    refused(path, fs::read_link(path));
    refused(path, fs::remove_file(path));
    refused(path, fs::rename(path, "/tmp/stolen"));
    refused(path, fs::hard_link(path, "/tmp/stolen"));
    refused(path, fs::set_permissions(path, Permissions::from_mode(0o777)));
    refused(path, File::create(path.join("new")));
    refused(path, symlink("/etc", path.with_extension("new")));
}

#[test]
fn ordinary_user_reaches_no_socket() {
    let site = Site::start();
    let sockets = [
        site.root().join("nydus-store.sock"),
        site.root().join("supervisor.sock"),
    ];
    assert!(sockets.iter().all(|socket| socket.exists()));
    as_user(|| {
        refused("stream", UnixStream::connect(&sockets[0]));
        let datagram = UnixDatagram::unbound().unwrap();
        refused("datagram", datagram.send_to(b"STOPPING=1", &sockets[1]));
    });
    for id in site.processes() {
        let abstract_ones = abstract_sockets(id);
        assert!(abstract_ones.is_empty(), "{abstract_ones:?}");
    }
}

/// Names of a process's sockets that are not files, which every user of a network namespace can reach.
fn abstract_sockets(process: u32) -> Vec<String> {
    let fds = fs::read_dir(format!("/proc/{process}/fd")).unwrap();
    // May be closed meanwhile.
    let targets: Vec<_> = fds.filter_map(|fd| fs::read_link(fd.ok()?.path()).ok()).collect();
    let is_own = |inode: &str| targets.contains(&PathBuf::from(format!("socket:[{inode}]")));
    let sockets = fs::read_to_string("/proc/net/unix").unwrap();
    let named = sockets.lines().filter_map(|line| {
        let words: Vec<_> = line.split_whitespace().collect();
        (words.len() == 8 && is_own(words[6])).then(|| words[7].to_owned())
    });
    named.filter(|name| name.starts_with('@')).collect()
}

#[test]
fn ordinary_user_cannot_look_into_the_processes() {
    let site = Site::start();
    for id in site.processes() {
        let proc = PathBuf::from(format!("/proc/{id}"));
        // The memory file with the credentials is one of them.
        let fds: Vec<_> = fs::read_dir(proc.join("fd"))
            .unwrap()
            .map(|fd| fd.unwrap().path())
            .collect();
        let memory_files = fds
            .iter()
            .filter(|fd| fs::read_link(fd).is_ok_and(|target| target.to_string_lossy().contains("memfd:")));
        assert!(memory_files.count() > 0);
        as_user(|| {
            for file in [
                "environ", "maps", "smaps", "mem", "auxv", "pagemap", "io", "stack", "syscall",
            ] {
                // Some are missing, depending on the kernel.
                if proc.join(file).exists() {
                    refused(proc.join(file), fs::read(proc.join(file)));
                }
            }
            for dir in ["fd", "fdinfo", "map_files", "root/etc"] {
                refused(proc.join(dir), fs::read_dir(proc.join(dir)));
            }
            for link in ["root", "cwd", "exe"] {
                refused(proc.join(link), fs::read_link(proc.join(link)));
            }
            for fd in &fds {
                refused(fd, File::open(fd));
            }
            refused(id, take_memory(id));
            let said = ["cmdline", "status", "comm"].map(|file| fs::read_to_string(proc.join(file)).unwrap());
            assert!(!shows_secret(&said.concat()));
        });
    }
    site.private.check(&site.private_layer);
}

/// Tries what reads another process's descriptors or memory, or stops it.
fn take_memory(id: u32) -> io::Result<()> {
    let pid = Pid::from_raw(id.cast_signed()).unwrap();
    refused(
        "signal",
        rustix::process::kill_process(pid, Signal::KILL).map_err(io::Error::from),
    );
    let handle = rustix::process::pidfd_open(pid, PidfdFlags::empty()).unwrap();
    for fd in 0..64 {
        let taken = rustix::process::pidfd_getfd(handle.as_fd(), fd, PidfdGetfdFlags::empty());
        refused(fd, taken.map_err(io::Error::from));
    }
    // SAFETY: PTRACE_SEIZE takes no addresses.
    let attached = unsafe { libc::ptrace(libc::PTRACE_SEIZE, id, 0, 0) };
    match attached {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

/// Whether the text contains the password, in any of its forms.
fn shows_secret(text: &str) -> bool {
    let encoded = authorization();
    text.contains(PASSWORD) || text.contains(encoded.trim_start_matches("Basic "))
}

#[test]
fn log_and_metrics_tell_no_secrets() {
    let site = Site::start();
    let (log, metrics) = (site.lab.serve.log(), as_user(|| metrics_on(site.port)));
    assert!(log.contains("DEBUG"));
    assert!(!shows_secret(&log) && !shows_secret(&metrics));
    let digests = [&site.private.image.manifest_digest(), &site.private.data_digest()];
    for name in ["private", "public"]
        .into_iter()
        .map(str::to_owned)
        .chain(digests.map(Digest::hex))
    {
        assert!(!metrics.contains(&name), "{name} is in:\n{metrics}");
    }
}
