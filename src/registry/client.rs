//! The operations on a registry.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use bytes::Bytes;
use reqwest::{Method, header::HeaderName};

use super::{
    BlobStream, Error, Options, Repository, Stats,
    auth::Auth,
    credentials::Credentials,
    endpoint_memory::ServedBy,
    endpoints::Endpoints,
    exchange::Exchange,
    failover::{CallLimits, Failover, MAX_CALL_TIME},
    hosts::max_prefetches,
    repository::ManifestSelector,
    request::RegistryRequest,
    stats::{CircuitStatus, HostLoad, HostStats},
    transport::Transport,
};
use crate::{digest::Digest, log_limit::LogLimit, registries_conf::watcher::RegistriesConfPaths};

/// Most bytes of a manifest: the size that the distribution specification asks registries to accept.
const MAX_MANIFEST: u64 = 4 << 20;
/// Slowest expected rate of a whole blob, as the binary logarithm of bytes per second: 256 KiB.
const MIN_BLOB_RATE_SHIFT: u32 = 18;

const CONTENT_DIGEST: HeaderName = HeaderName::from_static("docker-content-digest");

/// A manifest or an index as the registry has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Manifest {
    /// Unchanged, since the digest is of these bytes.
    pub bytes: Bytes,
    /// Computed from `bytes`.
    pub digest: Digest,
}

/// Interval in which corrupt bytes of registries are logged.
const CORRUPT_LOG_INTERVAL: Duration = Duration::from_secs(10);

/// Reads from OCI registries. Clones share connections, tokens and counters.
///
/// A call takes at most [`Options::request_timeout`], with all its retries, redirects, tokens and the wait for a permit
/// ([`Options::max_requests_per_host`]). [`Client::blob`] and [`Client::manifest_digest`] have time limits of their
/// own. Within a call, a request fails if no bytes arrive for [`Options::read_timeout`].
///
/// Mirrors are asked in the order of registries.conf, then the registry. If both are away, a call waits for them: they
/// are unreachable or silent, drop connections, or answer with status 502, 503 or 504. It waits as long as its patience
/// lasts ([`Client::with_patience`]), but not for a host that has been away for [`Options::request_timeout`] already.
/// Bodies cut short and other statuses 408, 429 and 5xx are retried [`Options::retries`] times, and so is an outage
/// without patience. The pauses are 100 ms, 200 ms and so on, give or take half, or what `Retry-After` says, but at
/// most [`Options::max_pause`]. Other failures are final. A host that is away gets no requests but single probes
/// ([`Options::circuit_failures`]).
#[derive(Clone)]
pub struct Client {
    options: Arc<Options>,
    patience: Duration,
    transport: Arc<Transport>,
    exchange: Arc<Exchange>,
    failover: Arc<Failover>,
    corrupt_log: Arc<LogLimit>,
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client")
            .field("stats", &self.stats())
            .finish_non_exhaustive()
    }
}

impl Client {
    /// Makes a client. Does not connect yet.
    ///
    /// # Errors
    /// [`Error::Setup`] if TLS cannot be set up.
    pub fn new(options: Options) -> Result<Self, Error> {
        let options = Arc::new(options);
        let default_paths = || RegistriesConfPaths::of_host(|name| std::env::var_os(name));
        let registries_conf = options.registries_conf.clone().unwrap_or_else(default_paths);
        let transport = Arc::new(Transport::new(options.clone())?);
        let auth = Auth::new(options.auth_files.clone(), registries_conf.clone());
        let exchange = Arc::new(Exchange::new(options.clone(), transport.clone(), auth));
        let endpoints = Endpoints::new(registries_conf);
        let failover = Arc::new(Failover::new(options.clone(), endpoints, exchange.clone()));
        Ok(Self {
            patience: options.request_timeout,
            options,
            transport,
            exchange,
            failover,
            corrupt_log: Arc::new(LogLimit::new(CORRUPT_LOG_INTERVAL)),
        })
    }

    /// This client, with calls that wait for hosts that are away for at most `patience`; with zero, not at all. The
    /// default is [`Options::request_timeout`].
    pub fn with_patience(&self, patience: Duration) -> Self {
        Self {
            patience,
            ..self.clone()
        }
    }

    /// Whether a call for a blob that failed with `error` may be repeated after [`Client::wait_for_host`].
    pub fn may_wait_after(&self, error: &Error) -> bool {
        !self.patience.is_zero() && error.is_outage(self.options.request_timeout)
    }

