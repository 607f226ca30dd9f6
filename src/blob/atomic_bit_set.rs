//! A set of chunk positions that many threads change at once.

use std::sync::atomic::{AtomicU64, Ordering};

/// Positions below a fixed count, 64 to a word. Orders no other memory accesses.
pub struct AtomicBitSet(Vec<AtomicU64>);

impl AtomicBitSet {
    /// An empty set of positions below `count`.
    pub fn new(count: usize) -> Self {
        Self((0..count.div_ceil(64)).map(|_| AtomicU64::new(0)).collect())
    }

    /// Whether `position` is in the set.
    pub fn contains(&self, position: usize) -> bool {
        self.0[position / 64].load(Ordering::Relaxed) & bit(position) != 0
    }

    /// Inserts `position`. Returns whether it was absent.
    pub fn insert(&self, position: usize) -> bool {
        let word = &self.0[position / 64];
        !self.contains(position) && word.fetch_or(bit(position), Ordering::Relaxed) & bit(position) == 0
    }

    /// Removes `position`. Returns whether it was present.
    pub fn remove(&self, position: usize) -> bool {
        let word = &self.0[position / 64];
        self.contains(position) && word.fetch_and(!bit(position), Ordering::Relaxed) & bit(position) != 0
    }

    /// Removes all positions.
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
    fn each_position_is_inserted_and_removed_once() {
        let bits = AtomicBitSet::new(130);
        for position in [0, 63, 64, 129] {
            assert_eq!([bits.insert(position), bits.insert(position)], [true, false]);
        }
        assert!(bits.contains(129) && !bits.contains(128));
        assert_eq!([bits.remove(64), bits.remove(64)], [true, false]);
        bits.clear();
        assert!(!bits.contains(129) && !bits.remove(0));
    }
}
