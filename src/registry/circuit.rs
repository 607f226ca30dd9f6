//! A host that does not answer is left alone for a while, so that a thousand readers do not each wait for it.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::Mutex;

use super::{Error, Options, jitter::scaled};

/// When a host is left alone, and for how long.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rules {
    /// Failures in a row after which it is.
    pub(super) failures: u32,
    /// For how long the first time; twice as long each further time, give or take a quarter.
    pub(super) pause: Duration,
    /// The longest time.
    pub(super) max_pause: Duration,
}

impl Rules {
    pub(super) fn of(options: &Options) -> Self {
        Self {
            failures: options.circuit_failures,
            pause: options.circuit_pause,
            max_pause: options.circuit_max_pause,
        }
    }
}

/// Failures of requests that took less than this, and were under way together, are one: they say that the host was away
/// for a moment. Who has waited longer for nothing has learned something of his own.
const MOMENT: Duration = Duration::from_millis(100);
/// The longest time a host is waited for that is being left alone: a registry that starts anew is back by then.
pub(super) const SHORT_REST: Duration = Duration::from_secs(2);
/// How long somebody else is given to find out whether it is back, before it is looked at again.
const PROBING: Duration = Duration::from_millis(100);

/// What is known of whether one host answers.
pub(super) struct Circuit {
    host: String,
    rules: Rules,
    state: Mutex<State>,
    /// Until when it has asked to be left alone.
    quiet_until: Mutex<Option<Instant>>,
}

#[derive(Default)]
struct State {
    /// Failures in a row.
    failures: u32,
    /// When the last one was counted.
    counted: Option<Instant>,
    /// Times in a row that the host was left alone.
    pauses: u32,
    /// For how long the last time.
    pause: Duration,
    /// Until when nobody asks.
    until: Option<Instant>,
    /// Whether somebody finds out if the host is back.
    probing: bool,
    /// Whether it has shown a sign of life since it was last left alone.
    alive: bool,
}

/// Leave to ask a host. Who has it says what came of it, and says nothing if it was given up.
pub(super) struct CircuitPermit {
    circuit: Arc<Circuit>,
    /// Whether another host can be asked instead: then one failure is enough.
    alternative: bool,
    /// When what comes after it is the caller's own time that has run out.
    due: Option<Instant>,
    started: Instant,
    probe: bool,
    alive: bool,
    answered: bool,
    told: bool,
}

impl Circuit {
    pub(super) fn new(host: String, rules: Rules) -> Self {
        Self {
            host,
            rules,
            state: Mutex::default(),
            quiet_until: Mutex::default(),
        }
    }

    /// Gives leave to ask until `due`, unless the host is being left alone. After that time one is let through to find
    /// out.
    pub(super) fn enter(self: &Arc<Self>, alternative: bool, due: Option<Instant>) -> Result<CircuitPermit, Error> {
        let mut state = self.state.lock();
        let (probe, alive) = (state.until.is_some(), state.alive);
        if let Some(until) = state.until {
            let left = until.saturating_duration_since(Instant::now());
            if !left.is_zero() || state.probing {
                return Err(self.error(left, &state));
            }
            state.probing = true;
        }
        drop(state);
        Ok(CircuitPermit {
            circuit: Arc::clone(self),
            alternative,
            due,
            started: Instant::now(),
            probe,
            alive,
            answered: false,
            told: false,
        })
    }

    /// As [`Circuit::enter`], for who has nobody else to ask: if the host has only just begun to be left alone, that is
    /// waited for, [`SHORT_REST`] at most. One that has been away for longer is not.
    pub(super) async fn enter_patiently(self: &Arc<Self>, due: Option<Instant>) -> Result<CircuitPermit, Error> {
        let last = Instant::now() + SHORT_REST;
        loop {
            let entered = self.enter(false, due);
            let left = match &entered {
                Err(Error::CircuitOpen { left, .. }) if self.rests_shortly() => *left,
                _ => return entered,
            };
            if Instant::now() + left >= last {
                return entered;
            }
            tokio::time::sleep(scaled(left.max(PROBING), 1.0, 1.25)).await;
        }
    }

    fn rests_shortly(&self) -> bool {
        self.state.lock().pause <= SHORT_REST
    }

    /// Has everybody leave it alone for that long.
    pub(super) fn backoff_until(&self, pause: Duration) {
        let until = Instant::now() + pause;
        let mut quiet_until = self.quiet_until.lock();
        *quiet_until = Some(quiet_until.map_or(until, |known| known.max(until)));
    }

