//! Single flight: concurrent callers that need the same work share one execution and its outcome.
//!
//! Each flight carries its [`Owner`]. A caller can tell by it whether a failure concerns its own image.

use std::{collections::HashMap, hash::Hash, sync::Arc};

use parking_lot::Mutex;
use tokio::sync::watch;

use super::error::ReadCause;

/// The flights in progress, by key.
pub(super) struct SingleFlight<K, T>(Mutex<HashMap<K, Flight<T>>>);

/// The object for which a flight was started. Owners are compared by address only.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Owner(usize);

impl Owner {
    /// The owner `object`, which must exist as long as its flights.
    pub(super) fn of<T>(object: &Arc<T>) -> Self {
        Self(Arc::as_ptr(object).addr())
    }
}

/// Work in progress, as its waiters see it.
pub(super) struct Flight<T> {
    outcome: watch::Receiver<Option<Result<T, ReadCause>>>,
    /// For whom the flight was started; `None` if for no single image.
    pub(super) owner: Option<Owner>,
}

/// The side of a flight that does the work. If it is dropped before [`Leader::complete`], the flight ends as aborted.
pub(super) struct Leader<K: Eq + Hash, T> {
    registration: Registration<K, T>,
    sender: watch::Sender<Option<Result<T, ReadCause>>>,
}

/// Removes a flight from the map when it is dropped.
struct Registration<K: Eq + Hash, T> {
    flights: Arc<SingleFlight<K, T>>,
    key: K,
}

impl<K, T> Default for SingleFlight<K, T> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<K, T> SingleFlight<K, T>
where
    K: Copy + Eq + Hash + Send + 'static,
    T: Clone + Send + Sync + 'static,
{
    /// Joins the flight of that key, or starts one for `owner` that does `work`. Returns whether it was started here.
    pub(super) fn join_or_start<F>(
        self: &Arc<Self>,
        key: K,
        owner: Option<Owner>,
        work: impl FnOnce() -> F,
    ) -> (Flight<T>, bool)
    where
        F: Future<Output = Result<T, ReadCause>> + Send + 'static,
    {
        let (leader, flight) = self.join_or_lead(key, owner);
        let Some(leader) = leader else { return (flight, false) };
        // The lock is not held here. A runtime that shuts down drops the task in `spawn`; the leader's drop then takes
        // the lock.
        let work = work();
        tokio::spawn(async move { leader.complete(work.await) });
        (flight, true)
    }

    /// Starts a flight without an owner, whose work the caller does; `None` if the key is in flight already.
    pub(super) fn lead(self: &Arc<Self>, key: K) -> Option<Leader<K, T>> {
        self.join_or_lead(key, None).0
    }

    /// Whether there is a flight of that key.
    pub(super) fn is_in_flight(&self, key: &K) -> bool {
        self.0.lock().contains_key(key)
    }

    /// The flight of that key, and its leader if the flight is new.
    fn join_or_lead(self: &Arc<Self>, key: K, owner: Option<Owner>) -> (Option<Leader<K, T>>, Flight<T>) {
        let (sender, outcome) = watch::channel(None);
        let flight = {
            let mut flights = self.0.lock();
            if let Some(flight) = flights.get(&key) {
                return (None, flight.clone());
            }
            let flight = Flight { outcome, owner };
            flights.insert(key, flight.clone());
            flight
        };
        let flights = Arc::clone(self);
        let registration = Registration { flights, key };
        (Some(Leader { registration, sender }), flight)
    }
}

impl<K: Eq + Hash, T> Leader<K, T> {
    /// A flight that is not registered: no other caller can join it.
    pub(super) fn detached(key: K) -> (Self, Flight<T>) {
        let (sender, outcome) = watch::channel(None);
        let flights = Arc::default();
        let registration = Registration { flights, key };
        (Self { registration, sender }, Flight { outcome, owner: None })
    }

    /// Ends the flight, and hands `outcome` to its waiters.
    pub(super) fn complete(self, outcome: Result<T, ReadCause>) {
        // The flight is removed from the map first: a waiter that retries after a failure then starts a new one.
        drop(self.registration);
        self.sender.send_replace(Some(outcome));
    }
}

impl<T: Clone> Flight<T> {
    /// Waits for the outcome.
    pub(super) async fn wait(mut self) -> Result<T, ReadCause> {
        match self.outcome.wait_for(Option::is_some).await {
            Ok(outcome) => outcome.clone().unwrap_or(Err(ReadCause::Aborted)),
            Err(_) => Err(ReadCause::Aborted),
        }
    }
}

// A derived implementation would require `T: Clone`.
impl<T> Clone for Flight<T> {
    fn clone(&self) -> Self {
        Self {
            outcome: self.outcome.clone(),
            owner: self.owner,
        }
    }
}

impl<K: Eq + Hash, T> Drop for Registration<K, T> {
    fn drop(&mut self) {
        self.flights.0.lock().remove(&self.key);
    }
}
