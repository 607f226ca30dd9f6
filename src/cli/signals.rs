//! Waits for SIGTERM or SIGINT.

use std::time::Duration;

use anyhow::Context as _;
use tokio::{
    runtime::Runtime,
    signal::unix::{Signal, SignalKind, signal},
};

use crate::fuse::session::Mounted;

/// Handles SIGTERM and SIGINT; once constructed, the signals do not end the process.
pub struct StopSignals {
    terminate: Signal,
    interrupt: Signal,
}

impl StopSignals {
    /// Installs the handlers. Must precede any mount, so that a signal always leads to an unmount.
    pub fn new(runtime: &Runtime) -> anyhow::Result<Self> {
        let _inside = runtime.enter();
        Ok(Self {
            terminate: signal(SignalKind::terminate()).context("cannot handle SIGTERM")?,
            interrupt: signal(SignalKind::interrupt()).context("cannot handle SIGINT")?,
        })
    }

    /// Waits for a signal. Fails if another process unmounts `mounted`.
    pub async fn wait(&mut self, mounted: &Mounted) -> anyhow::Result<()> {
        let unmounted = async {
            while !mounted.has_ended() {
                tokio::time::sleep(Duration::from_millis(500)).await;
            }
        };
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
            () = unmounted => anyhow::bail!("another process unmounted the file system"),
        }
        Ok(())
    }
}
