//! What is measured of many operations: how long their parts took, how much came when, and what failed.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use hdrhistogram::Histogram;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// The longest time that is told from longer ones, in nanoseconds: an hour.
const LONGEST: u64 = 3_600_000_000_000;
/// Significant digits of times: they are right to 1 %.
const DIGITS: u8 = 2;
/// The shortest interval that throughput is told by, in milliseconds.
const INTERVAL: u64 = 10;
/// Most intervals; when there are more, two become one.
const INTERVALS: usize = 1000;

/// A part of an operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// All of it, waits included.
    Total,
    /// Making connections, TLS included; only of operations that had to make one.
    Connect,
    /// From sending the request to the first bytes of the body, without connecting.
    FirstByte,
    /// From the first bytes of the body to its end.
    Transfer,
    /// Decompressing.
    Decompress,
    /// Hashing chunks and comparing with their digests.
    Verify,
    /// Writing chunks to the cache.
    Write,
}

impl Phase {
    /// All of them, in the order in which they come.
    pub const ALL: [Self; 7] = [
        Self::Total,
        Self::Connect,
        Self::FirstByte,
        Self::Transfer,
        Self::Decompress,
        Self::Verify,
        Self::Write,
    ];

    /// As people read it.
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

/// How long something took, many times; right to 1 %.
#[derive(Debug, Clone, PartialEq)]
pub struct Distribution(Histogram<u64>);

/// The form of a [`Distribution`] in JSON. Times are in nanoseconds.
#[derive(Serialize, Deserialize)]
struct Written {
    count: u64,
    min: u64,
    mean: u64,
    p50: u64,
    p90: u64,
    p99: u64,
    max: u64,
    /// Times, and how often each was measured.
    buckets: Vec<(u64, u64)>,
}

impl Default for Distribution {
    fn default() -> Self {
        // Fails only for bounds that are not in order, or more than 5 digits.
        Self(Histogram::new_with_bounds(1, LONGEST, DIGITS).expect("the bounds are in order"))
    }
}

impl Distribution {
    /// Adds one measurement.
    pub fn record(&mut self, took: Duration) {
        self.0.saturating_record(nanoseconds(took));
    }

    /// How many there are.
    pub fn count(&self) -> u64 {
        self.0.len()
    }

    /// The shortest; zero if there is none.
    pub fn min(&self) -> Duration {
        match self.count() {
            0 => Duration::ZERO,
            _ => Duration::from_nanos(self.0.min()),
        }
    }

    /// The longest.
    pub fn max(&self) -> Duration {
        Duration::from_nanos(self.0.max())
    }

    /// What so many percent of the measurements do not exceed.
    pub fn percentile(&self, percent: f64) -> Duration {
        let within = self.0.value_at_percentile(percent);
        Duration::from_nanos(within).clamp(self.min(), self.max())
    }

