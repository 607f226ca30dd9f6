//! Errors of the client, and what each says about retries.

use std::{io, path::PathBuf, sync::Arc, time::Duration};

use crate::digest::Digest;

/// The source of an [`Error`], shared because many waiters may get the same failure.
pub type Cause = Arc<dyn std::error::Error + Send + Sync + 'static>;

/// A request to a registry failed.
///
/// No variant holds credentials, tokens or URL queries: all may be secrets.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The client could not be set up.
    #[error("cannot set up the HTTP client")]
    Setup {
        /// Why.
        source: Cause,
    },
    /// A registry, repository, tag or digest is malformed.
    #[error("invalid name: {what}")]
    InvalidName {
        /// The name and its kind.
        what: String,
    },
    /// The registry has no such manifest or blob (status 404).
    #[error("{what} does not exist")]
    NotFound {
        /// What was requested, with its repository and registry.
        what: String,
    },
    /// The registry or its token server refuses the credentials, or there are none.
    #[error(
        "{registry} requires valid credentials for {repository}: {detail}; \
         if the image exists and is private, run `podman login {registry}` as root"
    )]
    Unauthorized {
        /// `host[:port]`.
        registry: String,
        /// The repository's name.
        repository: String,
        /// The reason, as far as known.
        detail: String,
    },
    /// The registry refuses access (status 403).
    #[error("{host} denies access to {what}{}", colon(.detail))]
    Denied {
        /// The host that refused: the registry or its redirect target.
        host: String,
        /// What was requested.
        what: String,
        /// The registry's error message, if any.
        detail: String,
    },
    /// [`Options::offline`](super::Options::offline) is set.
    #[error("{what} is not available: the configuration sets `offline`")]
    Offline {
        /// What was requested.
        what: String,
    },
    /// registries.conf blocks the repository.
    #[error("{name} is blocked by the entry for {prefix} in {file}")]
    Blocked {
        /// Registry and repository.
        name: String,
        /// The prefix of the blocking entry.
        prefix: String,
        /// The file of that entry.
        file: PathBuf,
    },
    /// A file of registries.conf has never been readable, so that it is unknown what it blocks.
    #[error("{name} may be blocked, and is not requested while {path} is unusable: {detail}")]
    RegistriesConf {
        /// Registry and repository.
        name: String,
        /// The file, or the directory of drop-ins.
        path: PathBuf,
        /// What is wrong with it.
        detail: String,
    },
    /// A certificate or key file, or a directory of them, is unusable.
    #[error("cannot use {path}: {detail}")]
    Certificates {
        /// The file or directory.
        path: PathBuf,
        /// What is wrong with it.
        detail: String,
    },
    /// The host's circuit is open: no request is sent to it.
    #[error("circuit open for {host} after {failures} failures in a row; next attempt in {retry_in:.1?}")]
    CircuitOpen {
        /// `host[:port]`.
        host: String,
        /// Failures in a row.
        failures: u32,
        /// How long the host has been away, as far as is known.
        away: Duration,
        /// Time until the next request is let through.
        retry_in: Duration,
        /// The last failure.
        source: Option<Cause>,
    },
    /// The host asked for a pause with `Retry-After`.
    #[error("{host} is busy; next attempt in {retry_in:.1?}")]
    Busy {
        /// `host[:port]`.
        host: String,
        /// Time until the next request is let through.
        retry_in: Duration,
    },
    /// The host's health check fails.
    #[error("{host} is unhealthy: its health check at {check} fails")]
    Unhealthy {
        /// `host[:port]`.
        host: String,
        /// The host of the health check.
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
    /// The host's TLS certificate failed verification.
    #[error(
        "TLS certificate of {host} is not trusted; put its CA certificate into \
         /etc/containers/certs.d/{host}/ca.crt, or list {host} as insecure"
    )]
    UntrustedCertificate {
        /// `host[:port]`.
        host: String,
        /// Why.
        source: Cause,
    },
    /// No bytes arrived for too long, or the whole call took too long.
    #[error("timed out after {after:?} waiting for {what} from {host}")]
    Timeout {
        /// `host[:port]`.
        host: String,
        /// What was requested.
        what: String,
        /// The time-out.
        after: Duration,
    },
    /// The connection broke.
    #[error("connection to {host} lost while fetching {what}")]
    Interrupted {
        /// `host[:port]`.
        host: String,
        /// What was requested.
        what: String,
        /// Why.
        source: Cause,
    },
    /// The registry could not be reached, and all mirrors failed.
    #[error("{registry}; mirrors failed too: {mirrors}")]
    AllEndpoints {
        /// The registry's error.
        registry: Box<Error>,
        /// The mirrors' errors, each after its mirror's name.
        mirrors: String,
        /// Whether one of the mirrors is away.
        is_mirror_away: bool,
        /// The source of the registry's error.
        source: Option<Cause>,
    },
    /// A status without a variant of its own.
    #[error("{url} answered with status {status}{}", colon(.detail))]
    Status {
        /// Without query.
        url: String,
        /// The HTTP status.
        status: u16,
        /// The registry's error message, if any.
        detail: String,
        /// The pause that the server asks for.
        retry_after: Option<Duration>,
    },
    /// The received bytes have another digest.
    #[error("{what} is corrupt: expected digest {expected}, got {actual}")]
    DigestMismatch {
        /// What was requested.
        what: String,
        /// The digest requested.
        expected: Digest,
        /// The digest of the received bytes.
        actual: Digest,
    },
    /// The body exceeds the caller's limit.
    #[error("{what} is larger than the {limit} bytes allowed")]
    TooLarge {
        /// What was requested.
        what: String,
        /// The limit in bytes.
        limit: u64,
    },
    /// The body ended early.
    #[error("{what} ended after {actual} of {expected} bytes")]
    ShortBody {
        /// What was requested.
        what: String,
        /// Bytes expected.
        expected: u64,
        /// Bytes received.
        actual: u64,
    },
    /// The answer has another range, or the blob has no such bytes.
    #[error("wrong range of {what}: {detail}")]
    WrongRange {
        /// What was requested.
        what: String,
        /// The difference.
        detail: String,
    },
    /// The answer violates the protocol.
    #[error("invalid answer from {host} for {what}: {detail}")]
    InvalidResponse {
        /// `host[:port]`.
        host: String,
        /// What was requested.
        what: String,
        /// What is wrong with it.
        detail: String,
    },
}

