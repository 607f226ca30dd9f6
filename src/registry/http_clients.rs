//! HTTP clients: one for each combination of trust, certificates and proxy.

use std::{collections::HashMap, path::PathBuf, sync::Arc};

use parking_lot::Mutex;
use reqwest::NoProxy;

use super::{
    Error, Options,
    host_certs::{CertDir, CertDirs, HostCerts, unusable},
    host_name::Trust,
    settings::Proxy,
    timing,
};
use crate::error_chain::ErrorChain;

/// How a host is reached.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) enum Route {
    /// Through the proxy of the configuration or the environment, except for loopback.
    Default,
    /// Through this proxy.
    Proxy(Proxy),
    /// Through no proxy.
    Direct,
}

/// The properties of a connection.
pub(super) struct ConnectionSpec {
    pub(super) trust: Trust,
    pub(super) route: Route,
    /// Hosts whose certificate directories apply, the first existing one only. The flag marks the host connected to:
    /// the client certificate is sent to no other.
    pub(super) certs_of: Vec<(String, bool)>,
}

/// A certificate directory, and whether it belongs to the host connected to.
type OwnedCertDir = (CertDir, bool);

#[derive(PartialEq, Eq, Hash)]
struct ClientKey {
    trust: Trust,
    certs: Option<(PathBuf, bool)>,
    route: Route,
}

/// The clients built so far. The configuration and the certificate directories bound their number.
pub(super) struct HttpClients {
    options: Arc<Options>,
    cert_dirs: CertDirs,
    /// Never held during disk I/O.
    built: Mutex<HashMap<ClientKey, (Option<CertDir>, reqwest::Client)>>,
    /// Held while a client is built, so that concurrent requests share it.
    building: Mutex<()>,
}

impl HttpClients {
    pub(super) fn new(options: Arc<Options>, cert_dirs: CertDirs) -> Result<Self, Error> {
        install_crypto_provider();
        let clients = Self {
            options,
            cert_dirs,
            built: Mutex::default(),
            building: Mutex::default(),
        };
        // Reports general problems at start.
        clients.get_or_build(&ConnectionSpec {
            trust: Trust::Strict,
            route: Route::Default,
            certs_of: Vec::new(),
        })?;
        Ok(clients)
    }

    /// The client for `spec`, built anew if its certificates have changed. Reads files on a blocking thread.
    pub(super) async fn get(self: &Arc<Self>, spec: ConnectionSpec) -> Result<reqwest::Client, Error> {
        let certs = spec.certs(|host| self.cert_dirs.cached(host));
        if let Some(client) = certs.and_then(|certs| self.cached(&spec.key(&certs), &certs)) {
            return Ok(client);
        }
        let clients = Arc::clone(self);
        let built = tokio::task::spawn_blocking(move || clients.get_or_build(&spec)).await;
        built.unwrap_or_else(|error| {
            Err(Error::Setup {
                source: Arc::new(error),
            })
        })
    }

    fn get_or_build(&self, spec: &ConnectionSpec) -> Result<reqwest::Client, Error> {
        let certs = spec.certs(|host| Some(self.cert_dirs.get(host))).flatten();
        let key = spec.key(&certs);
        let _building = self.building.lock();
        if let Some(client) = self.cached(&key, &certs) {
            return Ok(client);
        }
        let client = self.build(&key, certs.as_ref())?;
        let dir = certs.map(|(dir, _)| dir);
        self.built.lock().insert(key, (dir, client.clone()));
        Ok(client)
    }

    /// The client for `key`, if it was built with these certificates.
    fn cached(&self, key: &ClientKey, certs: &Option<OwnedCertDir>) -> Option<reqwest::Client> {
        let built = self.built.lock();
        let (built_with, client) = built.get(key)?;
        let dir = certs.as_ref().map(|(dir, _)| dir);
        (built_with.as_ref() == dir).then(|| client.clone())
    }

    fn build(&self, key: &ClientKey, certs: Option<&OwnedCertDir>) -> Result<reqwest::Client, Error> {
        let host_certs = certs.map(|(dir, is_own)| dir.load(*is_own)).transpose()?;
        let built = self.builder(key, host_certs.as_ref(), true)?.build().or_else(|error| {
            // Without any CA certificates, insecure and loopback registries are still usable.
            let Ok(retry) = self.builder(key, host_certs.as_ref(), false) else {
                return Err(error);
            };
            let built = retry.build()?;
            tracing::warn!(
                error = %ErrorChain(&error),
                "failed to load system CA certificates; trusting only hosts with CA certificates of their own"
            );
            Ok(built)
        });
        built.map_err(|error: reqwest::Error| match certs {
            Some((dir, _)) => unusable(&dir.path, ErrorChain(&error.without_url()).to_string()),
            None => setup(error),
        })
    }

