//! `nydus-store bench`

use std::time::Duration;

use clap::{Args, Subcommand};
use tokio::{
    runtime::Handle,
    signal::unix::{SignalKind, signal},
};

use crate::bench::stop::Stop;

mod fetch;
mod output;
mod progress;
mod read;

/// Measure how fast chunks are fetched, or a mounted tree is read
#[derive(Debug, Args)]
pub struct Bench {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Fetch the chunks of an image, and tell what takes how long
    ///
    /// Chunks are fetched, decompressed and verified as when a container reads them, but not kept. Interrupted, it tells what it
    /// has measured until then. Exit status 1 if no request succeeds.
    Fetch(Box<fetch::Fetch>),
    /// Read a directory, on whatever file system, and tell what takes how long
    ///
    /// Phases: walk (lstat of everything), seq (the largest file), random (pages of 4 KiB of the largest files), all (every file),
    /// parallel (every file, several at a time). Symbolic links are not followed, other mounts not entered, special files left
    /// out. Interrupted, it tells what it has measured until then.
    Read(read::Read),
}

impl Bench {
    pub fn run(&self) -> anyhow::Result<()> {
        match &self.what {
            What::Fetch(fetch) => fetch.run(),
            What::Read(read) => read.run(),
        }
    }
}

/// Is asked to stop by SIGINT and SIGTERM.
fn stop_on_signals(runtime: &Handle) -> anyhow::Result<Stop> {
    let (stop, stopper) = Stop::new();
    let _entered = runtime.enter();
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    runtime.spawn(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        stopper.ask();
    });
    Ok(stop)
}

/// A number of seconds, from a tenth to a day.
fn seconds(text: &str) -> Result<Duration, String> {
    match text.parse::<f64>() {
        Ok(seconds) if (0.1..=86_400.0).contains(&seconds) => Ok(Duration::from_secs_f64(seconds)),
        _ => Err("it must be a number of seconds from 0.1 to 86400".to_owned()),
    }
}

/// A number of bytes.
fn bytes(text: &str) -> Result<u64, String> {
    let size = crate::bench::workload::parse_size(text).filter(|size| *size > 0);
    size.ok_or_else(|| "it must be a number of bytes, such as 4096, 64K, 1M or 2G".to_owned())
}
