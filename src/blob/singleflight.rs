//! Flights: work of which several may need the outcome, done once, with its success or failure given to all of them.

use std::{collections::HashMap, hash::Hash, sync::Arc};

use parking_lot::Mutex;
use tokio::sync::watch;

use super::error::ReadCause;

/// The work under way in one place, by what it is for.
pub(super) struct SingleFlight<K, T>(Mutex<HashMap<K, Flight<T>>>);

/// Work under way.
pub(super) struct Flight<T> {
    outcome: watch::Receiver<Option<Result<T, ReadCause>>>,
    /// Who started it, as told to [`SingleFlight::join`].
    pub(super) owner: usize,
}

/// The duty to end a flight. One that is dropped before counts as given up.
pub(super) struct Leader<K: Eq + Hash, T> {
    landing: Landing<K, T>,
    sender: watch::Sender<Option<Result<T, ReadCause>>>,
}

/// Takes a flight off the list when it ends, however it ends.
struct Landing<K: Eq + Hash, T> {
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
    /// Joins the flight of that key, or starts `work` as one on behalf of `owner`; tells whether it was started here.
    pub(super) fn join<F>(self: &Arc<Self>, key: K, owner: usize, work: impl FnOnce() -> F) -> (Flight<T>, bool)
    where
        F: Future<Output = Result<T, ReadCause>> + Send + 'static,
    {
        let (lead, flight) = self.board(key, owner);
        let Some(lead) = lead else { return (flight, false) };
        // Without the lock: a runtime that is shutting down drops what it is given at once, and the landing with it.
        let work = work();
        tokio::spawn(async move { lead.land(work.await) });
        (flight, true)
    }

    /// Starts a flight of that key whose work the caller does; `None` if there is one.
    pub(super) fn lead(self: &Arc<Self>, key: K, owner: usize) -> Option<Leader<K, T>> {
        self.board(key, owner).0
    }

    /// Whether there is a flight of that key.
    pub(super) fn is_under_way(&self, key: &K) -> bool {
        self.0.lock().contains_key(key)
    }

    /// The flight of that key, and the duty to end it if it is a new one.
    fn board(self: &Arc<Self>, key: K, owner: usize) -> (Option<Leader<K, T>>, Flight<T>) {
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
        let landing = Landing { flights, key };
        (Some(Leader { landing, sender }), flight)
    }
}

impl<K: Eq + Hash, T> Leader<K, T> {
    /// The duty to end a flight that is on no list, and the flight.
    pub(super) fn alone(key: K) -> (Self, Flight<T>) {
        let (sender, outcome) = watch::channel(None);
        let flights = Arc::default();
        let landing = Landing { flights, key };
        (Self { landing, sender }, Flight { outcome, owner: 0 })
    }

    /// Ends the flight with that outcome.
    pub(super) fn land(self, outcome: Result<T, ReadCause>) {
        // Removed before the outcome is seen, so that whoever tries again after a failure starts anew.
        drop(self.landing);
        self.sender.send_replace(Some(outcome));
    }
}

impl<T: Clone> Flight<T> {
    /// How the work ended.
    pub(super) async fn wait(mut self) -> Result<T, ReadCause> {
        match self.outcome.wait_for(Option::is_some).await {
            Ok(outcome) => outcome.clone().unwrap_or(Err(ReadCause::Aborted)),
            Err(_) => Err(ReadCause::Aborted),
        }
    }
}

// Derived, it would ask `T` to be `Clone`, which the list of flights does not.
impl<T> Clone for Flight<T> {
    fn clone(&self) -> Self {
        Self {
            outcome: self.outcome.clone(),
            owner: self.owner,
        }
    }
}

impl<K: Eq + Hash, T> Drop for Landing<K, T> {
    fn drop(&mut self) {
        self.flights.0.lock().remove(&self.key);
    }
}
