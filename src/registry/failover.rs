//! Which endpoint is asked, when another, and when again: fail-over, retries, and the bound in time of both.
//!
//! One round asks the endpoints in order, mirrors first, until one has what is wanted. A mirror that fails in whatever way
//! is passed over without waiting, and it has no more than its share of the time; the registry has the last word. If that is
//! not an answer, and one of them has failed in a way that may pass, there is another round after a pause. Mirrors that have
//! refused are left out of it.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use tracing::debug;

use super::{
    Client, Error, Repository,
    circuit::SHORT_REST,
    client::{Ask, Object},
    endpoints::Endpoint,
    jitter::scaled,
};
use crate::{digest::Digest, ttl_cache::TtlCache};

/// The first pause before a request is sent again; each further one is twice as long.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
/// Most blobs of which something is remembered.
const MOST: usize = 4096;
/// How long it is remembered that a mirror did not give a blob.
const LACKING: Duration = Duration::from_secs(60);
/// How long it is remembered that what a mirror gave was not the blob.
const LYING: Duration = Duration::from_secs(600);

/// A budget that is longer than any clock can tell ends then: a year.
const LONGEST_BUDGET: Duration = Duration::from_secs(365 * 24 * 3600);

/// An endpoint that is asked now.
pub(super) struct Turn {
    pub(super) endpoint: Endpoint,
    /// When its time is over.
    pub(super) due: Instant,
}

/// How a round has failed.
struct Failed {
    /// The registry's error.
    last: Error,
    /// Those of mirrors, with their names.
    before: Vec<(String, Error)>,
}

/// A blob of an endpoint, or of an image's repository.
type Place = (Repository, Digest);

/// What is remembered of mirrors.
pub(super) struct Mirrors {
    lacking: TtlCache<Place, ()>,
    lying: TtlCache<Place, ()>,
    /// Where all of a blob has been given though a range was asked for: at a mirror; or, by the image's repository, at the
    /// registry.
    whole: TtlCache<Place, ()>,
}

/// The endpoint that has given bytes of a blob. They may turn out to be wrong ([`Client::distrust`]).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServedBy {
    place: Place,
    is_mirror: bool,
}

impl Mirrors {
    pub(super) fn new() -> Self {
        Self {
            lacking: TtlCache::new(MOST, LACKING),
            lying: TtlCache::new(MOST, LYING),
            whole: TtlCache::new(MOST, LACKING),
        }
    }

    /// Notes whether an endpoint keeps to ranges of a blob. (A mirror may not while it fetches the blob itself.)
    pub(super) fn note_whole(&self, ask: &Ask<'_>, at: &Endpoint, whole: bool) {
        let Some(digest) = ask.digest() else { return };
        let (there, of_image) = ((at.repository.clone(), digest), (ask.repository.clone(), digest));
        if whole {
            self.whole.insert(if at.is_mirror { there } else { of_image }, ());
        } else {
            self.whole.remove(&there);
            self.whole.remove(&of_image);
        }
    }

    /// Whether all of a blob would be given there, as far as is known.
    pub(super) fn gives_whole(&self, place: &Place) -> bool {
        self.whole.get(place).is_some()
    }

    /// Whether a blob is not to be had there.
    fn pass_over(&self, place: &Place) -> bool {
        self.lacking.get(place).is_some() || self.lying.get(place).is_some()
    }
}

impl Client {
    /// Tells that bytes of a blob that `giver` has given were not what they should be. A mirror is not asked for this blob for
    /// ten minutes, so that another attempt goes elsewhere; and where it was redirected to is not used again.
    pub fn distrust(&self, giver: &ServedBy) {
        let ServedBy { place, is_mirror } = giver;
        self.inner.redirects.remove(place);
        if !is_mirror {
            return;
        }
        let lying = &self.inner.mirrors.lying;
        if lying.get(place).is_none() {
            let (mirror, digest) = place;
            tracing::warn!(%mirror, %digest, "a mirror gave damaged bytes, and is not asked for this blob for a while");
        }
        lying.insert(place.clone(), ());
    }

