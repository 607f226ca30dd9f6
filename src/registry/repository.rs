//! Names of repositories and what is valid in them.

use std::fmt;

use super::Error;
use crate::digest::Digest;

/// A repository of a registry, e.g. `docker.io` and `library/alpine`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Repository {
    /// `host[:port]`, as references write it.
    pub registry: String,
    /// The name within the registry, without tag or digest.
    pub name: String,
}

impl Repository {
    /// Puts a repository together; whether the parts are valid is seen when it is used.
    pub fn new(registry: impl Into<String>, name: impl Into<String>) -> Self {
        Self {
            registry: registry.into(),
            name: name.into(),
        }
    }

    /// Refuses what would make another URL than the one meant, such as `..` or `?`. The grammar is the distribution
    /// specification's, except that upper case is let through: some registries take it.
    pub(super) fn validate(&self) -> Result<(), Error> {
        let host = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_' | b':' | b'[' | b']');
        let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_');
        let part = |part: &str| part.bytes().all(plain) && part.bytes().any(|b| b.is_ascii_alphanumeric());
        if self.registry.is_empty() || !self.registry.bytes().all(host) {
            return Err(Error::InvalidName {
                what: format!("registry `{}`", printable(&self.registry)),
            });
        }
        if self.name.len() > 255 || !self.name.split('/').all(part) {
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

/// What a manifest is asked for by.
pub(super) enum Selector<'a> {
    Tag(&'a str),
    Digest(Digest),
}

impl<'a> Selector<'a> {
    /// Tells a tag (`[a-zA-Z0-9_][a-zA-Z0-9._-]{0,127}`) from a digest.
    pub(super) fn parse(text: &'a str) -> Result<Self, Error> {
        if text.contains(':') {
            return text.parse().map(Self::Digest).map_err(|error| Error::InvalidName {
                what: error.to_string(),
            });
        }
        let valid = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_');
        if text.is_empty() || text.len() > 128 || text.starts_with(['.', '-']) || !text.bytes().all(valid) {
            return Err(Error::InvalidName {
                what: format!("tag `{}`", printable(text)),
            });
        }
        Ok(Self::Tag(text))
    }
}

impl fmt::Display for Selector<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tag(tag) => f.write_str(tag),
            Self::Digest(digest) => fmt::Display::fmt(digest, f),
        }
    }
}

/// At most 200 characters of somebody else's text, without control characters.
pub(super) fn printable(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .take(200)
        .collect()
}
