//! Chance for pauses, so that those who failed together do not come back together.

use std::{
    hash::{BuildHasher, RandomState},
    time::Duration,
};

/// Nobody waits longer, and a factor does not overflow it.
pub(super) const LONGEST: Duration = Duration::from_secs(24 * 3600);

/// `pause`, [`LONGEST`] at most, times something from `least` to `most`. The standard library's hash seeds are random enough for that.
pub(super) fn scaled(pause: Duration, least: f64, most: f64) -> Duration {
    let chance = (RandomState::new().hash_one(0) % 1024) as f64 / 1024.0;
    pause.min(LONGEST).mul_f64(least + (most - least) * chance)
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
