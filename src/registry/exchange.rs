//! One request to one endpoint: its turn, the way that is known to work, and proof of who we are.

use std::{sync::Arc, time::Instant};

use reqwest::{Method, StatusCode, Url, header::HeaderValue};
use tracing::debug;

use super::{
    Client, Error, Repository,
    circuit::CircuitPermit,
    client::{Ask, Inner},
    endpoints::Endpoint,
    failover::Turn,
    hosts::{Host, Scheme},
    jitter::LONGEST,
    response::{Response, ranges_ignored},
    transport::Request,
};
use crate::digest::Digest;

impl Client {
    /// Asks once, with a new proof of who we are if the old one is refused. Gives a success whose body is to be read.
    pub(super) async fn exchange(&self, ask: &Ask<'_>, turn: &Turn) -> Result<Response, Error> {
        let Inner { mirrors, options, .. } = &*self.inner;
        let at = &turn.endpoint;
        let host = self.host(at)?;
        let place = ask.digest().map(|digest| (at.repository.clone(), digest));
        let far = ask.range.filter(|(offset, _)| at.is_mirror && *offset > 0);
        if let (Some(place), Some((offset, _))) = (&place, far)
            && mirrors.gives_whole(place)
        {
            // Others may do better.
            return Err(ranges_ignored(&at.repository.registry, &ask.what, offset));
        }
        let permit = host.permit(ask).await;
        let mut response = match self.by_known_redirect(ask, turn).await? {
            Some(response) => response,
            None => self.by_registry(ask, turn, &host).await?,
        };
        if ask.range.is_some() && response.status().is_success() {
            mirrors.note_whole(ask, at, response.status() == StatusCode::OK);
        }
        if ask.method == Method::HEAD {
            response.done();
        }
        response.hold(Some(permit));
        let speaker = if response.is_foreign() {
            self.inner.transport.elsewhere(response.host())
        } else {
            Arc::clone(&host.circuit)
        };
        let outcome = response.check().await;
        if let Err(Error::Status {
            retry_after: Some(asked),
            ..
        }) = &outcome
        {
            speaker.backoff_until((*asked).min(options.max_pause));
        }
        outcome
    }

    /// Asks where the registry has redirected to the last time, if that is remembered and still has what is asked for.
    async fn by_known_redirect(&self, ask: &Ask<'_>, turn: &Turn) -> Result<Option<Response>, Error> {
        let Inner {
            transport, redirects, ..
        } = &*self.inner;
        let known = redirect_place(ask, &turn.endpoint).and_then(|place| Some((redirects.get(&place)?, place)));
        let Some((url, place)) = known else {
            return Ok(None);
        };
        let mut request = ask.request(url.clone(), turn);
        // What it is signed with is all the proof it takes.
        request.authorization = None;
        let trust = transport.trust(&request.url);
        match transport.send_elsewhere(&request, trust).await {
            Ok(mut response) if has_moved(response.status()) => response.drain().await,
            Ok(mut response) => {
                response.set_foreign(true);
                return Ok(Some(response));
            }
            // The registry would only lead there again.
            Err(error) if error.is_unsent() || matches!(error, Error::Timeout { .. }) => return Err(error),
            Err(_) => {}
        }
        redirects.remove_if(&place, &url);
        Ok(None)
    }

    /// Asks the endpoint itself, and follows where it redirects to.
    async fn by_registry(&self, ask: &Ask<'_>, turn: &Turn, host: &Arc<Host>) -> Result<Response, Error> {
        let at = &turn.endpoint;
        let mut pass = self.enter(turn, host).await?;
        let mut response = match self.proved(ask, turn, host, &mut pass).await {
            Ok(response) => response,
            Err(error) => {
                // A mirror is as good as where it leads to.
                if at.is_mirror && error.is_silence() {
                    pass.failed();
                }
                pass.succeeded();
                return Err(error);
            }
        };
        if let Some(place) = redirect_place(ask, at).filter(|_| response.is_foreign() && response.status().is_success())
        {
            self.inner.redirects.insert(place, response.url().clone());
        }
        if response.is_foreign() && !at.is_mirror {
            pass.succeeded();
        } else {
            response.watch(pass);
        }
        Ok(response)
    }

    /// Asks the endpoint with such proof of who we are as it takes.
    async fn proved(
        &self,
        ask: &Ask<'_>,
        turn: &Turn,
        host: &Host,
        pass: &mut CircuitPermit,
    ) -> Result<Response, Error> {
        let Inner { transport, auth, .. } = &*self.inner;
        let mut proving = auth.proving(transport, &turn.endpoint.repository, host.trust);
        let mut response = self.reach(host, ask, turn, proving.at_hand().await?, pass).await?;
        while let Some(proof) = proving.another(&mut response).await? {
            response = self.reach(host, ask, turn, Some(proof), pass).await?;
        }
        Ok(response)
    }

