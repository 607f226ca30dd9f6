//! Sends one HTTP request over the right connection, with the host's headers, proxy and health check.

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use reqwest::{Url, header};
use tracing::debug;

use super::{
    Error, HostSettings, Options,
    health::HealthCheck,
    host_certs::{self, CertDirs},
    host_name::{Trust, api_host, authority, config_name, normalized, redacted},
    http_clients::{ConnectionSpec, HttpClients, Route},
    pace::{Pace, SlowHosts},
    request::HttpRequest,
    request_context::RequestContext,
    response::Response,
    stats::Counters,
    timing,
};

/// A host's settings, with its health check if it has one.
struct ConfiguredHost {
    settings: HostSettings,
    health: Option<Arc<HealthCheck>>,
}

/// Sends requests to any host. Knows no retries, redirects or circuits.
pub(super) struct Transport {
    clients: Arc<HttpClients>,
    configured_hosts: HashMap<String, ConfiguredHost>,
    options: Arc<Options>,
    pub(super) counters: Counters,
    slow_hosts: Arc<SlowHosts>,
}

impl Transport {
    pub(super) fn new(options: Arc<Options>) -> Result<Self, Error> {
        let default_dirs = || host_certs::default_dirs(|name| std::env::var_os(name));
        let configured_host = |settings: &HostSettings| {
            let name = normalized(&settings.name);
            let url = settings.health_check.clone();
            let health = url.map(|url| Arc::new(HealthCheck::new(name.clone(), url, options.connect_timeout)));
            let settings = settings.clone();
            (name, ConfiguredHost { settings, health })
        };
        let cert_dirs = CertDirs::new(options.certs_dirs.clone().unwrap_or_else(default_dirs));
        Ok(Self {
            clients: Arc::new(HttpClients::new(options.clone(), cert_dirs)?),
            configured_hosts: options.hosts.iter().map(configured_host).collect(),
            options,
            counters: Counters::default(),
            slow_hosts: Arc::default(),
        })
    }

    /// The trust in the host of `url`, as the configuration has it.
    pub(super) fn trust(&self, url: &Url) -> Trust {
        Trust::of(url, &self.options.insecure)
    }

    /// Refuses a host whose health check fails. A host with a proxy of its own passes: the proxy is bypassed instead.
    pub(super) async fn check_health(&self, host: &str) -> Result<(), Error> {
        let Some(ConfiguredHost {
            settings,
            health: Some(health),
        }) = self.configured_hosts.get(&normalized(host))
        else {
            return Ok(());
        };
        if settings.proxy.is_some() || self.is_healthy(health).await? {
            return Ok(());
        }
        Err(Error::Unhealthy {
            host: host.to_owned(),
            check: authority(health.url().url()),
        })
    }

    async fn is_healthy(&self, health: &Arc<HealthCheck>) -> Result<bool, Error> {
        Ok(health.is_healthy(&self.health_client(health).await?).await)
    }

    async fn health_client(&self, health: &HealthCheck) -> Result<reqwest::Client, Error> {
        let spec = ConnectionSpec {
            trust: self.trust(health.url().url()),
            route: Route::Direct,
            certs_of: Vec::new(),
        };
        self.clients.get(spec).await
    }

    /// Sends one request and waits for the headers of its answer, whatever the status. Bypasses the host's proxy while
    /// its health check fails.
    pub(super) async fn send(&self, request: &HttpRequest<'_>, trust: Trust) -> Result<Response, Error> {
        let name = config_name(&request.url);
        let Some(ConfiguredHost { settings, health }) = self.configured_hosts.get(&name) else {
            return self.send_over(request, trust, Route::Default).await;
        };
        let Some(proxy) = settings.proxy.clone() else {
            return self.send_over(request, trust, Route::Default).await;
        };
        let Some(health) = health else {
            return self.send_over(request, trust, Route::Proxy(proxy)).await;
        };
        if self.is_healthy(health).await? {
            let sent = self.send_over(request, trust, Route::Proxy(proxy)).await;
            // Either the proxy or the host behind it may be unreachable.
            if !matches!(sent, Err(Error::Unreachable { .. }))
                || health.recheck(&self.health_client(health).await?).await
            {
                return sent;
            }
        }
        self.send_over(request, trust, Route::Default).await
    }

    async fn send_over(&self, request: &HttpRequest<'_>, trust: Trust, route: Route) -> Result<Response, Error> {
        let HttpRequest { method, url, what, .. } = request;
        let mut context = RequestContext::new(url, what);
        if let Route::Proxy(proxy) = &route {
            context.set_proxy(&proxy.authority());
        }
        let certs_of = certs_of(request);
        let client = self.clients.get(ConnectionSpec { trust, route, certs_of }).await?;
        let builder = self.with_headers(client.request(method.clone(), url.clone()), request);
        let counters = self.counters.host(config_name(url));
        let unanswered = counters.begin();
        let (header_timeout, started) = (self.header_timeout(), Instant::now());
        let answer = match timing::time_send(tokio::time::timeout(header_timeout, builder.send())).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(error)) => return Err(context.failure(error, header_timeout)),
            Err(_) => return Err(context.timeout(header_timeout)),
        };
        unanswered.answered(answer.status());
        let (status, range) = (answer.status().as_u16(), request.range);
        debug!(%method, url = redacted(url), ?range, status, "received registry response");
        let pace = Pace::new(Arc::clone(&self.slow_hosts), started.elapsed());
        let read_timeout = self.options.read_timeout;
        Ok(Response::new(answer, context, read_timeout, counters, pace, trust))
    }

    fn with_headers(&self, builder: reqwest::RequestBuilder, request: &HttpRequest<'_>) -> reqwest::RequestBuilder {
        let mut builder = builder.header(header::ACCEPT_ENCODING, "identity");
        if let Some(ConfiguredHost { settings, .. }) = self.configured_hosts.get(&config_name(&request.url)) {
            let image_registry = match request.image_registry {
                "" => request.registry,
                name => name,
            };
            for (name, value) in settings.headers.for_registry(api_host(image_registry)) {
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
        builder
    }

    /// Longest wait for the headers of an answer, the connection included.
    fn header_timeout(&self) -> Duration {
        let Options {
            connect_timeout,
            answer_timeout,
            read_timeout,
            ..
        } = *self.options;
        connect_timeout.saturating_add(answer_timeout.unwrap_or(read_timeout))
    }
}

/// The hosts whose certificates apply to `request`; the flag marks the host itself. A host without certificates of its
/// own, such as a token server, is verified with those of the registry that led there, but gets no client certificate.
fn certs_of(request: &HttpRequest<'_>) -> Vec<(String, bool)> {
    if request.url.scheme() != "https" {
        return Vec::new();
    }
    let name = config_name(&request.url);
    let with_port = request.url.port().is_none().then(|| format!("{name}:443"));
    let own = [name].into_iter().chain(with_port).map(|name| (name, true));
    let registry = (!request.registry.is_empty()).then(|| (request.registry.to_owned(), false));
    own.chain(registry).collect()
}
