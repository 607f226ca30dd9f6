//! `nydus-store serve`

use clap::Args;

use super::{ConfigArg, RootArg, runtime, signals::StopSignals};
use crate::daemon::Daemon;

/// Serve the store to Podman and CRI-O
#[derive(Debug, Args)]
pub struct Serve {
    #[command(flatten)]
    root: RootArg,

    #[command(flatten)]
    config: ConfigArg,
}

impl Serve {
    pub fn run(&self) -> anyhow::Result<()> {
        let config = self.config.load()?;
        let runtime = runtime()?;
        let mut stop = StopSignals::new(&runtime)?;
        let daemon = Daemon::start(&self.root.root, &config, runtime.handle())?;
        let asked = runtime.block_on(stop.wait(daemon.mounted()));
        daemon.stop();
        // Requests that wait for a registry are not waited for.
        runtime.shutdown_background();
        asked
    }
}
