//! How fast a registry answers: what a request costs before its answer begins, and how fast bytes follow.
//!
//! Both decide how much is worth bringing along ([`super::neighbours`]): on a link that carries megabytes while one waits for an
//! answer to begin, a request saved is worth many bytes fetched in vain.

use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// The shortest answer, in bytes, of which the rate is taken.
const LONG: u64 = 256 << 10;
/// The highest rate that counts, in bytes per second: 1 Gbit/s. What comes faster has to be decompressed on some core all the same.
const FASTEST: f64 = 125e6;
/// Weight of an answer among those before it.
const WEIGHT: f64 = 0.25;
/// Weight of one that was longer in coming: that may have been the machine's doing, or that of others on the link.
const LATE: f64 = 0.1;

/// What has been seen of one registry's answers to what somebody waited for.
#[derive(Default)]
pub(super) struct LinkEstimator(Mutex<Seen>);

#[derive(Default)]
struct Seen {
    /// Seconds until an answer begins.
    first: Option<f64>,
    /// Seconds that each byte takes after that. Not the rate: its average would take long to forget that a link was fast.
    byte: Option<f64>,
}

/// When an answer comes, or has come.
pub(super) struct Arrival {
    asked: Instant,
    /// When its first and its last part have come, counted from there.
    parts: Option<(Duration, Duration)>,
}

impl Arrival {
    /// Of what is asked for now.
    pub(super) fn awaited() -> Self {
        let asked = Instant::now();
        Self { asked, parts: None }
    }

    /// A part has come.
    pub(super) fn part(&mut self) {
        let now = self.asked.elapsed();
        self.parts.get_or_insert((now, now)).1 = now;
    }
}

impl LinkEstimator {
    /// An answer of so many `bytes` has come.
    pub(super) fn saw(&self, answer: &Arrival, bytes: u64) {
        let Some((first, total)) = answer.parts else { return };
        let mut seen = self.0.lock();
        let (new, old) = (first.as_secs_f64(), seen.first);
        let first = old.map_or(new, |old| new.min(old + (new - old) * LATE));
        seen.first = Some(first);
        if bytes < LONG {
            return;
        }
        // Against the usual time until it begins: where all of it was seen late, it seems to have come at once.
        let byte = ((total.as_secs_f64() - first) / bytes as f64).max(1.0 / FASTEST);
        seen.byte = Some(seen.byte.map_or(byte, |old| old + (byte - old) * WEIGHT));
    }

    /// An answer did not come, or not in time: nothing is known any more.
    pub(super) fn forget(&self) {
        *self.0.lock() = Seen::default();
    }

    /// Bytes that could come in the time until an answer begins; 0 if not known.
    pub(super) fn bandwidth_delay_product(&self) -> u64 {
        let seen = self.0.lock();
        // Not negative, and no byte takes no time. Fractions are cut.
        let bytes = |(first, byte)| (first / byte) as u64;
        seen.first.zip(seen.byte).map_or(0, bytes)
    }
}

#[cfg(test)]
impl LinkEstimator {
    /// Has seen an answer of a registry that is fast and far: 80 ms, 1 Gbit/s.
    pub(super) fn saw_far(&self) {
        let parts = Some((Duration::from_millis(80), Duration::from_millis(88)));
        let asked = Instant::now();
        self.saw(&Arrival { asked, parts }, 1 << 20);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn answer(first: f64, total: f64) -> Arrival {
        let parts = Some((Duration::from_secs_f64(first), Duration::from_secs_f64(total)));
        let asked = Instant::now();
        Arrival { asked, parts }
    }

    /// An answer of 1 MiB over a link, seen so much too late.
    fn saw(pace: &LinkEstimator, round_trip: f64, rate: f64, late: f64) {
        let (first, total) = (round_trip + late, round_trip + MIB as f64 / rate);
        pace.saw(&answer(first, total.max(first)), MIB);
    }

    #[test]
    fn long_and_fat_links_carry_much_in_a_round_trip() {
        for (round_trip, rate, expected) in [
            (0.02, 12.5e6, 250_000),
            (0.08, 125e6, 10_000_000),
            (0.001, 1e9, 125_000),
        ] {
            let pace = LinkEstimator::default();
            assert_eq!(pace.bandwidth_delay_product(), 0);
            (0..20).for_each(|_| saw(&pace, round_trip, rate, 0.0));
            let seen = pace.bandwidth_delay_product();
            assert!(seen.abs_diff(expected) < expected / 50, "{seen} for {expected}");
        }
    }

    #[test]
    fn what_is_seen_late_did_not_come_at_once() {
        let pace = LinkEstimator::default();
        (0..100).for_each(|turn| saw(&pace, 0.02, 12.5e6, if turn % 5 == 4 { 0.08 } else { 0.0 }));
        let seen = pace.bandwidth_delay_product();
        assert!((200_000..500_000).contains(&seen), "{seen}");
    }

    #[test]
    fn short_answers_tell_no_rate() {
        let pace = LinkEstimator::default();
        pace.saw(&answer(0.08, 0.08), 1000);
        assert_eq!(pace.bandwidth_delay_product(), 0);
    }

    #[test]
    fn a_link_that_changes_is_noticed() {
        let pace = LinkEstimator::default();
        (0..20).for_each(|_| saw(&pace, 0.08, 125e6, 0.0));
        (0..5).for_each(|_| saw(&pace, 0.02, 12.5e6, 0.0));
        assert!(pace.bandwidth_delay_product() < MIB);
        (0..60).for_each(|_| saw(&pace, 0.08, 125e6, 0.0));
        assert!(pace.bandwidth_delay_product() > 8 * MIB);
        pace.forget();
        assert_eq!(pace.bandwidth_delay_product(), 0);
    }
}
