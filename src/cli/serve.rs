//! `nydus-store serve`: runs the daemon in the foreground until a signal or `nydus-store stop` ends it.

use anyhow::Context as _;
use clap::Args;

use super::{
    ConfigArg, RootArg, runtime,
    signals::{StopSignal, StopSignals},
};
use crate::{
    daemon::Daemon,
    error_chain::ErrorChain,
    handover::{Inherited, supervisor::Supervisor},
    memory,
};

/// Run the daemon that serves lazy images to Podman and CRI-O
#[derive(Debug, Args)]
pub struct ServeCommand {
    #[command(flatten)]
    root: RootArg,

    #[command(flatten)]
    config: ConfigArg,

    /// Also run a parent process that restarts the daemon without containers noticing, on hosts without systemd
    #[arg(long)]
    supervise: bool,
}

/// How serving goes on after a signal.
enum Next {
    /// Ends, and unmounts.
    End,
    /// Ends; the sessions go on in the next process.
    Leave,
}

impl ServeCommand {
    pub fn run(&self) -> anyhow::Result<()> {
        memory::limit_retained_memory();
        // Nothing else has opened descriptors yet.
        let inherited = Inherited::from_environment().context("cannot take over descriptors")?;
        let config = self.config.load()?;
        let runtime = runtime()?;
        if self.supervise {
            let _inside = runtime.enter();
            let supervisor = Supervisor::new(&self.root.root, inherited)?;
            return runtime.block_on(supervisor.run());
        }
        let mut signals = StopSignals::new(&runtime)?;
        let mut daemon = Daemon::start(&self.root.root, &config, inherited, runtime.handle())?;
        let asked = runtime.block_on(self.wait(&mut signals, &mut daemon));
        match asked {
            Ok(Next::Leave) => daemon.leave(),
            Ok(Next::End) | Err(_) => daemon.stop(),
        }
        // Abandons requests to registries that are in flight.
        runtime.shutdown_background();
        asked.map(drop)
    }

    async fn wait(&self, signals: &mut StopSignals, daemon: &mut Daemon) -> anyhow::Result<Next> {
        loop {
            let signal = tokio::select! {
                signal = signals.wait(&daemon.overlay) => signal?,
                Some(()) = daemon.stop_requests.recv() => StopSignal::Interrupt,
            };
            match signal {
                StopSignal::Terminate if daemon.is_held() => return Ok(Next::Leave),
                StopSignal::Interrupt | StopSignal::Terminate => return Ok(Next::End),
                StopSignal::HangUp => self.restart(daemon),
            }
        }
    }

    /// Executes the program anew, which may have been replaced. Returns only on failure, and the daemon goes on.
    fn restart(&self, daemon: &Daemon) {
        if let Err(error) = self.config.load() {
            tracing::error!(error = %ErrorChain(error.as_ref()), "failed to restart; the configuration is invalid");
            return;
        }
        let error = daemon.execute();
        tracing::error!(%error, "failed to restart");
    }
}
