//! Health checks of hosts that stand between this machine and a registry, such as a peer-to-peer engine.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::Mutex;

use super::settings::HealthCheckUrl;
use crate::error_chain::ErrorChain;

/// How long the result of a check is valid.
const CHECK_INTERVAL: Duration = Duration::from_secs(5);

/// The health check of one host.
pub(super) struct HealthCheck {
    host: String,
    url: HealthCheckUrl,
    timeout: Duration,
    /// When the last check ended, and whether the host was healthy.
    last: Mutex<Option<(Instant, bool)>>,
    /// Held during a check.
    checking: Arc<tokio::sync::Mutex<()>>,
}

impl HealthCheck {
    pub(super) fn new(host: String, url: HealthCheckUrl, timeout: Duration) -> Self {
        Self {
            host,
            url,
            timeout,
            last: Mutex::default(),
            checking: Arc::default(),
        }
    }

    pub(super) fn url(&self) -> &HealthCheckUrl {
        &self.url
    }

    /// Whether the host is healthy. Waits for the first check only; later ones run in the background.
    pub(super) async fn is_healthy(self: &Arc<Self>, client: &reqwest::Client) -> bool {
        let last = *self.last.lock();
        match last {
            Some((at, healthy)) if at.elapsed() < CHECK_INTERVAL => healthy,
            Some((_, healthy)) => {
                if let Ok(checking) = Arc::clone(&self.checking).try_lock_owned() {
                    let (check, client) = (Arc::clone(self), client.clone());
                    tokio::spawn(async move {
                        check.run(&client).await;
                        drop(checking);
                    });
                }
                healthy
            }
            None => {
                let _checking = self.checking.lock().await;
                let last = *self.last.lock();
                match last {
                    Some((_, healthy)) => healthy,
                    None => self.run(client).await,
                }
            }
        }
    }

    /// Checks now, because the host could not be reached. Uses a concurrent check's result if there is one.
    pub(super) async fn recheck(&self, client: &reqwest::Client) -> bool {
        let started = Instant::now();
        let _checking = self.checking.lock().await;
        let last = *self.last.lock();
        match last {
            Some((at, healthy)) if at >= started => healthy,
            _ => self.run(client).await,
        }
    }

    async fn run(&self, client: &reqwest::Client) -> bool {
        let answer = client.get(self.url.url().clone()).timeout(self.timeout).send().await;
        let failure = match answer {
            Ok(answer) if answer.status().is_success() => None,
            Ok(answer) => Some(format!("status {}", answer.status())),
            Err(error) => Some(ErrorChain(&error.without_url()).to_string()),
        };
        self.record(failure.as_deref());
        failure.is_none()
    }

    fn record(&self, failure: Option<&str>) {
        let before = self.last.lock().replace((Instant::now(), failure.is_none()));
        match (before, failure) {
            (None | Some((_, true)), Some(error)) => {
                tracing::warn!(host = %self.host, check = ?self.url, error, "health check: failed; bypassing host");
            }
            (Some((_, false)), None) => {
                tracing::info!(host = %self.host, check = ?self.url, "health check: passes again; using host");
            }
            _ => {}
        }
    }
}