    /// Times in rising order, each with the share (0 to 1) of measurements that do not exceed it.
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
        Written {
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
    /// From the buckets; the rest follows from these.
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let written = Written::deserialize(deserializer)?;
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

/// How many bytes came in each interval from the start on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Throughput {
    /// Length of an interval, in milliseconds.
    pub interval_ms: u64,
    /// Bytes of each.
    pub bytes: Vec<u64>,
}

impl Default for Throughput {
    fn default() -> Self {
        let (interval_ms, bytes) = (INTERVAL, Vec::new());
        Self { interval_ms, bytes }
    }
}

impl Throughput {
    /// So many bytes came at that time after the start.
    pub fn add(&mut self, at: Duration, bytes: u64) {
        let at = u64::try_from(at.as_millis()).unwrap_or(u64::MAX);
        while at / self.interval_ms >= INTERVALS as u64 {
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

/// Failures of one kind.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// The kind, in a word or two.
    pub cause: String,
    /// How many.
    pub count: u64,
    /// The first one, in full.
    pub first: String,
}

/// What one run has measured so far.
#[derive(Debug)]
pub struct Samples {
    start: Instant,
    /// From the start to the last operation's end.
    pub elapsed: Duration,
    /// Operations that succeeded.
    pub operations: u64,
    /// Bytes that came.
    pub bytes: u64,
    /// What the parts of these took.
    pub latency: BTreeMap<Phase, Distribution>,
    /// Bytes over time.
    pub throughput: Throughput,
    failures: BTreeMap<&'static str, Failure>,
    in_a_row: u64,
}

impl Samples {
    /// Nothing measured; the run starts now.
    pub fn start() -> Self {
        Self {
            start: Instant::now(),
            elapsed: Duration::ZERO,
            operations: 0,
            bytes: 0,
            latency: BTreeMap::new(),
            throughput: Throughput::default(),
            failures: BTreeMap::new(),
            in_a_row: 0,
        }
    }

    /// An operation has succeeded just now.
    pub fn succeeded(&mut self, bytes: u64, parts: impl IntoIterator<Item = (Phase, Duration)>) {
        self.elapsed = self.start.elapsed();
        self.operations += 1;
        self.bytes += bytes;
        self.in_a_row = 0;
        if bytes > 0 {
            self.throughput.add(self.elapsed, bytes);
        }
        for (phase, took) in parts {
            self.latency.entry(phase).or_default().record(took);
        }
    }

    /// Bytes of an operation that is not over have come just now.
    pub fn came(&mut self, bytes: u64) {
        self.elapsed = self.start.elapsed();
        self.bytes += bytes;
        self.throughput.add(self.elapsed, bytes);
    }

    /// An operation has failed just now. `first` tells all of it.
    pub fn failed(&mut self, cause: &'static str, first: impl FnOnce() -> String) {
        self.elapsed = self.start.elapsed();
        self.in_a_row += 1;
        let failure = self.failures.entry(cause).or_insert_with(|| Failure {
            cause: cause.to_owned(),
            count: 0,
            first: first(),
        });
        failure.count += 1;
    }

    /// How many failures came since the last success.
    pub fn failed_in_a_row(&self) -> u64 {
        self.in_a_row
    }

    /// Failures by cause, the most frequent first.
    pub fn failures(&self) -> Vec<Failure> {
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
    fn percentiles() {
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
    fn distributions_survive_json() {
        let distribution = milliseconds(3..=700);
        let text = serde_json::to_string(&distribution).unwrap();
        let back: Distribution = serde_json::from_str(&text).unwrap();
        assert_eq!(serde_json::to_string(&back).unwrap(), text);
        for percent in [0.1, 50.0, 99.9] {
            assert_eq!(back.percentile(percent), distribution.percentile(percent));
        }
    }

    #[test]
    fn intervals_get_longer_before_there_are_too_many() {
        let mut throughput = Throughput::default();
        for second in 0..100 {
            throughput.add(Duration::from_secs(second), 7);
        }
        assert!(throughput.bytes.len() <= INTERVALS && throughput.interval_ms >= 100);
        assert_eq!(throughput.bytes.iter().sum::<u64>(), 700);
        throughput.add(Duration::MAX, 1);
        assert_eq!(throughput.bytes.iter().sum::<u64>(), 701);
    }

    #[test]
    fn failures_are_told_by_cause() {
        let mut samples = Samples::start();
        for text in ["a", "b"] {
            samples.failed("timeout", || text.to_owned());
        }
        samples.failed("reset", || "c".to_owned());
        assert_eq!(samples.failed_in_a_row(), 3);
        samples.succeeded(5, [(Phase::Total, Duration::from_millis(1))]);
        assert_eq!(
            (samples.failed_in_a_row(), samples.operations, samples.bytes),
            (0, 1, 5)
        );
        let failures = samples.failures();
        assert_eq!((failures[0].count, failures[0].first.as_str()), (2, "a"));
        assert_eq!(failures.len(), 2);
    }
}
