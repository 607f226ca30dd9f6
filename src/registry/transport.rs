//! Requests over HTTP: which host may be spoken to how, redirects, and answers read within bounds of time and size.

use std::{
    net::IpAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use reqwest::{
    Method, StatusCode, Url,
    header::{self, HeaderValue},
};
use tracing::debug;

use super::{
    Error, Options,
    response::{Response, Target, failure, invalid},
    timing,
};

/// Most redirects followed for one request.
const MAX_REDIRECTS: usize = 5;

/// What a client has done so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Stats {
    /// HTTP requests sent: retries, redirects and tokens count too.
    pub requests: u64,
    /// Bytes of bodies received.
    pub bytes_received: u64,
}

#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) requests: AtomicU64,
    pub(super) bytes_received: AtomicU64,
}

impl Counters {
    pub(super) fn stats(&self) -> Stats {
        Stats {
            requests: self.requests.load(Ordering::Relaxed),
            bytes_received: self.bytes_received.load(Ordering::Relaxed),
        }
    }
}

/// How far a host is trusted without proof.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Trust {
    /// Verified TLS only.
    Strict,
    /// Listed as insecure: unverified TLS, or plain HTTP.
    Insecure,
    /// This machine: as insecure ones, and no proxy is asked.
    Loopback,
}

/// One request; no `Debug`, because it holds the secret that authorizes it.
#[derive(Clone)]
pub(super) struct Request<'a> {
    pub(super) method: Method,
    pub(super) url: Url,
    pub(super) accept: Option<&'static str>,
    /// First and last byte wanted.
    pub(super) range: Option<(u64, u64)>,
    pub(super) authorization: Option<HeaderValue>,
    /// The body of a POST, `application/x-www-form-urlencoded`.
    pub(super) form: Option<String>,
    /// What is asked for, for messages.
    pub(super) what: &'a str,
}

impl<'a> Request<'a> {
    pub(super) fn new(method: Method, url: Url, what: &'a str) -> Self {
        Self {
            method,
            url,
            accept: None,
            range: None,
            authorization: None,
            form: None,
            what,
        }
    }
}

/// The connections to all hosts.
pub(super) struct Transport {
    strict: reqwest::Client,
    insecure: reqwest::Client,
    loopback: reqwest::Client,
    options: Arc<Options>,
    pub(super) counters: Arc<Counters>,
}

impl Transport {
    pub(super) fn new(options: Arc<Options>) -> Result<Self, Error> {
        choose_cryptography();
        let setup = |error: reqwest::Error| Error::Setup {
            source: Arc::new(error),
        };
        let builder = || {
            reqwest::Client::builder()
                .connect_timeout(options.connect_timeout)
                .tcp_nodelay(true)
                .redirect(reqwest::redirect::Policy::none())
                .referer(false)
                .connector_layer(timing::ConnectLayer)
                .user_agent(concat!("nydus-store/", env!("CARGO_PKG_VERSION")))
        };
        let strict = builder().build().or_else(|error| {
            // A machine without any CA certificates can still use insecure and loopback registries.
            tracing::warn!(error = %error, "the system's CA certificates cannot be used: no TLS host will be trusted");
            builder().tls_certs_only([]).build()
        });
        Ok(Self {
            strict: strict.map_err(setup)?,
            insecure: builder().tls_danger_accept_invalid_certs(true).build().map_err(setup)?,
            loopback: builder()
                .tls_danger_accept_invalid_certs(true)
                .no_proxy()
                .build()
                .map_err(setup)?,
            options,
            counters: Arc::default(),
        })
    }

    /// How far the host of `url` is trusted.
    pub(super) fn trust(&self, url: &Url) -> Trust {
        let host = url.host_str().unwrap_or_default();
        if is_loopback(host) {
            return Trust::Loopback;
        }
        let with_port = url.port_or_known_default().map(|port| format!("{host}:{port}"));
        let listed = |entry: &String| {
            (url.port().is_none() && entry.eq_ignore_ascii_case(host))
                || with_port.as_ref().is_some_and(|name| entry.eq_ignore_ascii_case(name))
        };
        if self.options.insecure.iter().any(listed) {
            Trust::Insecure
        } else {
            Trust::Strict
        }
    }

