//! TLS: authorities and client certificates in directories of hosts' names.

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

/// An authority, which signs for servers on 127.0.0.1 and for clients.
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

/// A listener that shakes hands before it hands over; who fails at that is dropped.
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

/// A server with a certificate of `authority`, which wants one of its clients, or redirects to `elsewhere`.
async fn tls_server(authority: &Authority, wants_client: bool, elsewhere: Option<String>) -> Repository {
    crate::registry::choose_cryptography();
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
        let elsewhere = elsewhere.clone();
        async move {
            match elsewhere {
                Some(place) => redirected(place),
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

fn place(certs: &Path, repository: &Repository, files: &[(&str, &str)]) {
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
async fn a_private_authority_and_a_client_certificate() {
    let (authority, other) = (Authority::new(), Authority::new());
    let repository = tls_server(&authority, true, None).await;
    let certs = tempfile::tempdir().unwrap();
    let client = client_of(certs.path());
    place(certs.path(), &repository, &[("ca.crt", &other.pem())]);
    let error = read(&client, &repository).await.unwrap_err();
    assert!(matches!(error, Error::Untrusted { .. }), "{error:?}");
    assert!(
        error
            .to_string()
            .contains(&format!("certs.d/{}/ca.crt", repository.registry))
    );

    place(certs.path(), &repository, &[("ca.crt", &authority.pem())]);
    let result = read(&client_of(certs.path()), &repository).await;
    assert!(
        matches!(result, Err(Error::Interrupted { .. } | Error::Unreachable { .. })),
        "{result:?}"
    );

    let (certificate, key) = authority.signed(ExtendedKeyUsagePurpose::ClientAuth);
    place(
        certs.path(),
        &repository,
        &[("me.cert", &certificate.pem()), ("me.key", &key.serialize_pem())],
    );
    assert_eq!(read(&client_of(certs.path()), &repository).await.unwrap(), "safe");
    // The first client sees the change too, once it looks again.
    tokio::time::sleep(Duration::from_millis(1100)).await;
    assert_eq!(read(&client, &repository).await.unwrap(), "safe");

    place(certs.path(), &repository, &[("me.key", "spoilt")]);
    let error = read(&client_of(certs.path()), &repository)
        .await
        .unwrap_err()
        .to_string();
    assert!(error.contains("me.cert cannot be used"), "{error}");
}

/// What a registry leads to may be verified by its authorities; but who we are is for the registry alone.
#[tokio::test]
async fn the_authorities_of_a_registry_do_for_where_it_leads() {
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
        place(certs.path(), &registry, &files);
        let result = read(&client_of(certs.path()), &registry).await;
        assert_eq!(result.is_ok(), expected, "{result:?}");
    }
}
