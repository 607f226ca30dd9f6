//! Answers: their bodies read within bounds, and their statuses told as errors.

use std::{
    error::Error as StdError,
    sync::{Arc, atomic::Ordering},
    time::{Duration, SystemTime},
};

use bytes::{Bytes, BytesMut};
use reqwest::{
    StatusCode, Url,
    header::{self, HeaderMap, HeaderName},
};
use serde::Deserialize;
use sha2::{Digest as _, Sha256};
use tokio::time::timeout;

use super::{
    Error,
    circuit::CircuitPermit,
    hosts::Permit,
    jitter::LONGEST,
    repository::printable,
    settings::Proxy,
    timing,
    transport::{Counters, Trust, authority, plain},
};
use crate::digest::Digest;

/// Most bytes read of an error's body.
const MAX_ERROR_BODY: u64 = 16 << 10;
/// Most memory set aside before anything has come.
const MAX_PREALLOCATION: usize = 8 << 20;
/// Most bytes read only to come to those that were asked for, where ranges are ignored.
pub(super) const MAX_SKIPPED: u64 = 64 << 20;

/// Who was asked for what, for messages.
#[derive(Debug, Clone)]
pub(super) struct Target {
    host: String,
    /// How it is reached, if there is something to tell of that.
    way: String,
    /// Without its query.
    url: String,
    what: String,
}

impl Target {
    pub(super) fn new(url: &Url, what: &str) -> Self {
        Self {
            host: authority(url),
            way: String::new(),
            url: plain(url),
            what: what.to_owned(),
        }
    }

    /// Has messages tell that a proxy stands between.
    pub(super) fn by(&mut self, proxy: &Proxy) {
        self.way = format!(" through the proxy {}", proxy.authority());
    }

    pub(super) fn timeout(&self, after: Duration) -> Error {
        Error::Timeout {
            host: self.host.clone(),
            what: self.what.clone(),
            after,
        }
    }
}

/// An answer that does not follow the protocol.
pub(super) fn invalid(url: &Url, what: &str, detail: String) -> Error {
    Error::InvalidResponse {
        host: authority(url),
        what: what.to_owned(),
        detail,
    }
}

/// Tells what reqwest reports in our terms. Its own words hold the whole URL, which must not be shown.
pub(super) fn failure(target: &Target, error: reqwest::Error, patience: Duration) -> Error {
    let (host, what) = (target.host.clone(), target.what.clone());
    let (connect, timed_out) = (error.is_connect(), error.is_timeout());
    let source: Arc<reqwest::Error> = Arc::new(error.without_url());
    if is_untrusted(&*source) {
        Error::Untrusted { host, source }
    } else if connect {
        let host = host + &target.way;
        Error::Unreachable { host, source }
    } else if timed_out {
        Error::Timeout {
            host,
            what,
            after: patience,
        }
    } else {
        Error::Interrupted { host, what, source }
    }
}

