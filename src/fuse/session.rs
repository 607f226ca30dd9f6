//! Opens a FUSE session: mounts, replies to the kernel's INIT with the desired capabilities, and has `fuser` serve the
//! rest.
//!
//! `fuser` has its own handshake, but supports neither id-mapped mounts (`FUSE_ALLOW_IDMAP`, required by `podman run
//! --userns=auto`) nor a descriptor whose session has begun. So the kernel's INIT is answered here. `fuser` does its
//! handshake with a socket, and the real descriptor then replaces the socket. The structures are those of the kernel's
//! `include/uapi/linux/fuse.h`.

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

use fuser::{Config, InitFlags, Session, SessionACL};
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
    /// FUSE is not available.
    #[error("cannot open /dev/fuse: {0}; load the kernel module `fuse`, or pass the device to the container")]
    Device(#[source] io::Error),
    /// The kernel refused the mount.
    #[error("cannot mount on {dir}: {source}; mounting needs root (CAP_SYS_ADMIN)")]
    Mount {
        /// The mount point.
        dir: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The kernel's first message is malformed.
    #[error("FUSE handshake failed: {0}")]
    Handshake(#[source] io::Error),
    /// The kernel is too old.
    #[error("unsupported FUSE version {major}.{minor}; at least 7.31 (Linux 5.4) is required")]
    TooOld {
        /// Major version of the protocol.
        major: u32,
        /// Minor version of the protocol.
        minor: u32,
    },
    /// `fuser` cannot serve the session.
    #[error("cannot serve FUSE session: {0}")]
    Serve(#[source] io::Error),
}

/// Options of a mount.
#[derive(Debug, Clone)]
pub struct MountOptions {
    /// Number of threads that read requests; at least 1.
    pub threads: usize,
    /// Source of the mount, as shown by `mount`.
    pub name: String,
}

/// A mounted file system in service.
pub struct Mounted {
    dir: PathBuf,
    serving: Option<JoinHandle<io::Result<()>>>,
    /// Whether the kernel allows this mount to be id-mapped.
    pub idmap: bool,
}

// Sizes of `struct fuse_in_header`, `fuse_init_in`, `fuse_out_header` and `fuse_init_out`, in bytes. INIT sizes include
// headers.
const IN_HEADER_LEN: usize = 40;
const INIT_IN_LEN: usize = IN_HEADER_LEN + 64;
const OUT_HEADER_LEN: usize = 16;
const INIT_OUT_LEN: usize = OUT_HEADER_LEN + 64;
const FUSE_INIT: u32 = 26;
/// Minor version of the protocol used here. Newer replies are not used.
const MINOR: u32 = 41;
const MIN_MINOR: u32 = 31;
/// Read-ahead of the kernel. With its default of 128 KiB, each chunk would take several round trips.
const READAHEAD_KIB: u32 = 1024;
/// Maximum number of pages in a request: 1 MiB, the most that an unprivileged `fs.fuse.max_pages_limit` allows.
const MAX_PAGES: u16 = 256;
/// How long a session may take to end once it is unused.
const END_TIMEOUT: Duration = Duration::from_secs(2);
/// Number of the kernel's read-ahead requests in flight beyond which it starts no more of them.
const CONGESTION_THRESHOLD: u16 = 48;
/// Number of reads in flight, over all images, beyond which the kernel blocks readers. Nearly all file reads count.
/// Large, so that reads from a silent registry leave room for others.
const MAX_BACKGROUND: u16 = 8192;

/// Capabilities to request, as far as the kernel offers them.
fn wanted_flags() -> InitFlags {
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
    options: &MountOptions,
    runtime: Handle,
) -> Result<Mounted, SessionError> {
    let device = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/fuse")
        .map_err(SessionError::Device)?;
    mount_device(&device, dir, options)?;
    let mounted = handshake(&device).and_then(|idmap| {
        raise_readahead_limit(dir);
        let session = session(Adapter::new(fs, runtime), &device, options).map_err(SessionError::Serve)?;
        let serving = std::thread::Builder::new()
            .name("fuse".to_owned())
            .spawn(move || session.run());
        let serving = Some(serving.map_err(SessionError::Serve)?);
        Ok(Mounted {
            dir: dir.to_owned(),
            serving,
            idmap,
        })
    });
    mounted.inspect_err(|_| unmount(dir, UnmountFlags::DETACH))
}

fn mount_device(device: &File, dir: &Path, options: &MountOptions) -> Result<(), SessionError> {
    let data = format!(
        "fd={},rootmode=40000,user_id=0,group_id=0,allow_other,default_permissions\0",
        device.as_raw_fd()
    );
    // The string contains one NUL, at its end.
    let data = std::ffi::CStr::from_bytes_until_nul(data.as_bytes()).unwrap_or_default();
    let flags = MountFlags::NODEV | MountFlags::NOSUID | MountFlags::NOATIME | MountFlags::RDONLY;
    rustix::mount::mount(options.name.as_str(), dir, super::mountpoint::FS_TYPE, flags, data).map_err(|error| {
        SessionError::Mount {
            dir: dir.to_owned(),
            source: error.into(),
        }
    })
}

/// Replies to the kernel's INIT. Returns whether id-mapped mounts were granted.
fn handshake(mut device: &File) -> Result<bool, SessionError> {
    let mut request = [0; 8192];
    let len = device.read(&mut request).map_err(SessionError::Handshake)?;
    let field = |index: usize| {
        let at = IN_HEADER_LEN + 4 * index;
        let bytes = request[..len].get(at..at + 4)?;
        Some(u32::from_ne_bytes(bytes.try_into().ok()?))
    };
    let (Some(major), Some(minor), Some(readahead), Some(low)) = (field(0), field(1), field(2), field(3)) else {
        return Err(SessionError::Handshake(io::Error::other("first message is too short")));
    };
    if major != 7 || minor < MIN_MINOR {
        return Err(SessionError::TooOld { major, minor });
    }
    let extended = low & InitFlags::FUSE_INIT_EXT.bits() as u32 != 0;
    let high = if extended { field(4).unwrap_or(0) } else { 0 };
    let flags = wanted_flags() & InitFlags::from_bits_retain(u64::from(high) << 32 | u64::from(low));
    let unique = &request[8..16];
    device
        .write_all(&init_reply(unique, minor.min(MINOR), readahead, flags))
        .map_err(SessionError::Handshake)?;
    tracing::debug!(kernel_minor = minor, ?flags, "opened FUSE session");
    Ok(flags.contains(InitFlags::FUSE_ALLOW_IDMAP))
}

/// Encodes a `fuse_out_header` and a `fuse_init_out`.
fn init_reply(unique: &[u8], minor: u32, readahead: u32, flags: InitFlags) -> Vec<u8> {
    let mut reply = Vec::with_capacity(INIT_OUT_LEN);
    reply.extend((INIT_OUT_LEN as u32).to_ne_bytes());
    reply.extend(0i32.to_ne_bytes());
    reply.extend(unique);
    for word in [7, minor, readahead.max(READAHEAD_KIB << 10), flags.bits() as u32] {
        reply.extend(word.to_ne_bytes());
    }
    for half in [MAX_BACKGROUND, CONGESTION_THRESHOLD] {
        reply.extend(half.to_ne_bytes());
    }
    let (max_write, time_granularity) = (1u32 << 20, 1u32);
    reply.extend(max_write.to_ne_bytes());
    reply.extend(time_granularity.to_ne_bytes());
    reply.extend(MAX_PAGES.to_ne_bytes());
    reply.extend(0u16.to_ne_bytes());
    reply.extend(((flags.bits() >> 32) as u32).to_ne_bytes());
    reply.resize(INIT_OUT_LEN, 0);
    reply
}

/// Has `fuser` do its handshake with a socket, then replaces the socket by the real device.
fn session<F: FileSystem>(fs: Adapter<F>, device: &File, options: &MountOptions) -> io::Result<Session<Adapter<F>>> {
    let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    rustix::io::write(&ours, &synthetic_init())?;
    let mut config = Config::default();
    config.n_threads = Some(options.threads);
    config.clone_fd = true;
    let session = Session::from_fd(fs, theirs, SessionACL::All, config)?;
    #[expect(unsafe_code, reason = "fuser takes no device that has done its handshake")]
    // SAFETY: the session owns the descriptor and outlives this copy of it, which `ManuallyDrop` does not close.
    // dup3(2) replaces the file behind the number atomically.
    let mut place = ManuallyDrop::new(unsafe { OwnedFd::from_raw_fd(session.as_fd().as_raw_fd()) });
    rustix::io::dup3(device, &mut place, rustix::io::DupFlags::CLOEXEC)?;
    Ok(session)
}

/// An INIT request for the handshake of `fuser`. It requests nothing, and the reply is discarded.
fn synthetic_init() -> Vec<u8> {
    let mut request = Vec::with_capacity(INIT_IN_LEN);
    request.extend((INIT_IN_LEN as u32).to_ne_bytes());
    request.extend(FUSE_INIT.to_ne_bytes());
    request.extend(1u64.to_ne_bytes());
    request.resize(IN_HEADER_LEN, 0);
    for word in [7, MINOR, READAHEAD_KIB << 10] {
        request.extend(word.to_ne_bytes());
    }
    request.resize(INIT_IN_LEN, 0);
    request
}

/// Raises the read-ahead limit of the mount's backing device, which applies in addition to that of INIT. A failure is
/// harmless.
fn raise_readahead_limit(dir: &Path) {
    let Some(device) = super::mountpoint::device_number(dir) else {
        return;
    };
    let path = format!("/sys/class/bdi/{device}/read_ahead_kb");
    if let Err(error) = fs::write(&path, READAHEAD_KIB.to_string()) {
        tracing::debug!(file = %path, %error, "failed to raise read-ahead limit");
    }
}

fn unmount(dir: &Path, flags: UnmountFlags) {
    if let Err(error) = rustix::mount::unmount(dir, flags) {
        tracing::warn!(dir = %dir.display(), %error, "failed to unmount");
    }
}

impl Mounted {
    /// Unmounts. If the mount is still in use, it is detached and ends with this process; the result is then `false`.
    pub fn unmount(mut self) -> bool {
        if self.has_ended() {
            // Unmounted externally: another mount may be on the directory by now.
            return true;
        }
        if rustix::mount::unmount(&self.dir, UnmountFlags::empty()).is_err() {
            unmount(&self.dir, UnmountFlags::DETACH);
        }
        // An overlay clones the mount of its lower layer. So unmounting succeeds while a container runs, and the
        // session continues.
        let start = Instant::now();
        while !self.has_ended() && start.elapsed() < END_TIMEOUT {
            std::thread::sleep(Duration::from_millis(10));
        }
        let has_ended = self.has_ended();
        if let Some(serving) = self.serving.take().filter(|_| has_ended) {
            let ended = serving.join();
            if let Err(error) = ended.unwrap_or_else(|_| Err(io::Error::other("a thread panicked"))) {
                tracing::warn!(%error, "failed to serve FUSE session");
            }
        }
        has_ended
    }

    /// Whether the session has ended, because the file system was unmounted externally.
    pub fn has_ended(&self) -> bool {
        self.serving.as_ref().is_none_or(JoinHandle::is_finished)
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if self.serving.is_some() && !self.has_ended() {
            unmount(&self.dir, UnmountFlags::DETACH);
        }
    }
}