    /// Waits for as long as it has asked to be left alone.
    ///
    /// # Errors
    /// If there is an `alternative`, nobody waits: [`Error::Busy`].
    pub(super) async fn quiet(&self, alternative: bool) -> Result<(), Error> {
        let until = *self.quiet_until.lock();
        let left = until.map_or(Duration::ZERO, |until| until.saturating_duration_since(Instant::now()));
        if !left.is_zero() && alternative {
            let host = self.host.clone();
            return Err(Error::Busy { host, left });
        }
        tokio::time::sleep(left).await;
        Ok(())
    }

    /// Why nobody may ask now.
    pub(super) fn resting(&self) -> Error {
        let state = self.state.lock();
        let left = state.until.map(|until| until.saturating_duration_since(Instant::now()));
        self.error(left.unwrap_or_default(), &state)
    }

    fn error(&self, left: Duration, state: &State) -> Error {
        Error::CircuitOpen {
            host: self.host.clone(),
            failures: state.failures,
            left,
        }
    }

    /// A mirror has used up the time it had.
    pub(super) fn overran(&self) {
        self.failed(Instant::now(), false, 1);
    }

    fn failed(&self, started: Instant, probe: bool, enough: u32) {
        let mut state = self.state.lock();
        let together = state.counted.is_some_and(|counted| started < counted) && started.elapsed() < MOMENT;
        // Of those who fail together one is enough to lengthen the time, too.
        let open = state.until.is_some();
        if !probe && (together || open) {
            return;
        }
        state.counted = Some(Instant::now());
        state.failures = state.failures.saturating_add(1);
        if !open && state.failures < enough {
            return;
        }
        let doubled = self.rules.pause.saturating_mul(1 << state.pauses.min(16));
        let pause = scaled(doubled.min(self.rules.max_pause), 0.75, 1.25).min(self.rules.max_pause);
        state.pauses = state.pauses.saturating_add(1);
        state.pause = pause;
        (state.probing, state.alive) = (false, false);
        state.until = Some(Instant::now() + pause);
        tracing::warn!(
            host = self.host,
            failures = state.failures,
            ?pause,
            "does not answer, and is left alone"
        );
    }

    /// Everybody may ask again. What has failed before is not forgotten yet: one failure more, and nobody may.
    fn close(&self) {
        let mut state = self.state.lock();
        if state.until.take().is_some() {
            state.probing = false;
            tracing::info!(host = self.host, "answers again");
        }
    }

    fn succeeded(&self) {
        self.close();
        *self.state.lock() = State::default();
    }
}

impl CircuitPermit {
    /// Whether a sign of life is to be asked for, because nobody knows if the host is back.
    pub(super) fn is_blind(&self) -> bool {
        self.probe && !self.alive
    }

    /// The host could not be reached, or was silent.
    pub(super) fn failed(&mut self) {
        if !self.told {
            self.told = true;
            let enough = if self.alternative {
                1
            } else {
                self.circuit.rules.failures
            };
            self.circuit.failed(self.started, self.probe, enough);
        }
    }

    /// The host has answered something. Where there is no other, all may ask it again.
    pub(super) fn answered(&mut self) {
        self.answered = true;
        if !self.alternative {
            self.close();
        }
    }

    /// The host gives what was asked for, and not only signs of life: all may ask it again.
    pub(super) fn delivering(&mut self) {
        self.close();
    }

    fn close(&mut self) {
        if std::mem::take(&mut self.probe) && !self.told {
            self.circuit.close();
        }
    }

    /// The host has shown a sign of life, and one request for something may find out whether it does more.
    pub(super) fn showed_life(mut self) {
        self.told = true;
        let mut state = self.circuit.state.lock();
        (state.probing, state.alive) = (false, true);
    }

    /// If the host has answered, the answer is complete.
    pub(super) fn succeeded(&mut self) {
        if self.answered && !self.told {
            self.told = true;
            self.circuit.succeeded();
        }
    }
}

