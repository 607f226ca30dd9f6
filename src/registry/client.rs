//! The operations on a registry.

use std::{fmt, sync::Arc, time::Duration};

use bytes::Bytes;
use reqwest::{
    Method, Url,
    header::{self, HeaderName},
};
use serde::Deserialize;

use super::{
    Error, Options, Repository, Stats,
    auth::Auth,
    credentials::Credentials,
    endpoints::{Endpoint, Endpoints},
    failover::{Mirrors, ServedBy},
    hosts::{Hosts, MOST_HOSTS, most_ahead},
    repository::Selector,
    response::Response,
    transport::Transport,
};
use crate::{digest::Digest, registries_conf::watcher::Files, ttl_cache::TtlCache};

/// Most bytes of a manifest: what the distribution specification asks registries to take.
const MAX_MANIFEST: u64 = 4 << 20;
/// Bytes per second that a whole blob is expected to come at, as a power of two: 256 KiB.
const SLOWEST_BLOB: u32 = 18;
/// Most redirects that are remembered, and for how long at most: what they are signed with runs out long before.
const REDIRECTS: (usize, Duration) = (4096, Duration::from_secs(24 * 3600));

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
/// Mirrors are asked in the order of registries.conf, and then the registry. Failed connections, broken or silent ones,
/// bodies cut short and the statuses 408, 429 and 5xx are tried again [`Options::retries`] times, after 100 ms, 200 ms and
/// so on, give or take half, or after what the server's `Retry-After` says, but [`Options::max_pause`] at most. Nothing else
/// is tried again. A host that does not answer is left alone for a while ([`Options::circuit_failures`]).
#[derive(Clone)]
pub struct Client {
    pub(super) inner: Arc<Inner>,
}

pub(super) struct Inner {
    pub(super) options: Arc<Options>,
    pub(super) transport: Transport,
    pub(super) auth: Auth,
    pub(super) endpoints: Endpoints,
    pub(super) hosts: Hosts,
    /// Where endpoints have redirected to for a blob. The addresses are secrets: they are signed.
    pub(super) redirects: TtlCache<(Repository, Digest), Url>,
    pub(super) mirrors: Mirrors,
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client")
            .field("stats", &self.stats())
            .finish_non_exhaustive()
    }
}

/// One thing asked of one repository, wherever that is.
pub(super) struct Ask<'a> {
    pub(super) repository: &'a Repository,
    pub(super) method: Method,
    pub(super) object: Object,
    pub(super) accept: Option<&'static str>,
    pub(super) range: Option<(u64, u64)>,
    /// Whether it is a range that nobody waits for yet.
    pub(super) is_ahead: bool,
    /// For messages.
    pub(super) what: String,
}

/// What is asked for.
pub(super) enum Object {
    /// By a tag or a digest.
    Manifest(String),
    Blob(Digest),
    /// Whether there is a registry.
    Base,
}

impl<'a> Ask<'a> {
    fn manifest(method: Method, repository: &'a Repository, selector: &Selector<'_>) -> Result<Self, Error> {
        repository.validate()?;
        let separator = if matches!(selector, Selector::Tag(_)) { ':' } else { '@' };
        Ok(Self {
            repository,
            method,
            object: Object::Manifest(selector.to_string()),
            accept: Some(MANIFEST_TYPES),
            range: None,
            is_ahead: false,
            what: format!("manifest {repository}{separator}{selector}"),
        })
    }

    pub(super) fn blob(repository: &'a Repository, digest: &Digest, range: Option<(u64, u64)>) -> Result<Self, Error> {
        repository.validate()?;
        Ok(Self {
            repository,
            method: Method::GET,
            object: Object::Blob(*digest),
            accept: None,
            range,
            is_ahead: false,
            what: format!("blob {repository}@{digest}"),
        })
    }

    /// What every registry answers somehow.
    pub(super) fn ping(repository: &'a Repository) -> Self {
        Self {
            repository,
            method: Method::GET,
            object: Object::Base,
            accept: None,
            range: None,
            is_ahead: false,
            what: format!("a sign of life of {}", repository.registry),
        }
    }

