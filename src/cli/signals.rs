//! Waiting for the request to stop.

use std::time::Duration;

use anyhow::Context as _;
use tokio::signal::unix::{SignalKind, signal};

use crate::fuse::session::Mounted;

/// Waits until the process is asked to stop (SIGTERM or SIGINT) or somebody else has unmounted `mounted`.
pub async fn asked_to_stop(mounted: &Mounted) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("cannot handle SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot handle SIGINT")?;
    let unmounted = async {
        while !mounted.is_over() {
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
    };
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
        () = unmounted => anyhow::bail!("the mount was taken off by somebody else"),
    }
    Ok(())
}
