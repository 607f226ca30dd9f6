//! Fail-over and retries: which endpoint is asked, when another one, and when again, all within one time limit.
//!
//! One round asks the endpoints in order, mirrors first, until one succeeds. A failed mirror is skipped without a
//! pause, and a mirror gets only its share of the remaining time. The registry's answer is final. If the registry gave
//! none, and a failure may pass, another round follows after a pause, without the mirrors that have refused.
//!
//! If all endpoints that may serve the request are away, the call waits for them as long as its patience lasts. It
//! holds no permit meanwhile.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use tracing::debug;

use super::{
    Error, Options, Repository,
    endpoints::{Endpoint, Endpoints},
    exchange::{Attempt, Exchange},
    jitter::jittered,
    request::RegistryRequest,
    response::Response,
};

/// The pause before the first retry. Doubles with each further one.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
/// Longest pause between two rounds of a call that waits for a host.
const MAX_OUTAGE_PAUSE: Duration = Duration::from_secs(2);
/// Upper bound of a call's time, so that its deadline does not overflow the clock.
pub(super) const MAX_CALL_TIME: Duration = Duration::from_secs(365 * 24 * 3600);

/// Sends requests to the endpoints of their repositories.
pub(super) struct Failover {
    options: Arc<Options>,
    endpoints: Endpoints,
    exchange: Arc<Exchange>,
}

/// How long a call may take.
#[derive(Debug, Clone, Copy)]
pub(super) struct CallLimits {
    /// With all retries and waits.
    pub(super) time: Duration,
    /// How long it waits for hosts that are away; zero if it does not.
    pub(super) patience: Duration,
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
    /// is final, the retries are used up, or the time is over.
    pub(super) async fn run<T, F>(
        &self,
        request: &RegistryRequest<'_>,
        limits: CallLimits,
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
        match tokio::time::timeout(limits.time, self.rounds(request, endpoints, limits, read)).await {
            Ok(result) => result,
            Err(_) => Err(timeout(&request.repository.registry, request, limits.time)),
        }
    }

    async fn rounds<T, F>(
        &self,
        request: &RegistryRequest<'_>,
        mut endpoints: Vec<Endpoint>,
        limits: CallLimits,
        read: impl Fn(Response, Arc<Attempt>) -> F,
    ) -> Result<T, Error>
    where
        F: Future<Output = Result<T, Error>>,
    {
        let started = Instant::now();
        let deadline = started + limits.time.min(MAX_CALL_TIME);
        // Ends before the call does, so that the error tells what is wrong with the host.
        let patience_end = started + limits.patience.min(limits.time).min(MAX_CALL_TIME);
        let (mut retries, mut waits) = (0, 0);
        loop {
            let mut mirrors = Vec::new();
            let round = self.round(request, &mut endpoints, deadline, &read, &mut mirrors);
            let failed = match round.await {
                Ok(done) => return Ok(done),
                Err(registry) => FailedRound { registry, mirrors },
            };
            if !limits.patience.is_zero() && failed.is_outage(self.options.request_timeout) {
                let has_mirrors = failed.mirror_errors().any(Error::is_transient);
                let wait = self.wait_for_host(&failed.registry, has_mirrors, &endpoints, waits);
                match tokio::time::timeout_at(patience_end.into(), wait).await {
                    Ok(waited) => waited?,
                    Err(_) => return Err(failed.into_error(self.options.request_timeout)),
                }
                waits += 1;
                continue;
            }
            if !failed.may_pass() || retries >= self.options.retries {
                return Err(failed.into_error(self.options.request_timeout));
            }
            let pause = pause(retries, &failed.registry, self.options.max_pause);
            debug!(error = %failed.registry, ?pause, "retrying registry request");
            tokio::time::sleep(pause).await;
            retries += 1;
            self.exchange.record_retry();
        }
    }

    /// Waits after a call for a blob of `repository` without patience that failed with `error`, until it makes sense to
    /// repeat the call. `waits` were made before.
    ///
    /// # Errors
    /// `error`, if `end` is over before, or the host is not away or has been for too long.
    pub(super) async fn wait(
        &self,
        repository: &Repository,
        error: &Error,
        end: Instant,
        waits: u32,
    ) -> Result<(), Error> {
        if !error.is_outage(self.options.request_timeout) {
            return Err(error.clone());
        }
        let endpoints = self.endpoints.of(repository, true).await?;
        let (registry, has_mirrors) = match error {
            Error::AllEndpoints { registry, .. } => (&**registry, true),
            error => (error, false),
        };
        let wait = self.wait_for_host(registry, has_mirrors, &endpoints, waits);
        let waited = tokio::time::timeout_at(end.into(), wait).await;
        waited.unwrap_or_else(|_| Err(error.clone()))
    }

    /// Waits until it makes sense to ask `endpoints` again, all of which are away. `error` is that of the registry;
    /// `has_mirrors` tells whether a mirror may be back first. `waits` were made before.
    async fn wait_for_host(
        &self,
        error: &Error,
        has_mirrors: bool,
        endpoints: &[Endpoint],
        waits: u32,
    ) -> Result<(), Error> {
        let is_told = matches!(error, Error::Status { retry_after, .. } if retry_after.is_some());
        let max_pause = match is_told {
            true => self.options.max_pause,
            false => self.options.max_pause.min(MAX_OUTAGE_PAUSE),
        };
        let pause = pause(waits, error, max_pause);
        debug!(%error, "waiting for host");
        let (Error::CircuitOpen { host, .. }, Some(registry)) = (error, endpoints.last()) else {
            tokio::time::sleep(pause).await;
            return Ok(());
        };
        let circuit = self.exchange.wait_for_circuit(registry, host);
        match has_mirrors {
            false => circuit.await,
            true => tokio::time::timeout(pause, circuit).await.unwrap_or(Ok(())),
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
                let error = timeout(&attempt.endpoint.repository.registry, request, share);
                self.exchange.record_timeout(&attempt.endpoint, &error)?;
                Err(error)
            }
        }
    }
}

impl FailedRound {
    /// Whether another round may succeed soon.
    fn may_pass(&self) -> bool {
        let was_sent = |error: &Error| error.is_transient() && !error.is_unsent();
        // The registry's answer counts, if it gave one.
        was_sent(&self.registry) || self.registry.is_unreachable() && self.mirror_errors().any(was_sent)
    }

    /// Whether the registry is away, or if it cannot be reached at all, a mirror; not for `patience` already.
    fn is_outage(&self, patience: Duration) -> bool {
        let is_outage = |error: &Error| error.is_outage(patience);
        is_outage(&self.registry) || self.registry.is_unreachable() && self.mirror_errors().any(is_outage)
    }

    fn mirror_errors(&self) -> impl Iterator<Item = &Error> {
        self.mirrors.iter().map(|(_, error)| error)
    }

    /// The registry's error, together with the mirrors' if the registry gave no answer.
    fn into_error(self, patience: Duration) -> Error {
        let is_mirror_away = self.mirror_errors().any(|error| error.is_outage(patience));
        if self.mirrors.is_empty() || !self.registry.is_unreachable() {
            return self.registry;
        }
        let mirrors = self.mirrors.iter().map(|(mirror, error)| format!("{mirror}: {error}"));
        Error::AllEndpoints {
            mirrors: mirrors.collect::<Vec<_>>().join("; "),
            is_mirror_away,
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
