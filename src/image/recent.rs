//! What happened a moment ago, so that it need not happen again at once.

use std::{
    collections::HashMap,
    hash::Hash,
    time::{Duration, Instant},
};

use parking_lot::Mutex;

/// Remembers values for a time.
pub struct Recent<K, V> {
    ttl: Duration,
    noted: Mutex<HashMap<K, (Instant, V)>>,
}

impl<K: Eq + Hash, V: Clone> Recent<K, V> {
    /// Remembers for `ttl`.
    pub fn new(ttl: Duration) -> Self {
        Self {
            ttl,
            noted: Mutex::default(),
        }
    }

    /// Remembers `value`.
    pub fn note(&self, key: K, value: V) {
        let mut noted = self.noted.lock();
        noted.retain(|_, (when, _)| when.elapsed() < self.ttl);
        noted.insert(key, (Instant::now(), value));
    }

    /// What is still remembered.
    pub fn recall(&self, key: &K) -> Option<V> {
        let noted = self.noted.lock();
        noted
            .get(key)
            .filter(|(when, _)| when.elapsed() < self.ttl)
            .map(|(_, value)| value.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_remembered_for_a_time() {
        let (always, never) = (Recent::new(Duration::MAX), Recent::new(Duration::ZERO));
        for recent in [&always, &never] {
            recent.note("key", 1);
        }
        assert_eq!(
            (always.recall(&"key"), always.recall(&"other"), never.recall(&"key")),
            (Some(1), None, None)
        );
    }
}
