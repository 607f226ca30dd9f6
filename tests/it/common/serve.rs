//! [`Serve`]: `nydus-store serve` as a process, and [`StoreLayer`]: a layer in its store.

use std::{
    fs::{self, File},
    io,
    os::{fd::AsRawFd as _, unix::process::CommandExt as _},
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::Duration,
};

use nydus_store::internals::{Digest, Logins, Reply, control};
use rustix::{
    mount::{MountFlags, MountPropagationFlags, UnmountFlags},
    process::{Pid, Signal},
};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::process::{Guard, output, wait_until};

/// The program under test.
pub const BINARY: &str = env!("CARGO_BIN_EXE_nydus-store");

/// A daemon with its own root.
pub struct Serve {
    process: Option<Guard>,
    root: PathBuf,
    config: PathBuf,
    _shared: Option<SharedMount>,
    // Dropped last, because it contains the mount.
    _dir: TempDir,
}

impl Serve {
    /// Starts a daemon with the default configuration.
    pub fn start() -> Self {
        Self::with_config("")
    }

    /// Starts a daemon with this configuration (TOML).
    pub fn with_config(config: &str) -> Self {
        let mut serve = Self::prepare(config);
        serve.launch();
        serve
    }

    /// Starts a daemon below a supervisor.
    pub fn supervised(config: &str) -> Self {
        let mut serve = Self::prepare(config);
        serve.launch_with(|command| _ = command.arg("--supervise"));
        serve
    }

    /// Process id of the daemon below a supervisor; `None` while there is none.
    pub fn supervised_id(&self) -> Option<u32> {
        let id = self.process.as_ref()?.id();
        let children = fs::read_to_string(format!("/proc/{id}/task/{id}/children")).ok()?;
        children.split_whitespace().next()?.parse().ok()
    }

    /// Sends a signal to the daemon below a supervisor, if there is one now.
    pub fn signal_supervised(&self, signal: Signal) {
        let pid = self.supervised_id().and_then(|id| Pid::from_raw(id.cast_signed()));
        if let Some(pid) = pid {
            rustix::process::kill_process(pid, signal).ok();
        }
    }

    /// Number of times that a daemon began to serve.
    pub fn times_served(&self) -> usize {
        self.log().matches(" serving ").count()
    }

    /// Like [`Self::with_config`], with its root on a shared mount: mounts propagate to other mount namespaces.
    pub fn shared(config: &str) -> Self {
        let mut serve = Self::prepare_shared(config);
        serve.launch();
        serve
    }

    /// Like [`Self::prepare`], with the root on a shared mount.
    pub fn prepare_shared(config: &str) -> Self {
        let mut serve = Self::prepare(config);
        serve._shared = Some(SharedMount::new(serve._dir.path()));
        serve
    }

    /// Like [`Self::prepare`], with the root on a file system of its own of so many bytes.
    pub fn prepare_on_tmpfs(config: &str, bytes: u64) -> Self {
        let mut serve = Self::prepare(config);
        fs::create_dir(&serve.root).unwrap();
        serve._shared = Some(SharedMount::tmpfs(&serve.root, bytes));
        serve
    }

    /// Writes the configuration without starting the daemon or creating its root.
    pub fn prepare(config: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (root, path) = (dir.path().join("root"), dir.path().join("config.toml"));
        fs::write(&path, config).unwrap();
        Self {
            process: None,
            root,
            config: path,
            _shared: None,
            _dir: dir,
        }
    }

    /// Runs `nydus-store setup` for this daemon, with `tree` as sysroot and `config` as configuration file.
    pub fn set_up(&self, tree: &Path, config: &Path, args: &[&str]) {
        let mut command = Command::new(BINARY);
        command.args(["setup", "--sysroot"]).arg(tree);
        command.arg("--root").arg(&self.root).arg("--config").arg(config);
        output(command.args(args));
    }

    /// The command that starts this daemon.
    pub fn command(&self) -> Command {
        let mut command = Command::new(BINARY);
        command
            .args(["--log", "info,nydus_store=debug", "serve", "--root"])
            .arg(&self.root);
        command.arg("--config").arg(&self.config);
        command
    }

    /// Starts the daemon, or starts it again on the same root, and waits until it serves.
    pub fn launch(&mut self) {
        self.launch_with(|_| ());
    }

