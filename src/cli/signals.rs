//! Waiting for the request to stop.

use std::time::Duration;

use anyhow::Context as _;
use tokio::{
    runtime::Runtime,
    signal::unix::{Signal, SignalKind, signal},
};

use crate::fuse::session::Mounted;

/// The signals that ask the process to stop, SIGTERM and SIGINT. From when this is made, they end it no longer.
pub struct StopSignals {
    terminate: Signal,
    interrupt: Signal,
}

impl StopSignals {
    /// To be made before anything is mounted, so that a signal finds the process ready to unmount it.
    pub fn new(runtime: &Runtime) -> anyhow::Result<Self> {
        let _inside = runtime.enter();
        Ok(Self {
            terminate: signal(SignalKind::terminate()).context("cannot handle SIGTERM")?,
            interrupt: signal(SignalKind::interrupt()).context("cannot handle SIGINT")?,
        })
    }

    /// Waits until the process is asked to stop, or another process has unmounted `mounted`.
    pub async fn wait(&mut self, mounted: &Mounted) -> anyhow::Result<()> {
        let unmounted = async {
            while !mounted.has_ended() {
                tokio::time::sleep(Duration::from_millis(500)).await;
            }
        };
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
            () = unmounted => anyhow::bail!("the mount was taken off by somebody else"),
        }
        Ok(())
    }
}
