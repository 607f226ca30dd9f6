//! FUSE sessions: begins one by mounting, or takes over one that an earlier process has begun, and serves it.
//!
//! A session ends when its last descriptor is closed. As long as another process holds one ([`crate::handover`]), the
//! kernel keeps all requests of readers, and the next process goes on. From Linux 6.9 on, requests that were read and
//! not answered are sent again. On older kernels they would wait forever. There, all requests are read from clones of
//! the descriptor: these are closed at the process's death, which makes the kernel fail the requests.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read as _, Write as _},
    os::fd::{AsFd, AsRawFd as _, BorrowedFd},
    path::{Path, PathBuf},
    sync::Arc,
    thread::JoinHandle,
    time::{Duration, Instant, SystemTime},
};

use rustix::mount::{MountFlags, UnmountFlags};
use serde::{Deserialize, Serialize};
use tokio::runtime::Handle;
use zerocopy::{FromBytes as _, IntoBytes as _};

use super::{
    abi::{InHeader, InitIn, InitOut, MAJOR, MIN_MINOR, MINOR, OutHeader, init_flag},
    channel::Channel,
    mountpoint,
    server::{REQUEST_BYTES, Server},
};
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
    /// Threads or descriptors are missing.
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

/// What the next process must know of a session.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionInfo {
    /// Device number (`major:minor`) of the mount.
    device: String,
    /// Generation of the nodes.
    generation: u64,
    /// Whether the kernel allows this mount to be id-mapped.
    pub idmap: bool,
    /// Whether the kernel can send unanswered requests again.
    resend: bool,
}

/// A session that has begun and is not served yet.
#[derive(Debug)]
pub struct FuseSession {
    dir: PathBuf,
    device: File,
    info: SessionInfo,
    /// Whether an earlier process has begun the session.
    is_inherited: bool,
}

/// A mounted file system in service.
pub struct Mounted {
    dir: PathBuf,
    serving: Vec<JoinHandle<io::Result<()>>>,
    /// Whether the kernel allows this mount to be id-mapped.
    pub idmap: bool,
}

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
/// Largest write; nothing is written. The kernel accepts no buffer for requests that is shorter.
const MAX_WRITE: u32 = 4096;

/// Capabilities to request, as far as the kernel offers them.
const WANTED_FLAGS: u64 = init_flag::ASYNC_READ
    | init_flag::DO_READDIRPLUS
    | init_flag::READDIRPLUS_AUTO
    | init_flag::NO_OPEN_SUPPORT
    | init_flag::PARALLEL_DIROPS
    | init_flag::POSIX_ACL
    | init_flag::MAX_PAGES
    | init_flag::CACHE_SYMLINKS
    | init_flag::NO_OPENDIR_SUPPORT
    | init_flag::EXPLICIT_INVAL_DATA
    | init_flag::INIT_EXT
    | init_flag::HAS_RESEND
    | init_flag::ALLOW_IDMAP;

/// Mounts `fs` on `dir` and serves it until it is unmounted.
pub fn mount<F: FileSystem>(
    fs: Arc<F>,
    dir: &Path,
    options: &MountOptions,
    runtime: Handle,
) -> Result<Mounted, SessionError> {
    FuseSession::begin(dir, &options.name)?.serve(fs, options.threads, runtime)
}

impl FuseSession {
    /// Mounts on `dir`, and does the handshake with the kernel. `name` is the source of the mount, as `mount` shows it.
    pub fn begin(dir: &Path, name: &str) -> Result<Self, SessionError> {
        let device = OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/fuse")
            .map_err(SessionError::Device)?;
        mount_device(&device, dir, name)?;
        let flags = handshake(&device).inspect_err(|_| unmount(dir, UnmountFlags::DETACH))?;
        raise_readahead_limit(dir);
        let since_epoch = SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default();
        let info = SessionInfo {
            device: mountpoint::device_number(dir).unwrap_or_default(),
            generation: since_epoch.as_micros() as u64,
            idmap: flags & init_flag::ALLOW_IDMAP != 0,
            resend: flags & init_flag::HAS_RESEND != 0,
        };
        Ok(Self {
            dir: dir.to_owned(),
            device,
            info,
            is_inherited: false,
        })
    }

    /// Continues a session that an earlier process began on `dir`. Returns `None` if `dir` is not its mount any more.
    pub fn resume(dir: &Path, device: File, info: SessionInfo) -> Option<Self> {
        let is_there = mountpoint::mounted_on(dir).ok().flatten().as_deref() == Some(mountpoint::FS_TYPE)
            && mountpoint::device_number(dir).as_ref() == Some(&info.device);
        is_there.then(|| Self {
            dir: dir.to_owned(),
            device,
            info,
            is_inherited: true,
        })
    }

    /// What the next process must know of the session.
    pub fn info(&self) -> &SessionInfo {
        &self.info
    }

