//! Clients of HTTP: one for each way in which connections differ.

use std::{collections::HashMap, path::PathBuf, sync::Arc};

use parking_lot::Mutex;
use reqwest::NoProxy;

use super::{
    Error, Options,
    settings::Proxy,
    timing,
    tls::{CertDir, Material, unusable},
    transport::{Trust, choose_cryptography},
};

/// How a host is reached.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) enum Route {
    /// By the proxy of the configuration or the environment, except for loopback.
    Usual,
    /// By this proxy.
    Through(Proxy),
    /// By none.
    Direct,
}

/// The certificates of a host, and whether they are its own: then the client's goes with them.
pub(super) type HostCerts = (CertDir, bool);

#[derive(PartialEq, Eq, Hash)]
struct Kind {
    trust: Trust,
    certs: Option<(PathBuf, bool)>,
    route: Route,
}

/// The clients made so far: as many as the configuration and the directories of certificates make different.
pub(super) struct Clients {
    options: Arc<Options>,
    made: Mutex<HashMap<Kind, (Option<CertDir>, reqwest::Client)>>,
}

impl Clients {
    pub(super) fn new(options: Arc<Options>) -> Result<Self, Error> {
        choose_cryptography();
        let made = Mutex::default();
        let clients = Self { options, made };
        // What is wrong in general is better known at once.
        clients.get(Trust::Strict, None, Route::Usual)?;
        Ok(clients)
    }

    /// The client for hosts of that kind, made anew if its certificates have changed.
    pub(super) fn get(&self, trust: Trust, certs: Option<HostCerts>, route: Route) -> Result<reqwest::Client, Error> {
        let kind = Kind {
            trust,
            certs: certs.as_ref().map(|(dir, own)| (dir.path.clone(), *own)),
            route,
        };
        let mut made = self.made.lock();
        let dir = certs.as_ref().map(|(dir, _)| dir);
        if let Some((_, client)) = made.get(&kind).filter(|(made_of, _)| made_of.as_ref() == dir) {
            return Ok(client.clone());
        }
        let client = self.build(&kind, certs.as_ref())?;
        made.insert(kind, (certs.map(|(dir, _)| dir), client.clone()));
        Ok(client)
    }

    fn build(&self, kind: &Kind, certs: Option<&HostCerts>) -> Result<reqwest::Client, Error> {
        let material = certs.map(|(dir, own)| dir.load(*own)).transpose()?;
        let built = self.builder(kind, material.as_ref(), true)?.build().or_else(|error| {
            // A machine without any CA certificates can still use insecure and loopback registries.
            let retry = self.builder(kind, material.as_ref(), false);
            let built = retry.map_err(|_| error)?.build()?;
            tracing::warn!(
                "the system's CA certificates cannot be used: only hosts with certificates of their own are trusted"
            );
            Ok(built)
        });
        built.map_err(|error: reqwest::Error| match certs {
            Some((dir, _)) => unusable(&dir.path, chain(&error)),
            None => setup(error),
        })
    }

    fn builder(
        &self,
        kind: &Kind,
        material: Option<&Material>,
        with_system: bool,
    ) -> Result<reqwest::ClientBuilder, Error> {
        let authorities = material.map_or(&[][..], |material| &material.authorities);
        let mut builder = reqwest::Client::builder()
            .connect_timeout(self.options.connect_timeout)
            .tcp_nodelay(true)
            .redirect(reqwest::redirect::Policy::none())
            .referer(false)
            .connector_layer(timing::ConnectLayer)
            .user_agent(concat!("nydus-store/", env!("CARGO_PKG_VERSION")));
        // Who gives authorities for a host on loopback wants them to be asked.
        let verified = kind.trust == Trust::Strict || kind.trust == Trust::Loopback && !authorities.is_empty();
        builder = match (verified, with_system) {
            (false, _) => builder.tls_danger_accept_invalid_certs(true),
            (true, true) => builder.tls_certs_merge(authorities.iter().cloned()),
            (true, false) => builder.tls_certs_only(authorities.iter().cloned()),
        };
        if let Some(identity) = material.and_then(|material| material.identity.clone()) {
            builder = builder.identity(identity);
        }
        Ok(match (&kind.route, kind.trust, &self.options.proxy) {
            (Route::Through(proxy), _, _) => builder.proxy(reqwest::Proxy::all(proxy.url().clone()).map_err(setup)?),
            (Route::Direct, _, _) | (Route::Usual, Trust::Loopback, _) => builder.no_proxy(),
            (Route::Usual, _, Some(proxy)) => {
                let proxy = reqwest::Proxy::all(proxy.url().clone()).map_err(setup)?;
                builder.proxy(proxy.no_proxy(self.without_proxy()))
            }
            (Route::Usual, _, None) => builder,
        })
    }

    fn without_proxy(&self) -> Option<NoProxy> {
        match &self.options.no_proxy {
            Some(hosts) => NoProxy::from_string(&hosts.join(",")),
            None => NoProxy::from_env(),
        }
    }
}

fn setup(error: reqwest::Error) -> Error {
    let source = Arc::new(error.without_url());
    Error::Setup { source }
}

/// What an error and those beneath it say.
fn chain(error: &reqwest::Error) -> String {
    let mut text = error.to_string();
    let mut next = std::error::Error::source(error);
    while let Some(error) = next {
        text = format!("{text}: {error}");
        next = error.source();
    }
    text
}
