//! `nydus-store auth-helper`

use std::time::Duration;

use anyhow::Context as _;
use clap::Args;
use tokio::time::timeout;

use super::{RootArg, runtime};
use crate::jobs::{
    announcement::{Logins, Reply},
    control::{self, JsonLines},
};

/// How long the daemon may take to accept an announcement, and to answer beyond the time that it says.
const ANSWER_TIME: Duration = Duration::from_secs(5);

/// Announce a pull to the daemon, as containers/image's additional-layer-store-auth-helper
///
/// Podman 5.2, CRI-O 1.31, Buildah 1.37 and later start it at each pull, wait for it, and tell it on standard input which
/// image it is and with which credentials it was found. The daemon publishes the image's layers before it answers. Without a
/// daemon, or for a user who may not reach it, nothing is done, and that is no failure. Exit status 1 says that the
/// image is a Nydus image that cannot be served: the pull will fail. `nydus-store setup` sets it up.
#[derive(Debug, Args)]
pub struct AuthHelper {
    #[command(flatten)]
    root: RootArg,
}

impl AuthHelper {
    pub fn run(&self) -> anyhow::Result<()> {
        let logins = Logins::read(std::io::stdin().lock())?;
        if logins.is_empty() {
            return Ok(());
        }
        runtime()?.block_on(async {
            let announced = timeout(ANSWER_TIME, control::announce(&self.root.root, &logins)).await;
            match announced.context("the daemon does not answer")?? {
                Some(replies) => listen(replies, logins.len()).await,
                None => {
                    tracing::info!(root = %self.root.root.display(), "no daemon to announce a pull to");
                    Ok(())
                }
            }
        })
    }
}

/// Waits for one answer to each announcement.
async fn listen(mut replies: JsonLines<Reply>, count: usize) -> anyhow::Result<()> {
    let accepted = timeout(ANSWER_TIME, replies.next())
        .await
        .context("the daemon does not answer")??;
    let Reply::Accepted(seconds) = accepted else {
        anyhow::bail!("the daemon gives an answer of another kind: is it of another version?");
    };
    let mut outcome = Ok(());
    for _ in 0..count {
        let limit = Duration::from_secs(seconds) + ANSWER_TIME;
        let reply = timeout(limit, replies.next()).await;
        match reply.with_context(|| format!("the daemon does not answer within {} seconds", limit.as_secs()))?? {
            Reply::Failed { reference, why } => {
                outcome = Err(anyhow::anyhow!("nydus-store cannot serve {reference}: {why}"));
            }
            reply => tracing::debug!(?reply, "announced"),
        }
    }
    outcome
}
