//! Limits how often a message is logged.

use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// Permits one message per interval, and counts the others.
#[derive(Debug)]
pub struct LogLimit {
    interval: Duration,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    last: Option<Instant>,
    suppressed: u64,
}

impl LogLimit {
    /// A limit of one message per `interval`.
    pub fn new(interval: Duration) -> Self {
        let state = Mutex::default();
        Self { interval, state }
    }

    /// The number of messages suppressed since the last one, if another one may be logged now.
    pub fn permit(&self) -> Option<u64> {
        let mut state = self.state.lock();
        if state.last.is_some_and(|last| last.elapsed() < self.interval) {
            state.suppressed += 1;
            return None;
        }
        state.last = Some(Instant::now());
        Some(std::mem::take(&mut state.suppressed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn suppressed_messages_are_counted() {
        let limit = LogLimit::new(Duration::from_secs(3600));
        assert_eq!([limit.permit(), limit.permit(), limit.permit()], [Some(0), None, None]);
        limit.state.lock().last = None;
        assert_eq!([limit.permit(), limit.permit()], [Some(2), None]);
        let always = LogLimit::new(Duration::ZERO);
        assert_eq!([always.permit(), always.permit()], [Some(0), Some(0)]);
    }
}
