//! Samples of many operations: times of their steps, throughput over time, and failures.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use hdrhistogram::Histogram;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Upper bound of recorded times, in nanoseconds: one hour. Longer times count as this.
const MAX_NANOSECONDS: u64 = 3_600_000_000_000;
/// Significant decimal digits of recorded times (1 % precision).
const SIGNIFICANT_DIGITS: u8 = 2;
/// Initial interval of throughput, in milliseconds.
const MIN_INTERVAL_MS: u64 = 10;
/// Maximum number of intervals. When it is reached, pairs of intervals are merged.
const MAX_INTERVALS: usize = 1000;

/// A timed step of an operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TimedStep {
    /// The whole operation, including waits.
    Total,
    /// Connecting, including TLS; only for operations that opened a connection.
    Connect,
    /// From sending the request to the first byte of the body, without connecting.
    FirstByte,
    /// From the first byte of the body to its end.
    Transfer,
    /// Decompression.
    Decompress,
    /// Verification of chunk digests.
    Verify,
    /// Writing chunks to the cache.
    Write,
}

impl TimedStep {
    /// All steps, in order.
    pub const ALL: [Self; 7] = [
        Self::Total,
        Self::Connect,
        Self::FirstByte,
        Self::Transfer,
        Self::Decompress,
        Self::Verify,
        Self::Write,
    ];

    /// The name for output.
    pub fn name(self) -> &'static str {
        match self {
            Self::Total => "total",
            Self::Connect => "connect",
            Self::FirstByte => "first byte",
            Self::Transfer => "transfer",
            Self::Decompress => "decompress",
            Self::Verify => "verify",
            Self::Write => "write",
        }
    }
}

/// A histogram of times with 1 % precision.
#[derive(Debug, Clone, PartialEq)]
pub struct Distribution(Histogram<u64>);

/// JSON format of a [`Distribution`]. Times are in nanoseconds.
#[derive(Serialize, Deserialize)]
struct DistributionJson {
    count: u64,
    min: u64,
    mean: u64,
    p50: u64,
    p90: u64,
    p99: u64,
    max: u64,
    /// Times and their counts.
    buckets: Vec<(u64, u64)>,
}

impl Default for Distribution {
    fn default() -> Self {
        #[expect(
            clippy::expect_used,
            reason = "fails only for bounds out of order, or more than 5 digits"
        )]
        Self(Histogram::new_with_bounds(1, MAX_NANOSECONDS, SIGNIFICANT_DIGITS).expect("the bounds are in order"))
    }
}

impl Distribution {
    /// Adds one measurement.
    pub fn record(&mut self, took: Duration) {
        self.0.saturating_record(nanoseconds(took));
    }

    /// Number of measurements.
    pub fn count(&self) -> u64 {
        self.0.len()
    }

    /// Minimum; zero if there is no measurement.
    pub fn min(&self) -> Duration {
        match self.count() {
            0 => Duration::ZERO,
            _ => Duration::from_nanos(self.0.min()),
        }
    }

    /// Maximum; zero if there is no measurement.
    pub fn max(&self) -> Duration {
        Duration::from_nanos(self.0.max())
    }

    /// The value that `percent` of the measurements do not exceed.
    pub fn percentile(&self, percent: f64) -> Duration {
        let within = self.0.value_at_percentile(percent);
        Duration::from_nanos(within).clamp(self.min(), self.max())
    }

    /// Times in ascending order, each with the share (0 to 1) of measurements that do not exceed it.
    pub fn shares(&self) -> Vec<(Duration, f64)> {
        let all = self.count() as f64;
        let mut seen = 0;
        let share = |value: hdrhistogram::iterators::IterationValue<u64>| {
            seen += value.count_at_value();
            (Duration::from_nanos(value.value_iterated_to()), seen as f64 / all)
        };
        self.0.iter_recorded().map(share).collect()
    }
}

impl Serialize for Distribution {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let at = |percent| nanoseconds(self.percentile(percent));
        let buckets = self.0.iter_recorded();
        DistributionJson {
            count: self.count(),
            min: nanoseconds(self.min()),
            mean: self.0.mean() as u64,
            p50: at(50.0),
            p90: at(90.0),
            p99: at(99.0),
            max: nanoseconds(self.max()),
            buckets: buckets
                .map(|value| (value.value_iterated_to(), value.count_at_value()))
                .collect(),
        }
        .serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Distribution {
    /// Restores the histogram from its buckets, and ignores the derived values.
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let written = DistributionJson::deserialize(deserializer)?;
        let mut distribution = Self::default();
        for (value, count) in written.buckets {
            distribution.0.saturating_record_n(value, count);
        }
        Ok(distribution)
    }
}

fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

/// Bytes received in each interval since the start.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Throughput {
    /// Length of an interval, in milliseconds.
    pub interval_ms: u64,
    /// Bytes of each interval.
    pub bytes: Vec<u64>,
}

impl Default for Throughput {
    fn default() -> Self {
        let (interval_ms, bytes) = (MIN_INTERVAL_MS, Vec::new());
        Self { interval_ms, bytes }
    }
}

impl Throughput {
    /// Adds bytes at the time `at` after the start.
    pub fn add(&mut self, at: Duration, bytes: u64) {
        let at = u64::try_from(at.as_millis()).unwrap_or(u64::MAX);
        while at / self.interval_ms >= MAX_INTERVALS as u64 {
            self.interval_ms = self.interval_ms.saturating_mul(2);
            self.bytes = self.bytes.chunks(2).map(|pair| pair.iter().sum()).collect();
        }
        let at = (at / self.interval_ms) as usize; // below INTERVALS
        if self.bytes.len() <= at {
            self.bytes.resize(at + 1, 0);
        }
        self.bytes[at] += bytes;
    }
}

