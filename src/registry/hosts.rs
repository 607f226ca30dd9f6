//! Registries: their base URL, the scheme that worked last, their circuit, and their limit of requests in flight.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicU8, Ordering},
    },
    time::Instant,
};

use parking_lot::Mutex;
use reqwest::{StatusCode, Url};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::{
    Error, Options,
    circuit::{Circuit, CircuitPolicy},
    host_name::{Trust, api_host, config_name},
    request::RegistryRequest,
    response::BodyObserver,
    stats::{CircuitStatus, HostLoad},
};
use crate::printable::printable;

const UNKNOWN: u8 = 0;
const HTTPS: u8 = 1;
const HTTP: u8 = 2;

/// Most registries with remembered state, unless more have requests in flight.
pub(super) const MAX_HOSTS: usize = 1024;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Scheme {
    Https,
    Http,
}

/// One registry or mirror.
pub(super) struct Host {
    /// `https://host[:port]/`.
    base: Url,
    pub(super) trust: Trust,
    /// Permits for ranges of blobs.
    ranges: Arc<Semaphore>,
    /// Permits for prefetches, which need one of `ranges` too. Half as many, so that a reader finds a free permit, or
    /// gets one as soon as one answer has arrived.
    prefetches: Arc<Semaphore>,
    /// How many permits `ranges` and `others` each have in all.
    max_requests: usize,
    /// Permits for all other requests, so that resolving an image does not wait for reads.
    others: Arc<Semaphore>,
    pub(super) circuit: Arc<Circuit>,
    /// The scheme that worked last.
    scheme: AtomicU8,
}

/// The hosts used so far.
pub(super) struct Hosts {
    capacity: usize,
    /// Each with the time of its last use.
    entries: Mutex<HashMap<HostKey, (Arc<Host>, Instant)>>,
}

/// The name of a registry, and whether registries.conf has it as insecure.
type HostKey = (String, bool);

/// One of a host's requests in flight.
pub(super) struct RequestPermit {
    _request: Option<OwnedSemaphorePermit>,
    _prefetch: Option<OwnedSemaphorePermit>,
}

/// Kept until the body has ended, since a host counts a request until then.
impl BodyObserver for RequestPermit {}

/// How many of `max_requests` in flight may be prefetches.
pub(super) fn max_prefetches(max_requests: usize) -> usize {
    (max_requests / 2).max(1)
}

impl Hosts {
    /// Remembers `capacity` hosts. Beyond it, the idle host that was least recently used is evicted.
    pub(super) fn new(capacity: usize) -> Self {
        let entries = Mutex::default();
        Self { capacity, entries }
    }

    /// The host named `registry`, made by `make` if unknown.
    pub(super) fn get_or_insert(
        &self,
        registry: &str,
        insecure: bool,
        make: impl FnOnce() -> Result<Host, Error>,
    ) -> Result<Arc<Host>, Error> {
        let key = (registry.to_owned(), insecure);
        let mut entries = self.entries.lock();
        if let Some((host, last_used)) = entries.get_mut(&key) {
            *last_used = Instant::now();
            return Ok(Arc::clone(host));
        }
        let host = Arc::new(make()?);
        if entries.len() >= self.capacity {
            let idle = entries.iter().filter(|(_, (host, _))| Host::is_idle(host));
            let evicted = idle
                .min_by_key(|(_, (_, last_used))| *last_used)
                .map(|(key, _)| key.clone());
            evicted.map(|key| entries.remove(&key));
        }
        entries.insert(key, (Arc::clone(&host), Instant::now()));
        Ok(host)
    }

    /// Name, circuit and requests of each host.
    pub(super) fn statuses(&self) -> Vec<(String, CircuitStatus, HostLoad)> {
        let entries = self.entries.lock();
        let hosts = entries.values().map(|(host, _)| host);
        hosts
            .map(|host| (config_name(&host.base), host.circuit.status(), host.load()))
            .collect()
    }
}

