//! Control socket: commands use it to have the running daemon do what only that process can.
//!
//! The socket is `<root>/nydus-store.sock` and speaks HTTP. The root's directory and the socket are accessible to root
//! only, so callers need no other authentication.
//!
//! - `POST /v1/jobs` takes a [`Job`] as JSON and responds with its [`Event`]s as they happen, one JSON document a line.
//!   Closing the connection cancels the job.
//! - `POST /v1/announcements` takes [`Logins`] and responds with [`Reply`]s in the same way.
//! - `POST /v1/stop` ends the daemon and its FUSE sessions, also if containers use them.
//! - `POST /v1/traces` takes a list of images (digests of their manifests) that have new traces below the root. It
//!   responds with those that are in use, whose traces are replayed now.
//! - `GET /v1/status` and `GET /metrics` are those of [`crate::monitor`].

use std::{
    fs::{self, File},
    io,
    marker::PhantomData,
    os::{
        fd::{AsFd as _, AsRawFd as _, OwnedFd},
        unix::fs::PermissionsExt as _,
    },
    path::{Path, PathBuf},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use anyhow::Context as _;
use axum::{
    Json, Router,
    body::Body,
    extract::{DefaultBodyLimit, State},
    http::{StatusCode, header},
    response::Response,
    routing::post,
};
use bytes::Bytes;
use futures_core::Stream;
use serde::{Serialize, de::DeserializeOwned};
use tokio::{
    net::{UnixListener, UnixStream},
    runtime::Handle,
    sync::mpsc,
    task::JoinHandle,
};

use super::{
    Event, Job, RootContext,
    announcement::{self, Logins, Reply},
    start,
};
use crate::{
    atomic_file::is_unwritable,
    blob::bulk::BulkLimits,
    digest::Digest,
    error_chain::ErrorChain,
    handover::{self, Handover, Inherited},
    image::reference::{InvalidReference, Reference},
    monitor::status::Status,
    registry::Credentials,
    store::announcer::Announcer,
};

/// Name of the socket in the root.
pub const SOCKET: &str = "nydus-store.sock";
/// Longest wait for the status.
const STATUS_TIMEOUT: Duration = Duration::from_secs(30);
/// Longest line of a response, in bytes.
const MAX_LINE_BYTES: usize = 1 << 20;

/// Interval in which a socket that could not be created is tried to be created.
const BIND_INTERVAL: Duration = Duration::from_secs(5);

/// A control socket in service.
pub struct ControlSocket {
    path: PathBuf,
    task: JoinHandle<()>,
}

/// What the control socket works with.
#[derive(Clone)]
pub struct ControlService {
    /// The served images and the store.
    pub root: RootContext,
    /// Publishes images that are about to be pulled.
    pub announcer: Arc<Announcer>,
    /// Keeps credentials for the next process.
    pub handover: Arc<Handover>,
    /// Is sent what ends the daemon.
    pub stop: mpsc::Sender<()>,
    /// Limits of all jobs together.
    pub bulk: Arc<BulkLimits>,
}

impl ControlSocket {
    /// Serves the socket in `dir`, on which the caller holds the lock; also `reports`, routes that only read. Takes
    /// over the listener of an earlier process, so that no client notices the change.
    pub fn serve(
        dir: &Path,
        service: ControlService,
        reports: Router,
        inherited: &mut Inherited,
        runtime: &Handle,
    ) -> anyhow::Result<Self> {
        let path = dir.join(SOCKET);
        let _inside = runtime.enter();
        let bound = match inherited.take(handover::CONTROL) {
            Some(listener) => adopt(listener),
            None => bind(dir),
        };
        let bound = match bound {
            Err(error) if is_unwritable(&error) => {
                tracing::warn!(
                    socket = %path.display(),
                    %error,
                    "failed to create control socket; accepting no pulls and commands until the root can be written to"
                );
                None
            }
            bound => Some(bound.with_context(|| format!("cannot listen on {}", path.display()))?),
        };
        let handover = Arc::clone(&service.handover);
        let announcements = post(announcements).layer(DefaultBodyLimit::max(announcement::MAX_LOGINS_BYTES));
        let router = Router::new()
            .route("/v1/jobs", post(jobs))
            .route("/v1/announcements", announcements)
            .route("/v1/stop", post(accept_stop))
            .route("/v1/traces", post(traces))
            .with_state(service)
            .merge(reports);
        let dir = dir.to_owned();
        let task = runtime.spawn(async move {
            let listener = match bound {
                Some(listener) => listener,
                None => bind_later(&dir).await,
            };
            if let Err(error) = handover.keep(handover::CONTROL, listener.as_fd()) {
                tracing::warn!(error = %ErrorChain(&error), "failed to keep control socket for the next process");
            }
            if let Err(error) = axum::serve(listener, router).await {
                tracing::error!(%error, "failed to serve control socket");
            }
        });
        Ok(Self { path, task })
    }

    /// Removes the socket: no further process serves it.
    pub fn remove(self) {
        fs::remove_file(&self.path).ok();
    }
}

fn adopt(listener: File) -> io::Result<UnixListener> {
    let listener = std::os::unix::net::UnixListener::from(OwnedFd::from(listener));
    listener.set_nonblocking(true)?;
    UnixListener::from_std(listener)
}

/// Creates the socket once that is possible.
async fn bind_later(root: &Path) -> UnixListener {
    loop {
        tokio::time::sleep(BIND_INTERVAL).await;
        if let Ok(listener) = bind(root) {
            tracing::info!(socket = %root.join(SOCKET).display(), "created control socket");
            return listener;
        }
    }
}

fn bind(root: &Path) -> io::Result<UnixListener> {
    let short = ShortPath::new(root)?;
    match fs::remove_file(&short.path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(&short.path)?;
    fs::set_permissions(&short.path, fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

/// A short path to the socket, whatever the length of the root's path: socket paths have at most 107 bytes (unix(7)).
struct ShortPath {
    path: PathBuf,
    /// Keeps the descriptor open that the path contains.
    _root: File,
}

impl ShortPath {
    fn new(root: &Path) -> io::Result<Self> {
        let root = File::open(root)?;
        let path = Path::new("/proc/self/fd")
            .join(root.as_raw_fd().to_string())
            .join(SOCKET);
        Ok(Self { path, _root: root })
    }
}

impl Drop for ControlSocket {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn jobs(State(service): State<ControlService>, Json(job): Json<Job>) -> Response {
    lines(start(job, service.root, service.bulk))
}

fn lines<T: Serialize + Send + 'static>(events: mpsc::Receiver<T>) -> Response {
    let mut response = Response::new(Body::from_stream(JsonLineStream(events)));
    let kind = header::HeaderValue::from_static("application/x-ndjson");
    response.headers_mut().insert(header::CONTENT_TYPE, kind);
    response
}

async fn announcements(
    State(service): State<ControlService>,
    Json(logins): Json<Logins>,
) -> Result<Response, StatusCode> {
    let images: Result<Vec<_>, InvalidReference> = logins.images().collect();
    let images = images.map_err(|error| {
        tracing::warn!(%error, "refused malformed announcement");
        StatusCode::BAD_REQUEST
    })?;
    let (replies, listener) = mpsc::channel(1 + images.len());
    tokio::spawn(async move {
        let accepted = Reply::Accepted(service.announcer.timeout().as_secs());
        replies.send(accepted).await.ok();
        // Continues after the client has disconnected: the next pull benefits from the result.
        for (reference, credentials) in images {
            let reply = publish(&service, reference, credentials).await;
            replies.send(reply).await.ok();
        }
    });
    Ok(lines(listener))
}

async fn publish(service: &ControlService, reference: Reference, credentials: Option<Credentials>) -> Reply {
    let failed = |why: String| Reply::Failed {
        reference: reference.to_string(),
        why,
    };
    if let Some(credentials) = credentials {
        let repository = reference.repository();
        if let Err(error) = service.root.images.push_credentials(&repository, credentials) {
            return failed(ErrorChain(&error).to_string());
        }
        tracing::info!(%repository, "received credentials of pull");
        if let Err(error) = service
            .handover
            .keep_credentials(service.root.images.pushed_credentials())
        {
            tracing::warn!(error = %ErrorChain(&error), "failed to keep credentials for the next process");
        }
    }
    match service.announcer.announce(&reference).await {
        Ok(layer) => Reply::Published(layer),
        Err(error) if error.is_ordinary() => Reply::Ordinary,
        Err(error) => failed(ErrorChain(&error).to_string()),
    }
}

async fn accept_stop(State(service): State<ControlService>) -> StatusCode {
    match service.stop.send(()).await {
        Ok(()) => StatusCode::ACCEPTED,
        Err(_) => StatusCode::SERVICE_UNAVAILABLE,
    }
}

async fn traces(State(service): State<ControlService>, Json(images): Json<Vec<Digest>>) -> Json<Vec<Digest>> {
    let mut replayed = Vec::new();
    for image in images {
        if service.root.images.replay(&image).await {
            tracing::info!(manifest = %image, "replaying imported trace");
            replayed.push(image);
        }
    }
    Json(replayed)
}

/// Serialises events, one a line.
struct JsonLineStream<T>(mpsc::Receiver<T>);

impl<T: Serialize> Stream for JsonLineStream<T> {
    type Item = Result<Bytes, serde_json::Error>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.0.poll_recv(context).map(|event| {
            let line = serde_json::to_vec(&event?).map(|mut line| {
                line.push(b'\n');
                line.into()
            });
            Some(line)
        })
    }
}

/// The daemon exited before its response was complete. Another one may follow.
#[derive(Debug, thiserror::Error)]
#[error("the daemon exited before it had responded")]
pub struct ConnectionLost(#[source] Option<reqwest::Error>);

impl ConnectionLost {
    fn because(error: reqwest::Error) -> Self {
        Self(Some(error.without_url()))
    }
}

fn no_answer(root: &Path) -> String {
    format!("no answer from the daemon on {}", root.join(SOCKET).display())
}

/// An HTTP client for the daemon. `path` must outlive it, because connections are opened lazily.
fn client(path: &ShortPath) -> reqwest::Result<reqwest::Client> {
    crate::registry::install_crypto_provider();
    reqwest::Client::builder()
        .unix_socket(path.path.clone())
        .no_proxy()
        .build()
}

/// Announces pulls to the daemon of `root`. Returns `None` if no daemon is reachable for this user.
pub async fn announce(root: &Path, logins: &Logins) -> anyhow::Result<Option<JsonLines<Reply>>> {
    let Some(path) = find_daemon(root).await? else {
        return Ok(None);
    };
    JsonLines::start(root, path, "announcements", logins).await.map(Some)
}

/// Tells the daemon of `root` that `images` have new traces. Returns those that are in use, whose traces are replayed
/// now; none if no daemon is reachable for this user.
pub async fn replay(root: &Path, images: &[Digest]) -> anyhow::Result<Vec<Digest>> {
    let answer = request(root, "traces", |client| client.post(url("traces")).json(images)).await?;
    answer.map_or(Ok(Vec::new()), |answer| {
        serde_json::from_slice(&answer).context("malformed response from the daemon")
    })
}

/// Ends the daemon of `root` and its FUSE sessions, also if containers use them. Returns `false` if no daemon is
/// reachable for this user.
pub async fn stop(root: &Path) -> anyhow::Result<bool> {
    let post = |client: &reqwest::Client| client.post(url("stop")).timeout(STATUS_TIMEOUT);
    Ok(request(root, "stop", post).await?.is_some())
}

/// The socket of the daemon of `root`; `None` if no daemon is reachable for this user.
async fn find_daemon(root: &Path) -> anyhow::Result<Option<ShortPath>> {
    let no_answer_here = || no_answer(root);
    let path = match ShortPath::new(root) {
        Ok(path) => path,
        Err(error) if is_no_daemon(&error) => return Ok(None),
        Err(error) => return Err(error).with_context(no_answer_here),
    };
    match UnixStream::connect(&path.path).await {
        Ok(_) => Ok(Some(path)),
        Err(error) if is_no_daemon(&error) => Ok(None),
        Err(error) => Err(error).with_context(no_answer_here),
    }
}

/// The status of the daemon of `root`; `None` if no daemon is reachable for this user.
pub async fn status(root: &Path) -> anyhow::Result<Option<Status>> {
    let get = |client: &reqwest::Client| client.get(url("status")).timeout(STATUS_TIMEOUT);
    let answer = request(root, "status", get).await?;
    let parse = |answer: Bytes| serde_json::from_slice(&answer);
    let status = answer.map(parse).transpose();
    status.context("malformed response from the daemon; it may be of another version")
}

fn url(kind: &str) -> String {
    format!("http://localhost/v1/{kind}")
}

/// Sends a request to the daemon of `root` and returns the response; `None` if no daemon is reachable for this user.
async fn request(
    root: &Path,
    kind: &str,
    request: impl FnOnce(&reqwest::Client) -> reqwest::RequestBuilder,
) -> anyhow::Result<Option<Bytes>> {
    let no_answer_here = || no_answer(root);
    let Some(path) = find_daemon(root).await? else {
        return Ok(None);
    };
    let sent = request(&client(&path)?).send().await;
    let response = sent.map_err(ConnectionLost::because).with_context(no_answer_here)?;
    let status = response.status();
    anyhow::ensure!(status.is_success(), "the daemon rejected {kind} ({status})");
    let answer = response.bytes().await.map_err(ConnectionLost::because);
    answer.map(Some).with_context(no_answer_here)
}

/// Whether the error means that no daemon is reachable for this user.
fn is_no_daemon(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused | io::ErrorKind::PermissionDenied
    )
}

/// A response of the daemon, one JSON document a line, as the lines arrive.
pub struct JsonLines<T> {
    response: reqwest::Response,
    received: Vec<u8>,
    kind: PhantomData<T>,
    /// Keeps the path valid, see [`client`].
    _path: ShortPath,
}

/// A job that runs in a daemon.
pub type RemoteJob = JsonLines<Event>;

impl RemoteJob {
    /// Has the daemon of `root` run `job`. Returns `None` if no daemon is reachable for this user.
    pub async fn run(root: &Path, job: &Job) -> anyhow::Result<Option<Self>> {
        let Some(path) = find_daemon(root).await? else {
            return Ok(None);
        };
        Self::start(root, path, "jobs", job).await.map(Some)
    }
}

impl<T: DeserializeOwned> JsonLines<T> {
    async fn start(root: &Path, path: ShortPath, kind: &str, what: &impl Serialize) -> anyhow::Result<Self> {
        let client = client(&path)?;
        let sent = client.post(url(kind)).json(what).send().await;
        let response = sent.map_err(ConnectionLost::because).with_context(|| no_answer(root))?;
        let status = response.status();
        anyhow::ensure!(
            status.is_success(),
            "the daemon rejected {kind} ({status}); it may be of another version"
        );
        Ok(Self {
            response,
            received: Vec::new(),
            kind: PhantomData,
            _path: path,
        })
    }

    /// Waits for the next line.
    pub async fn next(&mut self) -> anyhow::Result<T> {
        loop {
            if let Some(end) = self.received.iter().position(|byte| *byte == b'\n') {
                let line: Vec<_> = self.received.drain(..=end).collect();
                return serde_json::from_slice(&line)
                    .context("malformed response from the daemon; it may be of another version");
            }
            anyhow::ensure!(
                self.received.len() < MAX_LINE_BYTES,
                "response of the daemon is too long"
            );
            match self.response.chunk().await.map_err(ConnectionLost::because)? {
                Some(bytes) => self.received.extend_from_slice(&bytes),
                None => return Err(ConnectionLost(None).into()),
            }
        }
    }
}
