//! One request to one endpoint: its turn, the way that is known to work, and proof of who we are.

use std::sync::Arc;

use reqwest::{Method, StatusCode, Url, header::HeaderValue};
use tracing::debug;

use super::{
    Client, Error, Repository,
    circuit::Pass,
    client::{Ask, Inner},
    endpoints::Endpoint,
    hosts::{Host, Scheme},
    response::{MAX_SKIPPED, Response, ranges_ignored},
    transport::Request,
};
use crate::digest::Digest;

impl Client {
    /// Asks once, with a new proof of who we are if the old one is refused. Gives a success whose body is to be read.
    pub(super) async fn exchange(&self, ask: &Ask<'_>, at: &Endpoint) -> Result<Response, Error> {
        let host = self.host(at)?;
        if let Some((offset, _)) = ask.range.filter(|_| host.ignores_ranges()) {
            // Others may do better; and to ask for too much again would only cost the host.
            if offset > MAX_SKIPPED || at.is_mirror && offset > 0 {
                return Err(ranges_ignored(&at.repository.registry, &ask.what, offset));
            }
        }
        // The semaphore is never closed, so there is always a permit.
        let permits = if ask.range.is_some() {
            &host.ranges
        } else {
            &host.others
        };
        let permit = Arc::clone(permits).acquire_owned().await.ok();
        let mut response = match self.by_known_redirect(ask, at).await {
            Some(response) => response,
            None => self.by_registry(ask, at, &host).await?,
        };
        if ask.range.is_some() && response.status() == StatusCode::OK {
            host.note_ignored_range();
        }
        response.hold(permit);
        let outcome = response.check().await;
        if let Err(Error::Status {
            retry_after: Some(asked),
            ..
        }) = &outcome
        {
            host.be_quiet((*asked).min(self.inner.options.max_pause));
        }
        outcome
    }

    /// Asks where the registry has redirected to the last time, if that is remembered and still works.
    async fn by_known_redirect(&self, ask: &Ask<'_>, at: &Endpoint) -> Option<Response> {
        let Inner {
            transport, redirects, ..
        } = &*self.inner;
        let place = redirect_place(ask, at)?;
        let url = redirects.get(&place)?;
        let mut request = ask.request(url, at);
        // What it is signed with is all the proof it takes.
        request.authorization = None;
        let trust = transport.trust(&request.url);
        let sent = transport.send(&request, trust).await;
        match sent {
            Ok(mut response) if response.status().is_success() => {
                response.set_foreign(true);
                Some(response)
            }
            sent => {
                if let Ok(mut response) = sent {
                    response.drain().await;
                }
                redirects.forget(&place);
                None
            }
        }
    }

    /// Asks the endpoint itself, and follows where it redirects to.
    async fn by_registry(&self, ask: &Ask<'_>, at: &Endpoint, host: &Arc<Host>) -> Result<Response, Error> {
        let Inner {
            transport,
            auth,
            redirects,
            ..
        } = &*self.inner;
        let mut pass = self.enter(at, host).await?;
        let mut proving = auth.proving(transport, &at.repository, host.trust);
        let mut response = self.reach(host, ask, at, proving.at_hand().await?, &mut pass).await?;
        while let Some(proof) = proving.another(&mut response).await? {
            response = self.reach(host, ask, at, Some(proof), &mut pass).await?;
        }
        if let Some(place) = redirect_place(ask, at).filter(|_| response.is_foreign() && response.status().is_success())
        {
            redirects.keep(place, response.url().clone());
        }
        response.watch(pass, at.is_mirror);
        Ok(response)
    }

    /// Leave to ask the host, after the time it wants to be left alone; for a mirror there is another one to ask
    /// meanwhile.
    async fn enter(&self, at: &Endpoint, host: &Arc<Host>) -> Result<Pass, Error> {
        let registry = &at.repository.registry;
        self.inner.transport.check_health(registry).await?;
        let quiet = host.quiet();
        if !quiet.is_zero() && at.is_mirror {
            return Err(Error::Busy {
                host: registry.clone(),
                left: quiet,
            });
        }
        tokio::time::sleep(quiet).await;
        let pass = host.circuit.enter()?;
        if at.is_mirror && pass.is_probe() {
            let probe = self.clone().probe(at.clone(), Arc::clone(host), pass);
            tokio::spawn(probe);
            return Err(host.circuit.resting());
        }
        Ok(pass)
    }

    /// Finds out whether a mirror is back, so that no reader has to wait for that.
    async fn probe(self, at: Endpoint, host: Arc<Host>, mut pass: Pass) {
        let ask = Ask::ping(&at.repository);
        // Any answer will do, and `pass` is told.
        if let Err(error) = self.reach(&host, &ask, &at, None, &mut pass).await {
            debug!(mirror = at.repository.registry, %error, "a mirror is not back yet");
        }
    }

    /// Sends the request over the scheme that works, and follows redirects. `pass` is told what came of the former.
    async fn reach(
        &self,
        host: &Host,
        ask: &Ask<'_>,
        at: &Endpoint,
        proof: Option<HeaderValue>,
        pass: &mut Pass,
    ) -> Result<Response, Error> {
        let (first, second) = host.schemes();
        let sent = match (self.send_over(first, host, ask, at, proof.clone()).await, second) {
            (Err(error @ Error::Unreachable { .. }), Some(second)) => {
                match self.send_over(second, host, ask, at, proof).await {
                    // The first scheme is the likelier one, so its error tells more.
                    Err(Error::Unreachable { .. }) => Err(error),
                    sent => sent,
                }
            }
            (sent, _) => sent,
        };
        match sent {
            Ok((request, response)) => {
                pass.answered();
                self.inner.transport.follow(request, response).await
            }
            Err(error) => {
                if matches!(error, Error::Unreachable { .. } | Error::Timeout { .. }) {
                    pass.failed(at.is_mirror);
                }
                Err(error)
            }
        }
    }

    /// Sends the request over one scheme and remembers if that works.
    async fn send_over<'a>(
        &self,
        scheme: Scheme,
        host: &Host,
        ask: &'a Ask<'_>,
        at: &'a Endpoint,
        proof: Option<HeaderValue>,
    ) -> Result<(Request<'a>, Response), Error> {
        let mut request = ask.request(host.url(scheme, &ask.path(at))?, at);
        request.authorization = proof;
        let response = self.inner.transport.send(&request, host.trust).await?;
        host.answered(scheme, response.status());
        Ok((request, response))
    }

    fn host(&self, at: &Endpoint) -> Result<Arc<Host>, Error> {
        let registry = &at.repository.registry;
        let key = (registry.clone(), at.insecure);
        let mut hosts = self.inner.hosts.lock();
        if let Some(host) = hosts.get(&key) {
            return Ok(host.clone());
        }
        let host = Host::new(registry, at.insecure, &self.inner.transport, &self.inner.options)?;
        let host = Arc::new(host);
        hosts.insert(key, host.clone());
        Ok(host)
    }
}

/// What a redirect is remembered by, if it is.
fn redirect_place(ask: &Ask<'_>, at: &Endpoint) -> Option<(Repository, Digest)> {
    let digest = ask.digest().filter(|_| ask.method == Method::GET)?;
    Some((at.repository.clone(), digest))
}

impl<'a> Ask<'a> {
    fn request<'b>(&'b self, url: Url, at: &'b Endpoint) -> Request<'b>
    where
        'a: 'b,
    {
        let mut request = Request::new(self.method.clone(), url, &self.what);
        request.accept = self.accept;
        request.range = self.range;
        request.home = &at.repository.registry;
        request.named = &self.repository.registry;
        request
    }
}
