//! Private registries: `docker-registry` with passwords, tokens, TLS, or blobs on another host. Credentials from files,
//! helpers and Podman.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Command, Output},
    sync::Arc,
    thread,
    time::Duration,
};

use axum::{
    extract::Request,
    http::{StatusCode, header},
    response::{IntoResponse as _, Redirect, Response},
};
use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use parking_lot::Mutex;
use rustix::process::Signal;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::common::{BINARY, DockerRegistry, Sample, Serve, StoreLayer, copy_program, wait_until};

mod auth_helper;
mod helpers;
mod podman;
mod token_server;

use token_server::TokenServer;

const USER: &str = "me";
const PASSWORD: &str = "pass-w0rd";
const IDENTITY_TOKEN: &str = "identity-t0ken";

/// An image in a public registry. Private registries of a test share its storage.
struct AuthSite {
    sample: Sample,
    open: DockerRegistry,
    dir: TempDir,
}

impl AuthSite {
    /// Pushes the image as `name`.
    async fn new(name: &str) -> Self {
        let (sample, open) = (Sample::new(1), DockerRegistry::start());
        sample.image.push(&open.url(), name, "1").await.unwrap();
        Self {
            sample,
            open,
            dir: tempfile::tempdir().unwrap(),
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Configuration lines of a registry that requires [`USER`]'s password.
    fn htpasswd(&self) -> String {
        let file = self.path("htpasswd");
        // The minimum cost: the registry checks the password at each request.
        let hash = bcrypt::hash(PASSWORD, 4).unwrap();
        fs::write(&file, format!("{USER}:{hash}\n")).unwrap();
        format!("auth: {{htpasswd: {{realm: test, path: {}}}}}\n", file.display())
    }

    /// Starts a registry with password authentication on the same storage.
    fn private(&self) -> DockerRegistry {
        self.open.sharing_storage(&self.htpasswd(), "")
    }

    /// Starts a daemon that uses only these auth files.
    fn serve(&self, files: &[&Path]) -> Serve {
        Serve::with_config(&config(files))
    }

    /// Writes an auth file with one entry.
    fn auth_file(&self, key: &str, entry: &Value) -> PathBuf {
        let file = self.path("auth.json");
        fs::write(&file, json!({"auths": {key: entry}}).to_string()).unwrap();
        file
    }

    /// The image's layer in the daemon's store.
    fn layer(&self, serve: &Serve, registry: &DockerRegistry, name: &str) -> StoreLayer {
        serve.layer(&registry.reference(name, "1"), &self.sample.bootstrap_digest())
    }

    /// Starts a daemon with these auth files, reads the whole image from this registry and compares it with its source.
    fn check(&self, registry: &DockerRegistry, name: &str, files: &[&Path]) -> Serve {
        let serve = self.serve(files);
        self.sample.check(&self.layer(&serve, registry, name));
        serve
    }
}

/// Configuration of a daemon that uses only these auth files.
fn config(files: &[&Path]) -> String {
    let files: Vec<_> = files.iter().map(|file| file.display().to_string()).collect();
    format!("[images]\nnegative_ttl = 0\n[registry]\nauth_files = {files:?}\n")
}

fn password() -> Value {
    json!({"auth": BASE64.encode(format!("{USER}:{PASSWORD}"))})
}

#[tokio::test(flavor = "multi_thread")]
async fn password_login_takes_effect_while_running() {
    let site = AuthSite::new("team/app").await;
    let registry = site.private();
    let file = site.auth_file(registry.host(), &json!({"auth": BASE64.encode("me:wrong")}));
    let serve = site.serve(&[&file]);
    let layer = site.layer(&serve, &registry, "team/app");
    assert!(!layer.pull_publishes());
    assert!(serve.log().contains("it refuses the credentials of"), "{}", serve.log());
    // A login for a part of the registry, while the daemon runs.
    site.auth_file(&format!("{}/team", registry.host()), &password());
    site.sample.check(&layer);
    for secret in [PASSWORD, &BASE64.encode(format!("{USER}:{PASSWORD}"))] {
        assert!(!serve.log().contains(secret));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn one_token_serves_all_reads() {
    let site = AuthSite::new("team/app").await;
    let tokens = TokenServer::start(site.dir.path()).await;
    let registry = site.open.sharing_storage(&tokens.config(site.dir.path()), "");
    let file = site.auth_file(registry.host(), &password());
    let _serve = site.check(&registry, "team/app", &[&file]);
    // One token for all reads.
    let asked = tokens.requests();
    assert_eq!(asked.len(), 1, "{asked:?}");
    assert_eq!(
        (asked[0].user.as_deref(), asked[0].scope.as_str()),
        (Some(USER), "repository:team/app:pull")
    );

    // Also with an identity token.
    let file = site.auth_file(registry.host(), &json!({"identitytoken": IDENTITY_TOKEN}));
    let serve = site.check(&registry, "team/app", &[&file]);
    assert_eq!(tokens.requests()[1].method, axum::http::Method::POST);
    assert!(!serve.log().contains(IDENTITY_TOKEN));

    // Anonymous access is denied.
    let serve = site.serve(&[]);
    assert!(!site.layer(&serve, &registry, "team/app").pull_publishes());
    assert!(serve.log().contains("anonymous access"), "{}", serve.log());
}

#[tokio::test(flavor = "multi_thread")]
async fn anonymous_token_reads_a_public_image() {
    let site = AuthSite::new("public").await;
    let tokens = TokenServer::start(site.dir.path()).await;
    let registry = site.open.sharing_storage(&tokens.config(site.dir.path()), "");
    let _serve = site.check(&registry, "public", &[]);
    assert_eq!(tokens.requests().len(), 1);
    assert_eq!(tokens.requests()[0].user, None);
}

/// The registry rejects the token before its announced expiry.
#[tokio::test(flavor = "multi_thread")]
async fn refused_token_is_renewed_once_for_all_readers() {
    let site = AuthSite::new("team/app").await;
    let tokens = TokenServer::start(site.dir.path()).await;
    tokens.limit_lifetime(2);
    let registry = site.open.sharing_storage(&tokens.config(site.dir.path()), "");
    let file = site.auth_file(registry.host(), &password());
    let serve = site.serve(&[&file]);
    let layer = site.layer(&serve, &registry, "team/app");
    assert!(layer.pull_publishes());
    let before = tokens.requests().len();
    thread::sleep(Duration::from_secs(4));
    tokens.limit_lifetime(300);
    thread::scope(|scope| {
        for _ in 0..4 {
            for name in site.sample.names() {
                let (site, layer) = (&site, &layer);
                scope.spawn(move || assert!(fs::read(layer.diff().join(&name)).unwrap() == site.sample.content(&name)));
            }
        }
    });
    assert_eq!(tokens.requests().len(), before + 1);
    assert!(before >= 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn loopback_registry_with_a_self_signed_certificate_is_read() {
    let site = AuthSite::new("team/app").await;
    let key = rcgen::KeyPair::generate().unwrap();
    let certificate = rcgen::CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap();
    let certificate = certificate.self_signed(&key).unwrap();
    let (certificate_file, key_file) = (site.path("tls.pem"), site.path("tls.key"));
    fs::write(&certificate_file, certificate.pem()).unwrap();
    fs::write(&key_file, key.serialize_pem()).unwrap();
    let tls = format!(
        ", tls: {{certificate: {}, key: {}}}",
        certificate_file.display(),
        key_file.display()
    );
    let registry = site.open.sharing_storage(&site.htpasswd(), &tls);
    let file = site.auth_file(registry.host(), &password());
    let _serve = site.check(&registry, "team/app", &[&file]);
}

/// Requests to a storage service: path and query, and whether they had an `Authorization` header.
type StorageRequests = Arc<Mutex<Vec<(String, bool)>>>;

/// Starts a storage service with the registry's blobs. It redirects each path to a signed URL, which serves the blob.
async fn storage(root: PathBuf) -> (String, StorageRequests) {
    let seen = StorageRequests::default();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let log = Arc::clone(&seen);
    let app = axum::Router::new().fallback(move |request: Request| {
        let path = request.uri().path().to_owned();
        let known = request.headers().contains_key(header::AUTHORIZATION);
        log.lock().push((request.uri().to_string(), known));
        let answer = match (path.strip_prefix("/signed"), request.uri().query()) {
            (Some(path), Some("signature=s3cr3t")) => range_of(&root.join(path.trim_start_matches('/')), &request),
            (Some(_), _) => StatusCode::FORBIDDEN.into_response(),
            // Another name of this machine is another origin.
            (None, _) => {
                let port = address.port();
                Redirect::temporary(&format!("http://localhost:{port}/signed{path}?signature=s3cr3t")).into_response()
            }
        };
        async move { answer }
    });
    tokio::spawn(async move { axum::serve(listener, app).await });
    (format!("http://{address}"), seen)
}

fn range_of(file: &Path, request: &Request) -> Response {
    let Ok(bytes) = fs::read(file) else {
        return StatusCode::NOT_FOUND.into_response();
    };
    let Some(range) = request.headers().get(header::RANGE) else {
        return bytes.into_response();
    };
    let range = range.to_str().unwrap().strip_prefix("bytes=").unwrap();
    let (first, last) = range.split_once('-').unwrap();
    let (first, last): (usize, usize) = (first.parse().unwrap(), last.parse().unwrap());
    let content_range = format!("bytes {first}-{last}/{}", bytes.len());
    let headers = [(header::CONTENT_RANGE, content_range)];
    (StatusCode::PARTIAL_CONTENT, headers, bytes[first..=last].to_vec()).into_response()
}

#[tokio::test(flavor = "multi_thread")]
async fn redirect_to_another_host_carries_no_credentials() {
    let site = AuthSite::new("team/app").await;
    let (address, seen) = storage(site.open.storage().to_owned()).await;
    let redirect = format!("middleware: {{storage: [{{name: redirect, options: {{baseurl: \"{address}\"}}}}]}}\n");
    let registry = site.open.sharing_storage(&format!("{}{redirect}", site.htpasswd()), "");
    let file = site.auth_file(registry.host(), &password());
    let serve = site.check(&registry, "team/app", &[&file]);
    let seen = seen.lock();
    let signed = |(path, _): &&(String, bool)| path.starts_with("/signed/docker/registry/v2/blobs/");
    assert!(seen.iter().filter(signed).count() > 2, "{seen:?}");
    assert!(seen.iter().all(|(_, known)| !known), "{seen:?}");
    assert!(!serve.log().contains("s3cr3t"));
}
