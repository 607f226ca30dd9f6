//! Fail-over and retries: which endpoint is asked, when another one, and when again, all within one time limit.
//!
//! One round asks the endpoints in order, mirrors first, until one succeeds. A failed mirror is skipped without a
//! pause, and a mirror gets only its share of the remaining time. The registry's answer is final. If the registry gave
//! none, and a failure may pass, another round follows after a pause, without the mirrors that have refused.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use tracing::debug;

use super::{
    Error, Options,
    circuit::MAX_OPEN_WAIT,
    endpoints::{Endpoint, Endpoints},
    exchange::{Attempt, Exchange},
    jitter::jittered,
    request::RegistryRequest,
    response::Response,
};

/// The pause before the first retry. Doubles with each further one.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
/// Upper bound of a call's time, so that its deadline does not overflow the clock.
const MAX_CALL_TIME: Duration = Duration::from_secs(365 * 24 * 3600);

/// Sends requests to the endpoints of their repositories.
pub(super) struct Failover {
    options: Arc<Options>,
    endpoints: Endpoints,
    exchange: Arc<Exchange>,
}

/// The errors of one round.
struct FailedRound {
    registry: Error,
    /// Each with its mirror's name.
    mirrors: Vec<(String, Error)>,
}

impl Failover {
    pub(super) fn new(options: Arc<Options>, endpoints: Endpoints, exchange: Arc<Exchange>) -> Self {
        Self {
            options,
            endpoints,
            exchange,
        }
    }

    /// Sends `request` and has `read` read the answer, at one endpoint after the other, until both succeed, the failure
    /// is final, the retries are used up, or `time_limit` is over.
    pub(super) async fn run<T, F>(
        &self,
        request: &RegistryRequest<'_>,
        time_limit: Duration,
        read: impl Fn(Response, Arc<Attempt>) -> F,
    ) -> Result<T, Error>
    where
        F: Future<Output = Result<T, Error>>,
    {
        if self.options.offline {
            let what = request.what.clone();
            return Err(Error::Offline { what });
        }
        let endpoints = self.endpoints.of(request.repository, request.is_by_digest()).await?;
        let deadline = Instant::now() + time_limit.min(MAX_CALL_TIME);
        match tokio::time::timeout(time_limit, self.rounds(request, endpoints, deadline, read)).await {
            Ok(result) => result,
            Err(_) => Err(timeout(&request.repository.registry, request, time_limit)),
        }
    }

    async fn rounds<T, F>(
        &self,
        request: &RegistryRequest<'_>,
        mut endpoints: Vec<Endpoint>,
        deadline: Instant,
        read: impl Fn(Response, Arc<Attempt>) -> F,
    ) -> Result<T, Error>
    where
        F: Future<Output = Result<T, Error>>,
    {
        let mut retries = 0;
        loop {
            let mut mirrors = Vec::new();
            let round = self.round(request, &mut endpoints, deadline, &read, &mut mirrors);
            let failed = match round.await {
                Ok(done) => return Ok(done),
                Err(registry) => FailedRound { registry, mirrors },
            };
            let Some(min_pause) = failed.retry_pause().filter(|_| retries < self.options.retries) else {
                return Err(failed.into_error());
            };
            let pause = pause(retries, &failed.registry, self.options.max_pause).max(min_pause);
            debug!(error = %failed.registry, ?pause, "retrying registry request");
            tokio::time::sleep(pause).await;
            retries += 1;
            self.exchange.record_retry();
        }
    }