impl Host {
    /// The host that serves `registry`. `insecure` is the setting in registries.conf, `trust` gives that of the
    /// configuration.
    pub(super) fn new(
        registry: &str,
        insecure: bool,
        trust: impl FnOnce(&Url) -> Trust,
        options: &Options,
    ) -> Result<Self, Error> {
        let invalid = |_| Error::InvalidName {
            what: format!("registry `{}`", printable(registry)),
        };
        let base = Url::parse(&format!("https://{}/", api_host(registry))).map_err(invalid)?;
        let trust = match trust(&base) {
            Trust::Strict if insecure => Trust::Insecure,
            configured => configured,
        };
        let max_requests = options.max_requests_per_host.clamp(1, Semaphore::MAX_PERMITS);
        let permits = |count| Arc::new(Semaphore::new(count));
        Ok(Self {
            base,
            trust,
            ranges: permits(max_requests),
            prefetches: permits(max_prefetches(max_requests)),
            others: permits(max_requests),
            max_requests,
            circuit: Arc::new(Circuit::new(registry.to_owned(), CircuitPolicy::of(options))),
            scheme: AtomicU8::new(UNKNOWN),
        })
    }

    /// Whether no request to it is in flight or waits for a permit: each holds a reference to the host or a part of it.
    fn is_idle(self: &Arc<Self>) -> bool {
        let permits = [&self.ranges, &self.prefetches, &self.others];
        Arc::strong_count(self) == 1
            && Arc::strong_count(&self.circuit) == 1
            && permits.iter().all(|permits| Arc::strong_count(permits) == 1)
    }

    /// Its requests in flight, and those that wait for a permit: each of both holds a reference to a semaphore.
    fn load(&self) -> HostLoad {
        let all = |permits: &Arc<Semaphore>| Arc::strong_count(permits) - 1;
        let taken = |permits: &Semaphore, max: usize| max.saturating_sub(permits.available_permits());
        let prefetching = taken(&self.prefetches, max_prefetches(self.max_requests));
        let in_flight = taken(&self.ranges, self.max_requests) + taken(&self.others, self.max_requests);
        // A prefetch with its first permit waits for a second one, and is counted there.
        let waiting_to_prefetch = all(&self.prefetches).saturating_sub(prefetching);
        let waiting = (all(&self.ranges) + all(&self.others)).saturating_sub(in_flight);
        HostLoad {
            in_flight,
            waiting: waiting + waiting_to_prefetch,
        }
    }

    /// Waits for permission to have `request` in flight.
    pub(super) async fn permit(&self, request: &RegistryRequest<'_>) -> RequestPermit {
        // No semaphore is ever closed, so that `ok` drops no permit.
        let acquire = |permits: &Arc<Semaphore>| Arc::clone(permits).acquire_owned();
        let _prefetch = match request.is_prefetch {
            true => acquire(&self.prefetches).await.ok(),
            false => None,
        };
        let permits = if request.range.is_some() {
            &self.ranges
        } else {
            &self.others
        };
        let _request = acquire(permits).await.ok();
        RequestPermit { _request, _prefetch }
    }

    /// The schemes to try, in order. Strictly trusted hosts have only HTTPS. So have hosts that have spoken TLS before:
    /// an attacker who breaks TLS must not be shown the request in plain text.
    pub(super) fn schemes(&self) -> (Scheme, Option<Scheme>) {
        match (self.trust, self.scheme.load(Ordering::Relaxed)) {
            (Trust::Strict, _) => (Scheme::Https, None),
            (_, HTTPS) => (Scheme::Https, None),
            (_, HTTP) => (Scheme::Http, Some(Scheme::Https)),
            _ => (Scheme::Https, Some(Scheme::Http)),
        }
    }

    /// Remembers that `scheme` got an answer with `status`.
    pub(super) fn record_scheme(&self, scheme: Scheme, status: StatusCode) {
        let worked = match scheme {
            Scheme::Https => HTTPS,
            // TLS servers answer plain HTTP with status 400, so that the next request tries TLS first.
            Scheme::Http if status == StatusCode::BAD_REQUEST => UNKNOWN,
            Scheme::Http => HTTP,
        };
        self.scheme.store(worked, Ordering::Relaxed);
    }

