//! One request to one endpoint: permit, circuit, scheme, authentication, remembered redirects.

use std::{
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use reqwest::{Method, StatusCode, Url, header::HeaderValue};
use tracing::debug;

use super::{
    Error, Options,
    auth::Auth,
    circuit::CircuitPermit,
    endpoint_memory::EndpointMemory,
    endpoints::Endpoint,
    error::is_unavailable,
    hosts::{Host, Hosts, MAX_HOSTS, Scheme},
    jitter::MAX_PAUSE,
    redirect_hosts::RedirectHosts,
    repository::BlobLocation,
    request::{HttpRequest, RegistryRequest},
    request_context::ranges_ignored,
    response::Response,
    stats::{CircuitStatus, HostLoad},
    transport::Transport,
};
use crate::ttl_cache::TtlCache;

/// Most redirects remembered.
const MAX_REDIRECT_URLS: usize = 4096;
/// How long a redirect is remembered at most. Signatures expire long before.
const REDIRECT_URL_TTL: Duration = Duration::from_secs(24 * 3600);

/// Sends requests to single endpoints.
pub(super) struct Exchange {
    options: Arc<Options>,
    transport: Arc<Transport>,
    redirect_hosts: RedirectHosts,
    hosts: Hosts,
    /// Where endpoints have redirected to for a blob. The URLs are secret: they are signed.
    redirect_urls: TtlCache<BlobLocation, Url>,
    pub(super) auth: Auth,
    pub(super) memory: EndpointMemory,
}

/// One attempt at an endpoint.
pub(super) struct Attempt {
    pub(super) endpoint: Endpoint,
    /// When the attempt's time ends.
    pub(super) deadline: Instant,
}

impl Exchange {
    pub(super) fn new(options: Arc<Options>, transport: Arc<Transport>, auth: Auth) -> Self {
        Self {
            redirect_hosts: RedirectHosts::new(transport.clone(), &options),
            hosts: Hosts::new(MAX_HOSTS),
            redirect_urls: TtlCache::new(MAX_REDIRECT_URLS, REDIRECT_URL_TTL),
            memory: EndpointMemory::new(),
            options,
            transport,
            auth,
        }
    }

    /// Sends `request` once, and again with other credentials if the first ones are refused. Returns a success whose
    /// body is still to be read.
    pub(super) async fn send(
        self: &Arc<Self>,
        request: &RegistryRequest<'_>,
        attempt: &Attempt,
    ) -> Result<Response, Error> {
        let endpoint = &attempt.endpoint;
        let host = self.host(endpoint)?;
        let blob = request.blob_at(&endpoint.repository);
        let skipping = request.range.filter(|(offset, _)| endpoint.is_mirror && *offset > 0);
        if let (Some(blob), Some((offset, _))) = (&blob, skipping)
            && self.memory.are_ranges_ignored(blob)
        {
            // Another endpoint may honour ranges.
            return Err(ranges_ignored(&endpoint.repository.registry, &request.what, offset));
        }
        let permit = host.permit(request).await;
        let mut response = match self.send_to_remembered_redirect(request, attempt).await? {
            Some(response) => response,
            None => self.send_to_endpoint(request, attempt, &host).await?,
        };
        if request.range.is_some() && response.status().is_success() {
            let is_ignored = response.status() == StatusCode::OK;
            self.memory.record_ranges(request, endpoint, is_ignored);
        }
        if request.method == Method::HEAD {
            response.complete();
        }
        response.observe(permit);
        let circuit = if response.is_cross_origin() {
            self.redirect_hosts.circuit(response.host())
        } else {
            Arc::clone(&host.circuit)
        };
        let checked = response.check().await;
        if let Err(Error::Status {
            retry_after: Some(pause),
            ..
        }) = &checked
        {
            circuit.back_off((*pause).min(self.options.max_pause));
        }
        checked
    }

    /// Name, circuit and requests of each host used so far. Hosts that were redirected to have no limit of requests.
    pub(super) fn known_hosts(&self) -> Vec<(String, CircuitStatus, Option<HostLoad>)> {
        let registries = self.hosts.statuses().into_iter();
        let registries = registries.map(|(name, circuit, load)| (name, circuit, Some(load)));
        let others = self.redirect_hosts.statuses().into_iter();
        registries
            .chain(others.map(|(name, circuit)| (name, circuit, None)))
            .collect()
    }

    /// Counts a round of requests that is repeated.
    pub(super) fn record_retry(&self) {
        self.transport.counters.retries.fetch_add(1, Ordering::Relaxed);
    }

    /// Forgets where an endpoint redirected to for `blob`.
    pub(super) fn forget_redirect(&self, blob: &BlobLocation) {
        self.redirect_urls.remove(blob);
    }

    /// Opens the circuit of an endpoint that has used up its share of the time.
    pub(super) fn record_timeout(&self, endpoint: &Endpoint, error: &Error) -> Result<(), Error> {
        self.host(endpoint)?.circuit.record_timeout(error);
        Ok(())
    }

    /// Waits until a request to `endpoint` that failed since the circuit of `host` is open may be sent again. The host
    /// is that of the endpoint, or one that it leads to.
    pub(super) async fn wait_for_circuit(&self, endpoint: &Endpoint, host: &str) -> Result<(), Error> {
        let own = self.host(endpoint)?;
        if own.circuit.host() == host {
            own.circuit.wait().await;
        }
        // A token server may have the name of its registry, and a circuit of its own.
        if let Some(circuit) = self.redirect_hosts.known_circuit(host) {
            circuit.wait().await;
        }
        Ok(())
    }

    /// Sends to where the endpoint redirected the last time; `None` if that is not known or has expired.
    async fn send_to_remembered_redirect(
        &self,
        request: &RegistryRequest<'_>,
        attempt: &Attempt,
    ) -> Result<Option<Response>, Error> {
        let Some(blob) = redirect_key(request, &attempt.endpoint) else {
            return Ok(None);
        };
        let Some(url) = self.redirect_urls.get(&blob) else {
            return Ok(None);
        };
        // The URL's signature is all the authorization it takes.
        let http_request = http_request(request, url.clone(), attempt);
        let trust = self.redirect_hosts.trust(&http_request.url);
        match self.redirect_hosts.send(&http_request, trust).await {
            Ok(mut response) if is_redirect_stale(response.status()) => response.drain().await,
            Ok(mut response) => {
                response.set_cross_origin(true);
                return Ok(Some(response));
            }
            // The endpoint would only redirect there again.
            Err(error) if error.is_unsent() || matches!(error, Error::Timeout { .. }) => return Err(error),
            Err(_) => {}
        }
        self.redirect_urls.remove_if(&blob, &url);
        Ok(None)
    }

    /// Sends to the endpoint itself, and follows its redirects.
    async fn send_to_endpoint(
        self: &Arc<Self>,
        request: &RegistryRequest<'_>,
        attempt: &Attempt,
        host: &Arc<Host>,
    ) -> Result<Response, Error> {
        let endpoint = &attempt.endpoint;
        let mut permit = self.acquire_circuit(attempt, host).await?;
        let mut response = match self.send_authenticated(request, attempt, host, &mut permit).await {
            Ok(response) => response,
            Err(error) => {
                // A mirror is only as good as its redirect target.
                if endpoint.is_mirror && error.is_unresponsive() {
                    permit.record_failure(&error);
                }
                permit.record_success();
                return Err(error);
            }
        };
        if let Some(blob) =
            redirect_key(request, endpoint).filter(|_| response.is_cross_origin() && response.status().is_success())
        {
            self.redirect_urls.insert(blob, response.url().clone());
        }
        if response.is_cross_origin() && !endpoint.is_mirror {
            permit.record_success();
        } else {
            response.observe(permit);
        }
        Ok(response)
    }

    /// Sends with the authorization at hand, and obtains another one while the endpoint refuses it.
    async fn send_authenticated(
        self: &Arc<Self>,
        request: &RegistryRequest<'_>,
        attempt: &Attempt,
        host: &Arc<Host>,
        permit: &mut CircuitPermit,
    ) -> Result<Response, Error> {
        let repository = &attempt.endpoint.repository;
        let mut authenticator = self.auth.authenticator(&self.redirect_hosts, repository, host.trust);
        let authorization = authenticator.initial().await?;
        let mut response = self
            .send_and_follow(host, request, attempt, authorization, permit)
            .await?;
        while let Some(authorization) = authenticator.after(&mut response).await? {
            response = self
                .send_and_follow(host, request, attempt, Some(authorization), permit)
                .await?;
        }
        Ok(response)
    }

    /// Waits for the host's health check and back-off, and takes a permit of its circuit. Does not wait for an open
    /// circuit: other requests need what this one holds.
    async fn acquire_circuit(self: &Arc<Self>, attempt: &Attempt, host: &Arc<Host>) -> Result<CircuitPermit, Error> {
        let Attempt { endpoint, deadline } = attempt;
        self.transport.check_health(&endpoint.repository.registry).await?;
        host.circuit.wait_for_backoff(endpoint.is_mirror).await?;
        let mut permit = host.circuit.try_acquire(endpoint.is_mirror, Some(*deadline))?;
        if !permit.needs_ping() {
            return Ok(permit);
        }
        if endpoint.is_mirror {
            tokio::spawn(Arc::clone(self).probe_mirror(endpoint.clone(), Arc::clone(host), permit));
            return Err(host.circuit.open_error());
        }
        match self.ping(endpoint, host).await {
            Ok(status) if !is_unavailable(status) => permit.record_own_ping(),
            Ok(status) => {
                let error = unavailable(endpoint, status);
                permit.record_failure(&error);
                return Err(error);
            }
            Err(error) => {
                permit.record_failure(&error);
                return Err(error);
            }
        }
        Ok(permit)
    }

    /// Pings a mirror whose circuit is half-open, in the background, so that no reader waits for it. If it answers, one
    /// reader's request finds out whether it serves content too.
    async fn probe_mirror(self: Arc<Self>, endpoint: Endpoint, host: Arc<Host>, mut permit: CircuitPermit) {
        match self.ping(&endpoint, &host).await {
            // Any status will do.
            Ok(_) => permit.record_ping(),
            Err(error) => {
                debug!(host = endpoint.repository.registry, %error, "failed to ping mirror");
                permit.record_failure(&error);
            }
        }
    }

    /// Pings a registry that has answered repeatedly that its service is unavailable, to tell a registry that is away
    /// from one that fails to serve some content. Only the former opens its circuit.
    async fn check_unavailable(self: Arc<Self>, endpoint: Endpoint, host: Arc<Host>) {
        match self.ping(&endpoint, &host).await {
            Ok(status) if !is_unavailable(status) => host.circuit.record_available(),
            Ok(status) => host.circuit.record_unavailable(&unavailable(&endpoint, status)),
            Err(error) => host.circuit.record_unavailable(&error),
        }
    }

    /// Requests `/v2/`, which every registry answers. Returns the status.
    async fn ping(&self, endpoint: &Endpoint, host: &Host) -> Result<u16, Error> {
        let repository = endpoint.repository.clone();
        let request = RegistryRequest::ping(&repository);
        let deadline = Instant::now() + self.options.request_timeout.min(MAX_PAUSE);
        let endpoint = endpoint.clone();
        let attempt = Attempt { endpoint, deadline };
        let sent = self.send_by_any_scheme(host, &request, &attempt, None).await;
        sent.map(|(_, response)| response.status().as_u16())
    }

    /// Sends by the scheme that works, and follows redirects. Records the outcome of the former in `permit`.
    async fn send_and_follow(
        self: &Arc<Self>,
        host: &Arc<Host>,
        request: &RegistryRequest<'_>,
        attempt: &Attempt,
        authorization: Option<HeaderValue>,
        permit: &mut CircuitPermit,
    ) -> Result<Response, Error> {
        let endpoint = &attempt.endpoint;
        match self.send_by_any_scheme(host, request, attempt, authorization).await {
            Ok((http_request, response)) => {
                let status = response.status().as_u16();
                if !is_unavailable(status) {
                    permit.record_answer();
                } else if permit.record_unavailable(&unavailable(endpoint, status)) {
                    tokio::spawn(Arc::clone(self).check_unavailable(endpoint.clone(), Arc::clone(host)));
                }
                self.redirect_hosts.follow(http_request, response).await
            }
            Err(error) => {
                // Another endpoint can be asked at once after a lost connection; the host need not be away.
                let is_lost = matches!(error, Error::Interrupted { .. }) && !endpoint.is_mirror;
                if is_lost || matches!(error, Error::Unreachable { .. } | Error::Timeout { .. }) {
                    permit.record_failure(&error);
                }
                Err(error)
            }
        }
    }

    /// Sends by the scheme that works.
    async fn send_by_any_scheme<'a>(
        &self,
        host: &Host,
        request: &'a RegistryRequest<'_>,
        attempt: &'a Attempt,
        authorization: Option<HeaderValue>,
    ) -> Result<(HttpRequest<'a>, Response), Error> {
        let (first, second) = host.schemes();
        let sent = self
            .send_by_scheme(first, host, request, attempt, authorization.clone())
            .await;
        match (sent, second) {
            (Err(error @ Error::Unreachable { .. }), Some(second)) => {
                // Plain HTTP is tried without authorization; if the host demands it, it gets it then.
                let authorization = authorization.filter(|_| second == Scheme::Https);
                match self.send_by_scheme(second, host, request, attempt, authorization).await {
                    // The first scheme is the likelier one, so that its error says more.
                    Err(Error::Unreachable { .. }) => Err(error),
                    sent => sent,
                }
            }
            (sent, _) => sent,
        }
    }

    /// Sends by one scheme, and remembers it if it works.
    async fn send_by_scheme<'a>(
        &self,
        scheme: Scheme,
        host: &Host,
        request: &'a RegistryRequest<'_>,
        attempt: &'a Attempt,
        authorization: Option<HeaderValue>,
    ) -> Result<(HttpRequest<'a>, Response), Error> {
        let url = host.url(scheme, &request.path(&attempt.endpoint.repository.name))?;
        let mut http_request = http_request(request, url, attempt);
        http_request.authorization = authorization;
        let response = self.transport.send(&http_request, host.trust).await?;
        host.record_scheme(scheme, response.status());
        Ok((http_request, response))
    }

    fn host(&self, endpoint: &Endpoint) -> Result<Arc<Host>, Error> {
        let (registry, insecure) = (&endpoint.repository.registry, endpoint.insecure);
        let trust = |url: &Url| self.transport.trust(url);
        self.hosts.get_or_insert(registry, insecure, || {
            Host::new(registry, insecure, trust, &self.options)
        })
    }
}

