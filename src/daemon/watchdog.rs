//! Tells the service manager that the daemon is alive (`WATCHDOG` of sd_notify(3)), as long as it answers.

use std::{
    path::{Path, PathBuf},
    sync::mpsc,
    time::Duration,
};

use sd_notify::NotifyState;
use tokio::runtime::Handle;

use crate::fuse::session::SessionError;

/// Starts to send signs of life, if the service manager asked for them. Before each, the mount on `overlay` must answer
/// a request, and `runtime` must run a task. Both may take as long as the service manager waits.
pub(super) fn start(overlay: PathBuf, runtime: Handle) -> Result<(), SessionError> {
    let Some(timeout) = sd_notify::watchdog_enabled() else {
        return Ok(());
    };
    let thread = std::thread::Builder::new().name("watchdog".to_owned());
    let run = move || {
        loop {
            if is_alive(&overlay, &runtime, timeout) {
                sd_notify::notify(&[NotifyState::Watchdog]).ok();
            }
            std::thread::sleep(timeout / 4);
        }
    };
    thread.spawn(run).map(drop).map_err(SessionError::Serve)
}

fn is_alive(overlay: &Path, runtime: &Handle, timeout: Duration) -> bool {
    // Goes through the kernel to the threads of the session. After an external unmount, it asks the directory below.
    if let Err(error) = rustix::fs::statfs(overlay) {
        tracing::debug!(%error, "failed to query the mount");
        return false;
    }
    let (done, is_done) = mpsc::channel();
    runtime.spawn(async move { done.send(()).ok() });
    is_done.recv_timeout(timeout).is_ok()
}
