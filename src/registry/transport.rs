//! Requests over HTTP: which host may be spoken to how, redirects, and answers read within bounds of time and size.

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use reqwest::{
    Method, StatusCode, Url,
    header::{self, HeaderValue},
};
use tracing::debug;

use super::{
    Error, HostSettings, Options,
    circuit::Circuit,
    clients::{Clients, Purpose, Route},
    health::Health,
    hosts::api_name,
    response::{Response, Target, failure, invalid},
    timing,
    tls::{self, Certs},
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
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
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
    /// The registry that is asked, even if it has led to another host: its authorities will do for that too.
    pub(super) home: &'a str,
    /// The registry that the image is named by, of which `home` may be a mirror.
    pub(super) named: &'a str,
    /// Whether somebody else is asked if this fails.
    pub(super) alternative: bool,
    /// When the time for it is over, as far as that is known.
    pub(super) due: Option<Instant>,
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
            home: "",
            named: "",
            alternative: false,
            due: None,
        }
    }
}

/// What the configuration says of a host, and how that is.
struct Special {
    settings: HostSettings,
    health: Option<Arc<Health>>,
}

/// The connections to all hosts.
pub(super) struct Transport {
    clients: Arc<Clients>,
    special: HashMap<String, Special>,
    pub(super) options: Arc<Options>,
    /// Whether hosts answer that registries lead to, by authority.
    pub(super) elsewhere: Mutex<HashMap<String, Arc<Circuit>>>,
    pub(super) counters: Arc<Counters>,
}

