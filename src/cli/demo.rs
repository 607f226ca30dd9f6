//! `nydus-store demo`

use clap::Args;

/// See it at work: a made-up image, a registry and a store, with nothing left behind
#[derive(Debug, Args)]
pub struct Demo {
    /// Also run a container from the image, if Podman is here
    #[arg(long)]
    podman: bool,
}

impl Demo {
    pub fn run(&self) -> anyhow::Result<()> {
        anyhow::bail!("pending: {}", self.podman)
    }
}
