//! What can go wrong with a registry.

use std::{io, path::PathBuf, sync::Arc, time::Duration};

use crate::digest::Digest;

/// The error beneath an [`Error`], shared because one failure may be told to many waiters.
pub type Cause = Arc<dyn std::error::Error + Send + Sync + 'static>;

/// A request to a registry failed.
///
/// URLs in it have no query, and nothing in it has credentials or tokens: both are secrets.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The client could not be set up.
    #[error("cannot set up the HTTP client")]
    Setup {
        /// Why.
        source: Cause,
    },
    /// A registry, repository, tag or digest that cannot be asked for.
    #[error("invalid name: {what}")]
    InvalidName {
        /// The name and its kind.
        what: String,
    },
    /// The registry has no such thing (status 404).
    #[error("{what} does not exist")]
    NotFound {
        /// What was asked for, with its repository and registry.
        what: String,
    },
    /// The registry, or its token server, does not accept who we are.
    #[error(
        "{registry} wants other credentials for {repository}: {detail}; \
         if it is private, or does not exist, `podman login {registry}` may help"
    )]
    Unauthorized {
        /// `host[:port]`.
        registry: String,
        /// The repository's name.
        repository: String,
        /// What is known about why.
        detail: String,
    },
    /// The registry knows who we are and refuses (status 403).
    #[error("{host} denies access to {what}{}", colon(.detail))]
    Denied {
        /// The host that refused: the registry, or where it redirected to.
        host: String,
        /// What was asked for.
        what: String,
        /// The registry's words, if any.
        detail: String,
    },
    /// No registry is to be asked.
    #[error("{what} is not here, and registries are not asked: the configuration says `offline`")]
    Offline {
        /// What was to be asked for.
        what: String,
    },
    /// registries.conf forbids it.
    #[error("{name} is not asked for: {file} blocks {prefix}")]
    Blocked {
        /// Registry and repository.
        name: String,
        /// The prefix of the entry.
        prefix: String,
        /// The file that has it.
        file: PathBuf,
    },
    /// A file of registries.conf cannot be read, so that nobody knows what it forbids.
    #[error("{name} is not asked for while {path} cannot be used, since it may block that: {detail}")]
    Registries {
        /// Registry and repository.
        name: String,
        /// The file, or the directory of drop-ins.
        path: PathBuf,
        /// What is wrong with it.
        detail: String,
    },
    /// A file of certificates, or a directory of them.
    #[error("{path} cannot be used: {detail}")]
    Certificates {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        detail: String,
    },
    /// The host has not answered for a while, and is left alone.
    #[error("{host} did not answer {failures} times in a row and is left alone; it is asked again in {left:.1?}")]
    CircuitOpen {
        /// `host[:port]`.
        host: String,
        /// Failures in a row.
        failures: u32,
        /// How long it is still left alone.
        left: Duration,
    },
    /// The host has asked to be left alone.
    #[error("{host} has too much to do; it is asked again in {left:.1?}")]
    Busy {
        /// `host[:port]`.
        host: String,
        /// How long it is still left alone.
        left: Duration,
    },
    /// The host's health check fails.
    #[error("{host} is not asked while its health check at {check} fails")]
    Unhealthy {
        /// `host[:port]`.
        host: String,
        /// The check's host.
        check: String,
    },
    /// No connection could be made.
    #[error("cannot connect to {host}")]
    Unreachable {
        /// `host[:port]`.
        host: String,
        /// Why.
        source: Cause,
    },
    /// The host's TLS certificate could not be verified.
    #[error(
        "the TLS certificate of {host} is not trusted: put its authority's certificate into \
         /etc/containers/certs.d/{host}/ca.crt, or list {host} as insecure"
    )]
    Untrusted {
        /// `host[:port]`.
        host: String,
        /// Why.
        source: Cause,
    },
    /// Nothing came for too long, or the whole took too long.
    #[error("{host} did not deliver {what} within {after:?}")]
    Timeout {
        /// `host[:port]`.
        host: String,
        /// What was asked for.
        what: String,
        /// The bound that was exceeded.
        after: Duration,
    },
    /// The connection broke.
    #[error("the connection to {host} broke while asking for {what}")]
    Interrupted {
        /// `host[:port]`.
        host: String,
        /// What was asked for.
        what: String,
        /// Why.
        source: Cause,
    },
    /// Neither the registry nor its mirrors could be asked.
    #[error("{last}; its mirrors have failed before: {mirrors}")]
    Everywhere {
        /// The registry's error.
        last: Box<Error>,
        /// Those of the mirrors, with their names.
        mirrors: String,
        /// What is beneath the registry's error.
        source: Option<Cause>,
    },
    /// A status that has no error of its own.
    #[error("{url} answered with status {status}{}", colon(.detail))]
    Status {
        /// The address, without its query.
        url: String,
        /// The HTTP status.
        status: u16,
        /// The registry's words, if any.
        detail: String,
        /// How long the server asks to be left alone.
        retry_after: Option<Duration>,
    },
    /// The bytes are not those asked for.
    #[error("{what} is corrupt: it should have digest {expected} and has {actual}")]
    DigestMismatch {
        /// What was asked for.
        what: String,
        /// The digest asked for.
        expected: Digest,
        /// The digest of what came.
        actual: Digest,
    },
    /// More bytes than are wanted.
    #[error("{what} is larger than the {limit} bytes allowed")]
    TooLarge {
        /// What was asked for.
        what: String,
        /// The most bytes that were allowed.
        limit: u64,
    },
    /// Fewer bytes came than were due.
    #[error("{what} ended after {actual} of {expected} bytes")]
    ShortBody {
        /// What was asked for.
        what: String,
        /// Bytes due.
        expected: u64,
        /// Bytes that came.
        actual: u64,
    },
    /// Other bytes came than those asked for, or the blob has no such bytes.
    #[error("wrong range of {what}: {detail}")]
    WrongRange {
        /// What was asked for.
        what: String,
        /// What came.
        detail: String,
    },
    /// The answer does not follow the protocol.
    #[error("{host} gave an invalid answer when asked for {what}: {detail}")]
    InvalidResponse {
        /// `host[:port]`.
        host: String,
        /// What was asked for.
        what: String,
        /// What is wrong with it.
        detail: String,
    },
}