    /// Like [`Self::launch`], after `change` has modified the command.
    pub fn launch_with(&mut self, change: impl FnOnce(&mut Command)) {
        let log = File::options().create(true).append(true).open(self.log_path()).unwrap();
        let served_before = self.log().matches("serving").count();
        let mut command = self.command();
        change(&mut command);
        self.process = Some(Guard(command.stderr(log).spawn().unwrap()));
        wait_until("the daemon serves", || {
            assert!(self.is_running(), "the daemon exited:\n{}", self.log());
            (self.log().matches("serving").count() > served_before).then_some(())
        });
    }

    /// Like [`Self::launch`], in a new network namespace that has only a loopback interface.
    pub fn launch_without_network(&mut self) {
        self.launch_with(|command| {
            // SAFETY: between fork and exec, the closure makes only system calls.
            unsafe { command.pre_exec(alone_on_loopback) };
        });
    }

    /// Stops the daemon (SIGTERM) and starts it again on the same root.
    pub fn restart(&mut self) {
        self.stop();
        self.launch();
    }

    /// Kills the daemon; its mounts stay behind.
    pub fn kill(&mut self) {
        self.process().signal(Signal::KILL);
        self.process.as_mut().unwrap().wait(Duration::from_secs(10)).unwrap();
    }

    /// Kills the daemon and starts it again on the same root, where its mounts stay behind.
    pub fn kill_and_restart(&mut self) {
        self.kill();
        self.launch();
    }

    /// Stops the daemon (SIGTERM). Panics unless it exits with success within 20 seconds.
    pub fn stop(&mut self) {
        self.process().signal(Signal::TERM);
        let status = self
            .process
            .as_mut()
            .unwrap()
            .wait(Duration::from_secs(20))
            .expect("the daemon stops");
        assert!(status.success(), "{status}:\n{}", self.log());
    }

    /// Waits until the daemon exits. Panics after 20 seconds.
    pub fn wait(&mut self) -> std::process::ExitStatus {
        let ended = self.process.as_mut().unwrap().wait(Duration::from_secs(20));
        ended.expect("the daemon exits")
    }

    /// The daemon's process.
    pub fn process(&self) -> &Guard {
        self.process.as_ref().unwrap()
    }

    /// Whether the daemon is alive; a zombie is not.
    pub fn is_running(&self) -> bool {
        Path::new(&format!("/proc/{}/exe", self.process().id())).exists()
            && fs::read_link(format!("/proc/{}/exe", self.process().id())).is_ok()
    }

    /// Process id of the daemon.
    pub fn id(&self) -> u32 {
        self.process().id()
    }

    /// The daemon's root.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The image store.
    pub fn store(&self) -> PathBuf {
        self.root.join("store")
    }

    /// The FUSE mount with the layers' files.
    pub fn overlay(&self) -> PathBuf {
        self.store().join("overlay")
    }

    /// Path of the daemon's log.
    pub fn log_path(&self) -> PathBuf {
        self.root.with_extension("log")
    }

    /// The daemon's configuration file.
    pub fn config_path(&self) -> &Path {
        &self.config
    }

    /// The daemon's log so far.
    pub fn log(&self) -> String {
        fs::read_to_string(self.log_path()).unwrap_or_default()
    }

    /// Resident memory of the daemon in bytes (VmRSS, proc(5)).
    pub fn resident_bytes(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.id())).unwrap();
        let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() << 10
    }

    /// A layer of the image `reference`.
    pub fn layer(&self, reference: &str, digest: &Digest) -> StoreLayer {
        StoreLayer {
            root: self.root.clone(),
            reference: reference.to_owned(),
            digest: *digest,
        }
    }
}

impl Drop for Serve {
    fn drop(&mut self) {
        // The daemon below a supervisor would survive it.
        let daemon = self.supervised_id().and_then(|id| Pid::from_raw(id.cast_signed()));
        self.process = None;
        if let Some(daemon) = daemon {
            rustix::process::kill_process(daemon, Signal::KILL).ok();
            wait_until("the daemon is dead", || {
                rustix::process::test_kill_process(daemon).is_err().then_some(())
            });
        }
    }
}

/// Moves the process to a new network namespace with its loopback interface up.
fn alone_on_loopback() -> io::Result<()> {
    // SAFETY: called after fork, so that no memory is shared with other threads.
    unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNET)? };
    let socket = rustix::net::socket(rustix::net::AddressFamily::INET, rustix::net::SocketType::DGRAM, None)?;
    // SAFETY: `ifreq` is plain old data; all zeros are valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    request.ifr_name[0] = b'l' as libc::c_char;
    request.ifr_name[1] = b'o' as libc::c_char;
    request.ifr_ifru.ifru_flags = libc::IFF_UP as libc::c_short;
    // SAFETY: SIOCSIFFLAGS (netdevice(7)) takes a `struct ifreq`.
    match unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// A directory that is a shared mount, as all mounts are under systemd.
