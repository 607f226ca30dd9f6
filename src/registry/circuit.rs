//! A host that does not answer is left alone for a while, so that a thousand readers do not each wait for it.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::Mutex;

use super::{Error, random::scaled};

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

/// What is known of whether one host answers.
pub(super) struct Circuit {
    host: String,
    rules: Rules,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Failures in a row.
    failures: u32,
    /// Times in a row that the host was left alone.
    pauses: u32,
    /// Until when nobody asks.
    until: Option<Instant>,
    /// Whether somebody finds out if the host is back.
    probing: bool,
}

/// Leave to ask a host. Who has it says what came of it, and says nothing if it was given up.
pub(super) struct Pass {
    circuit: Arc<Circuit>,
    probe: bool,
    answered: bool,
    told: bool,
}

impl Circuit {
    pub(super) fn new(host: String, rules: Rules) -> Self {
        let state = Mutex::default();
        Self { host, rules, state }
    }

    /// Gives leave to ask, unless the host is being left alone. After that time one is let through to find out.
    pub(super) fn enter(self: &Arc<Self>) -> Result<Pass, Error> {
        let mut state = self.state.lock();
        let probe = state.until.is_some();
        if let Some(until) = state.until {
            let left = until.saturating_duration_since(Instant::now());
            if !left.is_zero() || state.probing {
                return Err(self.error(left, &state));
            }
            state.probing = true;
        }
        drop(state);
        Ok(Pass {
            circuit: Arc::clone(self),
            probe,
            answered: false,
            told: false,
        })
    }

    /// Why nobody may ask now.
    pub(super) fn resting(&self) -> Error {
        let state = self.state.lock();
        let left = state.until.map(|until| until.saturating_duration_since(Instant::now()));
        self.error(left.unwrap_or_default(), &state)
    }

    fn error(&self, left: Duration, state: &State) -> Error {
        Error::Resting {
            host: self.host.clone(),
            failures: state.failures,
            left,
        }
    }

    fn failed(&self, probe: bool, enough: u32) {
        let mut state = self.state.lock();
        state.failures = state.failures.saturating_add(1);
        // Of those who fail together one is enough to lengthen the time.
        let open = state.until.is_some();
        if open && !probe || !open && state.failures < enough {
            return;
        }
        let doubled = self.rules.pause.saturating_mul(1 << state.pauses.min(16));
        let pause = scaled(doubled.min(self.rules.max_pause), 0.75, 1.25).min(self.rules.max_pause);
        state.pauses = state.pauses.saturating_add(1);
        state.probing = false;
        state.until = Some(Instant::now() + pause);
        tracing::warn!(
            host = self.host,
            failures = state.failures,
            ?pause,
            "does not answer, and is left alone"
        );
    }

    fn succeeded(&self) {
        let mut state = self.state.lock();
        if state.until.is_some() {
            tracing::info!(host = self.host, "answers again");
        }
        *state = State::default();
    }
}

impl Pass {
    /// Whether it is to find out if the host is back.
    pub(super) fn is_probe(&self) -> bool {
        self.probe
    }

    /// The host could not be reached, or was silent. `alternative` tells whether another can be asked instead: then
    /// one failure is enough.
    pub(super) fn failed(&mut self, alternative: bool) {
        if !self.told {
            self.told = true;
            let enough = if alternative { 1 } else { self.circuit.rules.failures };
            self.circuit.failed(self.probe, enough);
        }
    }

    /// The host has answered something. It counts unless what follows fails.
    pub(super) fn answered(&mut self) {
        self.answered = true;
    }
}

impl Drop for Pass {
    fn drop(&mut self) {
        if self.told {
            return;
        }
        if self.answered {
            self.circuit.succeeded();
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

    fn fail(circuit: &Arc<Circuit>) {
        circuit.enter().map(|mut pass| pass.failed(false)).unwrap();
    }

    fn left(circuit: &Arc<Circuit>) -> Option<Duration> {
        match circuit.enter() {
            Err(Error::Resting { left, .. }) => Some(left),
            _ => None,
        }
    }

    #[test]
    fn failures_in_a_row_open_it_and_one_probe_closes_it() {
        let circuit = circuit();
        fail(&circuit);
        fail(&circuit);
        circuit.enter().map(|mut pass| pass.answered()).unwrap();
        fail(&circuit);
        fail(&circuit);
        assert!(left(&circuit).is_none(), "an answer starts the count anew");
        fail(&circuit);
        assert!(left(&circuit).is_some_and(|left| left <= Duration::from_millis(50)));
        std::thread::sleep(Duration::from_millis(60));
        let mut probe = circuit.enter().unwrap();
        assert!(circuit.enter().is_err(), "a second one need not find out too");
        probe.failed(false);
        drop(probe);
        assert!(left(&circuit).is_some(), "it did not answer");
        std::thread::sleep(Duration::from_millis(110));
        drop(circuit.enter().unwrap());
        circuit.enter().map(|mut pass| pass.answered()).unwrap();
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
        circuit.enter().map(|mut pass| pass.failed(true)).unwrap();
        assert!(left(&circuit).is_some());
    }
}
