//! Random factors for pauses, so that requests that failed together are not retried together.

use std::time::Duration;

/// Upper bound of every pause, low enough that a factor cannot overflow it.
pub(super) const MAX_PAUSE: Duration = Duration::from_secs(24 * 3600);

/// `pause`, at most [`MAX_PAUSE`], times a random factor from `least` to `most`.
pub(super) fn jittered(pause: Duration, least: f64, most: f64) -> Duration {
    pause.min(MAX_PAUSE).mul_f64(least + (most - least) * fastrand::f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn longest_pause_does_not_overflow() {
        assert!(jittered(Duration::MAX, 1.0, 1.25) <= MAX_PAUSE * 2);
        assert!(jittered(Duration::from_millis(100), 0.5, 1.5) >= Duration::from_millis(50));
    }
}
