//! What happened a moment ago, or happens now, so that it need not happen again.

use std::{
    collections::HashMap,
    hash::Hash,
    sync::{Arc, Weak},
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use tokio::sync::OwnedMutexGuard;

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

    /// Forgets the value of `key`.
    pub fn forget(&self, key: &K) {
        self.noted.lock().remove(key);
    }

    /// Forgets all values.
    pub fn clear(&self) {
        self.noted.lock().clear();
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

/// One at a time for each key, so that those who come together do their work once.
pub struct Turns<K>(Mutex<HashMap<K, Weak<tokio::sync::Mutex<()>>>>);

impl<K> Default for Turns<K> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<K: Clone + Eq + Hash> Turns<K> {
    /// Waits for the turn of that key; it ends when the guard is dropped.
    pub async fn take(&self, key: &K) -> OwnedMutexGuard<()> {
        let turn = {
            let mut turns = self.0.lock();
            turns.retain(|_, turn| turn.strong_count() > 0);
            turns.get(key).and_then(Weak::upgrade).unwrap_or_else(|| {
                let turn = Arc::new(tokio::sync::Mutex::new(()));
                turns.insert(key.clone(), Arc::downgrade(&turn));
                turn
            })
        };
        turn.lock_owned().await
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