    /// Serves `fs` until it is unmounted. Node ids of an inherited session must mean the same as before.
    pub fn serve<F: FileSystem>(self, fs: Arc<F>, threads: usize, runtime: Handle) -> Result<Mounted, SessionError> {
        let server = Arc::new(Server {
            fs,
            runtime,
            generation: self.info.generation,
            waiting: Arc::default(),
        });
        let mut mounted = Mounted {
            dir: self.dir.clone(),
            serving: Vec::new(),
            idmap: self.info.idmap,
        };
        let channels = self.channels(threads).map_err(SessionError::Serve)?;
        if self.is_inherited && self.info.resend {
            channels[0].resend().map_err(SessionError::Serve)?;
        }
        for channel in channels {
            let server = Arc::clone(&server);
            let thread = std::thread::Builder::new().name("fuse".to_owned());
            let serving = thread
                .spawn(move || server.run(&channel))
                .map_err(SessionError::Serve)?;
            mounted.serving.push(serving);
        }
        Ok(mounted)
    }

    /// A channel for each thread: the same one if the kernel can send requests again, else clones.
    fn channels(&self, threads: usize) -> io::Result<Vec<Arc<Channel>>> {
        if self.info.resend {
            let shared = Arc::new(Channel::new(self.device.try_clone()?));
            return Ok(vec![shared; threads]);
        }
        let clones = (0..threads).map(|_| Ok(Arc::new(Channel::new(clone_session(&self.device)?))));
        clones.collect()
    }
}

impl AsFd for FuseSession {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.device.as_fd()
    }
}

/// Opens another descriptor of the session (`FUSE_DEV_IOC_CLONE`).
fn clone_session(device: &File) -> io::Result<File> {
    const CLONE: rustix::ioctl::Opcode = rustix::ioctl::opcode::read::<u32>(229, 0);
    let clone = OpenOptions::new().read(true).write(true).open("/dev/fuse")?;
    let original = device.as_raw_fd().cast_unsigned();
    #[expect(unsafe_code, reason = "rustix has no wrapper of this ioctl")]
    // SAFETY: FUSE_DEV_IOC_CLONE reads a 32-bit descriptor number behind the pointer, and keeps no reference to it.
    unsafe {
        rustix::ioctl::ioctl(&clone, rustix::ioctl::Setter::<CLONE, u32>::new(original))?;
    }
    Ok(clone)
}

fn mount_device(device: &File, dir: &Path, name: &str) -> Result<(), SessionError> {
    let data = format!(
        "fd={},rootmode=40000,user_id=0,group_id=0,allow_other,default_permissions\0",
        device.as_raw_fd()
    );
    // The string contains one NUL, at its end.
    let data = std::ffi::CStr::from_bytes_until_nul(data.as_bytes()).unwrap_or_default();
    let flags = MountFlags::NODEV | MountFlags::NOSUID | MountFlags::NOATIME | MountFlags::RDONLY;
    rustix::mount::mount(name, dir, mountpoint::FS_TYPE, flags, data).map_err(|error| SessionError::Mount {
        dir: dir.to_owned(),
        source: error.into(),
    })
}

/// Replies to the kernel's INIT. Returns the capabilities in effect.
fn handshake(mut device: &File) -> Result<u64, SessionError> {
    let mut request = [0; REQUEST_BYTES];
    let len = device.read(&mut request).map_err(SessionError::Handshake)?;
    let parsed = InHeader::read_from_prefix(&request[..len])
        .ok()
        .and_then(|(header, body)| Some((header, InitIn::read_from_prefix(body).ok()?.0)));
    let Some((header, init)) = parsed else {
        return Err(SessionError::Handshake(io::Error::other("first message is too short")));
    };
    let InitIn { major, minor, .. } = init;
    if major != MAJOR || minor < MIN_MINOR {
        return Err(SessionError::TooOld { major, minor });
    }
    let is_extended = u64::from(init.flags) & init_flag::INIT_EXT != 0;
    let high = if is_extended { init.flags2 } else { 0 };
    let flags = WANTED_FLAGS & (u64::from(high) << 32 | u64::from(init.flags));
    let reply = InitOut {
        major: MAJOR,
        minor: minor.min(MINOR),
        max_readahead: init.max_readahead.max(READAHEAD_KIB << 10),
        flags: flags as u32,
        max_background: MAX_BACKGROUND,
        congestion_threshold: CONGESTION_THRESHOLD,
        max_write: MAX_WRITE,
        time_granularity: 1,
        max_pages: MAX_PAGES,
        flags2: (flags >> 32) as u32,
        ..InitOut::default()
    };
    let reply_header = OutHeader {
        len: (size_of::<OutHeader>() + size_of::<InitOut>()) as u32,
        error: 0,
        unique: header.unique,
    };
    device
        .write_all(&[reply_header.as_bytes(), reply.as_bytes()].concat())
        .map_err(SessionError::Handshake)?;
    tracing::debug!(
        kernel_minor = minor,
        flags = format_args!("{flags:#x}"),
        "opened FUSE session"
    );
    Ok(flags)
}

