//! `nydus-store bench`: measures fetches from a registry and reads of a directory.

use std::time::Duration;

use clap::{Args, Subcommand};
use tokio::{
    runtime::Handle,
    signal::unix::{SignalKind, signal},
};

use crate::bench::stop::StopSignal;

mod fetch;
mod output;
mod progress;
mod read;

/// Measure fetch latency and throughput, or reads of a mounted tree
#[derive(Debug, Args)]
pub struct BenchCommand {
    #[command(subcommand)]
    what: BenchSubcommand,
}

#[derive(Debug, Subcommand)]
enum BenchSubcommand {
    /// Measure fetching an image's chunks, with the time of each step
    ///
    /// Fetches, decompresses and verifies chunks as a container's read does, but does not cache them. When interrupted,
    /// it prints the results so far. Exit status: 1 if no request succeeds.
    Fetch(Box<fetch::BenchFetchCommand>),
    /// Measure reading a directory tree on any file system
    ///
    /// Phases: walk (lstat every entry), seq (read the largest file), random (read 4 KiB pages of the largest files),
    /// all (read every file), parallel (read every file in several threads). It does not follow symbolic links, enter
    /// other mounts or read special files. When interrupted, it prints the results so far.
    Read(read::BenchReadCommand),
}

impl BenchCommand {
    pub fn run(&self) -> anyhow::Result<()> {
        match &self.what {
            BenchSubcommand::Fetch(fetch) => fetch.run(),
            BenchSubcommand::Read(read) => read.run(),
        }
    }
}

/// A [`StopSignal`] that SIGINT and SIGTERM trigger.
fn stop_on_signals(runtime: &Handle) -> anyhow::Result<StopSignal> {
    let (stop, stopper) = StopSignal::new();
    let _entered = runtime.enter();
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    runtime.spawn(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        stopper.request();
    });
    Ok(stop)
}

/// Parses a duration in seconds: 0.1 to 86,400.
fn seconds(text: &str) -> Result<Duration, String> {
    match text.parse::<f64>() {
        Ok(seconds) if (0.1..=86_400.0).contains(&seconds) => Ok(Duration::from_secs_f64(seconds)),
        _ => Err("expected seconds from 0.1 to 86400".to_owned()),
    }
}

/// Parses a positive number of bytes, with an optional suffix K, M or G.
fn bytes(text: &str) -> Result<u64, String> {
    let size = crate::bench::workload::parse_size(text).filter(|size| *size > 0);
    size.ok_or_else(|| "expected a number of bytes, such as 4096, 64K, 1M or 2G".to_owned())
}
