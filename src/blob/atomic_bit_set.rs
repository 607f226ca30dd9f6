//! A set of chunks, by position in a layout, that many threads change at once.

use std::sync::atomic::{AtomicU64, Ordering};

/// Positions below a number, 64 to a word. Says nothing about what else was done before.
pub struct AtomicBitSet(Vec<AtomicU64>);

impl AtomicBitSet {
    /// None of the positions below `count`.
    pub fn new(count: usize) -> Self {
        Self((0..count.div_ceil(64)).map(|_| AtomicU64::new(0)).collect())
    }

    /// Whether `position` is in the set.
    pub fn has(&self, position: usize) -> bool {
        self.0[position / 64].load(Ordering::Relaxed) & bit(position) != 0
    }

    /// Adds `position`; tells whether it was not there.
    pub fn add(&self, position: usize) -> bool {
        !self.has(position) && self.0[position / 64].fetch_or(bit(position), Ordering::Relaxed) & bit(position) == 0
    }

    /// Takes `position` out; tells whether it was there.
    pub fn take(&self, position: usize) -> bool {
        self.has(position) && self.0[position / 64].fetch_and(!bit(position), Ordering::Relaxed) & bit(position) != 0
    }

    /// Takes all out.
    pub fn clear(&self) {
        self.0.iter().for_each(|word| word.store(0, Ordering::Relaxed));
    }
}

fn bit(position: usize) -> u64 {
    1 << (position % 64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_position_is_added_and_taken_once() {
        let bits = AtomicBitSet::new(130);
        for position in [0, 63, 64, 129] {
            assert_eq!([bits.add(position), bits.add(position)], [true, false]);
        }
        assert!(bits.has(129) && !bits.has(128));
        assert_eq!([bits.take(64), bits.take(64)], [true, false]);
        bits.clear();
        assert!(!bits.has(129) && !bits.take(0));
    }
}