/// Whether a certificate that cannot be verified is at the root of `error`.
fn is_untrusted(error: &(dyn StdError + 'static)) -> bool {
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

/// An answer whose body has not been read yet.
pub(super) struct Response {
    inner: reqwest::Response,
    target: Target,
    read_timeout: Duration,
    counters: Arc<Counters>,
    trust: Trust,
    foreign: bool,
    /// Held until the body is read: a registry's requests under way are bounded.
    permit: Option<Permit>,
    /// Told how the body comes: those of the host, and of the one that has led to it.
    passes: Vec<CircuitPermit>,
}

impl Response {
    pub(super) fn new(
        inner: reqwest::Response,
        target: Target,
        timeout: Duration,
        counters: Arc<Counters>,
        trust: Trust,
    ) -> Self {
        Self {
            trust,
            passes: Vec::new(),
            inner,
            target,
            read_timeout: timeout,
            counters,
            foreign: false,
            permit: None,
        }
    }

    pub(super) fn status(&self) -> StatusCode {
        self.inner.status()
    }

    pub(super) fn headers(&self) -> &HeaderMap {
        self.inner.headers()
    }

    pub(super) fn header(&self, name: HeaderName) -> Option<&str> {
        self.inner.headers().get(name).and_then(|value| value.to_str().ok())
    }

    /// Whether the answer comes from another origin than the first request went to.
    pub(super) fn is_foreign(&self) -> bool {
        self.foreign
    }

    pub(super) fn set_foreign(&mut self, foreign: bool) {
        self.foreign = foreign;
    }

    pub(super) fn hold(&mut self, permit: Option<Permit>) {
        self.permit = permit;
    }

    /// Has `pass` told how the body comes.
    pub(super) fn watch(&mut self, pass: CircuitPermit) {
        self.passes.push(pass);
    }

    /// All that is wanted of it has come.
    pub(super) fn done(&mut self) {
        self.passes.drain(..).for_each(|mut pass| pass.succeeded());
    }

    /// How far the host was trusted.
    pub(super) fn trust(&self) -> Trust {
        self.trust
    }

    /// The address that answered.
    pub(super) fn url(&self) -> &Url {
        self.inner.url()
    }

    /// The host that answered.
    pub(super) fn host(&self) -> &str {
        &self.target.host
    }

    fn what(&self) -> String {
        self.target.what.clone()
    }

    pub(super) fn invalid(&self, detail: impl Into<String>) -> Error {
        Error::InvalidResponse {
            host: self.target.host.clone(),
            what: self.what(),
            detail: detail.into(),
        }
    }

    fn wrong_range(&self, detail: String) -> Error {
        Error::WrongRange {
            what: self.what(),
            detail,
        }
    }

    /// Any answer but a success becomes the error it stands for.
    pub(super) async fn check(mut self) -> Result<Self, Error> {
        let status = self.status();
        if status.is_success() {
            return match self.header(header::CONTENT_ENCODING) {
                None | Some("identity" | "") => Ok(self),
                // Nobody asked for an encoding, and offsets into an encoded body would mean nothing.
                Some(encoding) => Err(self.invalid(format!("it is encoded as `{}`", printable(encoding)))),
            };
        }
        let detail = self.detail().await;
        self.done();
        let what = self.what();
        let Target { host, url, .. } = self.target.clone();
        Err(match status {
            StatusCode::NOT_FOUND => Error::NotFound { what },
            StatusCode::FORBIDDEN => Error::Denied { host, what, detail },
            StatusCode::RANGE_NOT_SATISFIABLE => self.wrong_range(format!("{host} has no such bytes")),
            _ => Error::Status {
                url,
                status: status.as_u16(),
                detail,
                retry_after: self.retry_after(),
            },
        })
    }

    /// How long `Retry-After` asks to wait: it is a number of seconds or a date.
    fn retry_after(&self) -> Option<Duration> {
        let text = self.header(header::RETRY_AFTER)?.trim();
        let until = |date: SystemTime| date.duration_since(SystemTime::now()).unwrap_or_default();
        let seconds = text.parse().ok().map(Duration::from_secs);
        let asked = seconds.or_else(|| httpdate::parse_http_date(text).ok().map(until));
        asked.map(|asked| asked.min(LONGEST))
    }

    /// Reads the rest of a short body that does not matter, so that the connection can be used again.
    pub(super) async fn drain(&mut self) {
        // A failure costs the connection and nothing else.
        let _ = self.read_all(MAX_ERROR_BODY).await;
    }

    /// What the body says about a failure, if it is in the distribution specification's form. Nothing else is told:
    /// storage services quote parts of signed addresses in their errors.
    pub(super) async fn detail(&mut self) -> String {
        #[derive(Deserialize)]
        struct Body {
            errors: Vec<Item>,
        }
        #[derive(Deserialize)]
        struct Item {
            #[serde(default)]
            code: String,
            #[serde(default)]
            message: String,
        }
        let Ok(bytes) = self.read_all(MAX_ERROR_BODY).await else {
            return String::new();
        };
        let Ok(Body { errors }) = serde_json::from_slice(&bytes) else {
            return String::new();
        };
        let told = |item: &Item| {
            format!("{} {}", printable(&item.code), printable(&item.message))
                .trim()
                .to_owned()
        };
        errors.iter().take(3).map(told).collect::<Vec<_>>().join("; ")
    }

    /// The next bytes of the body.
    pub(super) async fn next(&mut self) -> Result<Option<Bytes>, Error> {
        let chunk = match timing::receiving(timeout(self.read_timeout, self.inner.chunk())).await {
            Ok(Ok(chunk)) => chunk,
            Ok(Err(error)) => return Err(failure(&self.target, error, self.read_timeout)),
            Err(_) => {
                self.passes.iter_mut().for_each(CircuitPermit::failed);
                return Err(self.target.timeout(self.read_timeout));
            }
        };
        match &chunk {
            Some(_) => self.passes.iter_mut().for_each(CircuitPermit::delivering),
            None => self.done(),
        }
        let received = chunk.as_ref().map_or(0, |bytes| bytes.len() as u64);
        self.counters.bytes_received.fetch_add(received, Ordering::Relaxed);
        Ok(chunk)
    }

    /// The whole body, if it has no more than `limit` bytes.
    pub(super) async fn read_all(&mut self, limit: u64) -> Result<Bytes, Error> {
        self.read_seen(limit, |_| ()).await
    }

    /// The whole body and its digest, if it has no more than `limit` bytes. It is hashed as it comes: hashing a large
    /// one at once would keep this thread from its other tasks.
    pub(super) async fn read_hashed(&mut self, limit: u64) -> Result<(Bytes, Digest), Error> {
        let mut hasher = Sha256::new();
        let bytes = self.read_seen(limit, |bytes| hasher.update(bytes)).await?;
        Ok((bytes, Digest::from_bytes(hasher.finalize().into())))
    }

    /// The whole body, shown to `see` piece by piece, if it has no more than `limit` bytes.
    async fn read_seen(&mut self, limit: u64, mut see: impl FnMut(&[u8])) -> Result<Bytes, Error> {
        let due = self.inner.content_length();
        let too_large = Error::TooLarge {
            what: self.what(),
            limit,
        };
        if due.is_some_and(|due| due > limit) {
            return Err(too_large);
        }
        let mut body = BytesMut::with_capacity(capacity(due.unwrap_or(0)));
        loop {
            let received = body.len() as u64;
            match self.next().await {
                Ok(Some(bytes)) if received + bytes.len() as u64 > limit => return Err(too_large),
                Ok(Some(bytes)) => {
                    see(&bytes);
                    body.extend_from_slice(&bytes);
                }
                Ok(None) => break,
                Err(error) => return Err(self.cut(error, due, received)),
            }
        }
        match due {
            Some(due) if due != body.len() as u64 => Err(self.short(due, body.len() as u64)),
            _ => Ok(body.freeze()),
        }
    }

    /// Exactly `len` bytes of the body, from byte `skip` on. What follows them is never waited for.
    async fn read_part(&mut self, skip: u64, len: usize) -> Result<Bytes, Error> {
        let due = skip.saturating_add(len as u64);
        let mut body = BytesMut::with_capacity(capacity(len as u64));
        let mut at = 0;
        while body.len() < len {
            let bytes = match self.next().await {
                Ok(Some(bytes)) => bytes,
                Ok(None) => return Err(self.short(due, at)),
                Err(error) => return Err(self.cut(error, Some(due), at)),
            };
            // Both fit a `usize`: they are bounded by the lengths of `bytes` and of what was asked for.
            let from = skip.saturating_sub(at).min(bytes.len() as u64) as usize;
            let to = due.saturating_sub(at).min(bytes.len() as u64) as usize;
            body.extend_from_slice(&bytes[from..to]);
            at += bytes.len() as u64;
        }
        self.done();
        Ok(body.freeze())
    }

    /// The `len` bytes at `offset` of the thing asked for, from an answer to a request for that range.
    pub(super) async fn read_range(&mut self, offset: u64, len: usize) -> Result<Bytes, Error> {
        if self.status() == StatusCode::OK {
            // The server ignores ranges, as RFC 9110 lets it, and sends everything.
            tracing::debug!(
                host = self.target.host,
                skipped = offset,
                "ranges are ignored by the server"
            );
            return match self.inner.content_length() {
                Some(size) if size < offset.saturating_add(len as u64) => {
                    Err(self.wrong_range(format!("it has {size} bytes")))
                }
                _ if offset > MAX_SKIPPED => Err(self.ranges_ignored(offset)),
                _ => self.read_part(offset, len).await,
            };
        }
        if self.status() != StatusCode::PARTIAL_CONTENT {
            return Err(self.invalid(format!("status {} to a range request", self.status())));
        }
        let last = offset.saturating_add((len as u64).saturating_sub(1));
        let skip = self.skip_in_part((offset, last))?;
        self.read_part(skip, len).await
    }

    /// How many bytes of an answer with status 206 come before the first and last byte asked for. Servers such as
    /// caches of aligned pieces send more; fewer mean that the blob ends there, so asking again does not help.
    pub(super) fn skip_in_part(&self, (first, last): (u64, u64)) -> Result<u64, Error> {
        let given = self.header(header::CONTENT_RANGE).unwrap_or_default();
        match content_range(given) {
            Some((from, to)) if from <= first && to >= last && first - from <= MAX_SKIPPED => Ok(first - from),
            _ => Err(self.wrong_range(format!("asked for bytes {first}-{last}, got `{}`", printable(given)))),
        }
    }

    /// It is a whole blob, of which it would take too much to read so far.
    pub(super) fn ranges_ignored(&self, offset: u64) -> Error {
        ranges_ignored(&self.target.host, &self.target.what, offset)
    }

    /// A broken connection where it is known how much was due is a short body.
    fn cut(&self, error: Error, due: Option<u64>, received: u64) -> Error {
        match (error, due) {
            (Error::Interrupted { .. }, Some(due)) => self.short(due, received),
            (error, _) => error,
        }
    }

    pub(super) fn short(&self, expected: u64, actual: u64) -> Error {
        Error::ShortBody {
            what: self.what(),
            expected,
            actual,
        }
    }
}

/// A host that gives whole blobs only, of which it would take too much to read so far.
pub(super) fn ranges_ignored(host: &str, what: &str, offset: u64) -> Error {
    Error::WrongRange {
        what: what.to_owned(),
        detail: format!("{host} ignores ranges, and {offset} bytes are too many to read only to skip them"),
    }
}

/// Memory to set aside for a body said to have `bytes` bytes: it may be a lie.
fn capacity(bytes: u64) -> usize {
    usize::try_from(bytes).map_or(MAX_PREALLOCATION, |bytes| bytes.min(MAX_PREALLOCATION))
}

/// First and last byte of `bytes 0-99/1000` ([RFC 9110, 14.4](https://www.rfc-editor.org/rfc/rfc9110#section-14.4)).
pub(super) fn content_range(value: &str) -> Option<(u64, u64)> {
    let (unit, range) = value.trim().split_once(' ')?;
    let (first, last) = range.split_once('/')?.0.split_once('-')?;
    if !unit.eq_ignore_ascii_case("bytes") {
        return None;
    }
    Some((first.trim().parse().ok()?, last.trim().parse().ok()?))
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::{content_range, is_untrusted};

    #[test]
    fn content_ranges() {
        assert_eq!(content_range("bytes 5-9/100"), Some((5, 9)));
        assert_eq!(content_range("bytes 5-9/*"), Some((5, 9)));
        for text in [
            "",
            "bytes */100",
            "items 5-9/100",
            "bytes 5-/100",
            "bytes=5-9/100",
            "bytes -1-9/100",
        ] {
            assert_eq!(content_range(text), None, "{text}");
        }
    }

    #[test]
    fn certificates_are_told_from_other_failures() {
        let bad = rustls::Error::InvalidCertificate(rustls::CertificateError::UnknownIssuer);
        assert!(is_untrusted(&io::Error::other(io::Error::other(bad.clone()))));
        assert!(is_untrusted(&bad));
        assert!(!is_untrusted(&io::Error::other(rustls::Error::DecryptError)));
        assert!(!is_untrusted(&io::Error::from(io::ErrorKind::ConnectionReset)));
    }
}