    /// Leave to ask the host, after the time it wants to be left alone; for a mirror there is another one to ask
    /// meanwhile.
    async fn enter(&self, turn: &Turn, host: &Arc<Host>) -> Result<CircuitPermit, Error> {
        let Turn { endpoint: at, due } = turn;
        self.inner.transport.check_health(&at.repository.registry).await?;
        host.circuit.quiet(at.is_mirror).await?;
        if !at.is_mirror {
            return host.circuit.enter_patiently(Some(*due)).await;
        }
        let pass = host.circuit.enter(true, Some(*due))?;
        if pass.is_blind() {
            let probe = self.clone().probe(at.clone(), Arc::clone(host), pass);
            tokio::spawn(probe);
            return Err(host.circuit.resting());
        }
        Ok(pass)
    }

    /// Finds out whether a mirror is back, so that no reader has to wait for that. If it is, one reader's request tells
    /// whether it also has something to give.
    async fn probe(self, at: Endpoint, host: Arc<Host>, mut pass: CircuitPermit) {
        let repository = at.repository.clone();
        let ask = Ask::ping(&repository);
        let due = Instant::now() + self.inner.options.request_timeout.min(LONGEST);
        let turn = Turn { endpoint: at, due };
        match self.reach(&host, &ask, &turn, None, &mut pass).await {
            // Any answer will do.
            Ok(_) => pass.showed_life(),
            Err(error) => {
                debug!(mirror = repository.registry, %error, "a mirror is not back yet");
                pass.failed();
            }
        }
    }

    /// Sends the request over the scheme that works, and follows redirects. `pass` is told what came of the former.
    async fn reach(
        &self,
        host: &Host,
        ask: &Ask<'_>,
        turn: &Turn,
        proof: Option<HeaderValue>,
        pass: &mut CircuitPermit,
    ) -> Result<Response, Error> {
        let (first, second) = host.schemes();
        let sent = match (self.send_over(first, host, ask, turn, proof.clone()).await, second) {
            (Err(error @ Error::Unreachable { .. }), Some(second)) => {
                // What a host speaks is found out without proof; if it is refused for that, it gets it then.
                let proof = proof.filter(|_| second == Scheme::Https);
                match self.send_over(second, host, ask, turn, proof).await {
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
                    pass.failed();
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
        turn: &'a Turn,
        proof: Option<HeaderValue>,
    ) -> Result<(Request<'a>, Response), Error> {
        let mut request = ask.request(host.url(scheme, &ask.path(&turn.endpoint))?, turn);
        request.authorization = proof;
        let response = self.inner.transport.send(&request, host.trust).await?;
        host.answered(scheme, response.status());
        Ok((request, response))
    }

    pub(super) fn host(&self, at: &Endpoint) -> Result<Arc<Host>, Error> {
        let Inner {
            hosts,
            transport,
            options,
            ..
        } = &*self.inner;
        let (registry, insecure) = (&at.repository.registry, at.insecure);
        hosts.get(registry, insecure, || Host::new(registry, insecure, transport, options))
    }
}

/// Whether what was at an address is not there any more, or not for who has that address: it has run out, or gone. All else
/// is the answer.
fn has_moved(status: StatusCode) -> bool {
    let busy = matches!(
        status,
        StatusCode::REQUEST_TIMEOUT | StatusCode::TOO_MANY_REQUESTS | StatusCode::RANGE_NOT_SATISFIABLE
    );
    !status.is_success() && !status.is_server_error() && !busy
}

/// What a redirect is remembered by, if it is.
fn redirect_place(ask: &Ask<'_>, at: &Endpoint) -> Option<(Repository, Digest)> {
    let digest = ask.digest().filter(|_| ask.method == Method::GET)?;
    Some((at.repository.clone(), digest))
}

impl<'a> Ask<'a> {
    fn request<'b>(&'b self, url: Url, turn: &'b Turn) -> Request<'b>
    where
        'a: 'b,
    {
        let mut request = Request::new(self.method.clone(), url, &self.what);
        request.accept = self.accept;
        request.range = self.range;
        request.home = &turn.endpoint.repository.registry;
        request.named = &self.repository.registry;
        request.alternative = turn.endpoint.is_mirror;
        request.due = Some(turn.due);
        request
    }
}