impl Error {
    /// The registry says that there is no such thing.
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::NotFound { .. })
    }

    /// Nothing was learned from the registry, not even that it refuses.
    pub fn is_unreachable(&self) -> bool {
        self.is_transient() || matches!(self, Self::Offline { .. }) || self.is_without_route()
    }

    /// This machine has no way to the registry, so that trying again soon is of no use.
    fn is_without_route(&self) -> bool {
        if let Self::Everywhere { last, .. } = self {
            return last.is_without_route();
        }
        let Self::Unreachable { source, .. } = self else {
            return false;
        };
        let mut next: Option<&(dyn std::error::Error + 'static)> = Some(&**source);
        while let Some(error) = next {
            let kind = error.downcast_ref::<io::Error>().map(io::Error::kind);
            if let Some(
                io::ErrorKind::NetworkUnreachable | io::ErrorKind::HostUnreachable | io::ErrorKind::NetworkDown,
            ) = kind
            {
                return true;
            }
            next = error.source();
        }
        false
    }

    /// Nothing was sent, because nothing would have come of it.
    pub(super) fn is_unsent(&self) -> bool {
        matches!(
            self,
            Self::CircuitOpen { .. } | Self::Busy { .. } | Self::Unhealthy { .. }
        )
    }

    /// How long the host is still left alone, if that is why nothing was sent.
    pub(super) fn rest(&self) -> Option<Duration> {
        match self {
            Self::CircuitOpen { left, .. } | Self::Busy { left, .. } => Some(*left),
            _ => None,
        }
    }

    /// Nothing came from the host for too long.
    pub(super) fn is_silence(&self) -> bool {
        matches!(
            self,
            Self::Unreachable { .. } | Self::Timeout { .. } | Self::CircuitOpen { .. }
        )
    }

    /// Another address of the same thing may do better. Who says that he has too much to do is no reason to ask twice.
    pub(super) fn may_be_the_place(&self) -> bool {
        !self.is_unsent() && !matches!(self, Self::Status { .. })
    }

    /// The error beneath it.
    pub(super) fn cause(&self) -> Option<Cause> {
        match self {
            Self::Setup { source }
            | Self::Unreachable { source, .. }
            | Self::Untrusted { source, .. }
            | Self::Interrupted { source, .. } => Some(Arc::clone(source)),
            _ => None,
        }
    }

    /// Another range of the same blob, or a part of it, may well be had: it took too long, or the answer was an odd one. All
    /// else would be said of any range.
    pub fn is_of_range(&self) -> bool {
        match self {
            Self::Timeout { .. } | Self::Interrupted { .. } | Self::ShortBody { .. } => true,
            Self::WrongRange { .. } | Self::InvalidResponse { .. } => true,
            Self::Status { status, .. } => matches!(status, 408 | 504),
            Self::Everywhere { last, .. } => last.is_of_range(),
            _ => false,
        }
    }

    /// The same request may succeed at another time or over another way.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Unreachable { .. } => !self.is_without_route(),
            Self::Everywhere { last, .. } => last.is_transient(),
            Self::Timeout { .. } | Self::Interrupted { .. } | Self::ShortBody { .. } => true,
            Self::CircuitOpen { .. } | Self::Busy { .. } | Self::Unhealthy { .. } => true,
            Self::Status { status, .. } => matches!(status, 408 | 429 | 500..=599),
            _ => false,
        }
    }
}

