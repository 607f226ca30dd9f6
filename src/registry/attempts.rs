//! Which endpoint is asked, when another, and when again: fail-over, retries, and the bound in time of both.
//!
//! One round asks the endpoints in order, mirrors first, until one has what is wanted. A mirror that fails in whatever way
//! is passed over without waiting; the registry has the last word. If that is a failure that may pass, there is another round
//! after a pause. Mirrors that have refused are left out of it.

use std::{sync::Arc, time::Duration};

use tracing::debug;

use super::{
    Client, Error, Repository,
    client::{Ask, Object},
    endpoints::Endpoint,
    memory::Memory,
    random::scaled,
};
use crate::digest::Digest;

/// The first pause before a request is sent again; each further one is twice as long.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
/// Most blobs of which something is remembered.
const MOST: usize = 4096;
/// How long it is remembered that a mirror did not give a blob.
const LACKING: Duration = Duration::from_secs(60);
/// How long it is remembered that what a mirror gave was not the blob, and who gave what.
const LYING: Duration = Duration::from_secs(600);

/// A blob of an endpoint, or of an image's repository.
type Place = (Repository, Digest);

/// What is remembered of mirrors.
pub(super) struct Mirrors {
    lacking: Memory<Place, ()>,
    lying: Memory<Place, ()>,
    /// Which mirror has given the last bytes of a blob.
    given: Memory<Place, Repository>,
}

impl Mirrors {
    pub(super) fn new() -> Self {
        Self {
            lacking: Memory::new(MOST, LACKING),
            lying: Memory::new(MOST, LYING),
            given: Memory::new(MOST, LYING),
        }
    }

    /// Whether a blob is not to be had there.
    fn pass_over(&self, place: &Place) -> bool {
        self.lacking.get(place).is_some() || self.lying.get(place).is_some()
    }
}

impl Client {
    /// Tells that bytes of a blob were not what they should be. If a mirror gave the last ones, it is not asked for this
    /// blob for ten minutes, so that another attempt goes elsewhere; and no redirect for it is used again.
    pub fn distrust(&self, repository: &Repository, digest: &Digest) {
        let (mirrors, redirects) = (&self.inner.mirrors, &self.inner.redirects);
        let place = (repository.clone(), *digest);
        redirects.forget(&place);
        if let Some(mirror) = mirrors.given.get(&place) {
            tracing::warn!(%mirror, %digest, "a mirror gave damaged bytes, and is not asked for this blob for a while");
            mirrors.given.forget(&place);
            let place = (mirror, *digest);
            redirects.forget(&place);
            mirrors.lying.keep(place, ());
        }
    }

    /// Makes `attempt` at one endpoint after the other until it succeeds, fails for good, has failed too often or `budget`
    /// is used up.
    pub(super) async fn bounded<T, F>(
        &self,
        ask: &Ask<'_>,
        budget: Duration,
        attempt: impl Fn(Arc<Endpoint>) -> F,
    ) -> Result<T, Error>
    where
        F: Future<Output = Result<T, Error>>,
    {
        if self.inner.options.offline {
            let what = ask.what.clone();
            return Err(Error::Offline { what });
        }
        let endpoints = self.inner.endpoints.of(ask.repository, ask.is_by_digest())?;
        let endpoints = endpoints.into_iter().map(Arc::new).collect();
        match tokio::time::timeout(budget, self.rounds(ask, endpoints, attempt)).await {
            Ok(result) => result,
            Err(_) => {
                let host = ask.repository.registry.clone();
                Err(Error::Timeout {
                    host,
                    what: ask.what.clone(),
                    after: budget,
                })
            }
        }
    }

    async fn rounds<T, F>(
        &self,
        ask: &Ask<'_>,
        mut endpoints: Vec<Arc<Endpoint>>,
        attempt: impl Fn(Arc<Endpoint>) -> F,
    ) -> Result<T, Error>
    where
        F: Future<Output = Result<T, Error>>,
    {
        let mut failures = 0;
        loop {
            let error = match self.round(ask, &mut endpoints, &attempt).await {
                Err(error) if failures < self.inner.options.retries && error.is_transient() && !error.is_unsent() => {
                    error
                }
                done => return done,
            };
            let pause = pause(failures, &error, self.inner.options.max_pause);
            debug!(%error, ?pause, "registry request will be sent again");
            tokio::time::sleep(pause).await;
            failures += 1;
        }
    }

    /// Asks each of `endpoints` once, of which mirrors that have refused are taken out.
    async fn round<T, F>(
        &self,
        ask: &Ask<'_>,
        endpoints: &mut Vec<Arc<Endpoint>>,
        attempt: &impl Fn(Arc<Endpoint>) -> F,
    ) -> Result<T, Error>
    where
        F: Future<Output = Result<T, Error>>,
    {
        let mirrors = &self.inner.mirrors;
        let mut at = 0;
        loop {
            // The last one is the registry, which is never taken out.
            let endpoint = Arc::clone(&endpoints[at]);
            let there = ask.digest().map(|digest| (endpoint.repository.clone(), digest));
            if endpoint.is_mirror && there.as_ref().is_some_and(|place| mirrors.pass_over(place)) {
                endpoints.remove(at);
                continue;
            }
            let error = match attempt(Arc::clone(&endpoint)).await {
                Ok(done) => {
                    self.note_given(ask, &endpoint);
                    return Ok(done);
                }
                Err(error) => error,
            };
            if let Some(place) = there.as_ref().filter(|_| !error.is_unsent()) {
                self.inner.redirects.forget(place);
            }
            if !endpoint.is_mirror {
                return Err(error);
            }
            debug!(mirror = endpoint.repository.registry, %error, "a mirror is passed over");
            if error.is_transient() {
                at += 1;
                continue;
            }
            endpoints.remove(at);
            match (there, error) {
                (Some(place), Error::DigestMismatch { .. }) => mirrors.lying.keep(place, ()),
                (Some(place), _) => mirrors.lacking.keep(place, ()),
                (None, _) => {}
            }
        }
    }

    fn note_given(&self, ask: &Ask<'_>, endpoint: &Endpoint) {
        let Some(digest) = ask.digest() else { return };
        let (place, given) = ((ask.repository.clone(), digest), &self.inner.mirrors.given);
        if endpoint.is_mirror {
            given.keep(place, endpoint.repository.clone());
        } else {
            given.forget(&place);
        }
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
