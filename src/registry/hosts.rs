//! Registries: their addresses, the scheme that worked last, and how many requests each has under way.

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
    circuit::{Circuit, Rules},
    client::Ask,
    repository::printable,
    transport::{Transport, Trust},
};

const UNKNOWN: u8 = 0;
const HTTPS: u8 = 1;
const HTTP: u8 = 2;

/// Most registries of which something is known, unless more have requests under way.
pub(super) const MOST_HOSTS: usize = 1024;

/// How to talk to a registry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Scheme {
    Https,
    Http,
}

/// One registry.
pub(super) struct Host {
    /// `https://host[:port]/`.
    base: Url,
    pub(super) trust: Trust,
    /// Requests for ranges of blobs that may be under way.
    ranges: Arc<Semaphore>,
    /// Those of them that may be for what nobody waits for: half, so that there is always a place for who waits, or one
    /// that is free as soon as one answer has come.
    ahead: Arc<Semaphore>,
    /// All other requests that may be under way: looking for an image does not wait until others were read.
    others: Arc<Semaphore>,
    /// Whether it answers at all.
    pub(super) circuit: Arc<Circuit>,
    /// The scheme that worked last.
    scheme: AtomicU8,
}

/// The registries that were asked.
pub(super) struct Hosts {
    most: usize,
    /// And when each was used last.
    known: Mutex<HashMap<HostKey, (Arc<Host>, Instant)>>,
}

/// The name of a registry, and whether registries.conf has it as insecure.
type HostKey = (String, bool);

/// A place among a host's requests under way, as long as it is held.
pub(super) struct Permit {
    _of_all: Option<OwnedSemaphorePermit>,
    _ahead: Option<OwnedSemaphorePermit>,
}

/// Of `most` requests under way to a host, those that may be for what nobody waits for yet.
pub(super) fn most_ahead(most: usize) -> usize {
    (most / 2).max(1)
}

/// The host that serves `registry`: itself, except for Docker Hub, whose API lives elsewhere than its name says.
pub(super) fn api_name(registry: &str) -> &str {
    match registry {
        "docker.io" | "index.docker.io" => "registry-1.docker.io",
        other => other,
    }
}

impl Hosts {
    /// Keeps `most` of them; beyond, the one that was not used for the longest time is evicted.
    pub(super) fn new(most: usize) -> Self {
        let known = Mutex::default();
        Self { most, known }
    }

    /// The host of that name, which `make` makes if it is not known.
    pub(super) fn get(
        &self,
        registry: &str,
        insecure: bool,
        make: impl FnOnce() -> Result<Host, Error>,
    ) -> Result<Arc<Host>, Error> {
        let key = (registry.to_owned(), insecure);
        let mut known = self.known.lock();
        if let Some((host, used)) = known.get_mut(&key) {
            *used = Instant::now();
            return Ok(Arc::clone(host));
        }
        let host = Arc::new(make()?);
        if known.len() >= self.most {
            let idle = known.iter().filter(|(_, (host, _))| Host::is_idle(host));
            let evicted = idle.min_by_key(|(_, (_, used))| *used).map(|(key, _)| key.clone());
            evicted.map(|key| known.remove(&key));
        }
        known.insert(key, (Arc::clone(&host), Instant::now()));
        Ok(host)
    }
}

impl Host {
    /// The host that serves `registry`; `insecure` as registries.conf has it.
    pub(super) fn new(registry: &str, insecure: bool, transport: &Transport, options: &Options) -> Result<Self, Error> {
        let invalid = |_| Error::InvalidName {
            what: format!("registry `{}`", printable(registry)),
        };
        let base = Url::parse(&format!("https://{}/", api_name(registry))).map_err(invalid)?;
        let trust = match transport.trust(&base) {
            Trust::Strict if insecure => Trust::Insecure,
            own => own,
        };
        let most = options.max_requests_per_host.clamp(1, Semaphore::MAX_PERMITS);
        let permits = |count| Arc::new(Semaphore::new(count));
        Ok(Self {
            base,
            trust,
            ranges: permits(most),
            ahead: permits(most_ahead(most)),
            others: permits(most),
            circuit: Arc::new(Circuit::new(registry.to_owned(), Rules::of(options))),
            scheme: AtomicU8::new(UNKNOWN),
        })
    }

    /// Whether no request to it is under way or waits for its turn: each holds the host or a part of it.
    fn is_idle(self: &Arc<Self>) -> bool {
        let permits = [&self.ranges, &self.ahead, &self.others];
        Arc::strong_count(self) == 1
            && Arc::strong_count(&self.circuit) == 1
            && permits.iter().all(|permits| Arc::strong_count(permits) == 1)
    }