    /// Whether ranges of a blob are to be had without all that lies before them, as far as is known: not for a minute after the
    /// registry has given all of it where a range was asked for, unless another answer has been better since. (Mirrors
    /// that do so are passed over.)
    pub fn gives_ranges(&self, repository: &Repository, digest: &Digest) -> bool {
        let place = (repository.clone(), *digest);
        !self.inner.mirrors.gives_whole(&place)
    }

    /// Makes `attempt` at one endpoint after the other until it succeeds, fails for good, has failed too often or `budget`
    /// is used up.
    pub(super) async fn bounded<T, F>(
        &self,
        ask: &Ask<'_>,
        budget: Duration,
        attempt: impl Fn(Arc<Turn>) -> F,
    ) -> Result<T, Error>
    where
        F: Future<Output = Result<T, Error>>,
    {
        if self.inner.options.offline {
            let what = ask.what.clone();
            return Err(Error::Offline { what });
        }
        let endpoints = self.inner.endpoints.of(ask.repository, ask.is_by_digest()).await?;
        let due = Instant::now() + budget.min(LONGEST_BUDGET);
        match tokio::time::timeout(budget, self.rounds(ask, endpoints, due, attempt)).await {
            Ok(result) => result,
            Err(_) => Err(overdue(&ask.repository.registry, ask, budget)),
        }
    }

    async fn rounds<T, F>(
        &self,
        ask: &Ask<'_>,
        mut endpoints: Vec<Endpoint>,
        due: Instant,
        attempt: impl Fn(Arc<Turn>) -> F,
    ) -> Result<T, Error>
    where
        F: Future<Output = Result<T, Error>>,
    {
        let mut failures = 0;
        loop {
            let mut failed = Vec::new();
            let failed = match self.round(ask, &mut endpoints, due, &attempt, &mut failed).await {
                Ok(done) => return Ok(done),
                Err(last) => Failed { last, before: failed },
            };
            let rest = failed.rest().filter(|_| failures < self.inner.options.retries);
            let Some(rest) = rest else {
                return Err(failed.told());
            };
            let pause = pause(failures, &failed.last, self.inner.options.max_pause).max(rest);
            debug!(error = %failed.last, ?pause, "registry request will be sent again");
            tokio::time::sleep(pause).await;
            failures += 1;
        }
    }

    /// Asks each of `endpoints` once, of which mirrors that have refused are taken out. What went wrong at mirrors goes
    /// to `failed`.
    async fn round<T, F>(
        &self,
        ask: &Ask<'_>,
        endpoints: &mut Vec<Endpoint>,
        due: Instant,
        attempt: &impl Fn(Arc<Turn>) -> F,
        failed: &mut Vec<(String, Error)>,
    ) -> Result<T, Error>
    where
        F: Future<Output = Result<T, Error>>,
    {
        let mirrors = &self.inner.mirrors;
        let mut at = 0;
        loop {
            // The last one is the registry, which is never taken out.
            let endpoint = endpoints[at].clone();
            let there = ask.digest().map(|digest| (endpoint.repository.clone(), digest));
            if endpoint.is_mirror && there.as_ref().is_some_and(|place| mirrors.pass_over(place)) {
                endpoints.remove(at);
                continue;
            }
            // At most as many as mirrors in a file.
            let others = u32::try_from(endpoints.len() - at).unwrap_or(u32::MAX);
            let error = match self.within(ask, endpoint.clone(), due, others, attempt).await {
                Ok(done) => return Ok(done),
                Err(error) => error,
            };
            if let Some(place) = there.as_ref().filter(|_| error.may_be_the_place()) {
                self.inner.redirects.remove(place);
            }
            if !endpoint.is_mirror {
                return Err(error);
            }
            debug!(mirror = endpoint.repository.registry, %error, "a mirror is passed over");
            if error.is_transient() {
                at += 1;
            } else {
                endpoints.remove(at);
                match (there, &error) {
                    (Some(place), Error::DigestMismatch { .. }) => mirrors.lying.insert(place, ()),
                    (Some(place), _) => mirrors.lacking.insert(place, ()),
                    (None, _) => {}
                }
            }
            failed.push((endpoint.repository.registry, error));
        }
    }

