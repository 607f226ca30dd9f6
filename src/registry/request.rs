//! Requests: what a caller asks of a repository ([`RegistryRequest`]), and one HTTP request made of it
//! ([`HttpRequest`]).

use std::time::Instant;

use reqwest::{Method, Url, header::HeaderValue};

use super::{
    Error, Repository,
    repository::{BlobLocation, ManifestSelector},
};
use crate::digest::Digest;

const MANIFEST_TYPES: &str = "application/vnd.oci.image.index.v1+json, application/vnd.oci.image.manifest.v1+json, \
    application/vnd.docker.distribution.manifest.list.v2+json, application/vnd.docker.distribution.manifest.v2+json";

/// A manifest or blob of one repository, whichever endpoint serves it.
pub(super) struct RegistryRequest<'a> {
    /// As the image is named, not as a mirror has it.
    pub(super) repository: &'a Repository,
    pub(super) method: Method,
    pub(super) resource: Resource,
    pub(super) accept: Option<&'static str>,
    /// First and last byte.
    pub(super) range: Option<(u64, u64)>,
    /// Whether the range is fetched before any reader waits for it.
    pub(super) is_prefetch: bool,
    /// Describes the resource in messages.
    pub(super) what: String,
}

/// Part of the distribution API.
pub(super) enum Resource {
    /// By tag or digest.
    Manifest(String),
    Blob(Digest),
    /// `/v2/`, which every registry answers.
    Base,
}

impl<'a> RegistryRequest<'a> {
    pub(super) fn manifest(
        method: Method,
        repository: &'a Repository,
        selector: &ManifestSelector<'_>,
    ) -> Result<Self, Error> {
        repository.validate()?;
        let separator = match selector {
            ManifestSelector::Tag(_) => ':',
            ManifestSelector::Digest(_) => '@',
        };
        Ok(Self {
            repository,
            method,
            resource: Resource::Manifest(selector.to_string()),
            accept: Some(MANIFEST_TYPES),
            range: None,
            is_prefetch: false,
            what: format!("manifest {repository}{separator}{selector}"),
        })
    }

    pub(super) fn blob(repository: &'a Repository, digest: &Digest, range: Option<(u64, u64)>) -> Result<Self, Error> {
        repository.validate()?;
        Ok(Self {
            repository,
            method: Method::GET,
            resource: Resource::Blob(*digest),
            accept: None,
            range,
            is_prefetch: false,
            what: format!("blob {repository}@{digest}"),
        })
    }

    pub(super) fn ping(repository: &'a Repository) -> Self {
        Self {
            repository,
            method: Method::GET,
            resource: Resource::Base,
            accept: None,
            range: None,
            is_prefetch: false,
            what: format!("ping of {}", repository.registry),
        }
    }

    /// The URL path at an endpoint, where the repository is called `name`.
    pub(super) fn path(&self, name: &str) -> String {
        match &self.resource {
            Resource::Manifest(selector) => format!("/v2/{name}/manifests/{selector}"),
            Resource::Blob(digest) => format!("/v2/{name}/blobs/{digest}"),
            Resource::Base => "/v2/".to_owned(),
        }
    }

    /// Whether a digest names the resource, as for all blobs.
    pub(super) fn is_by_digest(&self) -> bool {
        match &self.resource {
            Resource::Manifest(selector) => selector.contains(':'),
            Resource::Blob(_) | Resource::Base => true,
        }
    }

    /// The blob at an endpoint, where the repository is `there`; `None` for other resources.
    pub(super) fn blob_at(&self, there: &Repository) -> Option<BlobLocation> {
        match self.resource {
            Resource::Manifest(_) | Resource::Base => None,
            Resource::Blob(digest) => Some((there.clone(), digest)),
        }
    }
}

/// One HTTP request. No `Debug`: it holds the secret that authorizes it.
#[derive(Clone)]
pub(super) struct HttpRequest<'a> {
    pub(super) method: Method,
    pub(super) url: Url,
    pub(super) accept: Option<&'static str>,
    /// First and last byte.
    pub(super) range: Option<(u64, u64)>,
    pub(super) authorization: Option<HeaderValue>,
    /// The body of a POST, `application/x-www-form-urlencoded`.
    pub(super) form: Option<String>,
    /// Describes the resource in messages.
    pub(super) what: &'a str,
    /// The registry that redirected here, or the host itself. Its CA certificates count for the host of `url` too.
    pub(super) registry: &'a str,
    /// The registry in the image's name, of which `registry` may be a mirror.
    pub(super) image_registry: &'a str,
    /// Whether another endpoint is asked if this one fails.
    pub(super) has_alternative: bool,
    /// When the caller's time ends, if known.
    pub(super) deadline: Option<Instant>,
}

impl<'a> HttpRequest<'a> {
    pub(super) fn new(method: Method, url: Url, what: &'a str) -> Self {
        Self {
            method,
            url,
            accept: None,
            range: None,
            authorization: None,
            form: None,
            what,
            registry: "",
            image_registry: "",
            has_alternative: false,
            deadline: None,
        }
    }
}
