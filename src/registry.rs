//! A client that reads from OCI registries: manifests, whole blobs and ranges of blobs.
//!
//! It speaks the pull half of the
//! [OCI distribution specification](https://github.com/opencontainers/distribution-spec/blob/main/spec.md) with the
//! [token authentication](https://distribution.github.io/distribution/spec/auth/token/) registries use, and finds
//! credentials where Podman, Buildah and Docker keep them. It knows nothing of what the blobs hold.
//!
//! - `client`: the operations; `attempts`: which endpoint is asked, when another, and when again, within bounds of time;
//!   `exchange`: one request to one of them, with proof of who we are;
//! - `endpoints`: mirrors and registries, as registries.conf has them;
//! - `auth`: tokens, obtained once however many requests wait for them; `challenge`: the `WWW-Authenticate` header;
//! - `credentials`: auth files, credential helpers, and what Podman hands over;
//! - `hosts`: registries' addresses, the scheme that works, how many requests are under way; `circuit`: hosts that do not
//!   answer are left alone; `settings`: what the configuration says of single ones; `health`: whether they are well;
//! - `elsewhere`: where registries lead to;
//! - `transport`: requests, redirects, which host may be spoken to how; `clients`: connections; `tls`: certificates for single
//!   hosts; `response`: bodies and statuses; `stream`: blobs passed on as they come;
//!   `timing`: what a call's time goes to, for who measures it.

use std::{path::PathBuf, time::Duration};

use crate::registries_conf::watcher::Files;

mod auth;
mod challenge;
mod circuit;
mod client;
mod clients;
mod credentials;
mod endpoints;
mod error;
mod exchange;
mod failover;
mod health;
mod hosts;
mod jitter;
mod redirect_hosts;
mod repository;
mod response;
mod settings;
mod stream;
#[cfg(test)]
mod tests;
mod timing;
mod tls;
mod transport;

pub use client::{Client, Manifest};
pub use credentials::Credentials;
pub use error::{Cause, Error};
pub use failover::ServedBy;
pub use repository::Repository;
pub use settings::{HostSettings, Proxy};
pub use stream::BlobStream;
pub use timing::{Timing, observed};
pub use transport::{Stats, choose_cryptography};

/// How a [`Client`] behaves.
#[derive(Debug, Clone)]
pub struct Options {
    /// Longest time to connect to a host, TLS included. 5 s.
    pub connect_timeout: Duration,
    /// Longest wait for an answer's headers once there is a connection; `None` stands for `read_timeout`.
    pub answer_timeout: Option<Duration>,
    /// Longest silence while waiting for the next bytes of an answer's body. 15 s.
    pub read_timeout: Duration,
    /// Longest time one call may take, with all its retries, redirects and tokens. 60 s.
    pub request_timeout: Duration,
    /// How often a request is sent again after a failure that may pass. 2.
    pub retries: u32,
    /// Longest pause before that, whatever the server asks for. 5 s.
    pub max_pause: Duration,
    /// How often in a row a host may not answer before it is left alone; once, where another can be asked. 5.
    pub circuit_failures: u32,
    /// For how long it is left alone the first time. 1 s.
    pub circuit_pause: Duration,
    /// The longest time it is left alone. 30 s.
    pub circuit_max_pause: Duration,
    /// Registries, as `host[:port]`, which may speak plain HTTP or have TLS certificates nobody can verify.
    pub insecure: Vec<String>,
    /// Where registries.conf and its drop-ins are; `None` stands for the usual places.
    pub registries_conf: Option<Files>,
    /// Where certificates of hosts are, in directories of their names; `None` stands for the usual places.
    pub certs_dirs: Option<Vec<PathBuf>>,
    /// The proxy for hosts that are not on loopback, instead of the environment's.
    pub proxy: Option<Proxy>,
    /// Hosts, domains and networks without a proxy; `None` stands for `NO_PROXY`. The environment's proxy has its own.
    pub no_proxy: Option<Vec<String>>,
    /// What is different for single hosts.
    pub hosts: Vec<HostSettings>,
    /// Auth files, the first one with an entry for a repository wins; `None` stands for the usual ones.
    pub auth_files: Option<Vec<PathBuf>>,
    /// Whether no request is sent at all, and everything fails with [`Error::Offline`]. No.
    pub offline: bool,
    /// Most requests for ranges of blobs under way to one registry at a time, and most of all others. No more than half of the
    /// former, but one at least, are for what nobody waits for yet ([`Client::open_range`]). 32.
    pub max_requests_per_host: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            connect_timeout: Duration::from_secs(5),
            answer_timeout: None,
            read_timeout: Duration::from_secs(15),
            request_timeout: Duration::from_secs(60),
            retries: 2,
            max_pause: Duration::from_secs(5),
            circuit_failures: 5,
            circuit_pause: Duration::from_secs(1),
            circuit_max_pause: Duration::from_secs(30),
            insecure: Vec::new(),
            registries_conf: None,
            certs_dirs: None,
            proxy: None,
            no_proxy: None,
            hosts: Vec::new(),
            auth_files: None,
            offline: false,
            max_requests_per_host: 32,
        }
    }
}
