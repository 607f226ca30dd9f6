//! Options of a client.

use std::{path::PathBuf, time::Duration};

use super::settings::{HostSettings, Proxy};
use crate::registries_conf::watcher::RegistriesConfPaths;

/// How a [`Client`](super::Client) behaves.
#[derive(Debug, Clone)]
pub struct Options {
    /// Longest time to connect to a host, TLS included. Default: 5 s.
    pub connect_timeout: Duration,
    /// Longest wait for an answer's headers once connected; `None` stands for `read_timeout`.
    pub answer_timeout: Option<Duration>,
    /// Longest wait for the next bytes of an answer's body. Default: 15 s.
    pub read_timeout: Duration,
    /// Longest time of one call, with all its retries, redirects and tokens. Default: 60 s.
    pub request_timeout: Duration,
    /// Retries after a failure that may pass. Default: 2.
    pub retries: u32,
    /// Longest pause before a retry, whatever the server asks for. Default: 5 s.
    pub max_pause: Duration,
    /// Failures in a row that open a host's circuit. Where another endpoint can be asked, one is enough. Default: 5.
    pub circuit_failures: u32,
    /// How long a circuit stays open the first time. Default: 1 s.
    pub circuit_pause: Duration,
    /// How long a circuit stays open at most. Default: 30 s.
    pub circuit_max_pause: Duration,
    /// Registries, as `host[:port]`, that may speak plain HTTP or have TLS certificates that fail verification.
    pub insecure: Vec<String>,
    /// Where registries.conf and its drop-ins are; `None` stands for the paths of containers/image.
    pub registries_conf: Option<RegistriesConfPaths>,
    /// Directories with one subdirectory of certificates per host; `None` stands for those of Podman and Docker.
    pub certs_dirs: Option<Vec<PathBuf>>,
    /// The proxy for hosts that are not on loopback, instead of the environment's.
    pub proxy: Option<Proxy>,
    /// Hosts, domains and networks reached without `proxy`; `None` stands for `NO_PROXY`. The environment's proxy
    /// always uses `NO_PROXY`.
    pub no_proxy: Option<Vec<String>>,
    /// Settings of single hosts.
    pub hosts: Vec<HostSettings>,
    /// Auth files. The first one with an entry for a repository wins. `None` stands for those of containers/image.
    pub auth_files: Option<Vec<PathBuf>>,
    /// Sends no requests: each call fails with [`Error::Offline`](super::Error::Offline). Default: false.
    pub offline: bool,
    /// Most requests in flight to one registry for ranges of blobs, and most of all other requests. Of the former, at
    /// most half, but at least one, are prefetches ([`Client::open_range`](super::Client::open_range)). Default: 32.
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
