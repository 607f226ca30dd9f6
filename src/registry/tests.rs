//! The client against real HTTP servers on loopback.

use std::{
    net::SocketAddr,
    path::PathBuf,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use axum::{
    body::{Body, to_bytes},
    extract::Request,
    http::{HeaderMap, Method, StatusCode, header},
    response::{IntoResponse, Response},
};
use base64::{Engine, prelude::BASE64_STANDARD};
use parking_lot::Mutex;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
};

use super::{Client, Error, Options, Repository};
use crate::{digest::Digest, registries_conf::watcher::RegistriesConfPaths};

mod auth;
mod credentials;
mod failures;
mod mirrors;
mod outages;
mod reads;
mod routes;
mod status;
mod tls;

/// A request as the server received it.
#[derive(Debug, Clone)]
struct Seen {
    method: Method,
    /// Path and query.
    uri: String,
    headers: HeaderMap,
    body: String,
}

impl Seen {
    fn header(&self, name: header::HeaderName) -> &str {
        self.headers
            .get(name)
            .map(|value| value.to_str().unwrap())
            .unwrap_or_default()
    }

    fn authorization(&self) -> &str {
        self.header(header::AUTHORIZATION)
    }

    /// The first and last byte of the requested range.
    fn range(&self) -> Option<(usize, usize)> {
        let (first, last) = self.header(header::RANGE).strip_prefix("bytes=")?.split_once('-')?;
        Some((first.parse().unwrap(), last.parse().unwrap()))
    }
}

/// A server on loopback that logs its requests. It ends with the test's runtime.
struct Server {
    address: SocketAddr,
    log: Arc<Mutex<Vec<Seen>>>,
}

impl Server {
    /// Answers each request by `handler`, which also gets the number of earlier requests.
    async fn start(handler: impl Fn(&Seen, usize) -> Response + Clone + Send + Sync + 'static) -> Self {
        Self::start_async(move |seen, count| std::future::ready(handler(&seen, count))).await
    }

    async fn start_async<F>(handler: impl Fn(Seen, usize) -> F + Clone + Send + Sync + 'static) -> Self
    where
        F: Future<Output = Response> + Send,
    {
        let log: Arc<Mutex<Vec<Seen>>> = Arc::default();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let seen = log.clone();
        let app = axum::Router::new().fallback(move |request: Request| async move {
            let (parts, body) = request.into_parts();
            let body = to_bytes(body, 1 << 20).await.unwrap();
            let request = Seen {
                method: parts.method,
                uri: parts.uri.to_string(),
                headers: parts.headers,
                body: String::from_utf8(body.to_vec()).unwrap(),
            };
            let count = {
                let mut log = seen.lock();
                log.push(request.clone());
                log.len() - 1
            };
            handler(request, count).await
        });
        tokio::spawn(async move { axum::serve(listener, app).await });
        Self { address, log }
    }

    fn repository(&self) -> Repository {
        Repository::new(self.address.to_string(), "org/image")
    }

    fn log(&self) -> Vec<Seen> {
        self.log.lock().clone()
    }

    fn count(&self) -> usize {
        self.log.lock().len()
    }
}

/// A server that sends each connection the next of `scripts`, or the last one again, and then closes it, or leaves it
/// open and silent if `hangs`. Refuses TLS. Returns the repository and a counter of requests.
async fn raw_server(scripts: &'static [&'static str], hangs: bool) -> (Repository, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let requests = Arc::new(AtomicUsize::new(0));
    let counter = requests.clone();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut head = [0; 8192];
            if stream.read(&mut head).await.is_err() || head[0] != b'G' {
                continue;
            }
            let script = scripts[counter.fetch_add(1, Ordering::SeqCst).min(scripts.len() - 1)];
            stream.write_all(script.as_bytes()).await.unwrap();
            if hangs {
                tokio::spawn(async move {
                    tokio::time::sleep(Duration::from_secs(60)).await;
                    drop(stream);
                });
            }
        }
    });
    (Repository::new(address.to_string(), "org/image"), requests)
}

fn client() -> Client {
    client_with(Options::default())
}

/// A client that does not wait for hosts that are away.
fn impatient() -> Client {
    client().with_patience(Duration::ZERO)
}

/// A client that reads none of the machine's configuration files.
fn client_with(options: Options) -> Client {
    let auth_files = options.auth_files.or(Some(Vec::new()));
    let certs_dirs = options.certs_dirs.or(Some(Vec::new()));
    let registries_conf = options.registries_conf.or(Some(RegistriesConfPaths::default()));
    let options = Options {
        auth_files,
        certs_dirs,
        registries_conf,
        ..options
    };
    Client::new(options).unwrap()
}

/// An auth file with `user:password` for each key. It lives as long as the returned directory.
fn auth_file(entries: &[(&str, &str)]) -> (tempfile::TempDir, Vec<PathBuf>) {
    let entry = |(key, login): &(&str, &str)| {
        let auth = BASE64_STANDARD.encode(login);
        (key.to_string(), serde_json::json!({ "auth": auth }))
    };
    let auths: serde_json::Map<_, _> = entries.iter().map(entry).collect();
    write_auth_file(&serde_json::json!({ "auths": auths }).to_string())
}

fn write_auth_file(text: &str) -> (tempfile::TempDir, Vec<PathBuf>) {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("auth.json");
    std::fs::write(&file, text).unwrap();
    (dir, vec![file])
}

/// The 206 answer that `seen` requests, or all of `data`.
fn ranged(seen: &Seen, data: &[u8]) -> Response {
    let Some((first, last)) = seen.range() else {
        return data.to_vec().into_response();
    };
    let range = format!("bytes {first}-{last}/{}", data.len());
    (
        StatusCode::PARTIAL_CONTENT,
        [(header::CONTENT_RANGE, range)],
        data[first..=last].to_vec(),
    )
        .into_response()
}

/// An endless body of one byte at a time.
fn dripping(every: Duration) -> Body {
    struct Drip(tokio::sync::mpsc::Receiver<&'static str>);

    impl futures_core::Stream for Drip {
        type Item = std::io::Result<&'static str>;

        fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
            self.0.poll_recv(context).map(|byte| byte.map(Ok))
        }
    }

    let (sender, receiver) = tokio::sync::mpsc::channel(1);
    tokio::spawn(async move {
        while sender.send("x").await.is_ok() {
            tokio::time::sleep(every).await;
        }
    });
    Body::from_stream(Drip(receiver))
}

fn status(code: u16) -> Response {
    StatusCode::from_u16(code).unwrap().into_response()
}

/// Status 401 with `challenge`.
fn challenged(challenge: impl Into<String>) -> Response {
    (StatusCode::UNAUTHORIZED, [(header::WWW_AUTHENTICATE, challenge.into())]).into_response()
}

fn redirected(location: impl Into<String>) -> Response {
    (
        StatusCode::TEMPORARY_REDIRECT,
        [(header::LOCATION, location.into())],
        "elsewhere",
    )
        .into_response()
}

fn manifest(media_type: &str, text: &'static str) -> Response {
    Response::builder()
        .header(header::CONTENT_TYPE, media_type)
        .body(Body::from(text))
        .unwrap()
}

/// A thousand bytes without repetition within two hundred of them.
fn data() -> Vec<u8> {
    (0..1000u32).map(|i| (i * 7 + i / 256) as u8).collect()
}

fn any_digest() -> Digest {
    Digest::of(b"any")
}