/// The number of failures with one cause.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FailureCount {
    /// Cause, in one or two words.
    pub cause: String,
    /// Number of failures.
    pub count: u64,
    /// Full message of the first failure.
    pub first: String,
}

/// Samples of one run.
#[derive(Debug)]
pub struct Samples {
    start: Instant,
    /// Time from the start to the end of the last operation.
    pub elapsed: Duration,
    /// Successful operations.
    pub operations: u64,
    /// Received bytes.
    pub bytes: u64,
    /// Times of each step.
    pub latency: BTreeMap<TimedStep, Distribution>,
    /// Bytes over time.
    pub throughput: Throughput,
    failures: BTreeMap<&'static str, FailureCount>,
    consecutive_failures: u64,
}

impl Samples {
    /// Starts a run without samples.
    pub fn start() -> Self {
        Self {
            start: Instant::now(),
            elapsed: Duration::ZERO,
            operations: 0,
            bytes: 0,
            latency: BTreeMap::new(),
            throughput: Throughput::default(),
            failures: BTreeMap::new(),
            consecutive_failures: 0,
        }
    }

    /// Records an operation that succeeded now.
    pub fn succeeded(&mut self, bytes: u64, parts: impl IntoIterator<Item = (TimedStep, Duration)>) {
        self.elapsed = self.start.elapsed();
        self.operations += 1;
        self.bytes += bytes;
        self.consecutive_failures = 0;
        if bytes > 0 {
            self.throughput.add(self.elapsed, bytes);
        }
        for (phase, took) in parts {
            self.latency.entry(phase).or_default().record(took);
        }
    }

    /// Records bytes of an unfinished operation.
    pub fn record_bytes(&mut self, bytes: u64) {
        self.elapsed = self.start.elapsed();
        self.bytes += bytes;
        self.throughput.add(self.elapsed, bytes);
    }

    /// Records an operation that failed now. `first` makes the message, if it is the first failure of this cause.
    pub fn failed(&mut self, cause: &'static str, first: impl FnOnce() -> String) {
        self.elapsed = self.start.elapsed();
        self.consecutive_failures += 1;
        let failure = self.failures.entry(cause).or_insert_with(|| FailureCount {
            cause: cause.to_owned(),
            count: 0,
            first: first(),
        });
        failure.count += 1;
    }

    /// Number of failures since the last success.
    pub fn consecutive_failures(&self) -> u64 {
        self.consecutive_failures
    }

    /// Failures by cause, the most frequent first.
    pub fn failures(&self) -> Vec<FailureCount> {
        let mut failures: Vec<_> = self.failures.values().cloned().collect();
        failures.sort_by_key(|failure| std::cmp::Reverse(failure.count));
        failures
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn milliseconds(range: std::ops::RangeInclusive<u64>) -> Distribution {
        let mut distribution = Distribution::default();
        range.for_each(|time| distribution.record(Duration::from_millis(time)));
        distribution
    }

    fn is_about(time: Duration, milliseconds: f64) -> bool {
        (time.as_secs_f64() * 1000.0 / milliseconds - 1.0).abs() <= 0.01
    }

    #[test]
    fn percentiles_are_precise_to_one_percent() {
        let distribution = milliseconds(1..=1000);
        assert_eq!(distribution.count(), 1000);
        assert!(is_about(distribution.min(), 1.0) && is_about(distribution.max(), 1000.0));
        for percent in [50.0, 90.0, 99.0] {
            assert!(is_about(distribution.percentile(percent), percent * 10.0), "{percent}");
        }
        let shares = distribution.shares();
        assert!(shares.is_sorted_by(|a, b| a.0 < b.0 && a.1 < b.1));
        assert_eq!(shares.last().map(|(_, share)| *share), Some(1.0));
        let none = Distribution::default();
        assert_eq!((none.min(), none.max(), none.percentile(50.0)), Default::default());
        assert!(none.shares().is_empty());
    }

    #[test]
    fn distribution_round_trips_through_json() {
        let distribution = milliseconds(3..=700);
        let text = serde_json::to_string(&distribution).unwrap();
        let back: Distribution = serde_json::from_str(&text).unwrap();
        assert_eq!(serde_json::to_string(&back).unwrap(), text);
        for percent in [0.1, 50.0, 99.9] {
            assert_eq!(back.percentile(percent), distribution.percentile(percent));
        }
    }

    #[test]
    fn intervals_are_merged_at_the_maximum() {
        let mut throughput = Throughput::default();
        for second in 0..100 {
            throughput.add(Duration::from_secs(second), 7);
        }
        assert!(throughput.bytes.len() <= MAX_INTERVALS && throughput.interval_ms >= 100);
        assert_eq!(throughput.bytes.iter().sum::<u64>(), 700);
        throughput.add(Duration::MAX, 1);
        assert_eq!(throughput.bytes.iter().sum::<u64>(), 701);
    }

    #[test]
    fn failures_are_counted_by_cause() {
        let mut samples = Samples::start();
        for text in ["a", "b"] {
            samples.failed("timeout", || text.to_owned());
        }
        samples.failed("reset", || "c".to_owned());
        assert_eq!(samples.consecutive_failures(), 3);
        samples.succeeded(5, [(TimedStep::Total, Duration::from_millis(1))]);
        assert_eq!(
            (samples.consecutive_failures(), samples.operations, samples.bytes),
            (0, 1, 5)
        );
        let failures = samples.failures();
        assert_eq!((failures[0].count, failures[0].first.as_str()), (2, "a"));
        assert_eq!(failures.len(), 2);
    }
}
