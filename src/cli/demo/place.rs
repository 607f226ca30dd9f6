//! Where the tour takes place, and how nothing of it is left behind.

use std::{
    fs,
    os::unix::ffi::OsStrExt as _,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use anyhow::{Context as _, ensure};
use rustix::{
    mount::{MountPropagationFlags, UnmountFlags},
    thread::UnshareFlags,
};
use tempfile::TempDir;
use tokio::{
    runtime::Runtime,
    signal::unix::{SignalKind, signal},
};

use crate::fuse::mountpoint;

/// Says what is missing on this host before anything is made.
pub fn check_host() -> anyhow::Result<()> {
    ensure!(
        rustix::process::geteuid().is_root(),
        "the demo needs root, because it mounts the store's file system: run it with sudo"
    );
    let device = fs::File::options().read(true).write(true).open("/dev/fuse");
    device.context(
        "the demo needs FUSE, but /dev/fuse cannot be opened (load the kernel module `fuse`; in a container, give it \
         the device: --device /dev/fuse)",
    )?;
    Ok(())
}

/// Gives the process a mount table of its own, so that whatever it mounts goes with it, even if it is killed. Must be
/// called while the process has one thread. Without it, which is told, the tour works too: it unmounts what it mounts.
pub fn keep_mounts_private() -> bool {
    // SAFETY: only unsharing the table of file descriptors (`FILES`) is unsafe, and that is not asked for.
    let unshared = unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS) };
    let propagation = MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC;
    unshared
        .and_then(|()| rustix::mount::mount_change("/", propagation))
        .inspect_err(|error| tracing::debug!(%error, "the host sees what is mounted here"))
        .is_ok()
}

/// Runs `visit`, which uses a file system that this process serves, in a thread that does not hold the file system's
/// connection. If all threads did, and the process were killed while `visit` waits for an answer, the kernel would wait
/// for ever: for the answer until the connection is closed, and with closing it for the thread that waits.
pub fn apart<T: Send>(visit: impl FnOnce() -> anyhow::Result<T> + Send) -> anyhow::Result<T> {
    const CLOSE_RANGE_UNSHARE: libc::c_uint = 2;
    let thread = move || {
        let (first, last): (libc::c_uint, libc::c_uint) = (3, libc::c_uint::MAX);
        // SAFETY: the descriptors are closed in the thread's own copy of the table. `visit` owns none of those that
        // the others have, and opens and closes its own only.
        let closed = unsafe { libc::syscall(libc::SYS_close_range, first, last, CLOSE_RANGE_UNSHARE) };
        if closed != 0 {
            let error = std::io::Error::last_os_error();
            tracing::debug!(%error, "being killed may have to wait for the file system");
        }
        visit()
    };
    let visited = std::thread::scope(|scope| scope.spawn(thread).join());
    visited.unwrap_or_else(|_| Err(anyhow::anyhow!("the demo's thread has failed")))
}

/// Whether the tour is to stop early.
#[derive(Clone)]
pub struct Stop(Arc<AtomicBool>);

impl Stop {
    /// Notes the signals that ask a program to end, which end it no longer: it ends itself, after cleaning up.
    pub fn on_signals(runtime: &Runtime) -> anyhow::Result<Self> {
        let stop = Self(Arc::default());
        let _inside = runtime.enter();
        for kind in [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup()] {
            let mut signals = signal(kind).context("cannot handle signals")?;
            let flag = Arc::clone(&stop.0);
            runtime.spawn(async move {
                while signals.recv().await.is_some() {
                    flag.store(true, Ordering::Relaxed);
                }
            });
        }
        Ok(stop)
    }

    /// Fails if the tour is to stop.
    pub fn check(&self) -> anyhow::Result<()> {
        ensure!(
            !self.0.load(Ordering::Relaxed),
            "interrupted; what the demo had made was unmounted and deleted"
        );
        Ok(())
    }
}

/// A temporary directory, deleted with whatever is mounted in it.
pub struct Place {
    dir: Option<TempDir>,
    path: PathBuf,
}

impl Place {
    pub fn new() -> anyhow::Result<Self> {
        let dir = tempfile::Builder::new().prefix("nydus-store-demo-").tempdir();
        let dir = dir.context("cannot make a temporary directory (TMPDIR says where)")?;
        let path = dir.path().canonicalize()?;
        Ok(Self { dir: Some(dir), path })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Deletes the directory. Everything should be unmounted by now; Podman leaves a mount of its storage.
    pub fn clean(mut self) -> anyhow::Result<()> {
        self.delete()
    }

    fn delete(&mut self) -> anyhow::Result<()> {
        // Kept from deleting itself: what is mounted must not be deleted with it.
        let Some(dir) = self.dir.take().map(TempDir::keep) else {
            return Ok(());
        };
        let mut attempt = 0;
        loop {
            let deleted = unmount_below(&self.path).and_then(|()| fs::remove_dir_all(&dir));
            match deleted {
                // What Podman leaves running for a moment may still make files.
                Err(_) if attempt < 20 => attempt += 1,
                other => return other.with_context(|| format!("cannot delete {}", dir.display())),
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Err(error) = self.delete() {
            tracing::warn!("{error:#}");
        }
    }
}

/// Takes off all that is mounted in `dir`, the last first.
fn unmount_below(dir: &Path) -> std::io::Result<()> {
    for place in mountpoint::mounted_below(dir)?.iter().rev() {
        tracing::debug!(place = %String::from_utf8_lossy(place.as_os_str().as_bytes()), "unmounting");
        rustix::mount::unmount(place.as_path(), UnmountFlags::DETACH)?;
    }
    Ok(())
}