impl Transport {
    pub(super) fn new(options: Arc<Options>) -> Result<Self, Error> {
        let usual = || tls::usual_dirs(|name| std::env::var_os(name));
        let special = |settings: &HostSettings| {
            let name = key(&settings.name);
            let check = settings.health_check.clone();
            let health = check.map(|check| Arc::new(Health::new(name.clone(), check, options.connect_timeout)));
            let settings = settings.clone();
            (name, Special { settings, health })
        };
        let certs = Certs::new(options.certs_dirs.clone().unwrap_or_else(usual));
        Ok(Self {
            clients: Arc::new(Clients::new(options.clone(), certs)?),
            special: options.hosts.iter().map(special).collect(),
            options,
            elsewhere: Mutex::default(),
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

    /// Refuses a host whose health check fails, unless there is a way round what is ill.
    pub(super) async fn check_health(&self, host: &str) -> Result<(), Error> {
        let Some(Special {
            settings,
            health: Some(health),
        }) = self.special.get(&key(host))
        else {
            return Ok(());
        };
        if settings.proxy.is_some() || self.is_well(health).await? {
            return Ok(());
        }
        Err(Error::Unhealthy {
            host: host.to_owned(),
            check: authority(health.check().url()),
        })
    }

    async fn is_well(&self, health: &Arc<Health>) -> Result<bool, Error> {
        Ok(health.is_well(&self.checker(health).await?).await)
    }

    /// The client for checks.
    async fn checker(&self, health: &Health) -> Result<reqwest::Client, Error> {
        let purpose = Purpose {
            trust: self.trust(health.check().url()),
            route: Route::Direct,
            certs_of: Vec::new(),
        };
        self.clients.get(purpose).await
    }

    /// Sends one request and waits for the headers of its answer, whatever the status.
    pub(super) async fn send(&self, request: &Request<'_>, trust: Trust) -> Result<Response, Error> {
        let name = name_of(&request.url);
        let Some(Special { settings, health }) = self.special.get(&name) else {
            return self.send_by(request, trust, Route::Usual).await;
        };
        let Some(proxy) = settings.proxy.clone() else {
            return self.send_by(request, trust, Route::Usual).await;
        };
        let Some(health) = health else {
            return self.send_by(request, trust, Route::Through(proxy)).await;
        };
        if self.is_well(health).await? {
            let sent = self.send_by(request, trust, Route::Through(proxy)).await;
            // It may be the proxy that cannot be reached, or what is behind it.
            if !matches!(sent, Err(Error::Unreachable { .. }))
                || health.is_still_well(&self.checker(health).await?).await
            {
                return sent;
            }
        }
        self.send_by(request, trust, Route::Usual).await
    }

    async fn send_by(&self, request: &Request<'_>, trust: Trust, route: Route) -> Result<Response, Error> {
        let Request { method, url, what, .. } = request;
        let mut target = Target::new(url, what);
        if let Route::Through(proxy) = &route {
            target.by(proxy);
        }
        let certs_of = certs_of(request);
        let purpose = Purpose { trust, route, certs_of };
        let client = self.clients.get(purpose).await?;
        let mut builder = client
            .request(method.clone(), url.clone())
            .header(header::ACCEPT_ENCODING, "identity");
        if let Some(Special { settings, .. }) = self.special.get(&name_of(url)) {
            let named = if request.named.is_empty() {
                request.home
            } else {
                request.named
            };
            for (name, value) in settings.headers.of(api_name(named)) {
                builder = builder.header(name, value);
            }
        }
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
        let patience = self.patience();
        let answer = match timing::sending(tokio::time::timeout(patience, builder.send())).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(error)) => return Err(failure(&target, error, patience)),
            Err(_) => return Err(target.timeout(patience)),
        };
        let (status, range) = (answer.status().as_u16(), request.range);
        debug!(%method, url = plain(url), ?range, status, "registry request");
        let (read_timeout, counters) = (self.options.read_timeout, self.counters.clone());
        Ok(Response::new(answer, target, read_timeout, counters, trust))
    }

    /// How long the headers of an answer may take, the connection included.
    fn patience(&self) -> Duration {
        let Options {
            connect_timeout,
            answer_timeout,
            read_timeout,
            ..
        } = *self.options;
        connect_timeout.saturating_add(answer_timeout.unwrap_or(read_timeout))
    }

    /// Follows the redirects that `response`, the answer to `request`, may be the first of.
    ///
    /// Credentials stay with the scheme, host and port they were meant for, and nobody is led from TLS to plain HTTP
    /// except on hosts where that is allowed anyway.
    pub(super) async fn follow(&self, mut request: Request<'_>, mut response: Response) -> Result<Response, Error> {
        let home = authority(&request.url);
        for _ in 0..MAX_REDIRECTS {
            let Some(location) = redirect(&response, &request)? else {
                return Ok(response);
            };
            if let Some(why) = self.leads_in(&request.url, &location) {
                return Err(invalid(&request.url, request.what, format!("it redirects to {why}")));
            }
            let trust = match authority(&location) == authority(&request.url) {
                true => response.trust(),
                false => self.trust(&location),
            };
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
            response = match authority(&request.url) == home {
                true => self.send(&request, trust).await?,
                false => self.send_elsewhere(&request, trust).await?,
            };
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

/// Whose certificates are for the host of `request`. One that has none of its own is verified by those of the registry
/// that led there, as a token server beside it; but no client certificate goes to it.
fn certs_of(request: &Request<'_>) -> Vec<(String, bool)> {
    if request.url.scheme() != "https" {
        return Vec::new();
    }
    let name = name_of(&request.url);
    let with_port = request.url.port().is_none().then(|| format!("{name}:443"));
    let own = [name].into_iter().chain(with_port).map(|name| (name, true));
    let home = (!request.home.is_empty()).then(|| (request.home.to_owned(), false));
    own.chain(home).collect()
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

/// `host[:port]` as [`name_of`] has it: in small letters, and without the port that HTTPS has anyway.
fn key(name: &str) -> String {
    let name = name.to_ascii_lowercase();
    name.strip_suffix(":443").map_or_else(|| name.clone(), str::to_owned)
}

/// What registries.conf, certs.d and the configuration call the host of `url`.
fn name_of(url: &Url) -> String {
    match authority(url) {
        hub if hub == api_name("docker.io") => "docker.io".to_owned(),
        name => name,
    }
}

/// `url` without what may be secret in it: user, password, query and fragment.
pub(super) fn plain(url: &Url) -> String {
    format!("{}://{}{}", url.scheme(), authority(url), url.path())
}

/// This machine by its address or by the name RFC 6761 reserves for it.
pub(super) fn is_loopback(host: &str) -> bool {
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
