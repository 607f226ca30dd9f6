//! Repository names, tags and digests, checked before they become part of a URL.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::Error;
use crate::{digest::Digest, printable::printable};

/// A repository of a registry, e.g. `docker.io` and `library/alpine`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Repository {
    /// `host[:port]`, as references write it.
    pub registry: String,
    /// The name within the registry, without tag or digest.
    pub name: String,
}

/// A blob at one endpoint, or in the repository that the image is named by.
pub(super) type BlobLocation = (Repository, Digest);

impl Repository {
    /// Names a repository. The parts are validated on use, not here.
    pub fn new(registry: impl Into<String>, name: impl Into<String>) -> Self {
        Self {
            registry: registry.into(),
            name: name.into(),
        }
    }

    /// Refuses parts that would change the URL's structure, such as `..` or `?`. The grammar is the distribution
    /// specification's, plus upper case, which some registries accept.
    pub(super) fn validate(&self) -> Result<(), Error> {
        let is_host = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_' | b':' | b'[' | b']');
        let is_plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_');
        let is_component = |part: &str| part.bytes().all(is_plain) && part.bytes().any(|b| b.is_ascii_alphanumeric());
        if self.registry.is_empty() || !self.registry.bytes().all(is_host) {
            return Err(Error::InvalidName {
                what: format!("registry `{}`", printable(&self.registry)),
            });
        }
        if self.name.len() > 255 || !self.name.split('/').all(is_component) {
            return Err(Error::InvalidName {
                what: format!("repository `{}`", printable(&self.name)),
            });
        }
        Ok(())
    }
}

impl fmt::Display for Repository {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.registry, self.name)
    }
}

/// Names a manifest within a repository.
pub(super) enum ManifestSelector<'a> {
    Tag(&'a str),
    Digest(Digest),
}

impl<'a> ManifestSelector<'a> {
    /// Parses a digest, or a tag (`[a-zA-Z0-9_][a-zA-Z0-9._-]{0,127}`).
    pub(super) fn parse(text: &'a str) -> Result<Self, Error> {
        if text.contains(':') {
            return text.parse().map(Self::Digest).map_err(|error| Error::InvalidName {
                what: error.to_string(),
            });
        }
        let is_valid = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_');
        if text.is_empty() || text.len() > 128 || text.starts_with(['.', '-']) || !text.bytes().all(is_valid) {
            return Err(Error::InvalidName {
                what: format!("tag `{}`", printable(text)),
            });
        }
        Ok(Self::Tag(text))
    }
}

impl fmt::Display for ManifestSelector<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tag(tag) => f.write_str(tag),
            Self::Digest(digest) => fmt::Display::fmt(digest, f),
        }
    }
}