    /// Sends one request and waits for the headers of its answer, whatever the status.
    pub(super) async fn send(&self, request: &Request<'_>, trust: Trust) -> Result<Response, Error> {
        let Request { method, url, what, .. } = request;
        let client = match trust {
            Trust::Strict => &self.strict,
            Trust::Insecure => &self.insecure,
            Trust::Loopback => &self.loopback,
        };
        let mut builder = client
            .request(method.clone(), url.clone())
            .header(header::ACCEPT_ENCODING, "identity");
        if let Some(accept) = request.accept {
            builder = builder.header(header::ACCEPT, accept);
        }
        if let Some((first, last)) = request.range {
            builder = builder.header(header::RANGE, format!("bytes={first}-{last}"));
        }
        if let Some(authorization) = &request.authorization {
            builder = builder.header(header::AUTHORIZATION, authorization);
        }
        if let Some(form) = &request.form {
            builder = builder
                .header(header::CONTENT_TYPE, "application/x-www-form-urlencoded")
                .body(form.clone());
        }
        self.counters.requests.fetch_add(1, Ordering::Relaxed);
        let target = Target::new(url, what);
        let patience = self.options.connect_timeout + self.options.read_timeout;
        let answer = match timing::sending(tokio::time::timeout(patience, builder.send())).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(error)) => return Err(failure(&target, error, patience)),
            Err(_) => return Err(target.timeout(patience)),
        };
        let (status, range) = (answer.status().as_u16(), request.range);
        debug!(%method, url = plain(url), ?range, status, "registry request");
        Ok(Response::new(
            answer,
            target,
            self.options.read_timeout,
            self.counters.clone(),
        ))
    }

    /// Follows the redirects that `response`, the answer to `request`, may be the first of.
    ///
    /// Credentials stay with the scheme, host and port they were meant for, and nobody is led from TLS to plain HTTP
    /// except on hosts where that is allowed anyway.
    pub(super) async fn follow(&self, mut request: Request<'_>, mut response: Response) -> Result<Response, Error> {
        for _ in 0..MAX_REDIRECTS {
            let Some(location) = redirect(&response, &request)? else {
                return Ok(response);
            };
            let trust = self.trust(&location);
            if request.url.scheme() == "https" && location.scheme() == "http" && trust == Trust::Strict {
                let detail = format!("it redirects from TLS to plain HTTP on {}", authority(&location));
                return Err(invalid(&request.url, request.what, detail));
            }
            let moved = origin(&request.url) != origin(&location);
            if moved {
                request.authorization = None;
            }
            request.url = location;
            let foreign = response.is_foreign() || moved;
            response.drain().await;
            response = self.send(&request, trust).await?;
            response.set_foreign(foreign);
        }
        match redirect(&response, &request)? {
            None => Ok(response),
            Some(_) => Err(invalid(
                &request.url,
                request.what,
                format!("it redirects more than {MAX_REDIRECTS} times"),
            )),
        }
    }
}

/// Has TLS use this process's only implementation, without which no HTTP client can be made.
pub fn choose_cryptography() {
    // An error means that one has been chosen already, which serves as well.
    let _ = rustls::crypto::ring::default_provider().install_default();
}

/// Where `response` redirects to, if it does.
fn redirect(response: &Response, request: &Request<'_>) -> Result<Option<Url>, Error> {
    use StatusCode as S;
    let redirects = [
        S::MOVED_PERMANENTLY,
        S::FOUND,
        S::SEE_OTHER,
        S::TEMPORARY_REDIRECT,
        S::PERMANENT_REDIRECT,
    ];
    if !redirects.contains(&response.status()) {
        return Ok(None);
    }
    let invalid = |detail: &str| invalid(&request.url, request.what, detail.to_owned());
    let location = response
        .header(header::LOCATION)
        .ok_or_else(|| invalid("a redirect without a usable location"))?;
    let location = request
        .url
        .join(location)
        .map_err(|_| invalid("a redirect to something that is no URL"))?;
    match without_user(location) {
        Some(location) => Ok(Some(location)),
        None => Err(invalid("a redirect to something else than HTTP")),
    }
}

/// `url` without user and password, which would become credentials of the request; `None` if it is not HTTP(S).
pub(super) fn without_user(mut url: Url) -> Option<Url> {
    let http = matches!(url.scheme(), "http" | "https");
    (http && url.set_username("").is_ok() && url.set_password(None).is_ok()).then_some(url)
}

/// What may share credentials.
fn origin(url: &Url) -> (&str, Option<&str>, Option<u16>) {
    (url.scheme(), url.host_str(), url.port_or_known_default())
}

/// `host[:port]` of `url`.
pub(super) fn authority(url: &Url) -> String {
    let host = url.host_str().unwrap_or_default();
    url.port()
        .map_or_else(|| host.to_owned(), |port| format!("{host}:{port}"))
}

/// `url` without what may be secret in it: user, password, query and fragment.
pub(super) fn plain(url: &Url) -> String {
    format!("{}://{}{}", url.scheme(), authority(url), url.path())
}

/// This machine by its address or by the name RFC 6761 reserves for it.
fn is_loopback(host: &str) -> bool {
    let address = host.trim_start_matches('[').trim_end_matches(']');
    host == "localhost" || address.parse().is_ok_and(|ip: IpAddr| ip.to_canonical().is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn trust(url: &str, insecure: &[&str]) -> Trust {
        let insecure = insecure.iter().map(|entry| entry.to_string()).collect();
        let options = Options {
            insecure,
            ..Options::default()
        };
        Transport::new(Arc::new(options))
            .unwrap()
            .trust(&Url::parse(url).unwrap())
    }

    #[test]
    fn only_loopback_and_listed_hosts_are_relaxed() {
        for url in [
            "http://127.0.0.1:5000/",
            "https://127.8.0.1",
            "http://[::1]:80/",
            "http://LOCALHOST:1/",
        ] {
            assert_eq!(trust(url, &[]), Trust::Loopback, "{url}");
        }
        for url in [
            "https://127.0.0.1.example/",
            "https://localhost.example/",
            "http://10.0.0.1/",
            "https://128.0.0.1",
        ] {
            assert_eq!(trust(url, &["example", "10.0.0.1:5000"]), Trust::Strict, "{url}");
        }
        assert_eq!(trust("https://r.example/", &["R.example"]), Trust::Insecure);
        assert_eq!(trust("https://r.example/", &["r.example:443"]), Trust::Insecure);
        assert_eq!(trust("https://r.example:5000/", &["r.example:5000"]), Trust::Insecure);
        assert_eq!(trust("https://r.example:5000/", &["r.example"]), Trust::Strict);
    }

    #[test]
    fn printed_urls_keep_no_secrets() {
        let url = Url::parse("https://user:secret@r.example:1/v2/a?sig=secret#secret").unwrap();
        assert_eq!(plain(&url), "https://r.example:1/v2/a");
        assert_eq!(
            without_user(url).unwrap().as_str(),
            "https://r.example:1/v2/a?sig=secret#secret"
        );
    }
}