/// Raises the read-ahead limit of the mount's backing device, which applies in addition to that of INIT. A failure is
/// harmless.
fn raise_readahead_limit(dir: &Path) {
    let Some(device) = mountpoint::device_number(dir) else {
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
        for serving in std::mem::take(&mut self.serving) {
            if !has_ended {
                continue;
            }
            let ended = serving.join();
            if let Err(error) = ended.unwrap_or_else(|_| Err(io::Error::other("a thread panicked"))) {
                tracing::warn!(%error, "failed to serve FUSE session");
            }
        }
        has_ended
    }

    /// Leaves the mount to the next process, which continues the session.
    pub fn leave(mut self) {
        self.serving.clear();
    }

    /// Whether the session has ended, because the file system was unmounted externally.
    pub fn has_ended(&self) -> bool {
        self.serving.iter().all(JoinHandle::is_finished)
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if !self.serving.is_empty() && !self.has_ended() {
            unmount(&self.dir, UnmountFlags::DETACH);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vfs::{Answer, Attr, DirEntry, Entry, Errno, FsStat, NodeId, ROOT, ReadAnswer};

    /// A root directory with the file `greeting`.
    struct OneFile;

    const CONTENT: &[u8] = b"hello";

    impl OneFile {
        fn attr(node: NodeId) -> Attr {
            let (kind, nlink, size) = match node {
                ROOT => (libc::S_IFDIR, 2, 0),
                _ => (libc::S_IFREG, 1, CONTENT.len() as u64),
            };
            Attr {
                node,
                mode: kind | 0o755,
                uid: 0,
                gid: 0,
                nlink,
                size,
                rdev: 0,
                mtime: 0,
                mtime_nsec: 0,
            }
        }
    }

    impl FileSystem for OneFile {
        fn lookup(&self, _: NodeId, name: &[u8]) -> Answer<Entry> {
            let attr = (name == b"greeting").then(|| Self::attr(2));
            let ttl = Duration::ZERO;
            Answer::Pending(Box::pin(async move { Ok(Entry { attr, ttl }) }))
        }

        fn attr(&self, node: NodeId) -> Result<(Attr, Duration), Errno> {
            Ok((Self::attr(node), Duration::ZERO))
        }

        fn readlink(&self, _: NodeId) -> Result<Vec<u8>, Errno> {
            Err(Errno::INVAL)
        }

        fn list(&self, _: NodeId, _: u64, _: &mut dyn FnMut(DirEntry<'_>) -> bool) -> Result<(), Errno> {
            panic!("a panic fails one request")
        }

        fn read(&self, _: NodeId, offset: u64, into: &mut [u8]) -> ReadAnswer {
            let rest = &CONTENT[(offset as usize).min(CONTENT.len())..];
            let len = rest.len().min(into.len());
            into[..len].copy_from_slice(&rest[..len]);
            ReadAnswer::Ready(Ok(len))
        }

        fn xattr(&self, _: NodeId, _: &[u8]) -> Result<Vec<u8>, Errno> {
            Err(Errno::NODATA)
        }

        fn xattrs(&self, _: NodeId) -> Result<Vec<u8>, Errno> {
            Ok(Vec::new())
        }

        fn statfs(&self) -> FsStat {
            FsStat::default()
        }
    }

    /// With clones of the descriptor, as on kernels before 6.9, and without.
    #[test]
    fn sessions_are_served_and_survive_panics() {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        for can_resend in [true, false] {
            let dir = tempfile::tempdir().unwrap();
            let mut session = FuseSession::begin(dir.path(), "test").unwrap();
            session.info.resend &= can_resend;
            let mounted = session.serve(Arc::new(OneFile), 2, runtime.handle().clone()).unwrap();
            for _ in 0..4 {
                assert_eq!(fs::read(dir.path().join("greeting")).unwrap(), CONTENT);
                assert!(!dir.path().join("other").exists());
                let listed = fs::read_dir(dir.path()).and_then(|mut entries| entries.next().transpose());
                assert_eq!(listed.err().and_then(|error| error.raw_os_error()), Some(libc::EIO));
            }
            assert!(mounted.unmount());
        }
    }

    #[test]
    fn only_the_session_of_the_same_mount_is_resumed() {
        let dir = tempfile::tempdir().unwrap();
        let session = FuseSession::begin(dir.path(), "test").unwrap();
        let resume = |dir: &Path, info: &SessionInfo| {
            FuseSession::resume(dir, session.device.try_clone().unwrap(), info.clone()).is_some()
        };
        assert!(resume(dir.path(), &session.info));
        let other = SessionInfo {
            device: "0:1".to_owned(),
            ..session.info.clone()
        };
        assert!(!resume(dir.path(), &other));
        unmount(dir.path(), UnmountFlags::DETACH);
        assert!(!resume(dir.path(), &session.info));
    }
}
