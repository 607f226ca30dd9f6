//! What was learned a while ago, within bounds of time and number.

use std::{
    collections::HashMap,
    hash::Hash,
    time::{Duration, Instant},
};

use parking_lot::Mutex;

/// Keeps so many values, each for so long.
pub struct TtlCache<K, V> {
    most: usize,
    ttl: Duration,
    kept: Mutex<HashMap<K, (Instant, V)>>,
}

impl<K: Eq + Hash + Clone, V: Clone> TtlCache<K, V> {
    /// Keeps `most` values, each for `ttl`.
    pub fn new(most: usize, ttl: Duration) -> Self {
        let kept = Mutex::default();
        Self { most, ttl, kept }
    }

    /// Keeps `value`, if need be in the place of the oldest.
    pub fn insert(&self, key: K, value: V) {
        let mut kept = self.kept.lock();
        if kept.len() >= self.most && !kept.contains_key(&key) {
            kept.retain(|_, (since, _)| since.elapsed() < self.ttl);
            let oldest = kept.iter().min_by_key(|(_, (since, _))| *since);
            if let Some(oldest) = oldest.map(|(key, _)| key.clone()).filter(|_| kept.len() >= self.most) {
                kept.remove(&oldest);
            }
        }
        kept.insert(key, (Instant::now(), value));
    }

    /// What is kept under `key`, unless it is too old.
    pub fn get(&self, key: &K) -> Option<V> {
        let kept = self.kept.lock();
        let (since, value) = kept.get(key)?;
        (since.elapsed() < self.ttl).then(|| value.clone())
    }

    /// Forgets it if it still is `value`.
    pub fn remove_if(&self, key: &K, value: &V)
    where
        V: PartialEq,
    {
        let mut kept = self.kept.lock();
        if kept.get(key).is_some_and(|(_, kept)| kept == value) {
            kept.remove(key);
        }
    }

    /// Forgets what is kept under `key`.
    pub fn remove(&self, key: &K) {
        self.kept.lock().remove(key);
    }

    /// Forgets all values.
    pub fn clear(&self) {
        self.kept.lock().clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_remembered_for_a_time() {
        let (always, never) = (TtlCache::new(9, Duration::MAX), TtlCache::new(9, Duration::ZERO));
        for memory in [&always, &never] {
            memory.insert("key", 1);
        }
        assert_eq!(
            (always.get(&"key"), always.get(&"other"), never.get(&"key")),
            (Some(1), None, None)
        );
    }

    #[test]
    fn the_oldest_goes_and_so_does_what_is_too_old() {
        let memory = TtlCache::new(2, Duration::from_millis(50));
        for key in 0..3 {
            memory.insert(key, key * 10);
        }
        assert_eq!([0, 1, 2].map(|key| memory.get(&key)), [None, Some(10), Some(20)]);
        memory.insert(1, 11);
        assert_eq!((memory.get(&1), memory.get(&2)), (Some(11), Some(20)));
        memory.remove_if(&1, &10);
        assert_eq!(memory.get(&1), Some(11));
        memory.remove_if(&1, &11);
        assert_eq!(memory.get(&1), None);
        memory.remove(&1);
        assert_eq!(memory.get(&1), None);
        std::thread::sleep(Duration::from_millis(60));
        assert_eq!(memory.get(&2), None);
    }
}
