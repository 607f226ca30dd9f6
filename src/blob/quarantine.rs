//! [`Quarantine`]: limits how often chunks are fetched that were corrupt again and again.
//!
//! A malformed image may list digests that none of its bytes have. A program that reads such a file in a loop would
//! load the registry without end. A failure that may pass is retried at once, as before.

use std::time::{Duration, Instant};

use super::error::ReadCause;
use crate::ttl_cache::TtlCache;

/// Number of failures in a row after which a chunk is in quarantine.
const MAX_FAILURES: u32 = 32;
/// Minimum interval between fetches of a chunk in quarantine.
const INTERVAL: Duration = Duration::from_secs(1);
/// How long failures count.
const MEMORY: Duration = Duration::from_secs(60);
/// Maximum number of chunks of an image's blob whose failures count.
const MAX_CHUNKS: usize = 4096;

/// Corrupt chunks of one blob of one image, by position in the chunk table.
pub(super) struct Quarantine(TtlCache<usize, Failures>);

#[derive(Debug, Clone)]
struct Failures {
    count: u32,
    last: Instant,
    cause: ReadCause,
}

impl Default for Quarantine {
    fn default() -> Self {
        Self(TtlCache::new(MAX_CHUNKS, MEMORY))
    }
}

impl Quarantine {
    /// Why the chunk must not be fetched now, if so.
    pub(super) fn refusal(&self, position: usize) -> Option<ReadCause> {
        let failures = self.0.get(&position)?;
        let is_refused = failures.count >= MAX_FAILURES && failures.last.elapsed() < INTERVAL;
        is_refused.then_some(failures.cause)
    }

    /// Records how fetching the chunk ended. Of failures, only corruption counts.
    pub(super) fn record(&self, position: usize, failure: Option<&ReadCause>) {
        match failure {
            None => self.0.remove(&position),
            Some(cause) if cause.is_corruption() => {
                let before = self.0.get(&position).map_or(0, |failures| failures.count);
                let failures = Failures {
                    count: before.saturating_add(1),
                    last: Instant::now(),
                    cause: cause.clone(),
                };
                self.0.insert(position, failures);
            }
            Some(_) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunk_is_refused_after_many_failures_in_a_row() {
        let quarantine = Quarantine::default();
        for _ in 0..MAX_FAILURES {
            assert!(quarantine.refusal(1).is_none());
            quarantine.record(1, Some(&ReadCause::Digest));
            quarantine.record(2, Some(&ReadCause::Aborted));
        }
        assert!(matches!(quarantine.refusal(1), Some(ReadCause::Digest)));
        assert!(quarantine.refusal(2).is_none() && quarantine.refusal(3).is_none());
        quarantine.record(1, None);
        assert!(quarantine.refusal(1).is_none());
    }

    #[test]
    fn chunk_in_quarantine_is_fetched_after_the_interval() {
        let quarantine = Quarantine::default();
        let old = Failures {
            count: MAX_FAILURES,
            last: Instant::now() - INTERVAL,
            cause: ReadCause::Digest,
        };
        quarantine.0.insert(1, old);
        assert!(quarantine.refusal(1).is_none());
        quarantine.record(1, Some(&ReadCause::Digest));
        assert!(quarantine.refusal(1).is_some());
    }
}
