//! Answers in the distribution specification's form: headers, ranges and error bodies.

use axum::{
    body::Body,
    http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header},
    response::Response,
};
use bytes::Bytes;
use serde_json::json;

use crate::{digest::Digest, image::error::ImageError, registry, report::Report};

const CONTENT_DIGEST: HeaderName = HeaderName::from_static("docker-content-digest");
/// What tells this mirror from other registries.
pub const SERVER: &str = "nydus-store";
const API_VERSION: HeaderName = HeaderName::from_static("docker-distribution-api-version");

/// A request that is not answered with what was asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// The HTTP status.
    pub status: StatusCode,
    /// The specification's word.
    pub code: &'static str,
    /// What a person can make of it.
    pub message: String,
}

impl Refusal {
    /// Puts a refusal together.
    pub fn new(status: StatusCode, code: &'static str, message: impl ToString) -> Self {
        let message = message.to_string();
        Self { status, code, message }
    }

    /// Why a registry's thing cannot be given; `unknown` is the word for one that does not exist.
    pub fn registry(error: &registry::Error, unknown: &'static str) -> Self {
        // Of all that was asked, the registry has the last word.
        let decisive = match error {
            registry::Error::Everywhere { last, .. } => last,
            error => error,
        };
        let (status, code) = match decisive {
            registry::Error::NotFound { .. } => (StatusCode::NOT_FOUND, unknown),
            registry::Error::InvalidName { .. } => (StatusCode::BAD_REQUEST, "NAME_INVALID"),
            registry::Error::Unauthorized { .. } => (StatusCode::UNAUTHORIZED, "UNAUTHORIZED"),
            registry::Error::Denied { .. } => (StatusCode::FORBIDDEN, "DENIED"),
            registry::Error::Status { status: 429, .. } => (StatusCode::TOO_MANY_REQUESTS, "TOOMANYREQUESTS"),
            registry::Error::Timeout { .. } => (StatusCode::GATEWAY_TIMEOUT, "UNAVAILABLE"),
            _ => (StatusCode::BAD_GATEWAY, "UNAVAILABLE"),
        };
        Self::new(status, code, Report(error))
    }

    /// Why a manifest cannot be given.
    pub fn image(error: &ImageError) -> Self {
        match error {
            ImageError::Registry(error) => Self::registry(error, "MANIFEST_UNKNOWN"),
            ImageError::TimedOut(_) => Self::new(StatusCode::GATEWAY_TIMEOUT, "UNAVAILABLE", Report(error)),
            _ => Self::new(StatusCode::INTERNAL_SERVER_ERROR, "UNAVAILABLE", Report(error)),
        }
    }

    /// The response.
    pub fn respond(&self) -> Response {
        let body = json!({"errors": [{"code": self.code, "message": self.message}]}).to_string();
        let mut response = respond(self.status, Some(body.len() as u64), Body::from(body));
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        if self.status == StatusCode::FORBIDDEN {
            headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
        }
        response
    }
}

/// A response with the headers that all have.
pub fn respond(status: StatusCode, length: Option<u64>, body: Body) -> Response {
    let mut response = Response::new(body);
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(API_VERSION, HeaderValue::from_static("registry/2.0"));
    headers.insert(header::SERVER, HeaderValue::from_static(SERVER));
    if let Some(length) = length {
        headers.insert(header::CONTENT_LENGTH, length.into());
    }
    response
}

/// A manifest or an index.
pub fn manifest(bytes: Bytes, digest: &Digest, media_type: &str) -> Response {
    let mut response = respond(StatusCode::OK, Some(bytes.len() as u64), Body::from(bytes));
    let kind = HeaderValue::from_str(media_type);
    let kind = kind.unwrap_or(HeaderValue::from_static("application/octet-stream"));
    response.headers_mut().insert(header::CONTENT_TYPE, kind);
    name(response.headers_mut(), digest);
    response
}

