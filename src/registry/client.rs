//! The operations on a registry, their retries and their bounds in time.

use std::{
    collections::HashMap,
    fmt,
    hash::{BuildHasher, RandomState},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use parking_lot::Mutex;
use reqwest::{
    Method,
    header::{self, HeaderName, HeaderValue},
};
use serde::Deserialize;
use tracing::debug;

use super::{
    Error, Options, Repository, Stats,
    auth::Auth,
    credentials::Credentials,
    hosts::{Host, Scheme},
    repository::Selector,
    response::Response,
    transport::{Request, Transport},
};
use crate::digest::Digest;

/// Most bytes of a manifest: what the distribution specification asks registries to take.
const MAX_MANIFEST: u64 = 4 << 20;
/// The first pause before a request is sent again; each further one is twice as long.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
/// The longest such pause, whatever the server asks for.
const MAX_PAUSE: Duration = Duration::from_secs(5);
/// Bytes per second that a whole blob is expected to come at, as a power of two: 256 KiB.
const SLOWEST_BLOB: u32 = 18;

const MANIFEST_TYPES: &str = "application/vnd.oci.image.index.v1+json, application/vnd.oci.image.manifest.v1+json, \
    application/vnd.docker.distribution.manifest.list.v2+json, application/vnd.docker.distribution.manifest.v2+json";
const CONTENT_DIGEST: HeaderName = HeaderName::from_static("docker-content-digest");

/// A manifest or an index as the registry has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Manifest {
    /// Byte for byte, since its digest is of these.
    pub bytes: Bytes,
    /// Computed from `bytes`.
    pub digest: Digest,
    /// As the registry says, without parameters.
    pub media_type: String,
}

/// Reads from OCI registries. Clones share connections, tokens and counters.
///
/// No call takes longer than [`Options::request_timeout`], with all its retries, redirects, tokens and the wait for its
/// turn ([`Options::max_requests_per_host`]), with two exceptions: [`Client::blob`] and [`Client::manifest_digest`] say
/// theirs. Within that, no silence lasts longer than [`Options::read_timeout`] before the request counts as failed.
///
/// Failed connections, broken or silent ones, bodies cut short and the statuses 408, 429 and 5xx are tried again
/// [`Options::retries`] times, after 100 ms, 200 ms and so on, give or take half, or after what the server's
/// `Retry-After` says, but 5 s at most. Nothing else is tried again.
#[derive(Clone)]
pub struct Client {
    inner: Arc<Inner>,
}

struct Inner {
    options: Arc<Options>,
    transport: Transport,
    auth: Auth,
    hosts: Mutex<HashMap<String, Arc<Host>>>,
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client")
            .field("stats", &self.stats())
            .finish_non_exhaustive()
    }
}

/// One thing asked of one repository.
pub(super) struct Ask<'a> {
    repository: &'a Repository,
    pub(super) method: Method,
    path: String,
    accept: Option<&'static str>,
    range: Option<(u64, u64)>,
    /// For messages.
    what: String,
}

impl<'a> Ask<'a> {
    fn manifest(method: Method, repository: &'a Repository, selector: &Selector<'_>) -> Result<Self, Error> {
        repository.validate()?;
        let separator = if matches!(selector, Selector::Tag(_)) { ':' } else { '@' };
        Ok(Self {
            repository,
            method,
            path: format!("/v2/{}/manifests/{selector}", repository.name),
            accept: Some(MANIFEST_TYPES),
            range: None,
            what: format!("manifest {repository}{separator}{selector}"),
        })
    }

    pub(super) fn blob(repository: &'a Repository, digest: &Digest, range: Option<(u64, u64)>) -> Result<Self, Error> {
        repository.validate()?;
        Ok(Self {
            repository,
            method: Method::GET,
            path: format!("/v2/{}/blobs/{digest}", repository.name),
            accept: None,
            range,
            what: format!("blob {repository}@{digest}"),
        })
    }
}

impl Client {
    /// Makes a client. It connects to nothing yet.
    ///
    /// # Errors
    /// [`Error::Setup`] if TLS cannot be set up.
    pub fn new(options: Options) -> Result<Self, Error> {
        let options = Arc::new(options);
        let transport = Transport::new(options.clone())?;
        let auth = Auth::new(options.auth_files.clone());
        Ok(Self {
            inner: Arc::new(Inner {
                options,
                transport,
                auth,
                hosts: Mutex::default(),
            }),
        })
    }

