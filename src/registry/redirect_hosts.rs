//! Hosts that registries lead to, such as storages and token servers: redirects, and a circuit for each host.

use std::{collections::HashMap, sync::Arc};

use parking_lot::Mutex;
use reqwest::{StatusCode, Url, header};

use super::{
    Error, Options,
    circuit::{Circuit, CircuitPolicy},
    host_name::{Trust, authority, leads_to_this_machine, origin, without_user_info},
    request::HttpRequest,
    request_context::RequestContext,
    response::Response,
    stats::CircuitStatus,
    transport::Transport,
};

/// Most redirects followed for one request.
const MAX_REDIRECTS: usize = 5;
/// Most hosts with a circuit. Beyond it, circuits not in use are dropped.
const MAX_HOSTS: usize = 1024;

/// Sends requests to hosts that registries lead to. Their failures do not count against the registry.
pub(super) struct RedirectHosts {
    transport: Arc<Transport>,
    policy: CircuitPolicy,
    /// By `host[:port]`.
    circuits: Mutex<HashMap<String, Arc<Circuit>>>,
}

impl RedirectHosts {
    pub(super) fn new(transport: Arc<Transport>, options: &Options) -> Self {
        Self {
            transport,
            policy: CircuitPolicy::of(options),
            circuits: Mutex::default(),
        }
    }

    /// The circuit of `host` (`host[:port]`).
    pub(super) fn circuit(&self, host: &str) -> Arc<Circuit> {
        let mut circuits = self.circuits.lock();
        if circuits.len() >= MAX_HOSTS && !circuits.contains_key(host) {
            circuits.retain(|_, circuit| Arc::strong_count(circuit) > 1);
        }
        let new = || Arc::new(Circuit::new(host.to_owned(), self.policy));
        Arc::clone(circuits.entry(host.to_owned()).or_insert_with(new))
    }

    /// Name and circuit of each host.
    pub(super) fn statuses(&self) -> Vec<(String, CircuitStatus)> {
        let circuits = self.circuits.lock();
        let circuits = circuits.values();
        circuits
            .map(|circuit| (circuit.host().to_owned(), circuit.status()))
            .collect()
    }

    /// The circuit of `host`, if it has one.
    pub(super) fn known_circuit(&self, host: &str) -> Option<Arc<Circuit>> {
        self.circuits.lock().get(host).cloned()
    }

    /// The trust in the host of `url`, as the configuration has it.
    pub(super) fn trust(&self, url: &Url) -> Trust {
        self.transport.trust(url)
    }

    /// Sends one request, unless the host's circuit is open.
    pub(super) async fn send(&self, request: &HttpRequest<'_>, trust: Trust) -> Result<Response, Error> {
        let circuit = self.circuit(&authority(&request.url));
        circuit.wait_for_backoff(request.has_alternative).await?;
        // Mirrors and registry may share this host, so that a mirror's failure here counts as any other.
        let mut permit = circuit.try_acquire(false, request.deadline)?;
        match self.transport.send(request, trust).await {
            Ok(mut response) => {
                permit.record_answer();
                response.observe(permit);
                Ok(response)
            }
            Err(error) => {
                if error.is_unresponsive() || matches!(error, Error::Interrupted { .. }) {
                    permit.record_failure(&error);
                }
                Err(error)
            }
        }
    }

    /// Follows redirects, starting with `response`, the answer to `request`.
    ///
    /// Credentials stay with the scheme, host and port they were meant for. A redirect from TLS to plain HTTP is
    /// refused unless the target may speak plain HTTP.
    pub(super) async fn follow(&self, mut request: HttpRequest<'_>, mut response: Response) -> Result<Response, Error> {
        let first_host = authority(&request.url);
        for _ in 0..MAX_REDIRECTS {
            let Some(location) = redirect_target(&response, &request)? else {
                return Ok(response);
            };
            if let Some(target) = leads_to_this_machine(&request.url, &location) {
                return Err(invalid(&request, format!("redirect to {target}")));
            }
            let trust = match authority(&location) == authority(&request.url) {
                true => response.trust(),
                false => self.trust(&location),
            };
            if request.url.scheme() == "https" && location.scheme() == "http" && trust == Trust::Strict {
                let detail = format!("redirect from TLS to plain HTTP on {}", authority(&location));
                return Err(invalid(&request, detail));
            }
            let leaves_origin = origin(&request.url) != origin(&location);
            if leaves_origin {
                request.authorization = None;
            }
            request.url = location;
            let is_cross_origin = response.is_cross_origin() || leaves_origin;
            response.drain().await;
            response = match authority(&request.url) == first_host {
                true => self.transport.send(&request, trust).await?,
                false => self.send(&request, trust).await?,
            };
            response.set_cross_origin(is_cross_origin);
        }
        match redirect_target(&response, &request)? {
            None => Ok(response),
            Some(_) => Err(invalid(&request, format!("more than {MAX_REDIRECTS} redirects"))),
        }
    }
}

fn invalid(request: &HttpRequest<'_>, detail: impl Into<String>) -> Error {
    RequestContext::new(&request.url, request.what).invalid(detail)
}

/// The URL that `response` redirects to; `None` if it is no redirect.
fn redirect_target(response: &Response, request: &HttpRequest<'_>) -> Result<Option<Url>, Error> {
    use StatusCode as S;
    let redirects = [
        S::MOVED_PERMANENTLY,
        S::FOUND,
        S::SEE_OTHER,
        S::TEMPORARY_REDIRECT,
        S::PERMANENT_REDIRECT,
    ];
    if !redirects.contains(&response.status()) {
        return Ok(None);
    }
    let location = response
        .header(header::LOCATION)
        .ok_or_else(|| invalid(request, "redirect without a usable location"))?;
    let location = request
        .url
        .join(location)
        .map_err(|_| invalid(request, "redirect to an invalid URL"))?;
    match without_user_info(location) {
        Some(location) => Ok(Some(location)),
        None => Err(invalid(request, "redirect to a URL that is not HTTP")),
    }
}
