//! Chance for pauses, so that those who failed together do not come back together.

use std::time::Duration;

/// Nobody waits longer, and a factor does not overflow it.
pub(super) const LONGEST: Duration = Duration::from_secs(24 * 3600);

/// `pause`, [`LONGEST`] at most, times something from `least` to `most`.
pub(super) fn scaled(pause: Duration, least: f64, most: f64) -> Duration {
    pause.min(LONGEST).mul_f64(least + (most - least) * fastrand::f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_pause_is_too_long_to_be_scaled() {
        assert!(scaled(Duration::MAX, 1.0, 1.25) <= LONGEST * 2);
        assert!(scaled(Duration::from_millis(100), 0.5, 1.5) >= Duration::from_millis(50));
    }
}
