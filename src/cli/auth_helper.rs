//! `nydus-store auth-helper`

use std::time::Duration;

use anyhow::Context as _;
use clap::Args;

use super::{RootArg, runtime};
use crate::upkeep::{control, logins::Logins};

/// How long the daemon may take: whoever pulls waits for it.
const PATIENCE: Duration = Duration::from_secs(5);

/// Hand credentials over to the daemon, as Podman's additional-layer-store-auth-helper
///
/// Podman 5.2 and later starts it at each pull and tells it on standard input with which credentials the image was found.
/// The daemon keeps them in memory. Without a daemon, or for a user who may not reach it, nothing is done, and that is no
/// failure. `nydus-store setup --auth-helper` sets it up.
#[derive(Debug, Args)]
pub struct AuthHelper {
    #[command(flatten)]
    root: RootArg,
}

impl AuthHelper {
    pub fn run(&self) -> anyhow::Result<()> {
        let logins = Logins::read(std::io::stdin().lock())?.without_empty();
        if logins.is_empty() {
            return Ok(());
        }
        let handed = async {
            let handing = control::hand_over(&self.root.root, &logins);
            tokio::time::timeout(PATIENCE, handing)
                .await
                .context("the daemon does not answer")?
        };
        if !runtime()?.block_on(handed)? {
            tracing::info!(root = %self.root.root.display(), "no daemon to hand credentials over to");
        }
        Ok(())
    }
}