struct SharedMount(PathBuf);

impl SharedMount {
    fn new(dir: &Path) -> Self {
        rustix::mount::mount_bind(dir, dir).unwrap();
        let shared = Self(dir.to_owned());
        rustix::mount::mount_change(dir, MountPropagationFlags::SHARED).unwrap();
        shared
    }

    /// A new file system on `dir`, which is a shared mount too.
    fn tmpfs(dir: &Path, bytes: u64) -> Self {
        let size = std::ffi::CString::new(format!("size={bytes},mode=0700")).unwrap();
        rustix::mount::mount("tmpfs", dir, "tmpfs", MountFlags::empty(), size.as_c_str()).unwrap();
        let shared = Self(dir.to_owned());
        rustix::mount::mount_change(dir, MountPropagationFlags::SHARED).unwrap();
        shared
    }
}

impl Drop for SharedMount {
    fn drop(&mut self) {
        rustix::mount::unmount(&self.0, UnmountFlags::DETACH).ok();
    }
}

/// A layer of an image in a daemon's store. Most methods publish the image first: by announcing a pull or, where that
/// is not enough, with `nydus-store pull`.
pub struct StoreLayer {
    root: PathBuf,
    reference: String,
    digest: Digest,
}

impl StoreLayer {
    /// The layer's directory. Nothing exists at the path if the image is not served.
    pub fn dir(&self) -> PathBuf {
        let id = self.id().or_else(|| self.announce_pull().then(|| self.id())?);
        let id = id.unwrap_or_else(|| "not-published".to_owned());
        self.root.join("store/overlay").join(id)
    }

    /// The layer's files.
    pub fn diff(&self) -> PathBuf {
        self.dir().join("diff")
    }

    /// The layer's record in `layers.json`.
    pub fn record(&self) -> Option<Value> {
        let layers = records(&self.root.join("store/overlay-layers/layers.json"));
        let digest = self.digest.to_string();
        let own = layers.iter().find(|layer| layer["compressed-diff-digest"] == digest);
        own.cloned()
    }

    fn id(&self) -> Option<String> {
        if let Some(record) = self.record() {
            return Some(record["id"].as_str()?.to_owned());
        }
        let images = records(&self.root.join("store/overlay-images/images.json"));
        let named = |image: &&Value| {
            let names = image["names"].as_array().into_iter().flatten();
            names.into_iter().any(|name| name == &self.reference)
        };
        Some(images.iter().find(named)?["layer"].as_str()?.to_owned())
    }

    /// Announces a pull of the image; returns whether the layer is published afterwards.
    pub fn pull_publishes(&self) -> bool {
        self.announce_pull() && fs::symlink_metadata(self.diff()).is_ok()
    }

    /// Whether the layer is published. If it is not, announces a pull of the image first.
    pub fn is_served(&self) -> bool {
        (self.id().is_some() || self.announce_pull()) && fs::symlink_metadata(self.diff()).is_ok()
    }

    /// Announces a pull of the image; returns whether the image is published afterwards.
    pub fn announce_pull(&self) -> bool {
        match announce(&self.root, &self.reference) {
            Some(Reply::Published(_)) => true,
            Some(Reply::Ordinary) => {
                let mut pull = Command::new(BINARY);
                pull.args(["pull", &self.reference, "--root"]).arg(&self.root);
                pull.output().unwrap().status.success()
            }
            _ => false,
        }
    }
}

fn records(path: &Path) -> Vec<Value> {
    serde_json::from_slice(&fs::read(path).unwrap_or_else(|_| b"[]".to_vec())).unwrap()
}

/// Announces a pull without credentials; `None` if no daemon answers.
fn announce(root: &Path, reference: &str) -> Option<Reply> {
    let json = json!({reference: {}}).to_string();
    let logins = Logins::read(json.as_bytes()).unwrap();
    let asked = || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            let mut replies = control::announce(root, &logins).await.unwrap()?;
            assert!(matches!(replies.next().await.unwrap(), Reply::Accepted(_)));
            // The test may stop the daemon meanwhile.
            replies.next().await.ok()
        })
    };
    // The calling thread may belong to a runtime, in which `block_on` panics.
    thread::scope(|scope| scope.spawn(asked).join().unwrap())
}