impl Drop for CircuitPermit {
    fn drop(&mut self) {
        if self.told {
            return;
        }
        // Given up by us, not by who has asked us.
        if !self.answered && self.due.is_some_and(|due| Instant::now() >= due) {
            self.failed();
        } else if self.probe {
            self.circuit.state.lock().probing = false;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn circuit() -> Arc<Circuit> {
        let rules = Rules {
            failures: 3,
            pause: Duration::from_millis(40),
            max_pause: Duration::from_millis(100),
        };
        Arc::new(Circuit::new("r.example".into(), rules))
    }

    fn enter(circuit: &Arc<Circuit>) -> CircuitPermit {
        circuit.enter(false, None).unwrap()
    }

    fn fail(circuit: &Arc<Circuit>) {
        enter(circuit).failed();
    }

    fn succeed(circuit: &Arc<Circuit>) {
        let mut pass = enter(circuit);
        pass.answered();
        pass.succeeded();
    }

    fn left(circuit: &Arc<Circuit>) -> Option<Duration> {
        match circuit.enter(false, None) {
            Err(Error::CircuitOpen { left, .. }) => Some(left),
            _ => None,
        }
    }

    #[test]
    fn failures_in_a_row_open_it_and_one_probe_closes_it() {
        let circuit = circuit();
        fail(&circuit);
        fail(&circuit);
        succeed(&circuit);
        fail(&circuit);
        fail(&circuit);
        assert!(left(&circuit).is_none(), "an answer starts the count anew");
        fail(&circuit);
        assert!(left(&circuit).is_some_and(|left| left <= Duration::from_millis(50)));
        std::thread::sleep(Duration::from_millis(60));
        let mut probe = enter(&circuit);
        assert!(left(&circuit).is_some(), "a second one need not find out too");
        probe.failed();
        drop(probe);
        assert!(left(&circuit).is_some(), "it did not answer");
        std::thread::sleep(Duration::from_millis(110));
        drop(enter(&circuit));
        succeed(&circuit);
        assert!(left(&circuit).is_none() && left(&circuit).is_none());
    }

    #[test]
    fn the_time_grows_up_to_its_bound() {
        let circuit = circuit();
        for _ in 0..3 {
            fail(&circuit);
        }
        for _ in 0..5 {
            std::thread::sleep(Duration::from_millis(105));
            fail(&circuit);
            assert!(left(&circuit).is_some_and(|left| left <= Duration::from_millis(100)));
        }
    }

    #[test]
    fn one_failure_is_enough_where_another_can_be_asked() {
        let circuit = circuit();
        circuit.enter(true, None).map(|mut pass| pass.failed()).unwrap();
        assert!(left(&circuit).is_some());
    }

    #[test]
    fn those_who_fail_at_once_count_as_one_and_those_who_waited_each() {
        let at_once = circuit();
        let together: Vec<_> = (0..10).map(|_| enter(&at_once)).collect();
        together.into_iter().for_each(|mut pass| pass.failed());
        assert!(left(&at_once).is_none());
        let silent = circuit();
        let together: Vec<_> = (0..10).map(|_| enter(&silent)).collect();
        std::thread::sleep(MOMENT);
        together.into_iter().for_each(|mut pass| pass.failed());
        assert!(left(&silent).is_some());
    }

    #[test]
    fn an_answer_lets_all_in_and_a_silent_body_none() {
        let circuit = circuit();
        (0..3).for_each(|_| fail(&circuit));
        std::thread::sleep(Duration::from_millis(60));
        let mut probe = enter(&circuit);
        probe.answered();
        let mut other = enter(&circuit);
        assert!(left(&circuit).is_none(), "its body may take long");
        other.failed();
        assert!(left(&circuit).is_some(), "it was away a moment ago");
        // What was asked for before has come to its end.
        probe.succeeded();
        assert!(left(&circuit).is_none());
    }

    #[test]
    fn a_sign_of_life_lets_one_in() {
        let circuit = circuit();
        let enter = || circuit.enter(true, None);
        enter().unwrap().failed();
        std::thread::sleep(Duration::from_millis(60));
        let ping = enter().unwrap();
        assert!(ping.is_blind());
        ping.showed_life();
        let mut content = enter().unwrap();
        content.answered();
        assert!(!content.is_blind() && enter().is_err());
        content.failed();
        drop(content);
        assert!(
            circuit.state.lock().pauses == 2 && enter().is_err(),
            "it gets a longer time"
        );
        std::thread::sleep(Duration::from_millis(110));
        enter().unwrap().showed_life();
        let mut content = enter().unwrap();
        content.answered();
        content.delivering();
        assert!(enter().is_ok());
        content.succeeded();
        assert_eq!(circuit.state.lock().pauses, 0);
    }

    #[test]
    fn who_runs_out_of_time_without_an_answer_counts() {
        let circuit = circuit();
        drop(circuit.enter(true, Some(Instant::now() + Duration::from_secs(60))));
        assert!(left(&circuit).is_none(), "the caller has gone");
        drop(circuit.enter(true, Some(Instant::now())));
        assert!(left(&circuit).is_some());
    }

    #[tokio::test]
    async fn a_short_rest_is_waited_for_and_a_long_one_not() {
        let short = circuit();
        (0..3).for_each(|_| fail(&short));
        assert!(short.enter_patiently(None).await.is_ok());
        let rules = Rules {
            failures: 1,
            pause: Duration::from_secs(600),
            max_pause: Duration::from_secs(600),
        };
        let long = Arc::new(Circuit::new("r.example".into(), rules));
        fail(&long);
        assert!(long.enter_patiently(None).await.is_err());
    }
}