    /// The manifest or index that `selector`, a tag or a digest, names: 4 MiB at most.
    ///
    /// # Errors
    /// [`Error::NotFound`]; [`Error::DigestMismatch`] if a digest names other bytes; and whatever can go wrong with a
    /// registry.
    pub async fn manifest(&self, repository: &Repository, selector: &str) -> Result<Manifest, Error> {
        let selector = Selector::parse(selector)?;
        let ask = Ask::manifest(Method::GET, repository, &selector)?;
        self.bounded(&ask, self.inner.options.request_timeout, || async {
            let mut response = self.exchange(&ask).await?;
            let (bytes, actual) = response.read_hashed(MAX_MANIFEST).await?;
            if let Selector::Digest(expected) = selector {
                verify(&ask, expected, actual)?;
            }
            let media_type = media_type(&response, &bytes)?;
            Ok(Manifest {
                bytes,
                digest: actual,
                media_type,
            })
        })
        .await
    }

    /// The digest of the manifest that `tag` names at present, if possible without reading the manifest. It is the
    /// registry's word: [`Client::manifest`] proves it.
    ///
    /// Takes twice [`Options::request_timeout`] at most: some registries have to be asked in two ways.
    ///
    /// # Errors
    /// As [`Client::manifest`].
    pub async fn manifest_digest(&self, repository: &Repository, tag: &str) -> Result<Digest, Error> {
        let ask = Ask::manifest(Method::HEAD, repository, &Selector::parse(tag)?)?;
        let asked = self.bounded(&ask, self.inner.options.request_timeout, || async {
            let response = self.exchange(&ask).await?;
            Ok(response.header(CONTENT_DIGEST).and_then(|digest| digest.parse().ok()))
        });
        match asked.await {
            Ok(Some(digest)) => Ok(digest),
            Ok(None) | Err(Error::Status { status: 405 | 501, .. }) => Ok(self.manifest(repository, tag).await?.digest),
            Err(error) => Err(error),
        }
    }

    /// A whole blob of at most `limit` bytes, verified.
    ///
    /// Takes [`Options::request_timeout`] and one second for each 256 KiB of `limit` at most.
    ///
    /// # Errors
    /// [`Error::TooLarge`], [`Error::DigestMismatch`], [`Error::NotFound`], and whatever can go wrong with a registry.
    pub async fn blob(&self, repository: &Repository, digest: &Digest, limit: u64) -> Result<Bytes, Error> {
        let ask = Ask::blob(repository, digest, None)?;
        let budget = self
            .inner
            .options
            .request_timeout
            .saturating_add(Duration::from_secs(limit >> SLOWEST_BLOB));
        self.bounded(&ask, budget, || async {
            let (bytes, actual) = self.exchange(&ask).await?.read_hashed(limit).await?;
            verify(&ask, *digest, actual).map(|()| bytes)
        })
        .await
    }

    /// Exactly the `len` bytes of a blob from byte `offset` on. They are not verified: only who knows what they are can
    /// do that.
    ///
    /// # Errors
    /// [`Error::WrongRange`] if the blob has no such bytes or others came, [`Error::ShortBody`], [`Error::NotFound`],
    /// and whatever can go wrong with a registry.
    pub async fn blob_range(
        &self,
        repository: &Repository,
        digest: &Digest,
        offset: u64,
        len: usize,
    ) -> Result<Bytes, Error> {
        if len == 0 {
            return Ok(Bytes::new());
        }
        let mut ask = Ask::blob(repository, digest, None)?;
        let Some(last) = offset.checked_add(len as u64 - 1) else {
            return Err(Error::WrongRange {
                what: ask.what,
                detail: format!("{len} bytes from {offset} are too many"),
            });
        };
        ask.range = Some((offset, last));
        self.bounded(&ask, self.inner.options.request_timeout, || async {
            self.exchange(&ask).await?.read_range(offset, len).await
        })
        .await
    }

    /// Uses `credentials`, which Podman was given for a pull, for `repository` and what is below it. They count before what
    /// is found elsewhere, until the registry refuses them; they are in memory only.
    ///
    /// # Errors
    /// [`Error::InvalidName`].
    pub fn hand_over(&self, repository: &Repository, credentials: Credentials) -> Result<(), Error> {
        repository.validate()?;
        self.inner.auth.hand_over(repository, credentials);
        Ok(())
    }

    /// What was asked of registries and came from them so far.
    pub fn stats(&self) -> Stats {
        self.inner.transport.counters.stats()
    }

    /// The bound for most calls.
    pub(super) fn request_timeout(&self) -> Duration {
        self.inner.options.request_timeout
    }

    /// Makes `attempt` until it succeeds, fails for good, has failed too often or `budget` is used up.
    pub(super) async fn bounded<T, F>(
        &self,
        ask: &Ask<'_>,
        budget: Duration,
        attempt: impl Fn() -> F,
    ) -> Result<T, Error>
    where
        F: Future<Output = Result<T, Error>>,
    {
        let retries = self.inner.options.retries;
        let attempts = async {
            let mut failures = 0;
            loop {
                let error = match attempt().await {
                    Err(error) if failures < retries && error.is_transient() => error,
                    done => return done,
                };
                let pause = pause(failures, &error);
                debug!(%error, ?pause, "registry request will be sent again");
                tokio::time::sleep(pause).await;
                failures += 1;
            }
        };
        match tokio::time::timeout(budget, attempts).await {
            Ok(result) => result,
            Err(_) => {
                let host = ask.repository.registry.clone();
                Err(Error::Timeout {
                    host,
                    what: ask.what.clone(),
                    after: budget,
                })
            }
        }
    }