    /// The path at an endpoint.
    pub(super) fn path(&self, at: &Endpoint) -> String {
        let name = &at.repository.name;
        match &self.object {
            Object::Manifest(selector) => format!("/v2/{name}/manifests/{selector}"),
            Object::Blob(digest) => format!("/v2/{name}/blobs/{digest}"),
            Object::Base => "/v2/".to_owned(),
        }
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
        let usual = || Files::usual(|name| std::env::var_os(name));
        let files = options.registries_conf.clone().unwrap_or_else(usual);
        let auth = Auth::new(options.auth_files.clone(), files.clone());
        let endpoints = Endpoints::new(files);
        let (most, ttl) = REDIRECTS;
        Ok(Self {
            inner: Arc::new(Inner {
                options,
                transport,
                auth,
                endpoints,
                hosts: Hosts::new(MOST_HOSTS),
                redirects: TtlCache::new(most, ttl),
                mirrors: Mirrors::new(),
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
        let (client, asked, selector) = (self, &ask, &selector);
        self.bounded(&ask, self.inner.options.request_timeout, |at| async move {
            let mut response = client.exchange(asked, &at).await?;
            let (bytes, actual) = response.read_hashed(MAX_MANIFEST).await?;
            if let Selector::Digest(expected) = selector {
                verify(asked, *expected, actual)?;
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
        let (client, head) = (self, &ask);
        let asked = self.bounded(&ask, self.inner.options.request_timeout, |at| async move {
            let response = client.exchange(head, &at).await?;
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
        let (client, asked) = (self, &ask);
        self.bounded(&ask, budget, |at| async move {
            let (bytes, actual) = client.exchange(asked, &at).await?.read_hashed(limit).await?;
            verify(asked, *digest, actual).map(|()| bytes)
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
        match len {
            0 => Ok(Bytes::new()),
            _ => Ok(self.blob_range_and_giver(repository, digest, offset, len).await?.0),
        }
    }

    /// As [`Client::blob_range`], of one byte at least, and tells who has given them: for who can tell whether they are right.
    ///
    /// # Errors
    /// As there.
    pub async fn blob_range_and_giver(
        &self,
        repository: &Repository,
        digest: &Digest,
        offset: u64,
        len: usize,
    ) -> Result<(Bytes, ServedBy), Error> {
        let mut ask = Ask::blob(repository, digest, None)?;
        let Some(last) = (len as u64).checked_sub(1).and_then(|more| offset.checked_add(more)) else {
            return Err(Error::WrongRange {
                what: ask.what,
                detail: format!("there are no {len} bytes from {offset} on"),
            });
        };
        ask.range = Some((offset, last));
        let (client, asked) = (self, &ask);
        self.bounded(&ask, self.inner.options.request_timeout, |at| async move {
            let bytes = client.exchange(asked, &at).await?.read_range(offset, len).await?;
            Ok((bytes, ServedBy::of(&at, digest)))
        })
        .await
    }

    /// Uses `credentials`, which Podman was given for a pull, for `repository` and what is below it. They count before what
    /// is found elsewhere, until the registry refuses them; they are in memory only.
    ///
    /// # Errors
    /// [`Error::InvalidName`].
    pub fn push_credentials(&self, repository: &Repository, credentials: Credentials) -> Result<(), Error> {
        repository.validate()?;
        self.inner.auth.push_credentials(repository, credentials);
        Ok(())
    }

    /// What was asked of registries and came from them so far.
    pub fn stats(&self) -> Stats {
        self.inner.transport.counters.stats()
    }

    /// How many requests for what nobody waits for yet may be under way to one host at a time. Others wait for their place.
    pub fn most_ahead(&self) -> usize {
        most_ahead(self.inner.options.max_requests_per_host)
    }

    /// The bound for most calls.
    pub(super) fn request_timeout(&self) -> Duration {
        self.inner.options.request_timeout
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
