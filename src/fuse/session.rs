//! Opens a FUSE session: mounts, answers the kernel's INIT with the capabilities that are wanted, and lets `fuser`
//! serve what follows.
//!
//! `fuser` has its own handshake, but offers neither id-mapped mounts (`FUSE_ALLOW_IDMAP`, which `podman run
//! --userns=auto` needs) nor a way to go on serving a descriptor that is already in use. So the kernel's INIT is
//! answered here, and `fuser` shakes hands with a socket instead, over which the real descriptor is put afterwards.
//! The structures are those of the kernel's `include/uapi/linux/fuse.h`.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read as _, Write as _},
    mem::ManuallyDrop,
    os::fd::{AsFd as _, AsRawFd as _, FromRawFd as _, OwnedFd},
    path::{Path, PathBuf},
    sync::Arc,
    thread::JoinHandle,
    time::{Duration, Instant},
};

use fuser::{Config, InitFlags, Notifier, Session, SessionACL};
use rustix::{
    mount::{MountFlags, UnmountFlags},
    net::{AddressFamily, SocketFlags, SocketType, socketpair},
};
use tokio::runtime::Handle;

use super::adapter::Adapter;
use crate::vfs::FileSystem;

/// Why a file system cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// There is no FUSE here.
    #[error("cannot open /dev/fuse: {0}; load the kernel module `fuse`, or give the container the device")]
    Device(#[source] io::Error),
    /// The mount was refused.
    #[error("cannot mount on {dir}: {source}; mounting needs root (CAP_SYS_ADMIN)")]
    Mount {
        /// The mount point.
        dir: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The kernel's first message is not what it should be.
    #[error("the kernel's FUSE handshake failed: {0}")]
    Handshake(#[source] io::Error),
    /// The kernel is too old.
    #[error("the kernel speaks FUSE {major}.{minor}; 7.31 (Linux 5.4) is the oldest that is supported")]
    TooOld {
        /// Its major version.
        major: u32,
        /// Its minor version.
        minor: u32,
    },
    /// `fuser` cannot serve.
    #[error("cannot serve: {0}")]
    Serve(#[source] io::Error),
}

/// How to serve.
#[derive(Debug, Clone)]
pub struct Options {
    /// Threads that read requests: at least 1.
    pub threads: usize,
    /// What `mount` shows as the source.
    pub name: String,
}

/// A mounted file system that is being served.
pub struct Mounted {
    dir: PathBuf,
    serving: Option<JoinHandle<io::Result<()>>>,
    notifier: Notifier,
    /// Whether the kernel lets this mount be id-mapped.
    pub idmap: bool,
}

// `struct fuse_in_header`, `fuse_init_in` and `fuse_init_out` with their headers, in bytes.
const IN_HEADER: usize = 40;
const INIT_IN: usize = IN_HEADER + 64;
const OUT_HEADER: usize = 16;
const INIT_OUT: usize = OUT_HEADER + 64;
const FUSE_INIT: u32 = 26;
/// The protocol version that is spoken here; no newer reply is used.
const MINOR: u32 = 41;
const OLDEST_MINOR: u32 = 31;
/// The kernel's default is 128 KiB, which is one round trip each; a readahead window of a chunk is better.
const READAHEAD_KIB: u32 = 1024;
/// Pages in one request: 1 MiB, the most an unprivileged `fs.fuse.max_pages_limit` allows.
const MAX_PAGES: u16 = 256;
/// How long a session may take to end once nothing uses it.
const ENDING: Duration = Duration::from_secs(2);
/// Reads in flight that the kernel starts by itself (readahead), before it starts no more that nobody waits for.
const CONGESTED: u16 = 48;
/// Reads in flight before the kernel lets further readers wait, of whatever image: nearly all reads of files count.
/// Those that wait for a silent registry are to leave room for the others.
const MAX_BACKGROUND: u16 = 8192;

/// What is asked of the kernel, as far as it offers it.
fn wanted() -> InitFlags {
    InitFlags::FUSE_ASYNC_READ
        | InitFlags::FUSE_BIG_WRITES
        | InitFlags::FUSE_DO_READDIRPLUS
        | InitFlags::FUSE_READDIRPLUS_AUTO
        | InitFlags::FUSE_NO_OPEN_SUPPORT
        | InitFlags::FUSE_NO_OPENDIR_SUPPORT
        | InitFlags::FUSE_PARALLEL_DIROPS
        | InitFlags::FUSE_POSIX_ACL
        | InitFlags::FUSE_CACHE_SYMLINKS
        | InitFlags::FUSE_EXPLICIT_INVAL_DATA
        | InitFlags::FUSE_MAX_PAGES
        | InitFlags::FUSE_INIT_EXT
        | InitFlags::FUSE_ALLOW_IDMAP
}

/// Mounts `fs` on `dir` and serves it until it is unmounted.
pub fn mount<F: FileSystem>(
    fs: Arc<F>,
    dir: &Path,
    options: &Options,
    runtime: Handle,
) -> Result<Mounted, SessionError> {
    let device = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/fuse")
        .map_err(SessionError::Device)?;
    mount_device(&device, dir, options)?;
    let mounted = handshake(&device).and_then(|idmap| {
        widen_readahead(dir);
        let session = session(Adapter::new(fs, runtime), device, options).map_err(SessionError::Serve)?;
        let notifier = session.notifier();
        let serving = std::thread::Builder::new()
            .name("fuse".to_owned())
            .spawn(move || session.run());
        let serving = Some(serving.map_err(SessionError::Serve)?);
        Ok(Mounted {
            dir: dir.to_owned(),
            serving,
            notifier,
            idmap,
        })
    });
    mounted.inspect_err(|_| unmount(dir, UnmountFlags::DETACH))
}

fn mount_device(device: &File, dir: &Path, options: &Options) -> Result<(), SessionError> {
    let data = format!(
        "fd={},rootmode=40000,user_id=0,group_id=0,allow_other,default_permissions\0",
        device.as_raw_fd()
    );
    // The format has one NUL, at its end.
    let data = std::ffi::CStr::from_bytes_until_nul(data.as_bytes()).unwrap_or_default();
    let flags = MountFlags::NODEV | MountFlags::NOSUID | MountFlags::NOATIME | MountFlags::RDONLY;
    rustix::mount::mount(options.name.as_str(), dir, super::mountpoint::FS_TYPE, flags, data).map_err(|error| {
        SessionError::Mount {
            dir: dir.to_owned(),
            source: error.into(),
        }
    })
}

/// Answers the kernel's INIT. Tells whether id-mapped mounts were granted.
fn handshake(mut device: &File) -> Result<bool, SessionError> {
    let mut request = [0; 8192];
    let len = device.read(&mut request).map_err(SessionError::Handshake)?;
    let field = |index: usize| {
        let at = IN_HEADER + 4 * index;
        let bytes = request[..len].get(at..at + 4)?;
        Some(u32::from_ne_bytes(bytes.try_into().ok()?))
    };
    let (Some(major), Some(minor), Some(readahead), Some(low)) = (field(0), field(1), field(2), field(3)) else {
        return Err(SessionError::Handshake(io::Error::other(
            "the first message is too short",
        )));
    };
    if major != 7 || minor < OLDEST_MINOR {
        return Err(SessionError::TooOld { major, minor });
    }
    let extended = low & InitFlags::FUSE_INIT_EXT.bits() as u32 != 0;
    let high = if extended { field(4).unwrap_or(0) } else { 0 };
    let flags = wanted() & InitFlags::from_bits_retain(u64::from(high) << 32 | u64::from(low));
    let unique = &request[8..16];
    device
        .write_all(&init_reply(unique, minor.min(MINOR), readahead, flags))
        .map_err(SessionError::Handshake)?;
    tracing::debug!(kernel_minor = minor, ?flags, "FUSE session opened");
    Ok(flags.contains(InitFlags::FUSE_ALLOW_IDMAP))
}

/// A `fuse_out_header` and a `fuse_init_out`.
fn init_reply(unique: &[u8], minor: u32, readahead: u32, flags: InitFlags) -> Vec<u8> {
    let mut reply = Vec::with_capacity(INIT_OUT);
    reply.extend((INIT_OUT as u32).to_ne_bytes());
    reply.extend(0i32.to_ne_bytes());
    reply.extend(unique);
    for word in [7, minor, readahead.max(READAHEAD_KIB << 10), flags.bits() as u32] {
        reply.extend(word.to_ne_bytes());
    }
    for half in [MAX_BACKGROUND, CONGESTED] {
        reply.extend(half.to_ne_bytes());
    }
    let (max_write, time_granularity) = (1u32 << 20, 1u32);
    reply.extend(max_write.to_ne_bytes());
    reply.extend(time_granularity.to_ne_bytes());
    reply.extend(MAX_PAGES.to_ne_bytes());
    reply.extend(0u16.to_ne_bytes());
    reply.extend(((flags.bits() >> 32) as u32).to_ne_bytes());
    reply.resize(INIT_OUT, 0);
    reply
}

/// Lets `fuser` shake hands with a socket, then puts the real device in the socket's place.
fn session<F: FileSystem>(fs: Adapter<F>, device: File, options: &Options) -> io::Result<Session<Adapter<F>>> {
    let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    rustix::io::write(&ours, &synthetic_init())?;
    let mut config = Config::default();
    config.n_threads = Some(options.threads);
    config.clone_fd = true;
    let session = Session::from_fd(fs, theirs, SessionACL::All, config)?;
    // SAFETY: the descriptor belongs to the session, which outlives this copy of it; `ManuallyDrop` keeps the copy
    // from closing it. dup3(2) replaces what the number stands for in one step.
    let mut place = ManuallyDrop::new(unsafe { OwnedFd::from_raw_fd(session.as_fd().as_raw_fd()) });
    rustix::io::dup3(&device, &mut place, rustix::io::DupFlags::CLOEXEC)?;
    Ok(session)
}

/// An INIT request for `fuser`'s own handshake: it asks for nothing, and its answer goes nowhere.
fn synthetic_init() -> Vec<u8> {
    let mut request = Vec::with_capacity(INIT_IN);
    request.extend((INIT_IN as u32).to_ne_bytes());
    request.extend(FUSE_INIT.to_ne_bytes());
    request.extend(1u64.to_ne_bytes());
    request.resize(IN_HEADER, 0);
    for word in [7, MINOR, READAHEAD_KIB << 10] {
        request.extend(word.to_ne_bytes());
    }
    request.resize(INIT_IN, 0);
    request
}

/// The kernel caps readahead at what the mount's backing device says, whatever INIT answers. Failing is harmless.
fn widen_readahead(dir: &Path) {
    let Some(device) = super::mountpoint::device_number(dir) else {
        return;
    };
    let path = format!("/sys/class/bdi/{device}/read_ahead_kb");
    if let Err(error) = fs::write(&path, READAHEAD_KIB.to_string()) {
        tracing::debug!(path, %error, "cannot widen the kernel's readahead");
    }
}

fn unmount(dir: &Path, flags: UnmountFlags) {
    if let Err(error) = rustix::mount::unmount(dir, flags) {
        tracing::warn!(dir = %dir.display(), %error, "cannot unmount");
    }
}

impl Mounted {
    /// Tells the kernel what to drop from its caches.
    pub fn notifier(&self) -> Notifier {
        self.notifier.clone()
    }

    /// Unmounts. If something still uses the mount it is taken off its place and ends with this process; then the
    /// answer is `false`.
    pub fn unmount(mut self) -> bool {
        if self.is_over() {
            // Somebody else took it off; what is in its place by now is not ours.
            return true;
        }
        if rustix::mount::unmount(&self.dir, UnmountFlags::empty()).is_err() {
            unmount(&self.dir, UnmountFlags::DETACH);
        }
        // An overlay has a mount of its own of what is below it: while a container runs, unmounting succeeds and yet
        // the session goes on.
        let start = Instant::now();
        while !self.is_over() && start.elapsed() < ENDING {
            std::thread::sleep(Duration::from_millis(10));
        }
        let over = self.is_over();
        if let Some(serving) = self.serving.take().filter(|_| over)
            && !matches!(serving.join(), Ok(Ok(())))
        {
            tracing::warn!("the FUSE session did not end as it should");
        }
        over
    }

    /// Whether the session has ended, because somebody else unmounted it.
    pub fn is_over(&self) -> bool {
        self.serving.as_ref().is_none_or(JoinHandle::is_finished)
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if self.serving.is_some() && !self.is_over() {
            unmount(&self.dir, UnmountFlags::DETACH);
        }
    }
}