/// The error of an endpoint that answers that its service is unavailable.
fn unavailable(endpoint: &Endpoint, status: u16) -> Error {
    Error::Status {
        url: endpoint.repository.registry.clone(),
        status,
        detail: String::new(),
        retry_after: None,
    }
}

/// Whether a remembered redirect is of no use any more: expired, or its target has gone. Other statuses are answers.
fn is_redirect_stale(status: StatusCode) -> bool {
    let is_answer = matches!(
        status,
        StatusCode::REQUEST_TIMEOUT | StatusCode::TOO_MANY_REQUESTS | StatusCode::RANGE_NOT_SATISFIABLE
    );
    !status.is_success() && !status.is_server_error() && !is_answer
}

/// The key to remember a redirect by; `None` for requests whose redirects are not remembered.
fn redirect_key(request: &RegistryRequest<'_>, endpoint: &Endpoint) -> Option<BlobLocation> {
    request
        .blob_at(&endpoint.repository)
        .filter(|_| request.method == Method::GET)
}

/// The HTTP request for `url`, without authorization.
fn http_request<'a>(request: &'a RegistryRequest<'_>, url: Url, attempt: &'a Attempt) -> HttpRequest<'a> {
    let mut http_request = HttpRequest::new(request.method.clone(), url, &request.what);
    http_request.accept = request.accept;
    http_request.range = request.range;
    http_request.registry = &attempt.endpoint.repository.registry;
    http_request.image_registry = &request.repository.registry;
    http_request.has_alternative = attempt.endpoint.is_mirror;
    http_request.deadline = Some(attempt.deadline);
    http_request
}
