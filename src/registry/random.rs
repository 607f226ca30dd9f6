//! Chance for pauses, so that those who failed together do not come back together.

use std::{
    hash::{BuildHasher, RandomState},
    time::Duration,
};

/// `pause`, times something from `least` to `most`. The standard library's hash seeds are random enough for that.
pub(super) fn scaled(pause: Duration, least: f64, most: f64) -> Duration {
    let chance = (RandomState::new().hash_one(0) % 1024) as f64 / 1024.0;
    pause.mul_f64(least + (most - least) * chance)
}
