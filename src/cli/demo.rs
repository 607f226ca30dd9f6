//! `nydus-store demo`: a guided tour of what happens between Podman, the store and a registry.

use clap::Args;

use super::runtime;

mod console;
mod image;
mod meter;
mod podman;
mod program;
mod reading;
mod sandbox;
mod tour;

use console::Console;
use podman::HostPodman;
use sandbox::{DemoDir, StopFlag};
use tour::Tour;

/// Show a guided tour with a generated image, a local registry and a temporary store
#[derive(Debug, Args)]
pub struct DemoCommand {
    /// Also pull the image with Podman and run a container
    #[arg(long)]
    podman: bool,
}

impl DemoCommand {
    pub fn run(&self) -> anyhow::Result<()> {
        sandbox::check_host()?;
        let podman = self.podman.then(HostPodman::find).transpose()?;
        // The process has a single thread here; later threads inherit its mount namespace.
        let private = sandbox::unshare_mounts();
        let runtime = runtime()?;
        let stop = StopFlag::on_signals(&runtime)?;
        let demo_dir = DemoDir::new()?;
        if podman.is_some() && private {
            podman::hide_blob_info_cache(demo_dir.path())?;
        }
        let mut tour = Tour {
            console: Console::new(stop),
            dir: demo_dir.path().to_owned(),
            runtime: &runtime,
            podman,
        };
        // `run` stops everything that uses the directory, also on failure.
        let toured = tour.run();
        let deleted = demo_dir.clean();
        let summary = toured?;
        deleted?;
        tour.goodbye(&summary)?;
        runtime.shutdown_background();
        Ok(())
    }
}
