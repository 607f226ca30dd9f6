//! [`DurationHistogram`]: a histogram of durations for metrics, which counts with atomics only. That of
//! `prometheus-client` takes a lock for each value, which the threads that answer the kernel would wait for.

use std::{
    fmt,
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use prometheus_client::encoding::{MetricEncoder, NoLabelSet};

/// Upper bounds of the buckets, in microseconds: from a read of a cached chunk to the longest time-outs.
const BOUNDS: [u64; 14] = [
    25,
    50,
    100,
    250,
    1000,
    2500,
    10_000,
    50_000,
    250_000,
    1_000_000,
    2_500_000,
    10_000_000,
    30_000_000,
    120_000_000,
];

/// Durations, counted in buckets.
#[derive(Debug, Default)]
pub struct DurationHistogram {
    /// One for each of [`BOUNDS`], and one for longer durations.
    buckets: [AtomicU64; BOUNDS.len() + 1],
    nanoseconds: AtomicU64,
}

impl DurationHistogram {
    /// Counts a duration.
    pub fn observe(&self, duration: Duration) {
        let nanoseconds = u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
        let bucket = BOUNDS.partition_point(|bound| bound * 1000 < nanoseconds);
        self.buckets[bucket].fetch_add(1, Ordering::Relaxed);
        self.nanoseconds.fetch_add(nanoseconds, Ordering::Relaxed);
    }

    /// Number of durations.
    pub fn count(&self) -> u64 {
        self.buckets.iter().map(|bucket| bucket.load(Ordering::Relaxed)).sum()
    }

    /// Writes the histogram in seconds.
    pub fn encode(&self, mut encoder: MetricEncoder<'_>) -> fmt::Result {
        let bounds = BOUNDS.iter().map(|bound| *bound as f64 / 1e6).chain([f64::INFINITY]);
        let counts = self.buckets.iter().map(|bucket| bucket.load(Ordering::Relaxed));
        let buckets: Vec<_> = bounds.zip(counts).collect();
        // Not `count`: the total has to agree with the buckets, which change meanwhile.
        let count = buckets.iter().map(|(_, count)| count).sum();
        let seconds = self.nanoseconds.load(Ordering::Relaxed) as f64 / 1e9;
        encoder.encode_histogram::<NoLabelSet>(seconds, count, &buckets, None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_counted_in_the_bucket_with_the_next_bound() {
        let histogram = DurationHistogram::default();
        for microseconds in [0, 25, 26, 120_000_000, 120_000_001] {
            histogram.observe(Duration::from_micros(microseconds));
        }
        let counts = histogram.buckets.iter().map(|bucket| bucket.load(Ordering::Relaxed));
        let counts: Vec<_> = counts.collect();
        assert_eq!((counts[0], counts[1], counts[13], counts[14]), (2, 1, 1, 1));
        assert_eq!(histogram.count(), 5);
        histogram.observe(Duration::MAX);
        assert_eq!(histogram.count(), 6);
    }
}