    /// The URL of `path`, which starts with `/v2/` and needs no escapes.
    pub(super) fn url(&self, scheme: Scheme, path: &str) -> Result<Url, Error> {
        let name = self.base.as_str().trim_start_matches("https").trim_end_matches('/');
        let scheme = match scheme {
            Scheme::Https => "https",
            Scheme::Http => "http",
        };
        let url = format!("{scheme}{name}{path}");
        Url::parse(&url).map_err(|_| Error::InvalidName {
            what: format!("URL `{}`", printable(&url)),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(registry: &str) -> Host {
        Host::new(registry, false, |url| Trust::of(url, &[]), &Options::default()).unwrap()
    }

    #[test]
    fn urls_use_the_host_of_the_api() {
        let hub = host("docker.io").url(Scheme::Https, "/v2/a/b").unwrap();
        assert_eq!(hub.as_str(), "https://registry-1.docker.io/v2/a/b");
        assert_eq!(
            host("[::1]:5000").url(Scheme::Http, "/v2/a").unwrap().as_str(),
            "http://[::1]:5000/v2/a"
        );
    }

    #[tokio::test]
    async fn least_recently_used_idle_host_is_evicted() {
        let hosts = Hosts::new(3);
        let get = |name: &str| hosts.get_or_insert(name, false, || Ok(host(name))).unwrap();
        let known = || {
            let mut names: Vec<_> = hosts.entries.lock().keys().map(|(name, _)| name.clone()).collect();
            names.sort();
            names.join(" ")
        };
        let repository = crate::registry::Repository::new("held", "a");
        let (held, permit) = (get("a"), get("b").permit(&RegistryRequest::ping(&repository)).await);
        get("c");
        get("d");
        assert_eq!(known(), "a b d", "requests in flight keep their hosts");
        drop((held, permit));
        get("a");
        get("e");
        assert_eq!(known(), "a d e");
        let in_use = (get("a").circuit.clone(), get("d"), get("e"));
        get("f");
        assert_eq!(known(), "a d e f", "all are in use");
        drop(in_use);
        assert!(
            hosts
                .get_or_insert("g", false, || Err(Error::NotFound { what: String::new() }))
                .is_err()
        );
        assert_eq!(known(), "a d e f");
    }

    #[tokio::test]
    async fn load_tells_requests_in_flight_from_waiting_ones() {
        let options = Options {
            max_requests_per_host: 2,
            ..Options::default()
        };
        let host = Host::new("r.example", false, |url| Trust::of(url, &[]), &options).unwrap();
        let repository = crate::registry::Repository::new("r.example", "a");
        let mut range = RegistryRequest::ping(&repository);
        (range.range, range.is_prefetch) = (Some((0, 1)), true);
        let first = host.permit(&range).await;
        let waiting = host.permit(&range);
        let mut waiting = std::pin::pin!(waiting);
        assert!(futures_poll_once(waiting.as_mut()).await.is_none());
        let (in_flight, waits) = (1, 1);
        assert_eq!(
            host.load(),
            HostLoad {
                in_flight,
                waiting: waits
            }
        );
        drop(first);
        let _second = waiting.await;
        assert_eq!(host.load(), HostLoad { in_flight, waiting: 0 });
    }

    /// Polls once: the output if it is ready.
    async fn futures_poll_once<F: Future>(mut future: std::pin::Pin<&mut F>) -> Option<F::Output> {
        std::future::poll_fn(|context| match future.as_mut().poll(context) {
            std::task::Poll::Ready(output) => std::task::Poll::Ready(Some(output)),
            std::task::Poll::Pending => std::task::Poll::Ready(None),
        })
        .await
    }

    #[test]
    fn only_relaxed_hosts_fall_back_to_plain_http() {
        let strict = host("r.example");
        strict.record_scheme(Scheme::Http, StatusCode::OK);
        assert_eq!(strict.schemes(), (Scheme::Https, None));
        let local = host("localhost:5000");
        assert_eq!(local.schemes(), (Scheme::Https, Some(Scheme::Http)));
        local.record_scheme(Scheme::Http, StatusCode::OK);
        assert_eq!(local.schemes(), (Scheme::Http, Some(Scheme::Https)));
        local.record_scheme(Scheme::Http, StatusCode::BAD_REQUEST);
        assert_eq!(local.schemes(), (Scheme::Https, Some(Scheme::Http)));
        local.record_scheme(Scheme::Https, StatusCode::OK);
        assert_eq!(
            local.schemes(),
            (Scheme::Https, None),
            "a host that speaks TLS gets no plain HTTP"
        );
    }
}
