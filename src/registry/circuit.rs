//! Circuit breaker of one host. Failures in a row open the circuit: then one request at a time probes the host, and no
//! other is sent. Callers ask another endpoint, or wait for the host ([`super::failover`]), unless it has been away for
//! long.

use std::{
    fmt,
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use tokio::sync::watch;

use super::{Error, Options, jitter::jittered, response::BodyObserver, stats::CircuitStatus};
use crate::error_chain::ErrorChain;

/// When a circuit opens, and for how long.
#[derive(Debug, Clone, Copy)]
pub(super) struct CircuitPolicy {
    /// Failures in a row that open it.
    pub(super) failures: u32,
    /// How long it stays open the first time. Doubles each further time, give or take a quarter.
    pub(super) pause: Duration,
    /// Upper bound of that time.
    pub(super) max_pause: Duration,
    /// How long callers wait for a host that is away. Meanwhile the pauses are at most [`MAX_PATIENT_PAUSE`].
    pub(super) patience: Duration,
}

impl CircuitPolicy {
    pub(super) fn of(options: &Options) -> Self {
        Self {
            failures: options.circuit_failures,
            pause: options.circuit_pause,
            max_pause: options.circuit_max_pause,
            patience: options.request_timeout,
        }
    }
}

/// Concurrent failures faster than this count as one, since they share a cause such as a restart. Slower failures count
/// individually.
const BURST_WINDOW: Duration = Duration::from_millis(100);
/// Longest pause between two probes while callers wait for the host.
const MAX_PATIENT_PAUSE: Duration = Duration::from_secs(2);

/// How long a waiting caller has to send the next probe, before another one may.
const PROBE_TURN: Duration = Duration::from_secs(1);

/// Whether one host answers.
pub(super) struct Circuit {
    host: String,
    policy: CircuitPolicy,
    state: Mutex<CircuitState>,
    /// End of the pause that the host has asked for (`Retry-After`).
    backoff_until: Mutex<Option<Instant>>,
    /// Wakes waiting callers when the circuit closes or a probe ends.
    changes: watch::Sender<()>,
}

#[derive(Default)]
struct CircuitState {
    /// Failures in a row.
    failures: u32,
    /// When the last failure was counted, and what it was.
    last_failure: Option<(Instant, Error)>,
    /// When the first failure of the present outage was counted.
    away_since: Option<Instant>,
    /// Whether a message has told that the outage is a long one.
    is_long_outage_logged: bool,
    /// How often in a row the circuit has opened.
    pauses: u32,
    /// Until when it is open; `None` while it is closed. Once this time has passed, the circuit is half-open.
    open_until: Option<Instant>,
    /// Whether a request probes the host.
    is_probing: bool,
    /// When the turn of a waiting caller began, which is to send the next probe.
    turn_began: Option<Instant>,
    /// Whether the host has answered a ping since the circuit opened.
    is_ping_answered: bool,
    /// Answers in a row that the service is unavailable, while the circuit is closed.
    unavailable: u32,
}

/// Permission to send one request. Its holder records the outcome; a permit dropped without one records none, except
/// after its deadline.
pub(super) struct CircuitPermit {
    circuit: Arc<Circuit>,
    /// Whether another host can be asked instead: then one failure opens the circuit.
    has_alternative: bool,
    /// After this, a drop means that the host was too slow, not that the caller gave up.
    deadline: Option<Instant>,
    started: Instant,
    is_probe: bool,
    needs_ping: bool,
    is_answered: bool,
    is_recorded: bool,
}

impl Circuit {
    pub(super) fn new(host: String, policy: CircuitPolicy) -> Self {
        Self {
            host,
            policy,
            state: Mutex::default(),
            backoff_until: Mutex::default(),
            changes: watch::Sender::default(),
        }
    }

    /// The host, as errors name it.
    pub(super) fn host(&self) -> &str {
        &self.host
    }

    /// Whether it is open, and for how long.
    pub(super) fn status(&self) -> CircuitStatus {
        match self.state.lock().open_until {
            Some(until) => CircuitStatus::open_for(until.saturating_duration_since(Instant::now())),
            None => CircuitStatus::Closed,
        }
    }

    /// Permits a request until `deadline`. A half-open circuit permits one request, the probe.
    ///
    /// # Errors
    /// [`Error::CircuitOpen`].
    pub(super) fn try_acquire(
        self: &Arc<Self>,
        has_alternative: bool,
        deadline: Option<Instant>,
    ) -> Result<CircuitPermit, Error> {
        let mut state = self.state.lock();
        let is_probe = state.open_until.is_some();
        let needs_ping = is_probe && !state.is_ping_answered && (has_alternative || state.is_unavailable());
        if let Some(open_until) = state.open_until {
            let retry_in = open_until.saturating_duration_since(Instant::now());
            if !retry_in.is_zero() || state.is_probing {
                return Err(self.error(retry_in, &state));
            }
            (state.is_probing, state.turn_began) = (true, None);
        }
        drop(state);
        Ok(CircuitPermit {
            circuit: Arc::clone(self),
            has_alternative,
            deadline,
            started: Instant::now(),
            is_probe,
            needs_ping,
            is_answered: false,
            is_recorded: false,
        })
    }

    /// Waits until the circuit is closed, or it is this caller's turn to probe the host.
    pub(super) async fn wait(&self) {
        let mut changes = self.changes.subscribe();
        loop {
            let pause = {
                let mut state = self.state.lock();
                let Some(open_until) = state.open_until else { return };
                let retry_in = open_until.saturating_duration_since(Instant::now());
                let turn = state
                    .turn_began
                    .map_or(Duration::ZERO, |began| PROBE_TURN.saturating_sub(began.elapsed()));
                match retry_in.max(turn) {
                    _ if state.is_probing => None,
                    Duration::ZERO => {
                        state.turn_began = Some(Instant::now());
                        return;
                    }
                    pause => Some(pause),
                }
            };
            // An error is impossible: this circuit has the sender.
            match pause {
                None => _ = changes.changed().await,
                Some(pause) => _ = tokio::time::timeout(jittered(pause, 1.0, 1.25), changes.changed()).await,
            }
        }
    }

    /// Delays all requests to the host by `pause`, because it asked for that.
    pub(super) fn back_off(&self, pause: Duration) {
        let until = Instant::now() + pause;
        let mut backoff_until = self.backoff_until.lock();
        *backoff_until = Some(backoff_until.map_or(until, |known| known.max(until)));
    }

    /// Waits until the pause that the host asked for is over.
    ///
    /// # Errors
    /// [`Error::Busy`] instead of a wait, if the caller has an alternative.
    pub(super) async fn wait_for_backoff(&self, has_alternative: bool) -> Result<(), Error> {
        let until = *self.backoff_until.lock();
        let retry_in = until.map_or(Duration::ZERO, |until| until.saturating_duration_since(Instant::now()));
        if !retry_in.is_zero() && has_alternative {
            let host = self.host.clone();
            return Err(Error::Busy { host, retry_in });
        }
        tokio::time::sleep(retry_in).await;
        Ok(())
    }

    /// The error of a request that is refused now.
    pub(super) fn open_error(&self) -> Error {
        let state = self.state.lock();
        let retry_in = state
            .open_until
            .map(|until| until.saturating_duration_since(Instant::now()));
        self.error(retry_in.unwrap_or_default(), &state)
    }

    fn error(&self, retry_in: Duration, state: &CircuitState) -> Error {
        Error::CircuitOpen {
            host: self.host.clone(),
            failures: state.failures,
            away: state.away(),
            retry_in,
            source: state
                .last_failure
                .as_ref()
                .map(|(_, error)| Arc::new(error.clone()) as _),
        }
    }

    /// Records that a mirror has used up its share of the time. Opens the circuit.
    pub(super) fn record_timeout(&self, error: &Error) {
        self.record_failure(Instant::now(), false, true, error);
    }

    /// Records that the host does not answer a ping either, after it has answered that its service is unavailable.
    /// Opens the circuit.
    pub(super) fn record_unavailable(&self, error: &Error) {
        let mut state = self.state.lock();
        state.unavailable = 0;
        if state.open_until.is_none() {
            state.count(error);
            self.open(state, false);
        }
    }

    /// Records that the host answers a ping, although it has answered that its service is unavailable: the failures
    /// concern single requests.
    pub(super) fn record_available(&self) {
        self.state.lock().unavailable = 0;
    }

    /// Counts a failure of a request sent at `started`. Where there is an alternative, one failure opens the circuit.
    fn record_failure(&self, started: Instant, is_probe: bool, has_alternative: bool, error: &Error) {
        let mut state = self.state.lock();
        let last = state.last_failure.as_ref().map(|(at, _)| *at);
        let is_same_burst = last.is_some_and(|last| started < last) && started.elapsed() < BURST_WINDOW;
        // Requests sent before the circuit opened do not extend the pause either.
        let is_open = state.open_until.is_some();
        if !is_probe && (is_same_burst || is_open) {
            return;
        }
        if last.is_some_and(|last| last.elapsed() > self.policy.patience.max(self.policy.max_pause)) {
            // The host may have been back meanwhile, since no request has found it away.
            state.away_since = None;
        }
        state.count(error);
        if is_open || has_alternative || state.failures >= self.policy.failures {
            self.open(state, has_alternative);
        }
    }

    /// Opens the circuit, or keeps it open for another pause.
    fn open(&self, mut state: parking_lot::MutexGuard<'_, CircuitState>, has_alternative: bool) {
        let is_new = state.open_until.is_none();
        let is_long = state.away() >= self.policy.patience;
        let doubled = self.policy.pause.saturating_mul(1 << state.pauses.min(16));
        let max_pause = match is_long || has_alternative {
            true => self.policy.max_pause,
            false => self.policy.max_pause.min(MAX_PATIENT_PAUSE),
        };
        let pause = jittered(doubled.min(max_pause), 0.75, 1.25).min(max_pause);
        state.pauses = state.pauses.saturating_add(1);
        (state.is_probing, state.is_ping_answered, state.turn_began) = (false, false, None);
        state.open_until = Some(Instant::now() + pause);
        self.changes.send_replace(());
        let cause = state
            .last_failure
            .as_ref()
            .map(|(_, error)| ErrorChain(error).to_string());
        let error = cause.unwrap_or_default();
        if is_new {
            let failures = state.failures;
            tracing::warn!(host = %self.host, failures, error, "opened circuit: host does not answer");
        } else if is_long && !has_alternative && !std::mem::replace(&mut state.is_long_outage_logged, true) {
            let away = Seconds(state.away());
            tracing::warn!(host = %self.host, %away, error, "host is still away; failing its requests until it answers");
        }
    }

    /// Closes the circuit, but keeps the failure count: the next failure opens it again.
    fn close(&self) {
        let mut state = self.state.lock();
        if state.open_until.take().is_some() {
            state.is_probing = false;
            let away = Seconds(state.away());
            tracing::info!(host = %self.host, %away, "recovered: host answers again");
            self.changes.send_replace(());
        }
        (state.away_since, state.is_long_outage_logged) = (None, false);
    }

    fn reset(&self) {
        self.close();
        *self.state.lock() = CircuitState::default();
    }
}

impl CircuitState {
    /// How long the host has been away, as far as is known.
    fn away(&self) -> Duration {
        self.away_since.map(|since| since.elapsed()).unwrap_or_default()
    }

    /// Whether the last failure was an answer: the service behind the host is unavailable.
    fn is_unavailable(&self) -> bool {
        matches!(self.last_failure, Some((_, Error::Status { .. })))
    }

    fn count(&mut self, error: &Error) {
        let now = Instant::now();
        self.away_since.get_or_insert(now);
        self.last_failure = Some((now, error.clone()));
        self.failures = self.failures.saturating_add(1);
    }
}

impl CircuitPermit {
    /// Whether the host must answer a ping first, because it has shown no sign of life since the circuit opened.
    pub(super) fn needs_ping(&self) -> bool {
        self.needs_ping
    }

    /// Records that the host could not be reached or was silent.
    pub(super) fn record_failure(&mut self, error: &Error) {
        if !self.is_recorded {
            self.is_recorded = true;
            let Self {
                started,
                is_probe,
                has_alternative,
                ..
            } = *self;
            self.circuit.record_failure(started, is_probe, has_alternative, error);
        }
    }

    /// Records an answer that the service behind the host is unavailable. Returns whether a ping is to find out if that
    /// is true of the host as a whole; then [`Circuit::record_unavailable`] or [`Circuit::record_available`] is due.
    pub(super) fn record_unavailable(&mut self, error: &Error) -> bool {
        if self.has_alternative {
            self.record_answer();
            return false;
        }
        if self.is_probe && !self.is_ping_answered() {
            self.record_failure(error);
            return false;
        }
        self.record_answer();
        self.is_recorded = true;
        let mut state = self.circuit.state.lock();
        state.unavailable = state.unavailable.saturating_add(1);
        state.unavailable == self.circuit.policy.failures && state.open_until.is_none()
    }

    /// Records that headers have arrived. Without an alternative, this closes the circuit.
    pub(super) fn record_answer(&mut self) {
        self.is_answered = true;
        if !self.has_alternative {
            self.close();
        }
    }

    /// Records that bytes of the requested content arrive, which closes the circuit.
    fn record_progress(&mut self) {
        self.close();
    }

    fn close(&mut self) {
        if std::mem::take(&mut self.is_probe) && !self.is_recorded {
            self.circuit.close();
        }
    }

    fn is_ping_answered(&self) -> bool {
        self.circuit.state.lock().is_ping_answered
    }

    /// Records an answered ping. The circuit stays half-open, with this request as the probe.
    pub(super) fn record_own_ping(&mut self) {
        self.needs_ping = false;
        self.circuit.state.lock().is_ping_answered = true;
    }

    /// Records an answered ping. The circuit stays half-open: the next request for content is the probe.
    pub(super) fn record_ping(mut self) {
        self.is_recorded = true;
        let mut state = self.circuit.state.lock();
        (state.is_probing, state.is_ping_answered) = (false, true);
        self.circuit.changes.send_replace(());
    }

    /// Records the end of the exchange. If the host has answered, this resets the circuit.
    pub(super) fn record_success(&mut self) {
        if self.is_answered && !self.is_recorded {
            self.is_recorded = true;
            self.circuit.reset();
        }
    }
}

impl BodyObserver for CircuitPermit {
    fn progressed(&mut self) {
        self.record_progress();
    }

    fn stalled(&mut self, error: &Error) {
        self.record_failure(error);
    }

    fn completed(&mut self) {
        self.record_success();
    }
}

impl Drop for CircuitPermit {
    fn drop(&mut self) {
        if self.is_recorded {
            return;
        }
        if !self.is_answered && self.deadline.is_some_and(|deadline| Instant::now() >= deadline) {
            let error = Error::Timeout {
                host: self.circuit.host.clone(),
                what: "an answer".to_owned(),
                after: self.started.elapsed(),
            };
            self.record_failure(&error);
        } else if self.is_probe {
            self.circuit.state.lock().is_probing = false;
            self.circuit.changes.send_replace(());
        }
    }
}

/// Shows a duration in seconds, with one decimal.
struct Seconds(Duration);

impl fmt::Display for Seconds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.1}s", self.0.as_secs_f64())
    }
}

#[cfg(test)]
mod tests;
