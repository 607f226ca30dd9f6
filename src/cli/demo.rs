//! `nydus-store demo`: a guided tour through everything that happens between Podman, the store and a registry.

use clap::Args;

use super::runtime;

mod console;
mod image;
mod meter;
mod place;
mod podman;
mod program;
mod reading;
mod tour;

use console::Console;
use place::{Place, Stop};
use podman::Podman;
use tour::Tour;

/// See it at work: a made-up image, a registry and a store, with nothing left behind
#[derive(Debug, Args)]
pub struct Demo {
    /// Also run a container from the image, if Podman is here
    #[arg(long)]
    podman: bool,
}

impl Demo {
    pub fn run(&self) -> anyhow::Result<()> {
        place::check_host()?;
        let podman = self.podman.then(Podman::find).transpose()?;
        // The process has one thread yet, and all others inherit from it.
        let private = place::keep_mounts_private();
        let runtime = runtime()?;
        let stop = Stop::on_signals(&runtime)?;
        let place = Place::new()?;
        if podman.is_some() && private {
            podman::hide_shared_cache(place.path())?;
        }
        let mut tour = Tour {
            console: Console::new(stop),
            dir: place.path().to_owned(),
            runtime: &runtime,
            podman,
        };
        // Everything that uses the directory is gone when this returns, in whatever way it ends.
        let toured = tour.run();
        let deleted = place.clean();
        let summary = toured?;
        deleted?;
        tour.goodbye(&summary)?;
        runtime.shutdown_background();
        Ok(())
    }
}
