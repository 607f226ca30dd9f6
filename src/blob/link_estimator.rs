//! Estimates the link to a registry: the latency of a response, and the rate of its bytes.
//!
//! Both decide how much to coalesce ([`super::prefetcher::coalesce`]): on a link that carries megabytes during one
//! round trip, saving a request is worth many bytes that are never read.

use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// The shortest response, in bytes, whose rate is measured.
const MIN_RATE_SAMPLE_BYTES: u64 = 256 << 10;
/// The highest rate that counts, in bytes per second: 1 Gbit/s. Faster links gain nothing, since a core has to
/// decompress the bytes.
const MAX_RATE: f64 = 125e6;
/// Weight of a new sample in the average of the rate.
const WEIGHT: f64 = 0.25;
/// Weight of a latency above the estimate: this host, or other traffic on the link, may have caused it.
const SLOWER_WEIGHT: f64 = 0.1;

/// The estimates for one registry, from responses that a reader waited for.
#[derive(Default)]
pub(super) struct LinkEstimator(Mutex<Estimates>);

#[derive(Default)]
struct Estimates {
    /// Seconds until a response begins.
    latency: Option<f64>,
    /// Seconds for each byte after that. Not the rate: its average would take long to forget that a link was fast.
    seconds_per_byte: Option<f64>,
}

/// When the parts of a response came.
pub(super) struct ResponseTiming {
    sent: Instant,
    /// When the first and the last part came, since `sent`.
    parts: Option<(Duration, Duration)>,
}

impl ResponseTiming {
    /// Of a request that is sent now.
    pub(super) fn start() -> Self {
        let sent = Instant::now();
        Self { sent, parts: None }
    }

    /// A part has come.
    pub(super) fn on_part(&mut self) {
        let now = self.sent.elapsed();
        self.parts.get_or_insert((now, now)).1 = now;
    }
}

impl LinkEstimator {
    /// Takes a response of so many `bytes` into account.
    pub(super) fn record(&self, response: &ResponseTiming, bytes: u64) {
        let Some((first, total)) = response.parts else { return };
        let mut estimates = self.0.lock();
        let (new, old) = (first.as_secs_f64(), estimates.latency);
        let latency = old.map_or(new, |old| new.min(old + (new - old) * SLOWER_WEIGHT));
        estimates.latency = Some(latency);
        if bytes < MIN_RATE_SAMPLE_BYTES {
            return;
        }
        // Counted from the estimated latency, not the measured one: all parts of a response that was processed late
        // seem to come at once.
        let sample = ((total.as_secs_f64() - latency) / bytes as f64).max(1.0 / MAX_RATE);
        let old = estimates.seconds_per_byte;
        estimates.seconds_per_byte = Some(old.map_or(sample, |old| old + (sample - old) * WEIGHT));
    }

    /// A response failed or timed out: forgets the estimates.
    pub(super) fn reset(&self) {
        *self.0.lock() = Estimates::default();
    }

    /// The bytes that could be transferred during the latency of a response; 0 if there is no estimate.
    pub(super) fn bandwidth_delay_product(&self) -> u64 {
        let estimates = self.0.lock();
        // Neither is negative, and `seconds_per_byte` is not zero.
        let bytes = |(latency, seconds_per_byte)| (latency / seconds_per_byte) as u64;
        estimates.latency.zip(estimates.seconds_per_byte).map_or(0, bytes)
    }
}

#[cfg(test)]
impl LinkEstimator {
    /// Records a response over a fast and long link: 80 ms, 1 Gbit/s.
    pub(super) fn record_fast_and_far(&self) {
        let parts = Some((Duration::from_millis(80), Duration::from_millis(88)));
        let sent = Instant::now();
        self.record(&ResponseTiming { sent, parts }, 1 << 20);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn response(first: f64, total: f64) -> ResponseTiming {
        let parts = Some((Duration::from_secs_f64(first), Duration::from_secs_f64(total)));
        let sent = Instant::now();
        ResponseTiming { sent, parts }
    }

    /// Records a response of 1 MiB that was processed so many seconds late.
    fn record(link: &LinkEstimator, round_trip: f64, rate: f64, late: f64) {
        let (first, total) = (round_trip + late, round_trip + MIB as f64 / rate);
        link.record(&response(first, total.max(first)), MIB);
    }

    #[test]
    fn the_product_is_latency_times_rate() {
        for (round_trip, rate, expected) in [
            (0.02, 12.5e6, 250_000),
            (0.08, 125e6, 10_000_000),
            (0.001, 1e9, 125_000),
        ] {
            let link = LinkEstimator::default();
            assert_eq!(link.bandwidth_delay_product(), 0);
            (0..20).for_each(|_| record(&link, round_trip, rate, 0.0));
            let product = link.bandwidth_delay_product();
            assert!(product.abs_diff(expected) < expected / 50, "{product} for {expected}");
        }
    }

    #[test]
    fn responses_that_are_processed_late_do_not_raise_the_rate() {
        let link = LinkEstimator::default();
        (0..100).for_each(|turn| record(&link, 0.02, 12.5e6, if turn % 5 == 4 { 0.08 } else { 0.0 }));
        let product = link.bandwidth_delay_product();
        assert!((200_000..500_000).contains(&product), "{product}");
    }

    #[test]
    fn short_responses_give_no_rate() {
        let link = LinkEstimator::default();
        link.record(&response(0.08, 0.08), 1000);
        assert_eq!(link.bandwidth_delay_product(), 0);
    }

    #[test]
    fn the_estimate_follows_a_link_that_changes() {
        let link = LinkEstimator::default();
        (0..20).for_each(|_| record(&link, 0.08, 125e6, 0.0));
        (0..5).for_each(|_| record(&link, 0.02, 12.5e6, 0.0));
        assert!(link.bandwidth_delay_product() < MIB);
        (0..60).for_each(|_| record(&link, 0.08, 125e6, 0.0));
        assert!(link.bandwidth_delay_product() > 8 * MIB);
        link.reset();
        assert_eq!(link.bandwidth_delay_product(), 0);
    }
}