/// `: detail`, or nothing where there is none.
fn colon(detail: &str) -> String {
    if detail.is_empty() {
        String::new()
    } else {
        format!(": {detail}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_message_is_one_line_without_gaps() {
        let text = || "x".to_owned();
        let (file, time) = (PathBuf::from("/f"), Duration::from_secs(1));
        let source: Cause = Arc::new(io::Error::other("cause"));
        let (expected, actual) = (Digest::of(b"a"), Digest::of(b"b"));
        let errors = [
            Error::Setup { source: source.clone() },
            Error::InvalidName { what: text() },
            Error::NotFound { what: text() },
            Error::Unauthorized {
                registry: text(),
                repository: text(),
                detail: text(),
            },
            Error::Denied {
                host: text(),
                what: text(),
                detail: text(),
            },
            Error::Offline { what: text() },
            Error::Blocked {
                name: text(),
                prefix: text(),
                file: file.clone(),
            },
            Error::Registries {
                name: text(),
                path: file.clone(),
                detail: text(),
            },
            Error::Certificates {
                path: file,
                detail: text(),
            },
            Error::CircuitOpen {
                host: text(),
                failures: 1,
                left: time,
            },
            Error::Busy {
                host: text(),
                left: time,
            },
            Error::Unhealthy {
                host: text(),
                check: text(),
            },
            Error::Unreachable {
                host: text(),
                source: source.clone(),
            },
            Error::Untrusted {
                host: text(),
                source: source.clone(),
            },
            Error::Timeout {
                host: text(),
                what: text(),
                after: time,
            },
            Error::Interrupted {
                host: text(),
                what: text(),
                source,
            },
            Error::Status {
                url: text(),
                status: 500,
                detail: text(),
                retry_after: None,
            },
            Error::DigestMismatch {
                what: text(),
                expected,
                actual,
            },
            Error::TooLarge { what: text(), limit: 1 },
            Error::ShortBody {
                what: text(),
                expected: 1,
                actual: 0,
            },
            Error::WrongRange {
                what: text(),
                detail: text(),
            },
            Error::InvalidResponse {
                host: text(),
                what: text(),
                detail: text(),
            },
        ];
        for error in errors {
            let (last, mirrors) = (Box::new(error), text());
            let message = Error::Everywhere {
                last,
                mirrors,
                source: None,
            }
            .to_string();
            assert!(!message.contains("  ") && !message.contains('\n'), "{message}");
        }
    }
}
