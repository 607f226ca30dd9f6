//! Health checks: whether what stands between here and a registry, such as a peer-to-peer engine, is well.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::Mutex;

use super::settings::Check;

/// How long the outcome of a check counts.
const INTERVAL: Duration = Duration::from_secs(5);

/// The health of one host.
pub(super) struct Health {
    host: String,
    check: Check,
    /// Longest time of a check.
    patience: Duration,
    /// When it was looked at last, and what came of it.
    known: Mutex<Option<(Instant, bool)>>,
    /// Held by who looks.
    turn: Arc<tokio::sync::Mutex<()>>,
}

impl Health {
    pub(super) fn new(host: String, check: Check, patience: Duration) -> Self {
        Self {
            host,
            check,
            patience,
            known: Mutex::default(),
            turn: Arc::default(),
        }
    }

    pub(super) fn check(&self) -> &Check {
        &self.check
    }

    /// Whether the host is well. Only the first look is waited for; later ones are made in the background.
    pub(super) async fn is_well(self: &Arc<Self>, client: &reqwest::Client) -> bool {
        let known = *self.known.lock();
        match known {
            Some((at, well)) if at.elapsed() < INTERVAL => well,
            Some((_, well)) => {
                if let Ok(turn) = Arc::clone(&self.turn).try_lock_owned() {
                    let (health, client) = (Arc::clone(self), client.clone());
                    tokio::spawn(async move {
                        health.look(&client).await;
                        drop(turn);
                    });
                }
                well
            }
            None => {
                let _turn = self.turn.lock().await;
                let known = *self.known.lock();
                match known {
                    Some((_, well)) => well,
                    None => self.look(client).await,
                }
            }
        }
    }

    /// Looks at once, since it cannot be reached; unless somebody has done that a moment ago.
    pub(super) async fn is_still_well(&self, client: &reqwest::Client) -> bool {
        let asked = Instant::now();
        let _turn = self.turn.lock().await;
        let known = *self.known.lock();
        match known {
            Some((at, well)) if at >= asked => well,
            _ => self.look(client).await,
        }
    }

    async fn look(&self, client: &reqwest::Client) -> bool {
        let asked = client.get(self.check.url().clone()).timeout(self.patience).send().await;
        let well = asked.is_ok_and(|answer| answer.status().is_success());
        self.note(well);
        well
    }

    fn note(&self, well: bool) {
        let before = self.known.lock().replace((Instant::now(), well));
        match (before, well) {
            (None | Some((_, true)), false) => {
                tracing::warn!(host = self.host, check = ?self.check, "is ill, and passed by");
            }
            (Some((_, false)), true) => tracing::info!(host = self.host, check = ?self.check, "is well again"),
            _ => {}
        }
    }
}
