//! A cache bounded in age and number of its entries.

use std::{
    collections::HashMap,
    hash::Hash,
    time::{Duration, Instant},
};

use parking_lot::Mutex;

/// Keeps at most `capacity` values, each for `ttl` after its insertion. Evicts the oldest one first.
pub struct TtlCache<K, V> {
    capacity: usize,
    ttl: Duration,
    /// Each with the time of its insertion.
    entries: Mutex<HashMap<K, (Instant, V)>>,
}

impl<K: Eq + Hash + Clone, V: Clone> TtlCache<K, V> {
    /// An empty cache.
    pub fn new(capacity: usize, ttl: Duration) -> Self {
        let entries = Mutex::default();
        Self { capacity, ttl, entries }
    }

    /// Inserts `value`, or renews it. Evicts expired values and then the oldest one if the cache is full.
    pub fn insert(&self, key: K, value: V) {
        let mut entries = self.entries.lock();
        if entries.len() >= self.capacity && !entries.contains_key(&key) {
            entries.retain(|_, (inserted, _)| inserted.elapsed() < self.ttl);
            let oldest = entries.iter().min_by_key(|(_, (inserted, _))| *inserted);
            if let Some(oldest) = oldest
                .map(|(key, _)| key.clone())
                .filter(|_| entries.len() >= self.capacity)
            {
                entries.remove(&oldest);
            }
        }
        entries.insert(key, (Instant::now(), value));
    }

    /// The value of `key`, unless it has expired.
    pub fn get(&self, key: &K) -> Option<V> {
        let entries = self.entries.lock();
        let (inserted, value) = entries.get(key)?;
        (inserted.elapsed() < self.ttl).then(|| value.clone())
    }

    /// Removes the value of `key` if it still is `value`.
    pub fn remove_if(&self, key: &K, value: &V)
    where
        V: PartialEq,
    {
        let mut entries = self.entries.lock();
        if entries.get(key).is_some_and(|(_, found)| found == value) {
            entries.remove(key);
        }
    }

    /// Removes the value of `key`.
    pub fn remove(&self, key: &K) {
        self.entries.lock().remove(key);
    }

    /// Removes all values.
    pub fn clear(&self) {
        self.entries.lock().clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_expire_after_their_ttl() {
        let (always, never) = (TtlCache::new(9, Duration::MAX), TtlCache::new(9, Duration::ZERO));
        for cache in [&always, &never] {
            cache.insert("key", 1);
        }
        assert_eq!(
            (always.get(&"key"), always.get(&"other"), never.get(&"key")),
            (Some(1), None, None)
        );
    }

    #[test]
    fn oldest_and_expired_values_are_evicted() {
        let cache = TtlCache::new(2, Duration::from_millis(50));
        for key in 0..3 {
            cache.insert(key, key * 10);
        }
        assert_eq!([0, 1, 2].map(|key| cache.get(&key)), [None, Some(10), Some(20)]);
        cache.insert(1, 11);
        assert_eq!((cache.get(&1), cache.get(&2)), (Some(11), Some(20)));
        cache.remove_if(&1, &10);
        assert_eq!(cache.get(&1), Some(11));
        cache.remove_if(&1, &11);
        assert_eq!(cache.get(&1), None);
        cache.remove(&1);
        assert_eq!(cache.get(&1), None);
        std::thread::sleep(Duration::from_millis(60));
        assert_eq!(cache.get(&2), None);
    }
}
