//! `nydus-store stop`: ends the daemon and its mounts for good.

use std::time::{Duration, Instant};

use anyhow::Context as _;
use clap::Args;

use super::{RootArg, print, runtime};
use crate::{
    daemon::{self, RootLock},
    jobs::control,
};

/// How long the daemon may take to end.
const TIMEOUT: Duration = Duration::from_secs(30);

/// End the daemon and unmount the store
///
/// Running containers of lazy images lose access to their files. To restart the daemon without containers noticing, use
/// `systemctl restart nydus-store`, or send SIGHUP to the daemon or its supervisor.
#[derive(Debug, Args)]
pub struct StopCommand {
    /// Confirm that containers may lose access to their files
    #[arg(long, required = true)]
    unmount: bool,

    #[command(flatten)]
    root: RootArg,
}

impl StopCommand {
    pub fn run(&self) -> anyhow::Result<()> {
        let root = &self.root.root;
        if !root.exists() {
            return print("no daemon was running\n");
        }
        let was_running = runtime()?.block_on(control::stop(root))?;
        let start = Instant::now();
        let _lock = loop {
            match RootLock::try_take(root)? {
                Ok(lock) => break lock,
                Err(holder) if start.elapsed() > TIMEOUT => {
                    anyhow::bail!("process {holder} is still using {}", root.display())
                }
                Err(_) => std::thread::sleep(Duration::from_millis(50)),
            }
        };
        daemon::remove_mounts(root).context("cannot unmount the store")?;
        print(if was_running {
            "stopped\n"
        } else {
            "no daemon was running\n"
        })
    }
}
