//! `nydus-store auth-helper`: passes a pull's credentials from Podman or CRI-O to the daemon.

use std::time::{Duration, Instant};

use anyhow::Context as _;
use clap::Args;
use rustix::fs::{StatVfs, StatVfsMountFlags, statvfs};
use tokio::time::timeout;

use super::{RootArg, runtime};
use crate::jobs::{
    announcement::{Logins, Reply},
    control::{self, ConnectionLost, JsonLines},
};

/// Time-out for accepting an announcement, and the margin on top of the time-out that the daemon announces.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
/// How long to announce again to a daemon that is restarted meanwhile.
const RESTART_TIMEOUT: Duration = Duration::from_secs(60);
/// Interval between announcements to a daemon that is restarted.
const RETRY_INTERVAL: Duration = Duration::from_millis(50);

/// Announce a pull to the daemon (run by Podman and CRI-O)
///
/// `nydus-store setup` installs this command as the additional-layer-store-auth-helper of containers/image. Podman 5.2,
/// CRI-O 1.31, Buildah 1.37 and later run it at each pull and wait for it. It reads image references and credentials
/// from standard input. The daemon publishes the image's layers before the command returns. If no daemon can be
/// reached, the command does nothing and succeeds. Exit status 1: the daemon cannot serve a Nydus image (the pull then
/// fails), does not respond in time, or standard input is malformed.
#[derive(Debug, Args)]
pub struct AuthHelperCommand {
    #[command(flatten)]
    root: RootArg,
}

impl AuthHelperCommand {
    pub fn run(&self) -> anyhow::Result<()> {
        let logins = Logins::read(std::io::stdin().lock())?;
        if logins.is_empty() {
            return Ok(());
        }
        runtime()?.block_on(async {
            let start = Instant::now();
            loop {
                match self.announce(&logins).await {
                    // A daemon that is being restarted keeps its socket.
                    Err(error) if error.is::<ConnectionLost>() && start.elapsed() < RESTART_TIMEOUT => {
                        tokio::time::sleep(RETRY_INTERVAL).await;
                    }
                    announced => return announced,
                }
            }
        })
    }

    async fn announce(&self, logins: &Logins) -> anyhow::Result<()> {
        let announced = timeout(ANSWER_TIMEOUT, control::announce(&self.root.root, logins)).await;
        match announced.context("the daemon does not respond")?? {
            Some(replies) => await_replies(replies, logins.len()).await,
            None => {
                self.refuse_read_only_root()?;
                tracing::info!(
                    root = %self.root.root.display(),
                    "skipped announcement of pull: no daemon serves this root"
                );
                Ok(())
            }
        }
    }

    /// Fails if the root is read-only, so that Podman tells why it cannot use a Nydus image. The daemon serves what is
    /// published there, but has no socket.
    fn refuse_read_only_root(&self) -> anyhow::Result<()> {
        let root = &self.root.root;
        let is_read_only = |disk: StatVfs| disk.f_flag.contains(StatVfsMountFlags::RDONLY);
        anyhow::ensure!(
            !statvfs(root).is_ok_and(is_read_only),
            "{} is on a read-only file system: Nydus images cannot be pulled until it can be written to",
            root.display()
        );
        Ok(())
    }
}

/// Waits for one reply to each of `count` announcements. Fails with the last failed image.
async fn await_replies(mut replies: JsonLines<Reply>, count: usize) -> anyhow::Result<()> {
    let accepted = timeout(ANSWER_TIMEOUT, replies.next())
        .await
        .context("the daemon does not respond")??;
    let Reply::Accepted(seconds) = accepted else {
        anyhow::bail!("unexpected reply from the daemon; is it another version of nydus-store?");
    };
    let mut outcome = Ok(());
    for _ in 0..count {
        let limit = Duration::from_secs(seconds) + ANSWER_TIMEOUT;
        let reply = timeout(limit, replies.next()).await;
        match reply.with_context(|| format!("the daemon did not respond within {} seconds", limit.as_secs()))?? {
            Reply::Failed { reference, why } => {
                outcome = Err(anyhow::anyhow!("nydus-store cannot serve {reference}: {why}"));
            }
            reply => tracing::debug!(?reply, "announced image"),
        }
    }
    outcome
}
