//! `nydus-store serve`: runs the daemon in the foreground until SIGTERM or SIGINT.

use clap::Args;

use super::{ConfigArg, RootArg, runtime, signals::StopSignals};
use crate::daemon::Daemon;

/// Run the daemon that serves lazy images to Podman and CRI-O
#[derive(Debug, Args)]
pub struct ServeCommand {
    #[command(flatten)]
    root: RootArg,

    #[command(flatten)]
    config: ConfigArg,
}

impl ServeCommand {
    pub fn run(&self) -> anyhow::Result<()> {
        let config = self.config.load()?;
        let runtime = runtime()?;
        let mut stop = StopSignals::new(&runtime)?;
        let daemon = Daemon::start(&self.root.root, &config, runtime.handle())?;
        let asked = runtime.block_on(stop.wait(daemon.mounted()));
        daemon.stop();
        // Abandons requests to registries that are in flight.
        runtime.shutdown_background();
        asked
    }
}
