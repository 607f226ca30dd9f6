//! Answers: bodies read within limits of time and size, and statuses turned into errors.

use std::{
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant, SystemTime},
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
    host_name::Trust,
    jitter::MAX_PAUSE,
    pace::Pace,
    request_context::{RequestContext, ranges_ignored},
    stats::HostCounters,
    timing,
};
use crate::{digest::Digest, printable::printable};

/// Most bytes read of an error's body.
const MAX_ERROR_BODY: u64 = 16 << 10;
/// Most bytes allocated for a body before any byte has arrived.
const MAX_PREALLOCATION: usize = 8 << 20;
/// Most bytes read only to skip them, where a server ignores ranges.
pub(super) const MAX_SKIPPED: u64 = 64 << 20;

/// Follows a body's progress. Dropped when the body has ended, or with the [`Response`].
pub(super) trait BodyObserver: Send + Sync {
    /// Bytes have arrived.
    fn progressed(&mut self) {}

    /// No bytes have arrived within the read time-out, which is `_error`.
    fn stalled(&mut self, _error: &Error) {}

    /// All bytes that the caller needs have arrived.
    fn completed(&mut self) {}
}

/// An answer with its body still unread.
pub(super) struct Response {
    inner: reqwest::Response,
    context: RequestContext,
    read_timeout: Duration,
    counters: Arc<HostCounters>,
    pace: Pace,
    trust: Trust,
    is_cross_origin: bool,
    observers: Vec<Box<dyn BodyObserver>>,
}

