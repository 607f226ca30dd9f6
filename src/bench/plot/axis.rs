//! Scales: map values to coordinates of the drawing.

use std::time::Duration;

use crate::humanize::digits;

/// A logarithmic scale of times.
pub(super) struct LogTime {
    /// Decimal logarithms of both ends, in seconds.
    ends: [f64; 2],
    /// Coordinates of both ends.
    positions: [f64; 2],
}

/// The shortest time on the scale, in seconds.
const MIN_SECONDS: f64 = 1e-6;

impl LogTime {
    /// A scale for the times `least` to `most`, with a round time at each end.
    pub(super) fn new([least, most]: [Duration; 2], positions: [f64; 2]) -> Self {
        let [least, most] = [least, most].map(|time| time.as_secs_f64().max(MIN_SECONDS));
        let down = round_times().rev().find(|round| *round <= least * 1.0001);
        let up = round_times().find(|round| *round >= most * 0.9999 && *round > least * 1.01);
        let ends = [down.unwrap_or(least), up.unwrap_or(most * 2.0)];
        Self {
            ends: ends.map(f64::log10),
            positions,
        }
    }

    /// Coordinate of `time`.
    pub(super) fn at(&self, time: Duration) -> f64 {
        self.at_seconds(time.as_secs_f64())
    }

    fn at_seconds(&self, seconds: f64) -> f64 {
        let ([from, to], [start, end]) = (self.ends, self.positions);
        let share = (seconds.max(MIN_SECONDS).log10() - from) / (to - from);
        start + share.clamp(0.0, 1.0) * (end - start)
    }

    /// Coordinates and labels of round times, as many as fit. The first tick also stands for shorter times.
    pub(super) fn ticks(&self) -> Vec<(f64, String)> {
        let [from, to] = self.ends;
        let room = (self.positions[1] - self.positions[0]) / (to - from);
        let inside = round_times().filter(|time| (from - 1e-6..=to + 1e-6).contains(&time.log10()));
        // In a decade of 200 pixels, labels at 1, 2 and 5 are at least 60 pixels apart.
        let shown = inside.filter(|time| room >= 200.0 || is_power(*time));
        shown.map(|time| (self.at_seconds(time), name(time))).collect()
    }
}

/// 1, 2 and 5 in each decade, from 1 µs to 10,000 s.
fn round_times() -> impl DoubleEndedIterator<Item = f64> + Clone {
    (-6..4).flat_map(|decade| [1.0, 2.0, 5.0].map(|digit| digit * 10f64.powi(decade)))
}

fn is_power(time: f64) -> bool {
    let exponent = time.log10();
    (exponent - exponent.round()).abs() < 1e-6
}

fn name(seconds: f64) -> String {
    let units = [(1.0, "s"), (1e-3, "ms")];
    let unit = units.into_iter().find(|(unit, _)| seconds >= unit * 0.999);
    let (unit, name) = unit.unwrap_or((1e-6, "µs"));
    let or_less = if seconds <= MIN_SECONDS * 1.001 { "≤ " } else { "" };
    format!("{or_less}{:.0} {name}", seconds / unit)
}

/// A scale from 0 to a round number.
pub(super) struct Linear {
    step: f64,
    most: f64,
    positions: [f64; 2],
}

impl Linear {
    /// A scale from 0 to at least `most`, with about `steps` steps.
    pub(super) fn new(most: f64, steps: f64, positions: [f64; 2]) -> Self {
        let most = if most.is_finite() && most > 0.0 { most } else { 1.0 };
        let rough = most / steps;
        let decade = 10f64.powf(rough.log10().floor());
        let digit = [1.0, 2.0, 5.0, 10.0]
            .into_iter()
            .find(|digit| digit * decade >= rough * 0.999);
        let step = digit.unwrap_or(10.0) * decade;
        let most = (most / step - 1e-6).ceil() * step;
        Self { step, most, positions }
    }

    /// A scale from 0 to exactly `most`.
    pub(super) fn ending_at(most: f64, steps: f64, positions: [f64; 2]) -> Self {
        let scale = Self::new(most, steps, positions);
        let most = if most.is_finite() && most > 0.0 {
            most
        } else {
            scale.most
        };
        Self { most, ..scale }
    }

    /// Coordinate of `number`.
    pub(super) fn at(&self, number: f64) -> f64 {
        let [start, end] = self.positions;
        start + (number / self.most).clamp(0.0, 1.0) * (end - start)
    }

    /// Coordinates and labels of round numbers.
    pub(super) fn ticks(&self) -> Vec<(f64, String)> {
        let count = (self.most / self.step + 1e-6).floor() as u32; // a dozen at most
        let number = |tick| f64::from(tick) * self.step;
        (0..=count)
            .map(|tick| (self.at(number(tick)), short(number(tick))))
            .collect()
    }
}

fn short(number: f64) -> String {
    let text = digits(number);
    match text.contains('.') {
        true => text.trim_end_matches('0').trim_end_matches('.').to_owned(),
        false => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_scale_has_round_ends() {
        let scale = LogTime::new([Duration::from_micros(1200), Duration::from_micros(1900)], [0.0, 600.0]);
        let names: Vec<_> = scale.ticks().into_iter().map(|(_, name)| name).collect();
        assert_eq!(names, ["1 ms", "2 ms"]);
        assert_eq!(
            (scale.at(Duration::from_millis(1)), scale.at(Duration::from_secs(9))),
            (0.0, 600.0)
        );
        let wide = LogTime::new([Duration::from_nanos(300), Duration::from_secs(2)], [0.0, 600.0]);
        let names: Vec<_> = wide.ticks().into_iter().map(|(_, name)| name).collect();
        assert_eq!(names, ["≤ 1 µs", "10 µs", "100 µs", "1 ms", "10 ms", "100 ms", "1 s"]);
        // A single value, and zero.
        for time in [Duration::from_millis(1), Duration::ZERO] {
            let scale = LogTime::new([time, time], [0.0, 600.0]);
            assert!(scale.at(time).is_finite() && scale.ticks().len() >= 2);
        }
    }

    #[test]
    fn linear_scale_has_round_steps() {
        let scale = Linear::new(437.0, 4.0, [100.0, 0.0]);
        let names: Vec<_> = scale.ticks().into_iter().map(|(_, name)| name).collect();
        assert_eq!(names, ["0", "200", "400", "600"]);
        assert_eq!(scale.at(600.0), 0.0);
        let names: Vec<_> = Linear::ending_at(0.75, 4.0, [0.0, 1.0])
            .ticks()
            .into_iter()
            .map(|(_, name)| name)
            .collect();
        assert_eq!(names, ["0", "0.2", "0.4", "0.6"]);
        for nothing in [0.0, f64::NAN, f64::INFINITY] {
            assert!(Linear::new(nothing, 4.0, [0.0, 1.0]).at(1.0).is_finite());
        }
    }
}