    /// Waits for a host that is away, after a call for a blob of `repository` without patience that failed with
    /// `error`. The first such call began at `since`, and `waits` were made before. For callers that hold nothing while
    /// they wait.
    ///
    /// # Errors
    /// `error`, if the patience is over, or the host is not away or has been for too long.
    pub async fn wait_for_host(
        &self,
        repository: &Repository,
        error: &Error,
        since: Instant,
        waits: u32,
    ) -> Result<(), Error> {
        let end = since + self.patience.min(MAX_CALL_TIME);
        self.failover.wait(repository, error, end, waits).await
    }

    /// The limits of a call that takes at most `time`.
    fn limits(&self, time: Duration) -> CallLimits {
        let patience = self.patience;
        CallLimits { time, patience }
    }

    /// The manifest or index that `selector`, a tag or a digest, names: at most 4 MiB.
    ///
    /// # Errors
    /// [`Error::NotFound`]; [`Error::DigestMismatch`] if the bytes do not match the digest; and the errors of any
    /// request.
    pub async fn manifest(&self, repository: &Repository, selector: &str) -> Result<Manifest, Error> {
        let selector = ManifestSelector::parse(selector)?;
        let request = RegistryRequest::manifest(Method::GET, repository, &selector)?;
        let (sent, selector) = (&request, &selector);
        self.failover
            .run(
                &request,
                self.limits(self.options.request_timeout),
                |mut response, _| async move {
                    let (bytes, digest) = response.read_hashed(MAX_MANIFEST).await?;
                    if let ManifestSelector::Digest(expected) = selector {
                        self.verify(sent, *expected, digest)?;
                    }
                    Ok(Manifest { bytes, digest })
                },
            )
            .await
    }

    /// The digest of the manifest that `tag` names, if possible without reading the manifest. The registry's statement,
    /// unverified, unlike that of [`Client::manifest`].
    ///
    /// Takes at most twice [`Options::request_timeout`]: some registries need a second request.
    ///
    /// # Errors
    /// As [`Client::manifest`].
    pub async fn manifest_digest(&self, repository: &Repository, tag: &str) -> Result<Digest, Error> {
        let selector = ManifestSelector::parse(tag)?;
        let request = RegistryRequest::manifest(Method::HEAD, repository, &selector)?;
        let digest = self.failover.run(
            &request,
            self.limits(self.options.request_timeout),
            |response, _| async move { Ok(response.header(CONTENT_DIGEST).and_then(|digest| digest.parse().ok())) },
        );
        match digest.await {
            Ok(Some(digest)) => Ok(digest),
            Ok(None) | Err(Error::Status { status: 405 | 501, .. }) => Ok(self.manifest(repository, tag).await?.digest),
            Err(error) => Err(error),
        }
    }

    /// A whole blob of at most `limit` bytes, verified.
    ///
    /// Takes at most [`Options::request_timeout`] plus one second for each 256 KiB of `limit`.
    ///
    /// # Errors
    /// [`Error::TooLarge`], [`Error::DigestMismatch`], [`Error::NotFound`], and the errors of any request.
    pub async fn blob(&self, repository: &Repository, digest: &Digest, limit: u64) -> Result<Bytes, Error> {
        let request = RegistryRequest::blob(repository, digest, None)?;
        let time_limit = self
            .options
            .request_timeout
            .saturating_add(Duration::from_secs(limit >> MIN_BLOB_RATE_SHIFT));
        let sent = &request;
        self.failover
            .run(&request, self.limits(time_limit), |mut response, _| async move {
                let (bytes, actual) = response.read_hashed(limit).await?;
                self.verify(sent, *digest, actual).map(|()| bytes)
            })
            .await
    }

    /// Exactly the `len` bytes of a blob from byte `offset` on, unverified.
    ///
    /// # Errors
    /// [`Error::WrongRange`] if the blob has no such bytes or the answer has others, [`Error::ShortBody`],
    /// [`Error::NotFound`], and the errors of any request.
    pub async fn blob_range(
        &self,
        repository: &Repository,
        digest: &Digest,
        offset: u64,
        len: usize,
    ) -> Result<Bytes, Error> {
        match len {
            0 => Ok(Bytes::new()),
            _ => Ok(self.blob_range_with_origin(repository, digest, offset, len).await?.0),
        }
    }

    /// As [`Client::blob_range`] for at least one byte. Also returns the endpoint that served the bytes, for
    /// [`Client::report_corrupt`].
    ///
    /// # Errors
    /// As [`Client::blob_range`].
    pub async fn blob_range_with_origin(
        &self,
        repository: &Repository,
        digest: &Digest,
        offset: u64,
        len: usize,
    ) -> Result<(Bytes, ServedBy), Error> {
        let mut request = RegistryRequest::blob(repository, digest, None)?;
        let Some(last) = (len as u64).checked_sub(1).and_then(|more| offset.checked_add(more)) else {
            return Err(Error::WrongRange {
                what: request.what,
                detail: format!("there are no {len} bytes from {offset} on"),
            });
        };
        request.range = Some((offset, last));
        self.failover
            .run(
                &request,
                self.limits(self.options.request_timeout),
                |mut response, attempt| async move {
                    let bytes = response.read_range(offset, len).await?;
                    Ok((bytes, ServedBy::new(&attempt.endpoint, digest)))
                },
            )
            .await
    }