    /// Asks one endpoint: a mirror within its share of the time until `due`, of which there are `shares`.
    async fn within<T, F>(
        &self,
        ask: &Ask<'_>,
        endpoint: Endpoint,
        due: Instant,
        shares: u32,
        attempt: &impl Fn(Arc<Turn>) -> F,
    ) -> Result<T, Error>
    where
        F: Future<Output = Result<T, Error>>,
    {
        if !endpoint.is_mirror {
            return attempt(Arc::new(Turn { endpoint, due })).await;
        }
        let now = Instant::now();
        let share = due.saturating_duration_since(now) / shares.max(1);
        let due = now + share;
        let turn = Arc::new(Turn { endpoint, due });
        match tokio::time::timeout(share, attempt(Arc::clone(&turn))).await {
            Ok(outcome) => outcome,
            Err(_) => {
                self.host(&turn.endpoint)?.circuit.overran();
                Err(overdue(&turn.endpoint.repository.registry, ask, share))
            }
        }
    }
}

impl ServedBy {
    /// The endpoint whose turn it is, as the giver of that blob.
    pub(super) fn of(turn: &Turn, digest: &Digest) -> Self {
        let Endpoint {
            repository, is_mirror, ..
        } = &turn.endpoint;
        Self {
            place: (repository.clone(), *digest),
            is_mirror: *is_mirror,
        }
    }
}

impl Failed {
    /// If it is of use to try again: how long a mirror is still to be left alone that this is to be tried for.
    fn rest(&self) -> Option<Duration> {
        let sent = |error: &Error| error.is_transient() && !error.is_unsent();
        let mirrors = || self.before.iter().map(|(_, error)| error);
        // What the registry says counts, if it says anything.
        if sent(&self.last) || self.last.is_unreachable() && mirrors().any(sent) {
            return Some(Duration::ZERO);
        }
        let rests = mirrors().filter_map(Error::rest).filter(|left| *left <= SHORT_REST);
        rests.min().filter(|_| self.last.is_unreachable())
    }

    /// The registry's error, with the mirrors' if it is none of its words.
    fn told(self) -> Error {
        if self.before.is_empty() || !self.last.is_unreachable() {
            return self.last;
        }
        let told = self.before.iter().map(|(mirror, error)| format!("{mirror}: {error}"));
        Error::Everywhere {
            mirrors: told.collect::<Vec<_>>().join("; "),
            source: self.last.cause(),
            last: Box::new(self.last),
        }
    }
}

/// Who did not deliver in time.
fn overdue(host: &str, ask: &Ask<'_>, after: Duration) -> Error {
    Error::Timeout {
        host: host.to_owned(),
        what: ask.what.clone(),
        after,
    }
}

impl Ask<'_> {
    /// Whether it is the digest that tells what is wanted, as for all blobs.
    fn is_by_digest(&self) -> bool {
        match &self.object {
            Object::Manifest(selector) => selector.contains(':'),
            Object::Blob(_) | Object::Base => true,
        }
    }

    /// Of the blob that is wanted, if it is one.
    pub(super) fn digest(&self) -> Option<Digest> {
        match self.object {
            Object::Manifest(_) | Object::Base => None,
            Object::Blob(digest) => Some(digest),
        }
    }
}

/// How long to wait after the failure `error`, with `failures` ones before.
fn pause(failures: u32, error: &Error, max: Duration) -> Duration {
    if let Error::Status {
        retry_after: Some(asked),
        ..
    } = error
    {
        return scaled(*asked, 1.0, 1.25).min(max);
    }
    scaled(FIRST_PAUSE.saturating_mul(1 << failures.min(10)), 0.5, 1.5).min(max)
}