    /// Asks once, with a new proof of who we are if the old one is refused. Gives a success whose body is to be read.
    pub(super) async fn exchange(&self, ask: &Ask<'_>) -> Result<Response, Error> {
        if self.inner.options.offline {
            let what = ask.what.clone();
            return Err(Error::Offline { what });
        }
        let host = self.host(ask.repository)?;
        // The semaphore is never closed, so there is always a permit.
        let permits = if ask.range.is_some() {
            &host.ranges
        } else {
            &host.others
        };
        let permit = Arc::clone(permits).acquire_owned().await.ok();
        let Inner { transport, auth, .. } = &*self.inner;
        let mut proving = auth.proving(transport, ask.repository, host.trust);
        let mut response = self.reach(&host, ask, proving.at_hand().await?).await?;
        while let Some(proof) = proving.another(&mut response).await? {
            response = self.reach(&host, ask, Some(proof)).await?;
        }
        response.hold(permit);
        response.check().await
    }

    /// Sends the request over the scheme that works, and follows redirects.
    async fn reach(&self, host: &Host, ask: &Ask<'_>, proof: Option<HeaderValue>) -> Result<Response, Error> {
        let transport = &self.inner.transport;
        let (first, second) = host.schemes();
        let sent = match (self.send_over(first, host, ask, proof.clone()).await, second) {
            (Err(error @ Error::Unreachable { .. }), Some(second)) => {
                match self.send_over(second, host, ask, proof).await {
                    // The first scheme is the likelier one, so its error tells more.
                    Err(Error::Unreachable { .. }) => Err(error),
                    sent => sent,
                }
            }
            (sent, _) => sent,
        };
        let (request, response) = sent?;
        transport.follow(request, response).await
    }

    /// Sends the request over one scheme and remembers if that works.
    async fn send_over<'a>(
        &self,
        scheme: Scheme,
        host: &Host,
        ask: &'a Ask<'_>,
        proof: Option<HeaderValue>,
    ) -> Result<(Request<'a>, Response), Error> {
        let mut request = Request::new(ask.method.clone(), host.url(scheme, &ask.path)?, &ask.what);
        request.accept = ask.accept;
        request.range = ask.range;
        request.authorization = proof;
        let response = self.inner.transport.send(&request, host.trust).await?;
        host.answered(scheme, response.status());
        Ok((request, response))
    }

    fn host(&self, repository: &Repository) -> Result<Arc<Host>, Error> {
        let mut hosts = self.inner.hosts.lock();
        if let Some(host) = hosts.get(&repository.registry) {
            return Ok(host.clone());
        }
        let max_requests = self.inner.options.max_requests_per_host;
        let host = Arc::new(Host::new(&repository.registry, &self.inner.transport, max_requests)?);
        hosts.insert(repository.registry.clone(), host.clone());
        Ok(host)
    }
}

fn verify(ask: &Ask<'_>, expected: Digest, actual: Digest) -> Result<(), Error> {
    if expected == actual {
        Ok(())
    } else {
        Err(Error::DigestMismatch {
            what: ask.what.clone(),
            expected,
            actual,
        })
    }
}

/// The media type the registry says, or else the one the manifest itself says.
fn media_type(response: &Response, bytes: &[u8]) -> Result<String, Error> {
    #[derive(Deserialize)]
    struct Body {
        #[serde(rename = "mediaType")]
        media_type: String,
    }
    let said = response
        .header(header::CONTENT_TYPE)
        .and_then(|value| value.split(';').next())
        .map(str::trim);
    match said.filter(|said| !said.is_empty()) {
        Some(said) => Ok(said.to_owned()),
        None => match serde_json::from_slice::<Body>(bytes) {
            Ok(body) => Ok(body.media_type),
            Err(_) => Err(response.invalid("it has no media type")),
        },
    }
}

/// How long to wait after the failure `error`, with `failures` ones before.
fn pause(failures: u32, error: &Error) -> Duration {
    if let Error::Status {
        retry_after: Some(asked),
        ..
    } = error
    {
        return (*asked).min(MAX_PAUSE);
    }
    // Half to one and a half, so that those who failed together do not come back together. The standard library's
    // hash seeds are random enough for that.
    let jitter = 0.5 + (RandomState::new().hash_one(0) % 1024) as f64 / 1024.0;
    FIRST_PAUSE
        .saturating_mul(1 << failures.min(10))
        .mul_f64(jitter)
        .min(MAX_PAUSE)
}