    /// Opens the bytes of a blob from the first to the last of `range`, to be read as they arrive. The caller must not
    /// wait for another request meanwhile: the stream counts as a request in flight. `is_prefetch` marks bytes that no
    /// reader waits for yet ([`Client::max_prefetches`]). It does not wait for a host that is away either.
    ///
    /// # Errors
    /// As [`Client::blob_range`].
    pub async fn open_range(
        &self,
        repository: &Repository,
        digest: &Digest,
        range: (u64, u64),
        is_prefetch: bool,
    ) -> Result<BlobStream, Error> {
        let mut request = RegistryRequest::blob(repository, digest, Some(range))?;
        request.is_prefetch = is_prefetch;
        let mut limits = self.limits(self.options.request_timeout);
        if is_prefetch {
            limits.patience = Duration::ZERO;
        }
        self.failover
            .run(&request, limits, |response, attempt| async move {
                BlobStream::new(response, ServedBy::new(&attempt.endpoint, digest), range)
            })
            .await
    }

    /// Reports that bytes of a blob were corrupt. A mirror is not asked for the blob for ten minutes, so that a retry
    /// goes to another endpoint. The redirect that led to the bytes is forgotten.
    pub fn report_corrupt(&self, served_by: &ServedBy) {
        self.record_corrupt_answer();
        let ServedBy { blob, is_mirror } = served_by;
        self.exchange.forget_redirect(blob);
        let (repository, digest) = blob;
        if !is_mirror && let Some(suppressed) = self.corrupt_log.permit() {
            tracing::warn!(
                host = %repository.registry,
                %repository,
                blob = %digest.hex(),
                suppressed,
                "received corrupt bytes from registry"
            );
        }
        if *is_mirror && self.exchange.memory.record_corrupt(blob.clone()) {
            tracing::warn!(
                host = %repository.registry,
                %repository,
                blob = %digest.hex(),
                "received corrupt bytes from mirror; not asking it for this blob for 10 minutes"
            );
        }
    }

    /// Whether ranges of a blob can be had without all that precedes them, as far as is known. False for a minute after
    /// the registry ignored a range of the blob, unless a later answer honoured one. Mirrors that ignore ranges are
    /// skipped instead.
    pub fn supports_ranges(&self, repository: &Repository, digest: &Digest) -> bool {
        let blob = (repository.clone(), *digest);
        !self.exchange.memory.are_ranges_ignored(&blob)
    }

    /// Uses `credentials`, which Podman has for a pull, for `repository` and what is below it. They take precedence
    /// over configured ones until the registry refuses them, and are kept in memory only.
    ///
    /// # Errors
    /// [`Error::InvalidName`].
    pub fn push_credentials(&self, repository: &Repository, credentials: Credentials) -> Result<(), Error> {
        repository.validate()?;
        self.exchange.auth.push_credentials(repository, credentials);
        Ok(())
    }

    /// Credentials of [`Self::push_credentials`] that are in use, for the next process.
    pub fn pushed_credentials(&self) -> Vec<(Repository, Credentials)> {
        self.exchange.auth.pushed_credentials()
    }

    /// Name, circuit and requests of each host used so far; a name may occur more than once.
    pub(super) fn known_hosts(&self) -> Vec<(String, CircuitStatus, Option<HostLoad>)> {
        self.exchange.known_hosts()
    }

    /// Totals by host.
    pub(super) fn host_stats(&self) -> BTreeMap<String, HostStats> {
        self.transport.counters.hosts()
    }

    fn verify(&self, request: &RegistryRequest<'_>, expected: Digest, actual: Digest) -> Result<(), Error> {
        if expected == actual {
            return Ok(());
        }
        self.record_corrupt_answer();
        Err(Error::DigestMismatch {
            what: request.what.clone(),
            expected,
            actual,
        })
    }

    fn record_corrupt_answer(&self) {
        self.transport.counters.corrupt_answers.fetch_add(1, Ordering::Relaxed);
    }

    /// Requests sent and bytes received so far.
    pub fn stats(&self) -> Stats {
        self.transport.counters.stats()
    }

    /// Most prefetches in flight to one host. Further ones wait for a permit.
    pub fn max_prefetches(&self) -> usize {
        max_prefetches(self.options.max_requests_per_host)
    }
}
