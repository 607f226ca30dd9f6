//! A client that reads from OCI registries: manifests, whole blobs and ranges of blobs.
//!
//! It speaks the pull half of the
//! [OCI distribution specification](https://github.com/opencontainers/distribution-spec/blob/main/spec.md) with the
//! [token authentication](https://distribution.github.io/distribution/spec/auth/token/) registries use, and finds
//! credentials where Podman, Buildah and Docker keep them. It knows nothing of what the blobs hold.
//!
//! - `client`: the operations, their retries and their time bounds;
//! - `auth`: tokens, obtained once however many requests wait for them; `challenge`: the `WWW-Authenticate` header;
//! - `credentials`: auth files, credential helpers, and what Podman hands over;
//! - `hosts`: registries' addresses, the scheme that works, how many requests are under way;
//! - `transport`: connections, redirects, which host may be spoken to how; `response`: bodies and statuses; `stream`: blobs
//!   passed on as they come.

use std::{path::PathBuf, time::Duration};

mod auth;
mod challenge;
mod client;
mod credentials;
mod error;
mod hosts;
mod repository;
mod response;
mod stream;
#[cfg(test)]
mod tests;
mod transport;

pub use client::{Client, Manifest};
pub use credentials::{Credentials, hosts_in, usual_files};
pub use error::{Cause, Error};
pub use repository::Repository;
pub use stream::BlobStream;
pub use transport::{Stats, choose_cryptography};

/// How a [`Client`] behaves.
#[derive(Debug, Clone)]
pub struct Options {
    /// Longest time to connect to a host, TLS included. 5 s.
    pub connect_timeout: Duration,
    /// Longest silence while waiting for an answer's headers or the next bytes of its body. 15 s.
    pub read_timeout: Duration,
    /// Longest time one call may take, with all its retries, redirects and tokens. 60 s.
    pub request_timeout: Duration,
    /// How often a request is sent again after a failure that may pass. 2.
    pub retries: u32,
    /// Registries, as `host[:port]`, which may speak plain HTTP or have TLS certificates nobody can verify.
    pub insecure: Vec<String>,
    /// Auth files, the first one with an entry for a repository wins; `None` stands for the usual ones.
    pub auth_files: Option<Vec<PathBuf>>,
    /// Whether no request is sent at all, and everything fails with [`Error::Offline`]. No.
    pub offline: bool,
    /// Most requests for ranges of blobs under way to one registry at a time, and most of all others. 32.
    pub max_requests_per_host: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            connect_timeout: Duration::from_secs(5),
            read_timeout: Duration::from_secs(15),
            request_timeout: Duration::from_secs(60),
            retries: 2,
            insecure: Vec::new(),
            auth_files: None,
            offline: false,
            max_requests_per_host: 32,
        }
    }
}