    /// Asks each of `endpoints` once. Removes mirrors that have refused, and adds the errors of mirrors to `failed`.
    async fn round<T, F>(
        &self,
        request: &RegistryRequest<'_>,
        endpoints: &mut Vec<Endpoint>,
        deadline: Instant,
        read: &impl Fn(Response, Arc<Attempt>) -> F,
        failed: &mut Vec<(String, Error)>,
    ) -> Result<T, Error>
    where
        F: Future<Output = Result<T, Error>>,
    {
        let memory = &self.exchange.memory;
        let mut at = 0;
        loop {
            // The last endpoint is the registry, which is never removed.
            let endpoint = endpoints[at].clone();
            let blob = request.blob_at(&endpoint.repository);
            if endpoint.is_mirror && blob.as_ref().is_some_and(|blob| memory.is_excluded(blob)) {
                endpoints.remove(at);
                continue;
            }
            let shares = u32::try_from(endpoints.len() - at).unwrap_or(u32::MAX);
            let error = match self.attempt(request, endpoint.clone(), deadline, shares, read).await {
                Ok(done) => return Ok(done),
                Err(error) => error,
            };
            if let Some(blob) = blob.as_ref().filter(|_| error.invalidates_redirect()) {
                self.exchange.forget_redirect(blob);
            }
            if !endpoint.is_mirror {
                return Err(error);
            }
            debug!(host = endpoint.repository.registry, %error, "failed to fetch from mirror; asking next endpoint");
            if error.is_transient() {
                at += 1;
            } else {
                endpoints.remove(at);
                match (blob, &error) {
                    (Some(blob), Error::DigestMismatch { .. }) => _ = memory.record_corrupt(blob),
                    (Some(blob), _) => memory.record_missing(blob),
                    (None, _) => {}
                }
            }
            failed.push((endpoint.repository.registry, error));
        }
    }

    /// Asks one endpoint. A mirror gets one of `shares` of the time until `deadline`.
    async fn attempt<T, F>(
        &self,
        request: &RegistryRequest<'_>,
        endpoint: Endpoint,
        deadline: Instant,
        shares: u32,
        read: &impl Fn(Response, Arc<Attempt>) -> F,
    ) -> Result<T, Error>
    where
        F: Future<Output = Result<T, Error>>,
    {
        let send = async |attempt: &Arc<Attempt>| {
            let response = self.exchange.send(request, attempt).await?;
            read(response, Arc::clone(attempt)).await
        };
        if !endpoint.is_mirror {
            return send(&Arc::new(Attempt { endpoint, deadline })).await;
        }
        let now = Instant::now();
        let share = deadline.saturating_duration_since(now) / shares.max(1);
        let deadline = now + share;
        let attempt = Arc::new(Attempt { endpoint, deadline });
        match tokio::time::timeout(share, send(&attempt)).await {
            Ok(result) => result,
            Err(_) => {
                self.exchange.record_timeout(&attempt.endpoint)?;
                Err(timeout(&attempt.endpoint.repository.registry, request, share))
            }
        }
    }
}

impl FailedRound {
    /// The shortest pause before another round; `None` if a retry is useless.
    fn retry_pause(&self) -> Option<Duration> {
        let was_sent = |error: &Error| error.is_transient() && !error.is_unsent();
        let mirrors = || self.mirrors.iter().map(|(_, error)| error);
        // The registry's answer counts, if it gave one.
        if was_sent(&self.registry) || self.registry.is_unreachable() && mirrors().any(was_sent) {
            return Some(Duration::ZERO);
        }
        let pauses = mirrors()
            .filter_map(Error::retry_in)
            .filter(|pause| *pause <= MAX_OPEN_WAIT);
        pauses.min().filter(|_| self.registry.is_unreachable())
    }

    /// The registry's error, together with the mirrors' if the registry gave no answer.
    fn into_error(self) -> Error {
        if self.mirrors.is_empty() || !self.registry.is_unreachable() {
            return self.registry;
        }
        let mirrors = self.mirrors.iter().map(|(mirror, error)| format!("{mirror}: {error}"));
        Error::AllEndpoints {
            mirrors: mirrors.collect::<Vec<_>>().join("; "),
            source: self.registry.shared_source(),
            registry: Box::new(self.registry),
        }
    }
}

fn timeout(host: &str, request: &RegistryRequest<'_>, after: Duration) -> Error {
    Error::Timeout {
        host: host.to_owned(),
        what: request.what.clone(),
        after,
    }
}

/// The pause after `error`, with `retries` made before.
fn pause(retries: u32, error: &Error, max_pause: Duration) -> Duration {
    if let Error::Status {
        retry_after: Some(pause),
        ..
    } = error
    {
        return jittered(*pause, 1.0, 1.25).min(max_pause);
    }
    jittered(FIRST_PAUSE.saturating_mul(1 << retries.min(10)), 0.5, 1.5).min(max_pause)
}