impl Error {
    /// The registry has no such manifest or blob.
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::NotFound { .. })
    }

    /// The registry gave no answer, not even a refusal.
    pub fn is_unreachable(&self) -> bool {
        self.is_transient() || matches!(self, Self::Offline { .. }) || self.has_no_route()
    }

    /// This machine has no network route to the registry, so that a retry is useless.
    fn has_no_route(&self) -> bool {
        if let Self::AllEndpoints { registry, .. } = self {
            return registry.has_no_route();
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

    /// No request was sent, because it would have failed.
    pub(super) fn is_unsent(&self) -> bool {
        matches!(
            self,
            Self::CircuitOpen { .. } | Self::Busy { .. } | Self::Unhealthy { .. }
        )
    }

    /// The host is away: it is unreachable or silent, drops connections, or answers that its service is unavailable.
    /// Not if it has been away for `patience` already, so that waiting is of little use.
    pub(super) fn is_outage(&self, patience: Duration) -> bool {
        match self {
            Self::Unreachable { .. } => !self.has_no_route(),
            Self::Timeout { .. } | Self::Interrupted { .. } => true,
            Self::CircuitOpen { away, .. } => *away < patience,
            Self::Status { status, .. } => is_unavailable(*status),
            Self::AllEndpoints {
                registry,
                is_mirror_away,
                ..
            } => *is_mirror_away || registry.is_outage(patience),
            _ => false,
        }
    }

    /// The host is away at present: it may be back soon.
    pub fn is_away(&self) -> bool {
        self.is_outage(Duration::MAX)
    }

    /// The host could not be reached or was silent.
    pub(super) fn is_unresponsive(&self) -> bool {
        matches!(
            self,
            Self::Unreachable { .. } | Self::Timeout { .. } | Self::CircuitOpen { .. }
        )
    }

    /// A remembered redirect may be to blame, so that the endpoint is asked for another one. A status such as 503 is no
    /// reason: a second request would only add load.
    pub(super) fn invalidates_redirect(&self) -> bool {
        !self.is_unsent() && !matches!(self, Self::Status { .. })
    }

    /// The source, shared.
    pub(super) fn shared_source(&self) -> Option<Cause> {
        match self {
            Self::Setup { source }
            | Self::Unreachable { source, .. }
            | Self::UntrustedCertificate { source, .. }
            | Self::Interrupted { source, .. } => Some(Arc::clone(source)),
            Self::CircuitOpen { source, .. } => source.clone(),
            _ => None,
        }
    }

    /// The failure concerns the requested range only: another range of the blob, or a part of this one, may succeed.
    pub fn is_range_failure(&self) -> bool {
        match self {
            Self::Timeout { .. } | Self::Interrupted { .. } | Self::ShortBody { .. } => true,
            Self::WrongRange { .. } | Self::InvalidResponse { .. } => true,
            Self::Status { status, .. } => matches!(status, 408 | 504),
            Self::AllEndpoints { registry, .. } => registry.is_range_failure(),
            _ => false,
        }
    }

    /// The same request may succeed later, or at another endpoint.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Unreachable { .. } => !self.has_no_route(),
            Self::AllEndpoints { registry, .. } => registry.is_transient(),
            Self::Timeout { .. } | Self::Interrupted { .. } | Self::ShortBody { .. } => true,
            Self::CircuitOpen { .. } | Self::Busy { .. } | Self::Unhealthy { .. } => true,
            Self::Status { status, .. } => matches!(status, 408 | 429 | 500..=599),
            _ => false,
        }
    }
}

/// Whether a host answers with this status while the service behind it is away, as a proxy does.
pub(super) fn is_unavailable(status: u16) -> bool {
    matches!(status, 502..=504)
}

/// `: detail`, or nothing if `detail` is empty.
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
    fn messages_are_one_line_without_double_spaces() {
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
            Error::RegistriesConf {
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
                away: time,
                retry_in: time,
                source: None,
            },
            Error::Busy {
                host: text(),
                retry_in: time,
            },
            Error::Unhealthy {
                host: text(),
                check: text(),
            },
            Error::Unreachable {
                host: text(),
                source: source.clone(),
            },
            Error::UntrustedCertificate {
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
            let (registry, mirrors) = (Box::new(error), text());
            let message = Error::AllEndpoints {
                registry,
                mirrors,
                is_mirror_away: false,
                source: None,
            }
            .to_string();
            assert!(!message.contains("  ") && !message.contains('\n'), "{message}");
        }
    }
}
