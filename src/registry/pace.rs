//! Notices hosts that answer so slowly that reads take long.

use std::{sync::Arc, time::Duration};

use crate::ttl_cache::TtlCache;

/// Most hosts remembered.
const MAX_HOSTS: usize = 256;
/// Interval in which one host is logged.
const LOG_INTERVAL: Duration = Duration::from_secs(60);
/// How long an answer must have been waited for.
const MIN_WAIT: Duration = Duration::from_secs(5);
/// The rate below which an answer is slow, in bytes per second.
const MIN_RATE: f64 = 65536.0;

/// Logs slow hosts, each at most once in [`LOG_INTERVAL`].
pub(super) struct SlowHosts(TtlCache<String, ()>);

/// Measures one answer: how long it is waited for, and what comes.
pub(super) struct Pace {
    slow_hosts: Arc<SlowHosts>,
    waited: Duration,
    received: u64,
}

impl Default for SlowHosts {
    fn default() -> Self {
        Self(TtlCache::new(MAX_HOSTS, LOG_INTERVAL))
    }
}

impl Pace {
    /// Measures an answer whose headers took `waited`.
    pub(super) fn new(slow_hosts: Arc<SlowHosts>, waited: Duration) -> Self {
        Self {
            slow_hosts,
            waited,
            received: 0,
        }
    }

    /// Records that `bytes` have come from `host` after a wait of `waited`. Logs a slow host.
    pub(super) fn record(&mut self, host: &str, waited: Duration, bytes: u64) {
        self.waited += waited;
        self.received += bytes;
        if !self.is_slow() || self.slow_hosts.0.get(&host.to_owned()).is_some() {
            return;
        }
        self.slow_hosts.0.insert(host.to_owned(), ());
        tracing::warn!(
            host,
            bytes = self.received,
            seconds = self.waited.as_secs(),
            "host answers slowly; reads of its images take long"
        );
    }

    fn is_slow(&self) -> bool {
        self.waited >= MIN_WAIT && (self.received as f64) < MIN_RATE * self.waited.as_secs_f64()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answer_is_slow_if_it_takes_long_for_what_it_brings() {
        let slow_hosts = Arc::<SlowHosts>::default();
        let answer = |waits: &[(u64, u64)]| {
            let mut pace = Pace::new(Arc::clone(&slow_hosts), Duration::ZERO);
            for (seconds, bytes) in waits {
                pace.record("r.example", Duration::from_secs(*seconds), *bytes);
            }
            pace.is_slow()
        };
        assert!(!answer(&[(4, 1)]), "it may speed up");
        assert!(!answer(&[(1, 1 << 20); 10]));
        assert!(slow_hosts.0.get(&"r.example".to_owned()).is_none());
        assert!(answer(&[(1, 10 << 10); 10]));
        assert!(answer(&[(10, 100 << 10)]), "also a fast body after a long wait");
        assert!(slow_hosts.0.get(&"r.example".to_owned()).is_some(), "it was logged");
    }
}
