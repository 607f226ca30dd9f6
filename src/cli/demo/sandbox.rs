//! Isolates the tour from the host: a temporary directory, a private mount namespace, and clean-up on every exit.

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

use crate::{error_chain::ErrorChain, fuse::mountpoint};

/// Fails if the process lacks root or /dev/fuse.
pub fn check_host() -> anyhow::Result<()> {
    ensure!(
        rustix::process::geteuid().is_root(),
        "the demo needs root to mount the store's file system: run it with sudo"
    );
    let device = fs::File::options().read(true).write(true).open("/dev/fuse");
    device.context(
        "the demo needs FUSE, but cannot open /dev/fuse (load the kernel module `fuse`, or start the container with \
         --device /dev/fuse)",
    )?;
    Ok(())
}

/// Moves the process to a private mount namespace, so that its mounts end with it, even if it is killed. Must be called
/// while the process has a single thread. Returns whether it succeeded; the tour unmounts its mounts in either case.
pub fn unshare_mounts() -> bool {
    #[expect(unsafe_code, reason = "rustix has no safe function for a single namespace")]
    // SAFETY: only unsharing the table of file descriptors (`FILES`) is unsafe, and that is not asked for.
    let unshared = unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS) };
    let propagation = MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC;
    unshared
        .and_then(|()| rustix::mount::mount_change("/", propagation))
        .inspect_err(
            |error| tracing::debug!(%error, "failed to create mount namespace; mounts are visible to the host"),
        )
        .is_ok()
}

/// Runs `visit`, which reads a file system that this process serves, in a thread without the FUSE connection's
/// descriptor.
///
/// This avoids a deadlock when the process is killed while `visit` waits for a reply. The kernel ends that wait only
/// when the connection closes, and closes it only when the last thread that holds the descriptor exits.
pub fn without_fuse_descriptors<T: Send>(visit: impl FnOnce() -> anyhow::Result<T> + Send) -> anyhow::Result<T> {
    const CLOSE_RANGE_UNSHARE: libc::c_uint = 2;
    let thread = move || {
        let (first, last): (libc::c_uint, libc::c_uint) = (3, libc::c_uint::MAX);
        #[expect(unsafe_code, reason = "no crate in use has close_range(2) with a table of its own")]
        // SAFETY: closes the descriptors in the thread's own copy of the table. `visit` uses only descriptors that it
        // opens itself.
        let closed = unsafe { libc::syscall(libc::SYS_close_range, first, last, CLOSE_RANGE_UNSHARE) };
        if closed != 0 {
            let error = std::io::Error::last_os_error();
            tracing::debug!(%error, "failed to close descriptors; killing the process may hang");
        }
        visit()
    };
    let visited = std::thread::scope(|scope| scope.spawn(thread).join());
    visited.unwrap_or_else(|_| Err(anyhow::anyhow!("the demo's thread panicked")))
}

/// A flag that requests an early stop.
#[derive(Clone)]
pub struct StopFlag(Arc<AtomicBool>);

impl StopFlag {
    /// Sets the flag on SIGINT, SIGTERM and SIGHUP, instead of ending the process, so that the tour can clean up.
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

    /// Fails if the flag is set.
    pub fn check(&self) -> anyhow::Result<()> {
        ensure!(
            !self.0.load(Ordering::Relaxed),
            "interrupted; the demo unmounted and deleted everything it created"
        );
        Ok(())
    }
}

/// A temporary directory. Unmounts everything below it and deletes it when dropped.
pub struct DemoDir {
    dir: Option<TempDir>,
    path: PathBuf,
}

impl DemoDir {
    pub fn new() -> anyhow::Result<Self> {
        let dir = tempfile::Builder::new().prefix("nydus-store-demo-").tempdir();
        let dir = dir.context("cannot create a temporary directory; set TMPDIR to choose its place")?;
        let path = dir.path().canonicalize()?;
        Ok(Self { dir: Some(dir), path })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Deletes the directory and reports errors. Podman leaves a mount of its storage.
    pub fn clean(mut self) -> anyhow::Result<()> {
        self.delete()
    }

    fn delete(&mut self) -> anyhow::Result<()> {
        // `TempDir` would delete files below mounts.
        let Some(dir) = self.dir.take().map(TempDir::keep) else {
            return Ok(());
        };
        let mut attempt = 0;
        loop {
            let deleted = unmount_below(&self.path).and_then(|()| fs::remove_dir_all(&dir));
            match deleted {
                // Podman's background processes may still create files for a moment.
                Err(_) if attempt < 20 => attempt += 1,
                other => return other.with_context(|| format!("cannot delete {}", dir.display())),
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

impl Drop for DemoDir {
    fn drop(&mut self) {
        if let Err(error) = self.delete() {
            tracing::warn!(error = %ErrorChain(error.as_ref()), "failed to clean up temporary directory");
        }
    }
}

/// Unmounts everything below `dir`, the last mount first.
fn unmount_below(dir: &Path) -> std::io::Result<()> {
    for mount in mountpoint::mounted_below(dir)?.iter().rev() {
        tracing::debug!(dir = %String::from_utf8_lossy(mount.as_os_str().as_bytes()), "unmounting");
        rustix::mount::unmount(mount.as_path(), UnmountFlags::DETACH)?;
    }
    Ok(())
}
