//! Mutual exclusion by key.

use std::{
    collections::HashMap,
    hash::Hash,
    sync::{Arc, Weak},
};

use parking_lot::Mutex;
use tokio::sync::OwnedMutexGuard;

/// A mutex for each key. Simultaneous callers with the same key run one after the other.
pub struct KeyedMutex<K>(Mutex<HashMap<K, Weak<tokio::sync::Mutex<()>>>>);

impl<K> Default for KeyedMutex<K> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<K: Clone + Eq + Hash> KeyedMutex<K> {
    /// Waits for the key's mutex. Dropping the guard releases it.
    pub async fn lock(&self, key: &K) -> OwnedMutexGuard<()> {
        let mutex = {
            let mut mutexes = self.0.lock();
            mutexes.retain(|_, mutex| mutex.strong_count() > 0);
            mutexes.get(key).and_then(Weak::upgrade).unwrap_or_else(|| {
                let mutex = Arc::new(tokio::sync::Mutex::new(()));
                mutexes.insert(key.clone(), Arc::downgrade(&mutex));
                mutex
            })
        };
        mutex.lock_owned().await
    }
}
