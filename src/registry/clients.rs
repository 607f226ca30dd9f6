//! Clients of HTTP: one for each way in which connections differ.

use std::{collections::HashMap, path::PathBuf, sync::Arc};

use parking_lot::Mutex;
use reqwest::NoProxy;

use super::{
    Error, Options,
    settings::Proxy,
    timing,
    tls::{CertDir, Certs, Material, unusable},
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

/// What a client is for.
pub(super) struct Purpose {
    pub(super) trust: Trust,
    pub(super) route: Route,
    /// Hosts whose directories of certificates count, the first one that is there before others; and whether that is
    /// the host to be asked, to which alone the client's certificate goes.
    pub(super) certs_of: Vec<(String, bool)>,
}

/// The certificates of a host, and whether they are its own: then the client's goes with them.
type HostCerts = (CertDir, bool);

#[derive(PartialEq, Eq, Hash)]
struct Kind {
    trust: Trust,
    certs: Option<(PathBuf, bool)>,
    route: Route,
}

/// The clients made so far: as many as the configuration and the directories of certificates make different.
pub(super) struct Clients {
    options: Arc<Options>,
    certs: Certs,
    /// Never held while a disk is waited for.
    made: Mutex<HashMap<Kind, (Option<CertDir>, reqwest::Client)>>,
    /// Held while a client is built, so that requests that come together for one share it.
    building: Mutex<()>,
}

impl Clients {
    pub(super) fn new(options: Arc<Options>, certs: Certs) -> Result<Self, Error> {
        choose_cryptography();
        let clients = Self {
            options,
            certs,
            made: Mutex::default(),
            building: Mutex::default(),
        };
        // What is wrong in general is better known at once.
        clients.build_for(&Purpose {
            trust: Trust::Strict,
            route: Route::Usual,
            certs_of: Vec::new(),
        })?;
        Ok(clients)
    }

    /// The client for that purpose, made anew if its certificates have changed. Files are read where that holds up no
    /// other task.
    pub(super) async fn get(self: &Arc<Self>, purpose: Purpose) -> Result<reqwest::Client, Error> {
        let certs = purpose.certs(|host| self.certs.fresh(host));
        if let Some(client) = certs.and_then(|certs| self.made(&purpose.kind(&certs), &certs)) {
            return Ok(client);
        }
        let clients = Arc::clone(self);
        let built = tokio::task::spawn_blocking(move || clients.build_for(&purpose)).await;
        built.unwrap_or_else(|error| {
            Err(Error::Setup {
                source: Arc::new(error),
            })
        })
    }

    fn build_for(&self, purpose: &Purpose) -> Result<reqwest::Client, Error> {
        let certs = purpose.certs(|host| Some(self.certs.of(host))).flatten();
        let kind = purpose.kind(&certs);
        let _building = self.building.lock();
        if let Some(client) = self.made(&kind, &certs) {
            return Ok(client);
        }
        let client = self.build(&kind, certs.as_ref())?;
        let dir = certs.map(|(dir, _)| dir);
        self.made.lock().insert(kind, (dir, client.clone()));
        Ok(client)
    }

    /// The client of that kind, if it was made with these certificates.
    fn made(&self, kind: &Kind, certs: &Option<HostCerts>) -> Option<reqwest::Client> {
        let made = self.made.lock();
        let (made_of, client) = made.get(kind)?;
        let dir = certs.as_ref().map(|(dir, _)| dir);
        (made_of.as_ref() == dir).then(|| client.clone())
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

impl Purpose {
    /// The certificates, by what `look` knows of each host; `None` if it does not know one that matters.
    fn certs(&self, look: impl Fn(&str) -> Option<Option<CertDir>>) -> Option<Option<HostCerts>> {
        for (host, is_own) in &self.certs_of {
            if let Some(dir) = look(host)? {
                return Some(Some((dir, *is_own)));
            }
        }
        Some(None)
    }

    fn kind(&self, certs: &Option<HostCerts>) -> Kind {
        Kind {
            trust: self.trust,
            certs: certs.as_ref().map(|(dir, own)| (dir.path.clone(), *own)),
            route: self.route.clone(),
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

#[cfg(test)]
mod tests {
    use std::{sync::mpsc, time::Duration};

    use super::*;

    #[tokio::test]
    async fn tasks_go_on_while_a_client_is_built() {
        let clients = Arc::new(Clients::new(Arc::default(), Certs::new(Vec::new())).unwrap());
        let purpose = |trust| Purpose {
            trust,
            route: Route::Usual,
            certs_of: Vec::new(),
        };
        let ((building, begun), (end, ended)) = (mpsc::channel(), mpsc::channel::<()>());
        let slow = Arc::clone(&clients);
        let builder = std::thread::spawn(move || {
            let _building = slow.building.lock();
            building.send(()).unwrap();
            ended.recv().unwrap();
        });
        begun.recv().unwrap();
        let is_made = clients.get(purpose(Trust::Strict)).await.is_ok();
        assert!(is_made, "one that is there is waited for by nobody");
        // The test's only thread would be blocked otherwise.
        let waited = tokio::time::timeout(Duration::from_millis(50), clients.get(purpose(Trust::Insecure))).await;
        assert!(waited.is_err());
        end.send(()).unwrap();
        builder.join().unwrap();
        assert!(clients.get(purpose(Trust::Insecure)).await.is_ok());
    }

    #[test]
    fn clients_that_were_made_are_known_by_their_certificates() {
        let dir = tempfile::tempdir().unwrap();
        let clients = Clients::new(Arc::default(), Certs::new(vec![dir.path().to_owned()])).unwrap();
        let purpose = Purpose {
            trust: Trust::Strict,
            route: Route::Usual,
            certs_of: vec![("own.example".to_owned(), true), ("home.example".to_owned(), false)],
        };
        assert_eq!(
            purpose.certs(|host| clients.certs.fresh(host)),
            None,
            "nobody has looked"
        );
        clients.build_for(&purpose).unwrap();
        assert_eq!(purpose.certs(|host| clients.certs.fresh(host)), Some(None));
        std::fs::create_dir(dir.path().join("home.example")).unwrap();
        let look = |host: &str| Some(Certs::new(vec![dir.path().to_owned()]).of(host));
        let certs = purpose.certs(look).unwrap();
        assert!(certs.as_ref().is_some_and(|(_, is_own)| !is_own));
        assert!(clients.made(&purpose.kind(&None), &None).is_some());
        assert!(clients.made(&purpose.kind(&certs), &certs).is_none());
    }
}