impl Response {
    pub(super) fn new(
        inner: reqwest::Response,
        context: RequestContext,
        read_timeout: Duration,
        counters: Arc<HostCounters>,
        pace: Pace,
        trust: Trust,
    ) -> Self {
        Self {
            inner,
            context,
            read_timeout,
            counters,
            pace,
            trust,
            is_cross_origin: false,
            observers: Vec::new(),
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

    /// Whether a redirect led to another origin than that of the first request.
    pub(super) fn is_cross_origin(&self) -> bool {
        self.is_cross_origin
    }

    pub(super) fn set_cross_origin(&mut self, is_cross_origin: bool) {
        self.is_cross_origin = is_cross_origin;
    }

    pub(super) fn observe(&mut self, observer: impl BodyObserver + 'static) {
        self.observers.push(Box::new(observer));
    }

    /// Tells the observers that the body is complete, as far as the caller needs it, and drops them.
    pub(super) fn complete(&mut self) {
        self.observers.drain(..).for_each(|mut observer| observer.completed());
    }

    /// The trust that the request was sent with.
    pub(super) fn trust(&self) -> Trust {
        self.trust
    }

    /// The URL that answered, after redirects.
    pub(super) fn url(&self) -> &Url {
        self.inner.url()
    }

    /// The host that answered, as `host[:port]`.
    pub(super) fn host(&self) -> &str {
        &self.context.host
    }

    /// An error about an answer that violates the protocol.
    pub(super) fn invalid(&self, detail: impl Into<String>) -> Error {
        self.context.invalid(detail)
    }

    /// Returns a success as it is, and any other status as its error.
    pub(super) async fn check(mut self) -> Result<Self, Error> {
        let status = self.status();
        if status.is_success() {
            return match self.header(header::CONTENT_ENCODING) {
                None | Some("identity" | "") => Ok(self),
                // Requests ask for `identity`, and offsets into an encoded body would be meaningless.
                Some(encoding) => Err(self.invalid(format!("content encoding `{}`", printable(encoding)))),
            };
        }
        let detail = self.error_detail().await;
        self.complete();
        let RequestContext { host, url, what, .. } = self.context.clone();
        Err(match status {
            StatusCode::NOT_FOUND => Error::NotFound { what },
            StatusCode::FORBIDDEN => Error::Denied { host, what, detail },
            StatusCode::RANGE_NOT_SATISFIABLE => self.context.wrong_range(format!("{host} has no such bytes")),
            _ => Error::Status {
                url,
                status: status.as_u16(),
                detail,
                retry_after: self.retry_after(),
            },
        })
    }

    /// The pause that `Retry-After` asks for, in seconds or until a date.
    fn retry_after(&self) -> Option<Duration> {
        let text = self.header(header::RETRY_AFTER)?.trim();
        let until = |date: SystemTime| date.duration_since(SystemTime::now()).unwrap_or_default();
        let seconds = text.parse().ok().map(Duration::from_secs);
        let pause = seconds.or_else(|| httpdate::parse_http_date(text).ok().map(until));
        pause.map(|pause| pause.min(MAX_PAUSE))
    }

    /// Reads and drops the rest of a short body, so that the connection can be reused.
    pub(super) async fn drain(&mut self) {
        // A failure only costs the connection.
        let _ = self.read_all(MAX_ERROR_BODY).await;
    }

    /// The error message in the body, if it has the distribution specification's form. Other bodies are not shown:
    /// storage services quote parts of signed URLs in their errors.
    pub(super) async fn error_detail(&mut self) -> String {
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
        let shown = |item: &Item| {
            format!("{} {}", printable(&item.code), printable(&item.message))
                .trim()
                .to_owned()
        };
        errors.iter().take(3).map(shown).collect::<Vec<_>>().join("; ")
    }

    /// The next bytes of the body; `None` at its end.
    pub(super) async fn next(&mut self) -> Result<Option<Bytes>, Error> {
        let started = Instant::now();
        let chunk = match timing::time_receive(timeout(self.read_timeout, self.inner.chunk())).await {
            Ok(Ok(chunk)) => chunk,
            Ok(Err(error)) => return Err(self.context.failure(error, self.read_timeout)),
            Err(_) => {
                let error = self.context.timeout(self.read_timeout);
                self.observers.iter_mut().for_each(|observer| observer.stalled(&error));
                return Err(error);
            }
        };
        match &chunk {
            Some(_) => self.observers.iter_mut().for_each(|observer| observer.progressed()),
            None => self.complete(),
        }
        let received = chunk.as_ref().map_or(0, |bytes| bytes.len() as u64);
        self.counters.bytes_received.fetch_add(received, Ordering::Relaxed);
        self.pace.record(&self.context.host, started.elapsed(), received);
        Ok(chunk)
    }

    /// The whole body of at most `limit` bytes.
    pub(super) async fn read_all(&mut self, limit: u64) -> Result<Bytes, Error> {
        self.read_inspected(limit, |_| ()).await
    }

    /// The whole body of at most `limit` bytes, and its digest. Hashes bytes as they arrive: hashing a large body at
    /// once would block the thread's other tasks.
    pub(super) async fn read_hashed(&mut self, limit: u64) -> Result<(Bytes, Digest), Error> {
        let mut hasher = Sha256::new();
        let bytes = self.read_inspected(limit, |bytes| hasher.update(bytes)).await?;
        Ok((bytes, Digest::from_bytes(hasher.finalize().into())))
    }

    /// The whole body of at most `limit` bytes, each part of which is passed to `inspect`.
    async fn read_inspected(&mut self, limit: u64, mut inspect: impl FnMut(&[u8])) -> Result<Bytes, Error> {
        let expected = self.inner.content_length();
        let too_large = Error::TooLarge {
            what: self.context.what.clone(),
            limit,
        };
        if expected.is_some_and(|expected| expected > limit) {
            return Err(too_large);
        }
        let mut body = BytesMut::with_capacity(initial_capacity(expected.unwrap_or(0)));
        loop {
            let received = body.len() as u64;
            match self.next().await {
                Ok(Some(bytes)) if received + bytes.len() as u64 > limit => return Err(too_large),
                Ok(Some(bytes)) => {
                    inspect(&bytes);
                    body.extend_from_slice(&bytes);
                }
                Ok(None) => break,
                Err(error) => return Err(self.cut_short(error, expected, received)),
            }
        }
        match expected {
            Some(expected) if expected != body.len() as u64 => Err(self.short_body(expected, body.len() as u64)),
            _ => Ok(body.freeze()),
        }
    }

    /// Exactly `len` bytes of the body from byte `skip` on. Does not wait for what follows them.
    async fn read_part(&mut self, skip: u64, len: usize) -> Result<Bytes, Error> {
        let expected = skip.saturating_add(len as u64);
        let mut body = BytesMut::with_capacity(initial_capacity(len as u64));
        let mut at = 0;
        while body.len() < len {
            let bytes = match self.next().await {
                Ok(Some(bytes)) => bytes,
                Ok(None) => return Err(self.short_body(expected, at)),
                Err(error) => return Err(self.cut_short(error, Some(expected), at)),
            };
            // Both fit a `usize`: the length of `bytes` bounds them.
            let from = skip.saturating_sub(at).min(bytes.len() as u64) as usize;
            let to = expected.saturating_sub(at).min(bytes.len() as u64) as usize;
            body.extend_from_slice(&bytes[from..to]);
            at += bytes.len() as u64;
        }
        self.complete();
        Ok(body.freeze())
    }

    /// The `len` bytes at `offset` of the blob, from the answer to a request for that range.
    pub(super) async fn read_range(&mut self, offset: u64, len: usize) -> Result<Bytes, Error> {
        if self.status() == StatusCode::OK {
            // RFC 9110 allows a server to ignore ranges and to send everything.
            tracing::debug!(
                host = %self.context.host,
                skipped = offset,
                "skipping bytes of blob: host ignores ranges"
            );
            return match self.inner.content_length() {
                Some(size) if size < offset.saturating_add(len as u64) => {
                    Err(self.context.wrong_range(format!("it has {size} bytes")))
                }
                _ if offset > MAX_SKIPPED => Err(self.ranges_ignored(offset)),
                _ => self.read_part(offset, len).await,
            };
        }
        if self.status() != StatusCode::PARTIAL_CONTENT {
            return Err(self.invalid(format!("status {} to a range request", self.status())));
        }
        let last = offset.saturating_add((len as u64).saturating_sub(1));
        let skip = self.skip_in_range((offset, last))?;
        self.read_part(skip, len).await
    }

    /// How many bytes of an answer with status 206 precede the requested ones. Some servers, such as caches of aligned
    /// slices, send a longer range. A shorter one means that the blob ends there, so that a retry is useless.
    pub(super) fn skip_in_range(&self, (first, last): (u64, u64)) -> Result<u64, Error> {
        let value = self.header(header::CONTENT_RANGE).unwrap_or_default();
        match content_range(value) {
            Some((from, to)) if from <= first && to >= last && first - from <= MAX_SKIPPED => Ok(first - from),
            _ => Err(self
                .context
                .wrong_range(format!("requested bytes {first}-{last}, got `{}`", printable(value)))),
        }
    }

    /// The error for a whole blob where skipping `offset` bytes would take too long.
    pub(super) fn ranges_ignored(&self, offset: u64) -> Error {
        ranges_ignored(&self.context.host, &self.context.what, offset)
    }

    /// Turns a lost connection into a short body, if the expected length is known.
    fn cut_short(&self, error: Error, expected: Option<u64>, received: u64) -> Error {
        match (error, expected) {
            (Error::Interrupted { .. }, Some(expected)) => self.short_body(expected, received),
            (error, _) => error,
        }
    }

    pub(super) fn short_body(&self, expected: u64, actual: u64) -> Error {
        self.context.short_body(expected, actual)
    }
}

/// Bytes to allocate for a body said to have `bytes` bytes, which may be a lie.
fn initial_capacity(bytes: u64) -> usize {
    usize::try_from(bytes).map_or(MAX_PREALLOCATION, |bytes| bytes.min(MAX_PREALLOCATION))
}

/// First and last byte of `bytes 0-99/1000` ([RFC 9110, 14.4](https://www.rfc-editor.org/rfc/rfc9110#section-14.4)).
fn content_range(value: &str) -> Option<(u64, u64)> {
    let (unit, range) = value.trim().split_once(' ')?;
    let (first, last) = range.split_once('/')?.0.split_once('-')?;
    if !unit.eq_ignore_ascii_case("bytes") {
        return None;
    }
    Some((first.trim().parse().ok()?, last.trim().parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::content_range;

    #[test]
    fn only_byte_ranges_with_both_ends_are_parsed() {
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
}
