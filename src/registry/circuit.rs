//! Circuit breaker of one host: after failures in a row, requests fail at once for a while, so that not every reader
//! waits for a host that does not answer.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::Mutex;

use super::{Error, Options, jitter::jittered, response::BodyObserver, stats::CircuitStatus};

/// When a circuit opens, and for how long.
#[derive(Debug, Clone, Copy)]
pub(super) struct CircuitPolicy {
    /// Failures in a row that open it.
    pub(super) failures: u32,
    /// How long it stays open the first time. Doubles each further time, give or take a quarter.
    pub(super) pause: Duration,
    /// Upper bound of that time.
    pub(super) max_pause: Duration,
}

impl CircuitPolicy {
    pub(super) fn of(options: &Options) -> Self {
        Self {
            failures: options.circuit_failures,
            pause: options.circuit_pause,
            max_pause: options.circuit_max_pause,
        }
    }
}

/// Concurrent failures faster than this count as one, since they share a cause such as a restart. Slower failures count
/// individually.
const BURST_WINDOW: Duration = Duration::from_millis(100);
/// Longest time that [`Circuit::acquire`] waits for an open circuit. A registry that restarts is back within it.
pub(super) const MAX_OPEN_WAIT: Duration = Duration::from_secs(2);
/// Shortest wait before [`Circuit::acquire`] looks at the circuit again, e.g. while another request probes the host.
const MIN_POLL_INTERVAL: Duration = Duration::from_millis(100);

/// Whether one host answers.
pub(super) struct Circuit {
    host: String,
    policy: CircuitPolicy,
    state: Mutex<CircuitState>,
    /// End of the pause that the host has asked for (`Retry-After`).
    backoff_until: Mutex<Option<Instant>>,
}

#[derive(Default)]
struct CircuitState {
    /// Failures in a row.
    failures: u32,
    /// When the last failure was counted.
    last_failure: Option<Instant>,
    /// How often in a row the circuit has opened.
    pauses: u32,
    /// How long it was opened for the last time.
    pause: Duration,
    /// Until when it is open; `None` while it is closed. Once this time has passed, the circuit is half-open.
    open_until: Option<Instant>,
    /// Whether a request probes the host.
    is_probing: bool,
    /// Whether the host has answered a ping since the circuit opened.
    is_ping_answered: bool,
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
    is_ping_answered: bool,
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
        }
    }

    /// The host, as it was named.
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
        let (is_probe, is_ping_answered) = (state.open_until.is_some(), state.is_ping_answered);
        if let Some(open_until) = state.open_until {
            let retry_in = open_until.saturating_duration_since(Instant::now());
            if !retry_in.is_zero() || state.is_probing {
                return Err(self.error(retry_in, &state));
            }
            state.is_probing = true;
        }
        drop(state);
        Ok(CircuitPermit {
            circuit: Arc::clone(self),
            has_alternative,
            deadline,
            started: Instant::now(),
            is_probe,
            is_ping_answered,
            is_answered: false,
            is_recorded: false,
        })
    }

    /// As [`Circuit::try_acquire`] for a host without alternative. Waits for a circuit that has opened only recently,
    /// for at most [`MAX_OPEN_WAIT`].
    pub(super) async fn acquire(self: &Arc<Self>, deadline: Option<Instant>) -> Result<CircuitPermit, Error> {
        let give_up = Instant::now() + MAX_OPEN_WAIT;
        loop {
            let acquired = self.try_acquire(false, deadline);
            let retry_in = match &acquired {
                Err(Error::CircuitOpen { retry_in, .. }) if self.is_pause_short() => *retry_in,
                _ => return acquired,
            };
            if Instant::now() + retry_in >= give_up {
                return acquired;
            }
            tokio::time::sleep(jittered(retry_in.max(MIN_POLL_INTERVAL), 1.0, 1.25)).await;
        }
    }

    fn is_pause_short(&self) -> bool {
        self.state.lock().pause <= MAX_OPEN_WAIT
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
            retry_in,
        }
    }

    /// Records that a mirror has used up its share of the time. Opens the circuit.
    pub(super) fn record_timeout(&self) {
        self.record_failure(Instant::now(), false, 1);
    }

    /// Counts a failure of a request sent at `started`. `threshold` failures in a row open the circuit.
    fn record_failure(&self, started: Instant, is_probe: bool, threshold: u32) {
        let mut state = self.state.lock();
        let is_same_burst = state.last_failure.is_some_and(|last| started < last) && started.elapsed() < BURST_WINDOW;
        // Requests sent before the circuit opened do not extend the pause either.
        let is_open = state.open_until.is_some();
        if !is_probe && (is_same_burst || is_open) {
            return;
        }
        state.last_failure = Some(Instant::now());
        state.failures = state.failures.saturating_add(1);
        if !is_open && state.failures < threshold {
            return;
        }
        let doubled = self.policy.pause.saturating_mul(1 << state.pauses.min(16));
        let max_pause = self.policy.max_pause;
        let pause = jittered(doubled.min(max_pause), 0.75, 1.25).min(max_pause);
        state.pauses = state.pauses.saturating_add(1);
        state.pause = pause;
        (state.is_probing, state.is_ping_answered) = (false, false);
        state.open_until = Some(Instant::now() + pause);
        tracing::warn!(
            host = %self.host,
            failures = state.failures,
            pause = %format_args!("{:.1}s", pause.as_secs_f64()),
            "opened circuit: host does not answer; failing its requests until the next probe"
        );
    }

    /// Closes the circuit, but keeps the failure count: the next failure opens it again.
    fn close(&self) {
        let mut state = self.state.lock();
        if state.open_until.take().is_some() {
            state.is_probing = false;
            tracing::info!(host = %self.host, "closed circuit: host answers again");
        }
    }

    fn reset(&self) {
        self.close();
        *self.state.lock() = CircuitState::default();
    }
}