    fn builder(
        &self,
        key: &ClientKey,
        host_certs: Option<&HostCerts>,
        with_system_certs: bool,
    ) -> Result<reqwest::ClientBuilder, Error> {
        let authorities = host_certs.map_or(&[][..], |certs| &certs.authorities);
        let mut builder = reqwest::Client::builder()
            .connect_timeout(self.options.connect_timeout)
            .tcp_nodelay(true)
            .redirect(reqwest::redirect::Policy::none())
            .referer(false)
            .connector_layer(timing::ConnectLayer)
            .user_agent(concat!("nydus-store/", env!("CARGO_PKG_VERSION")));
        // Configured CA certificates of a host on loopback are there to be verified against.
        let is_verified = key.trust == Trust::Strict || key.trust == Trust::Loopback && !authorities.is_empty();
        builder = match (is_verified, with_system_certs) {
            (false, _) => builder.tls_danger_accept_invalid_certs(true),
            (true, true) => builder.tls_certs_merge(authorities.iter().cloned()),
            (true, false) => builder.tls_certs_only(authorities.iter().cloned()),
        };
        if let Some(identity) = host_certs.and_then(|certs| certs.identity.clone()) {
            builder = builder.identity(identity);
        }
        Ok(match (&key.route, key.trust, &self.options.proxy) {
            (Route::Proxy(proxy), _, _) => builder.proxy(reqwest::Proxy::all(proxy.url().clone()).map_err(setup)?),
            (Route::Direct, _, _) | (Route::Default, Trust::Loopback, _) => builder.no_proxy(),
            (Route::Default, _, Some(proxy)) => {
                let proxy = reqwest::Proxy::all(proxy.url().clone()).map_err(setup)?;
                builder.proxy(proxy.no_proxy(self.no_proxy()))
            }
            (Route::Default, _, None) => builder,
        })
    }

    fn no_proxy(&self) -> Option<NoProxy> {
        match &self.options.no_proxy {
            Some(hosts) => NoProxy::from_string(&hosts.join(",")),
            None => NoProxy::from_env(),
        }
    }
}

impl ConnectionSpec {
    /// The certificate directory that applies, if any; the outer `None` means that `look_up` does not know a host's.
    fn certs(&self, look_up: impl Fn(&str) -> Option<Option<CertDir>>) -> Option<Option<OwnedCertDir>> {
        for (host, is_own) in &self.certs_of {
            if let Some(dir) = look_up(host)? {
                return Some(Some((dir, *is_own)));
            }
        }
        Some(None)
    }

    fn key(&self, certs: &Option<OwnedCertDir>) -> ClientKey {
        ClientKey {
            trust: self.trust,
            certs: certs.as_ref().map(|(dir, is_own)| (dir.path.clone(), *is_own)),
            route: self.route.clone(),
        }
    }
}

fn setup(error: reqwest::Error) -> Error {
    let source = Arc::new(error.without_url());
    Error::Setup { source }
}

/// Selects ring as rustls' crypto provider for the whole process, which every HTTP client needs.
pub fn install_crypto_provider() {
    // An error means that a provider is installed already, which serves as well.
    let _ = rustls::crypto::ring::default_provider().install_default();
}

#[cfg(test)]
mod tests {
    use std::{sync::mpsc, time::Duration};

    use super::*;

    #[tokio::test]
    async fn building_a_client_blocks_no_task() {
        let clients = Arc::new(HttpClients::new(Arc::default(), CertDirs::new(Vec::new())).unwrap());
        let spec = |trust| ConnectionSpec {
            trust,
            route: Route::Default,
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
        let is_built = clients.get(spec(Trust::Strict)).await.is_ok();
        assert!(is_built, "an existing client is returned at once");
        // Blocking would stop the test's only thread.
        let waited = tokio::time::timeout(Duration::from_millis(50), clients.get(spec(Trust::Insecure))).await;
        assert!(waited.is_err());
        end.send(()).unwrap();
        builder.join().unwrap();
        assert!(clients.get(spec(Trust::Insecure)).await.is_ok());
    }

    #[test]
    fn changed_certificates_need_another_client() {
        let dir = tempfile::tempdir().unwrap();
        let clients = HttpClients::new(Arc::default(), CertDirs::new(vec![dir.path().to_owned()])).unwrap();
        let spec = ConnectionSpec {
            trust: Trust::Strict,
            route: Route::Default,
            certs_of: vec![("own.example".to_owned(), true), ("home.example".to_owned(), false)],
        };
        assert_eq!(
            spec.certs(|host| clients.cert_dirs.cached(host)),
            None,
            "not looked up yet"
        );
        clients.get_or_build(&spec).unwrap();
        assert_eq!(spec.certs(|host| clients.cert_dirs.cached(host)), Some(None));
        std::fs::create_dir(dir.path().join("home.example")).unwrap();
        let look_up = |host: &str| Some(CertDirs::new(vec![dir.path().to_owned()]).get(host));
        let certs = spec.certs(look_up).unwrap();
        assert!(certs.as_ref().is_some_and(|(_, is_own)| !is_own));
        assert!(clients.cached(&spec.key(&None), &None).is_some());
        assert!(clients.cached(&spec.key(&certs), &certs).is_none());
    }
}
