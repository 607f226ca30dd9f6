//! Registries: their addresses, the scheme that worked last, and how many requests each has under way.

use std::sync::{
    Arc,
    atomic::{AtomicU8, Ordering},
};

use reqwest::{StatusCode, Url};
use tokio::sync::Semaphore;

use super::{
    Error,
    repository::printable,
    transport::{Transport, Trust},
};

const UNKNOWN: u8 = 0;
const HTTPS: u8 = 1;
const HTTP: u8 = 2;

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
    pub(super) ranges: Arc<Semaphore>,
    /// All other requests that may be under way: looking for an image does not wait until others were read.
    pub(super) others: Arc<Semaphore>,
    /// The scheme that worked last.
    scheme: AtomicU8,
}

impl Host {
    /// The host that serves `registry`: itself, except for Docker Hub, whose API lives elsewhere than its name says.
    pub(super) fn new(registry: &str, transport: &Transport, max_requests: usize) -> Result<Self, Error> {
        let api = match registry {
            "docker.io" | "index.docker.io" => "registry-1.docker.io",
            other => other,
        };
        let invalid = |_| Error::InvalidName {
            what: format!("registry `{}`", printable(registry)),
        };
        let base = Url::parse(&format!("https://{api}/")).map_err(invalid)?;
        let permits = || Arc::new(Semaphore::new(max_requests.clamp(1, Semaphore::MAX_PERMITS)));
        Ok(Self {
            trust: transport.trust(&base),
            base,
            ranges: permits(),
            others: permits(),
            scheme: AtomicU8::new(UNKNOWN),
        })
    }

    /// The schemes to try, in order. Hosts that need proof of identity have one only.
    pub(super) fn schemes(&self) -> (Scheme, Option<Scheme>) {
        match (self.trust, self.scheme.load(Ordering::Relaxed)) {
            (Trust::Strict, _) => (Scheme::Https, None),
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
    use crate::registry::Options;

    fn host(registry: &str) -> Host {
        Host::new(registry, &Transport::new(Arc::new(Options::default())).unwrap(), 1).unwrap()
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
    }
}
