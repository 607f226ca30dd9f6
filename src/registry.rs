//! Client for the pull half of OCI registries: manifests, whole blobs and ranges of blobs.
//!
//! It speaks the
//! [OCI distribution specification](https://github.com/opencontainers/distribution-spec/blob/main/spec.md) with
//! [token authentication](https://distribution.github.io/distribution/spec/auth/token/), and finds credentials where
//! Podman, Buildah and Docker keep them. It does not interpret blobs. [`Client`] is the entry point.
//!
//! Modules, each of which uses only those above it:
//!
//! - `error`, `repository`, `host_name`: errors, repository names, host names and trust;
//! - `jitter`, `timing`, `stats`: random pauses, measurements, counters and states;
//! - `pace`: notices slow hosts;
//! - `request`, `request_context`, `response`: requests, their error messages, bodies within limits of time and size;
//! - `settings`, `options`: settings of single hosts, and of the client;
//! - `host_certs`, `http_clients`, `health`: certificates of hosts, connections, health checks;
//! - `transport`: sends one HTTP request; `circuit`: the circuit breaker of one host;
//! - `redirect_hosts`: follows redirects, with a circuit for each storage and token server;
//! - `challenge`, `credentials`, `auth`: the `WWW-Authenticate` header, where credentials are, tokens;
//! - `hosts`: registries, with their scheme, circuit and limit of requests in flight;
//! - `endpoints`, `endpoint_memory`: mirrors and registry from registries.conf, what is remembered of each;
//! - `exchange`: one authenticated request to one endpoint; `failover`: which endpoint, when another, when again;
//! - `blob_stream`: bodies read as they arrive; `client`: the operations; `host_status`: what is known of each host.

mod auth;
mod blob_stream;
mod challenge;
mod circuit;
mod client;
mod credentials;
mod endpoint_memory;
mod endpoints;
mod error;
mod exchange;
mod failover;
mod health;
mod host_certs;
mod host_name;
mod host_status;
mod hosts;
mod http_clients;
mod jitter;
mod options;
mod pace;
mod redirect_hosts;
mod repository;
mod request;
mod request_context;
mod response;
mod settings;
mod stats;
#[cfg(test)]
mod tests;
mod timing;
mod transport;

pub use blob_stream::BlobStream;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) use challenge::fuzz as fuzz_challenge;
pub use client::{Client, Manifest};
pub use credentials::Credentials;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) use credentials::fuzz_auth_file;
pub use endpoint_memory::ServedBy;
pub use error::Error;
pub use host_status::HostStatus;
pub use http_clients::install_crypto_provider;
pub use options::Options;
pub use repository::Repository;
pub use settings::{HostSettings, Proxy};
pub use stats::{Answers, CircuitStatus, Stats};
pub use timing::{Timing, measure};
