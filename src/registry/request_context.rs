//! What error messages say about a request, and the errors made with it.

use std::{error::Error as StdError, sync::Arc, time::Duration};

use reqwest::Url;

use super::{
    Error,
    host_name::{authority, redacted},
};

/// The host and resource of one HTTP request, for messages. Holds no secrets.
#[derive(Debug, Clone)]
pub(super) struct RequestContext {
    /// `host[:port]`.
    pub(super) host: String,
    /// Appended to the host in connection errors, e.g. to name a proxy.
    route: String,
    /// Without query.
    pub(super) url: String,
    pub(super) what: String,
}

impl RequestContext {
    pub(super) fn new(url: &Url, what: &str) -> Self {
        Self {
            host: authority(url),
            route: String::new(),
            url: redacted(url),
            what: what.to_owned(),
        }
    }

    /// Has connection errors name the proxy at `authority`.
    pub(super) fn set_proxy(&mut self, authority: &str) {
        self.route = format!(" through the proxy {authority}");
    }

    pub(super) fn timeout(&self, after: Duration) -> Error {
        Error::Timeout {
            host: self.host.clone(),
            what: self.what.clone(),
            after,
        }
    }

    /// An answer that violates the protocol.
    pub(super) fn invalid(&self, detail: impl Into<String>) -> Error {
        Error::InvalidResponse {
            host: self.host.clone(),
            what: self.what.clone(),
            detail: detail.into(),
        }
    }

    pub(super) fn wrong_range(&self, detail: String) -> Error {
        Error::WrongRange {
            what: self.what.clone(),
            detail,
        }
    }

    pub(super) fn short_body(&self, expected: u64, actual: u64) -> Error {
        Error::ShortBody {
            what: self.what.clone(),
            expected,
            actual,
        }
    }

    /// Translates an error of reqwest after a wait of `timeout`. Its own text holds the whole URL, which is secret.
    pub(super) fn failure(&self, error: reqwest::Error, timeout: Duration) -> Error {
        let (host, what) = (self.host.clone(), self.what.clone());
        let (is_connect, is_timeout) = (error.is_connect(), error.is_timeout());
        let source: Arc<reqwest::Error> = Arc::new(error.without_url());
        if is_untrusted_certificate(&*source) {
            Error::UntrustedCertificate { host, source }
        } else if is_connect {
            let host = host + &self.route;
            Error::Unreachable { host, source }
        } else if is_timeout {
            self.timeout(timeout)
        } else {
            Error::Interrupted { host, what, source }
        }
    }
}

/// An endpoint that serves whole blobs only, where skipping `offset` bytes would take too long.
pub(super) fn ranges_ignored(host: &str, what: &str, offset: u64) -> Error {
    Error::WrongRange {
        what: what.to_owned(),
        detail: format!("{host} ignores ranges, and {offset} bytes are too many to read only to skip them"),
    }
}

/// Whether a certificate that failed verification is in the chain of `error`.
fn is_untrusted_certificate(error: &(dyn StdError + 'static)) -> bool {
    let mut next = Some(error);
    while let Some(error) = next {
        // An I/O error hides what it wraps: its `source` is already the wrapped error's source.
        let inner = error.downcast_ref::<std::io::Error>().and_then(|error| error.get_ref());
        let tls = inner
            .and_then(|inner| inner.downcast_ref())
            .or_else(|| error.downcast_ref());
        if let Some(rustls::Error::InvalidCertificate(_)) = tls {
            return true;
        }
        next = inner
            .map(|inner| inner as &(dyn StdError + 'static))
            .or_else(|| error.source());
    }
    false
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::is_untrusted_certificate;

    #[test]
    fn untrusted_certificates_are_told_from_other_failures() {
        let bad = rustls::Error::InvalidCertificate(rustls::CertificateError::UnknownIssuer);
        assert!(is_untrusted_certificate(&io::Error::other(io::Error::other(
            bad.clone()
        ))));
        assert!(is_untrusted_certificate(&bad));
        assert!(!is_untrusted_certificate(&io::Error::other(
            rustls::Error::DecryptError
        )));
        assert!(!is_untrusted_certificate(&io::Error::from(
            io::ErrorKind::ConnectionReset
        )));
    }
}