/// The bytes of a blob that `body` gives: all of them, or first and last byte and the whole's length.
pub fn blob(digest: &Digest, length: Option<u64>, part: Option<(u64, u64, u64)>, body: Body) -> Response {
    let status = if part.is_some() {
        StatusCode::PARTIAL_CONTENT
    } else {
        StatusCode::OK
    };
    let mut response = respond(status, length, body);
    let headers = response.headers_mut();
    headers.insert(
        header::CONTENT_TYPE,
        HeaderValue::from_static("application/octet-stream"),
    );
    headers.insert(header::ACCEPT_RANGES, HeaderValue::from_static("bytes"));
    name(headers, digest);
    if let Some((first, last, size)) = part
        && let Ok(value) = HeaderValue::from_str(&format!("bytes {first}-{last}/{size}"))
    {
        headers.insert(header::CONTENT_RANGE, value);
    }
    response
}

/// The answer to a range that the blob does not have.
pub fn no_such_range(size: u64) -> Response {
    let message = format!("the blob has {size} bytes");
    let mut response = Refusal::new(StatusCode::RANGE_NOT_SATISFIABLE, "SIZE_INVALID", message).respond();
    if let Ok(value) = HeaderValue::from_str(&format!("bytes */{size}")) {
        response.headers_mut().insert(header::CONTENT_RANGE, value);
    }
    response
}

fn name(headers: &mut HeaderMap, digest: &Digest) {
    if let Ok(value) = HeaderValue::from_str(&digest.to_string()) {
        headers.insert(CONTENT_DIGEST, value);
    }
}

/// What a `Range` header asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Range {
    /// From a byte on, to a last one or to the end.
    From(u64, Option<u64>),
    /// So many bytes at the end.
    Last(u64),
}

impl Range {
    /// The one range in a request's headers. Several ranges, other units and what is malformed are ignored, as RFC 9110
    /// wants it.
    pub fn of(headers: &HeaderMap) -> Option<Self> {
        Self::parse(headers.get(header::RANGE)?.to_str().ok()?)
    }

    fn parse(text: &str) -> Option<Self> {
        let (first, last) = text.strip_prefix("bytes=")?.split_once('-')?;
        let (first, last) = (first.trim(), last.trim());
        match (first.is_empty(), last.is_empty()) {
            (true, _) => Some(Self::Last(last.parse().ok()?)),
            (false, true) => Some(Self::From(first.parse().ok()?, None)),
            (false, false) => {
                let (first, last) = (first.parse().ok()?, last.parse().ok()?);
                (first <= last).then_some(Self::From(first, Some(last)))
            }
        }
    }

    /// First and last byte in a blob of `size` bytes; `None` if it has no such bytes.
    pub fn within(self, size: u64) -> Option<(u64, u64)> {
        let end = size.checked_sub(1)?;
        match self {
            Self::From(first, last) => (first <= end).then(|| (first, last.unwrap_or(end).min(end))),
            Self::Last(0) => None,
            Self::Last(count) => Some((size.saturating_sub(count), end)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges() {
        for (text, size, expected) in [
            ("bytes=0-9", 100, Some((0, 9))),
            ("bytes=90-200", 100, Some((90, 99))),
            ("bytes=90-", 100, Some((90, 99))),
            ("bytes=-10", 100, Some((90, 99))),
            ("bytes=-1000", 100, Some((0, 99))),
            ("bytes=100-", 100, None),
            ("bytes=-0", 100, None),
            ("bytes=0-0", 0, None),
        ] {
            assert_eq!(Range::parse(text).unwrap().within(size), expected, "{text}");
        }
        for text in [
            "",
            "bytes=",
            "bytes=-",
            "bytes=5-1",
            "bytes=0-1,3-4",
            "items=0-1",
            "bytes=a-b",
            "bytes=--1",
        ] {
            assert_eq!(Range::parse(text), None, "{text}");
        }
    }
}
