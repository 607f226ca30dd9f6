//! TLS: CA certificates and client certificates in the directories of hosts.

use std::{fs, net::SocketAddr, path::Path, sync::Arc};

use axum::serve::Listener;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, ExtendedKeyUsagePurpose, IsCa, KeyPair};
use rustls::{
    RootCertStore, ServerConfig,
    pki_types::{CertificateDer, PrivateKeyDer},
    server::WebPkiClientVerifier,
};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::{TlsAcceptor, server::TlsStream};

use super::*;

/// A CA that signs for servers on 127.0.0.1 and for clients.
struct Authority(CertifiedIssuer<'static, KeyPair>);

impl Authority {
    fn new() -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        Self(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
    }

    fn pem(&self) -> String {
        self.0.pem()
    }

    fn signed(&self, usage: ExtendedKeyUsagePurpose) -> (rcgen::Certificate, KeyPair) {
        let mut params = CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap();
        params.extended_key_usages = vec![usage];
        let key = KeyPair::generate().unwrap();
        (params.signed_by(&key, &self.0).unwrap(), key)
    }
}

/// A listener that returns connections after their TLS handshake. Drops those that fail it.
struct TlsListener(TcpListener, TlsAcceptor);

impl Listener for TlsListener {
    type Io = TlsStream<TcpStream>;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Self::Io, SocketAddr) {
        loop {
            let Ok((stream, address)) = self.0.accept().await else {
                continue;
            };
            if let Ok(stream) = self.1.accept(stream).await {
                return (stream, address);
            }
        }
    }

    fn local_addr(&self) -> std::io::Result<SocketAddr> {
        self.0.local_addr()
    }
}

/// A server with a certificate of `authority`. Demands a client certificate if `wants_client`. Redirects to `target`,
/// if any.
async fn tls_server(authority: &Authority, wants_client: bool, target: Option<String>) -> Repository {
    crate::registry::install_crypto_provider();
    let (certificate, key) = authority.signed(ExtendedKeyUsagePurpose::ServerAuth);
    let builder = ServerConfig::builder();
    let builder = if wants_client {
        let mut roots = RootCertStore::empty();
        roots.add(authority.0.der().clone()).unwrap();
        builder.with_client_cert_verifier(WebPkiClientVerifier::builder(Arc::new(roots)).build().unwrap())
    } else {
        builder.with_no_client_auth()
    };
    let chain: Vec<CertificateDer<'static>> = vec![certificate.der().clone()];
    let key = PrivateKeyDer::try_from(key.serialize_der()).unwrap();
    let config = builder.with_single_cert(chain, key).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let app = axum::Router::new().fallback(move || {
        let target = target.clone();
        async move {
            match target {
                Some(target) => redirected(target),
                None => (
                    StatusCode::PARTIAL_CONTENT,
                    [(header::CONTENT_RANGE, "bytes 3-6/9")],
                    "safe",
                )
                    .into_response(),
            }
        }
    });
    let listener = TlsListener(listener, TlsAcceptor::from(Arc::new(config)));
    tokio::spawn(async move { axum::serve(listener, app).await });
    Repository::new(address.to_string(), "org/image")
}

fn write_certs(certs: &Path, repository: &Repository, files: &[(&str, &str)]) {
    let dir = certs.join(&repository.registry);
    fs::create_dir_all(&dir).unwrap();
    for (name, text) in files {
        fs::write(dir.join(name), text).unwrap();
    }
}

fn client_of(certs: &Path) -> Client {
    client_with(Options {
        certs_dirs: Some(vec![certs.to_owned()]),
        retries: 0,
        ..Options::default()
    })
}

async fn read(client: &Client, repository: &Repository) -> Result<bytes::Bytes, Error> {
    client.blob_range(repository, &any_digest(), 3, 4).await
}

#[tokio::test]
async fn private_ca_and_client_certificate_are_used() {
    let (authority, other) = (Authority::new(), Authority::new());
    let repository = tls_server(&authority, true, None).await;
    let certs = tempfile::tempdir().unwrap();
    let client = client_of(certs.path());
    write_certs(certs.path(), &repository, &[("ca.crt", &other.pem())]);
    let error = read(&client, &repository).await.unwrap_err();
    assert!(matches!(error, Error::UntrustedCertificate { .. }), "{error:?}");
    assert!(
        error
            .to_string()
            .contains(&format!("certs.d/{}/ca.crt", repository.registry))
    );

    write_certs(certs.path(), &repository, &[("ca.crt", &authority.pem())]);
    let client_without_certificate = client_of(certs.path()).with_patience(Duration::ZERO);
    let result = read(&client_without_certificate, &repository).await;
    assert!(
        matches!(result, Err(Error::Interrupted { .. } | Error::Unreachable { .. })),
        "{result:?}"
    );

    let (certificate, key) = authority.signed(ExtendedKeyUsagePurpose::ClientAuth);
    write_certs(
        certs.path(),
        &repository,
        &[("me.cert", &certificate.pem()), ("me.key", &key.serialize_pem())],
    );
    assert_eq!(read(&client_of(certs.path()), &repository).await.unwrap(), "safe");
    // The first client sees the change too, once it checks the directory again.
    tokio::time::sleep(Duration::from_millis(1100)).await;
    assert_eq!(read(&client, &repository).await.unwrap(), "safe");

    write_certs(certs.path(), &repository, &[("me.key", "spoilt")]);
    let error = read(&client_of(certs.path()), &repository)
        .await
        .unwrap_err()
        .to_string();
    assert!(error.contains("me.cert: not a certificate and key"), "{error}");
}

/// The client certificate goes to the registry only.
#[tokio::test]
async fn redirect_target_is_verified_with_the_ca_of_the_registry() {
    let (authority, other) = (Authority::new(), Authority::new());
    let (certificate, key) = authority.signed(ExtendedKeyUsagePurpose::ClientAuth);
    let files = [
        ("ca.crt", &*authority.pem()),
        ("me.cert", &certificate.pem()),
        ("me.key", &key.serialize_pem()),
    ];
    for (of, wants_client, expected) in [
        (&authority, false, true),
        (&other, false, false),
        (&authority, true, false),
    ] {
        let storage = tls_server(of, wants_client, None).await;
        let registry = tls_server(&authority, true, Some(format!("https://{}/blob", storage.registry))).await;
        let certs = tempfile::tempdir().unwrap();
        write_certs(certs.path(), &registry, &files);
        let client = client_of(certs.path()).with_patience(Duration::ZERO);
        let result = read(&client, &registry).await;
        assert_eq!(result.is_ok(), expected, "{result:?}");
    }
}