impl CircuitPermit {
    /// Whether the host must answer a ping first, because it has shown no sign of life since the circuit opened.
    pub(super) fn needs_ping(&self) -> bool {
        self.is_probe && !self.is_ping_answered
    }

    /// Records that the host could not be reached or was silent.
    pub(super) fn record_failure(&mut self) {
        if !self.is_recorded {
            self.is_recorded = true;
            let threshold = if self.has_alternative {
                1
            } else {
                self.circuit.policy.failures
            };
            self.circuit.record_failure(self.started, self.is_probe, threshold);
        }
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

    /// Records an answered ping. The circuit stays half-open: the next request for content is the probe.
    pub(super) fn record_ping(mut self) {
        self.is_recorded = true;
        let mut state = self.circuit.state.lock();
        (state.is_probing, state.is_ping_answered) = (false, true);
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

    fn stalled(&mut self) {
        self.record_failure();
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
            self.record_failure();
        } else if self.is_probe {
            self.circuit.state.lock().is_probing = false;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn circuit() -> Arc<Circuit> {
        let policy = CircuitPolicy {
            failures: 3,
            pause: Duration::from_millis(40),
            max_pause: Duration::from_millis(100),
        };
        Arc::new(Circuit::new("r.example".into(), policy))
    }

    fn acquire(circuit: &Arc<Circuit>) -> CircuitPermit {
        circuit.try_acquire(false, None).unwrap()
    }

    fn fail(circuit: &Arc<Circuit>) {
        acquire(circuit).record_failure();
    }

    fn succeed(circuit: &Arc<Circuit>) {
        let mut permit = acquire(circuit);
        permit.record_answer();
        permit.record_success();
    }

    fn retry_in(circuit: &Arc<Circuit>) -> Option<Duration> {
        match circuit.try_acquire(false, None) {
            Err(Error::CircuitOpen { retry_in, .. }) => Some(retry_in),
            _ => None,
        }
    }

    #[test]
    fn failures_in_a_row_open_the_circuit_and_one_probe_closes_it() {
        let circuit = circuit();
        fail(&circuit);
        fail(&circuit);
        succeed(&circuit);
        fail(&circuit);
        fail(&circuit);
        assert!(retry_in(&circuit).is_none(), "an answer resets the count");
        fail(&circuit);
        assert!(retry_in(&circuit).is_some_and(|retry_in| retry_in <= Duration::from_millis(50)));
        std::thread::sleep(Duration::from_millis(60));
        let mut probe = acquire(&circuit);
        assert!(retry_in(&circuit).is_some(), "one probe at a time");
        probe.record_failure();
        drop(probe);
        assert!(retry_in(&circuit).is_some(), "the probe failed");
        std::thread::sleep(Duration::from_millis(110));
        drop(acquire(&circuit));
        succeed(&circuit);
        assert!(retry_in(&circuit).is_none() && retry_in(&circuit).is_none());
    }

    #[test]
    fn pause_grows_up_to_its_maximum() {
        let circuit = circuit();
        for _ in 0..3 {
            fail(&circuit);
        }
        for _ in 0..5 {
            std::thread::sleep(Duration::from_millis(105));
            fail(&circuit);
            assert!(retry_in(&circuit).is_some_and(|retry_in| retry_in <= Duration::from_millis(100)));
        }
    }

    #[test]
    fn one_failure_opens_the_circuit_of_a_host_with_an_alternative() {
        let circuit = circuit();
        circuit
            .try_acquire(true, None)
            .map(|mut permit| permit.record_failure())
            .unwrap();
        assert!(retry_in(&circuit).is_some());
    }

    #[test]
    fn concurrent_fast_failures_count_once_and_slow_ones_individually() {
        let at_once = circuit();
        let permits: Vec<_> = (0..10).map(|_| acquire(&at_once)).collect();
        permits.into_iter().for_each(|mut permit| permit.record_failure());
        assert!(retry_in(&at_once).is_none());
        let silent = circuit();
        let permits: Vec<_> = (0..10).map(|_| acquire(&silent)).collect();
        std::thread::sleep(BURST_WINDOW);
        permits.into_iter().for_each(|mut permit| permit.record_failure());
        assert!(retry_in(&silent).is_some());
    }

    #[test]
    fn headers_close_the_circuit_and_a_stalled_body_opens_it() {
        let circuit = circuit();
        (0..3).for_each(|_| fail(&circuit));
        std::thread::sleep(Duration::from_millis(60));
        let mut probe = acquire(&circuit);
        probe.record_answer();
        let mut other = acquire(&circuit);
        assert!(retry_in(&circuit).is_none(), "other requests do not wait for the body");
        other.record_failure();
        assert!(retry_in(&circuit).is_some(), "the failure count was kept");
        // The body of the earlier request has ended.
        probe.record_success();
        assert!(retry_in(&circuit).is_none());
    }

    #[test]
    fn answered_ping_permits_one_request() {
        let circuit = circuit();
        let acquire = || circuit.try_acquire(true, None);
        acquire().unwrap().record_failure();
        std::thread::sleep(Duration::from_millis(60));
        let ping = acquire().unwrap();
        assert!(ping.needs_ping());
        ping.record_ping();
        let mut content = acquire().unwrap();
        content.record_answer();
        assert!(!content.needs_ping() && acquire().is_err());
        content.record_failure();
        drop(content);
        assert!(
            circuit.state.lock().pauses == 2 && acquire().is_err(),
            "the next pause is longer"
        );
        std::thread::sleep(Duration::from_millis(110));
        acquire().unwrap().record_ping();
        let mut content = acquire().unwrap();
        content.record_answer();
        content.record_progress();
        assert!(acquire().is_ok());
        content.record_success();
        assert_eq!(circuit.state.lock().pauses, 0);
    }

    #[test]
    fn drop_after_the_deadline_counts_as_a_failure() {
        let circuit = circuit();
        drop(circuit.try_acquire(true, Some(Instant::now() + Duration::from_secs(60))));
        assert!(retry_in(&circuit).is_none(), "the caller gave up");
        drop(circuit.try_acquire(true, Some(Instant::now())));
        assert!(retry_in(&circuit).is_some());
    }

    #[tokio::test]
    async fn acquire_waits_for_a_short_pause_only() {
        let short = circuit();
        (0..3).for_each(|_| fail(&short));
        assert!(short.acquire(None).await.is_ok());
        let policy = CircuitPolicy {
            failures: 1,
            pause: Duration::from_secs(600),
            max_pause: Duration::from_secs(600),
        };
        let long = Arc::new(Circuit::new("r.example".into(), policy));
        fail(&long);
        assert!(long.acquire(None).await.is_err());
    }
}