    /// Waits until there is a place for that request. `None` in it is never the case: no semaphore is closed.
    pub(super) async fn permit(&self, ask: &Ask<'_>) -> Permit {
        let one = |permits: &Arc<Semaphore>| Arc::clone(permits).acquire_owned();
        let _ahead = match ask.is_ahead {
            true => one(&self.ahead).await.ok(),
            false => None,
        };
        let of_all = if ask.range.is_some() {
            &self.ranges
        } else {
            &self.others
        };
        let _of_all = one(of_all).await.ok();
        Permit { _of_all, _ahead }
    }

    /// The schemes to try, in order. Hosts that need proof of identity have one only, and so have those that are known to
    /// speak TLS: who makes that fail must not be shown in the clear what was meant for them.
    pub(super) fn schemes(&self) -> (Scheme, Option<Scheme>) {
        match (self.trust, self.scheme.load(Ordering::Relaxed)) {
            (Trust::Strict, _) => (Scheme::Https, None),
            (_, HTTPS) => (Scheme::Https, None),
            (_, HTTP) => (Scheme::Http, Some(Scheme::Https)),
            _ => (Scheme::Https, Some(Scheme::Http)),
        }
    }

    /// Remembers that `scheme` got an answer.
    pub(super) fn answered(&self, scheme: Scheme, status: StatusCode) {
        let known = match scheme {
            Scheme::Https => HTTPS,
            // TLS servers answer plain HTTP so: the next request had better try TLS first again.
            Scheme::Http if status == StatusCode::BAD_REQUEST => UNKNOWN,
            Scheme::Http => HTTP,
        };
        self.scheme.store(known, Ordering::Relaxed);
    }

    /// The address of `path`, which starts with `/v2/` and needs no escapes.
    pub(super) fn url(&self, scheme: Scheme, path: &str) -> Result<Url, Error> {
        let name = self.base.as_str().trim_start_matches("https").trim_end_matches('/');
        let scheme = match scheme {
            Scheme::Https => "https",
            Scheme::Http => "http",
        };
        let url = format!("{scheme}{name}{path}");
        Url::parse(&url).map_err(|_| Error::InvalidName {
            what: format!("address `{}`", printable(&url)),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(registry: &str) -> Host {
        let options = Arc::new(Options::default());
        Host::new(registry, false, &Transport::new(options.clone()).unwrap(), &options).unwrap()
    }

    #[test]
    fn addresses() {
        let hub = host("docker.io").url(Scheme::Https, "/v2/a/b").unwrap();
        assert_eq!(hub.as_str(), "https://registry-1.docker.io/v2/a/b");
        assert_eq!(
            host("[::1]:5000").url(Scheme::Http, "/v2/a").unwrap().as_str(),
            "http://[::1]:5000/v2/a"
        );
    }

    #[tokio::test]
    async fn idle_host_that_was_not_used_longest_is_evicted() {
        let hosts = Hosts::new(3);
        let get = |name: &str| hosts.get(name, false, || Ok(host(name))).unwrap();
        let known = || {
            let mut names: Vec<_> = hosts.known.lock().keys().map(|(name, _)| name.clone()).collect();
            names.sort();
            names.join(" ")
        };
        let repository = crate::registry::Repository::new("held", "a");
        let (held, permit) = (get("a"), get("b").permit(&Ask::ping(&repository)).await);
        get("c");
        get("d");
        assert_eq!(known(), "a b d", "requests under way keep their hosts");
        drop((held, permit));
        get("a");
        get("e");
        assert_eq!(known(), "a d e");
        let watched = (get("a").circuit.clone(), get("d"), get("e"));
        get("f");
        assert_eq!(known(), "a d e f", "all are in use");
        drop(watched);
        assert!(
            hosts
                .get("g", false, || Err(Error::NotFound { what: String::new() }))
                .is_err()
        );
        assert_eq!(known(), "a d e f");
    }

    #[test]
    fn only_relaxed_hosts_fall_back() {
        let strict = host("r.example");
        strict.answered(Scheme::Http, StatusCode::OK);
        assert_eq!(strict.schemes(), (Scheme::Https, None));
        let local = host("localhost:5000");
        assert_eq!(local.schemes(), (Scheme::Https, Some(Scheme::Http)));
        local.answered(Scheme::Http, StatusCode::OK);
        assert_eq!(local.schemes(), (Scheme::Http, Some(Scheme::Https)));
        local.answered(Scheme::Http, StatusCode::BAD_REQUEST);
        assert_eq!(local.schemes(), (Scheme::Https, Some(Scheme::Http)));
        local.answered(Scheme::Https, StatusCode::OK);
        assert_eq!(
            local.schemes(),
            (Scheme::Https, None),
            "what speaks TLS is not asked in the clear"
        );
    }
}
