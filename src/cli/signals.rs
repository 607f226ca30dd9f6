//! Waits for signals that end or replace the process.

use std::time::Duration;

use anyhow::Context as _;
use tokio::{
    runtime::Runtime,
    signal::unix::{Signal, SignalKind, signal},
};

use crate::fuse::session::Mounted;

/// Handles SIGTERM, SIGINT and SIGHUP; once constructed, the signals do not end the process.
pub struct StopSignals {
    terminate: Signal,
    interrupt: Signal,
    hang_up: Signal,
}

/// What a signal asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StopSignal {
    /// SIGTERM: exit; another process may follow.
    Terminate,
    /// SIGINT: end for good.
    Interrupt,
    /// SIGHUP: restart with the program and the configuration on disk.
    HangUp,
}

impl StopSignals {
    /// Installs the handlers. Must precede any mount, so that a signal always leads to an unmount.
    pub fn new(runtime: &Runtime) -> anyhow::Result<Self> {
        let _inside = runtime.enter();
        Ok(Self {
            terminate: signal(SignalKind::terminate()).context("cannot handle SIGTERM")?,
            interrupt: signal(SignalKind::interrupt()).context("cannot handle SIGINT")?,
            hang_up: signal(SignalKind::hangup()).context("cannot handle SIGHUP")?,
        })
    }

    /// Waits for a signal. Fails if another process unmounts `mounted`.
    pub async fn wait(&mut self, mounted: &Mounted) -> anyhow::Result<StopSignal> {
        let unmounted = async {
            while !mounted.has_ended() {
                tokio::time::sleep(Duration::from_millis(500)).await;
            }
        };
        Ok(tokio::select! {
            _ = self.terminate.recv() => StopSignal::Terminate,
            _ = self.interrupt.recv() => StopSignal::Interrupt,
            _ = self.hang_up.recv() => StopSignal::HangUp,
            () = unmounted => anyhow::bail!("another process unmounted the file system"),
        })
    }
}
