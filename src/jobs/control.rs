//! The control socket, by which commands have the running daemon do what only it can.
//!
//! It is `<root>/nydus-store.sock`, and speaks HTTP. The root's directory and the socket are root's alone, so that nothing
//! more is asked of a caller.
//!
//! - `POST /v1/jobs` takes a [`Job`] as JSON and answers with its [`Event`]s, one JSON document a line, as they happen.
//!   Closing the connection cancels the job.
//! - `POST /v1/announcements` takes [`Logins`] and answers with [`Reply`]s in the same way.
//! - `POST /v1/traces` takes a list of images, by the digests of their manifests, of which there are new traces below the root.
//!   It answers with those that are in use, for which the traces are replayed now.

use std::{
    fs::{self, File},
    io,
    marker::PhantomData,
    os::{fd::AsRawFd as _, unix::fs::PermissionsExt as _},
    path::{Path, PathBuf},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
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
    Event, Job, Root,
    announcement::{self, Logins, Reply},
    start,
};
use crate::{
    blob::verify::Bulk,
    digest::Digest,
    error_chain::ErrorChain,
    image::reference::{InvalidReference, Reference},
    registry::Credentials,
    store::announcer::Announcer,
};

/// The socket's name in the root.
pub const SOCKET: &str = "nydus-store.sock";
/// Longest line of an answer, in bytes.
const MAX_LINE: usize = 1 << 20;

/// A control socket that is served; it is removed when dropped.
pub struct Control {
    path: PathBuf,
    task: JoinHandle<()>,
}

#[derive(Clone)]
struct Service {
    root: Root,
    announcer: Arc<Announcer>,
    bulk: Arc<Bulk>,
}

impl Control {
    /// Serves the socket in `dir`, which the caller holds.
    pub fn serve(dir: &Path, root: Root, announcer: Arc<Announcer>, runtime: &Handle) -> anyhow::Result<Self> {
        let path = dir.join(SOCKET);
        let _inside = runtime.enter();
        let listener = bind(dir).with_context(|| format!("cannot listen on {}", path.display()))?;
        let service = Service {
            root,
            announcer,
            bulk: Arc::default(),
        };
        let announcements = post(announcements).layer(DefaultBodyLimit::max(announcement::MAX_BYTES));
        let router = Router::new()
            .route("/v1/jobs", post(jobs))
            .route("/v1/announcements", announcements)
            .route("/v1/traces", post(traces))
            .with_state(service);
        let task = runtime.spawn(async move {
            if let Err(error) = axum::serve(listener, router).await {
                tracing::error!(%error, "the control socket has stopped");
            }
        });
        Ok(Self { path, task })
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

/// The socket by a path that is short, however long the root's is: a socket's may have 107 bytes (unix(7)).
struct ShortPath {
    path: PathBuf,
    /// What the path goes by.
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

impl Drop for Control {
    fn drop(&mut self) {
        self.task.abort();
        fs::remove_file(&self.path).ok();
    }
}

async fn jobs(State(service): State<Service>, Json(job): Json<Job>) -> Response {
    lines(start(job, service.root, service.bulk))
}

fn lines<T: Serialize + Send + 'static>(events: mpsc::Receiver<T>) -> Response {
    let mut response = Response::new(Body::from_stream(Lines(events)));
    let kind = header::HeaderValue::from_static("application/x-ndjson");
    response.headers_mut().insert(header::CONTENT_TYPE, kind);
    response
}

async fn announcements(State(service): State<Service>, Json(logins): Json<Logins>) -> Result<Response, StatusCode> {
    let images: Result<Vec<_>, InvalidReference> = logins.images().collect();
    let images = images.map_err(|error| {
        tracing::warn!(%error, "refused announcement");
        StatusCode::BAD_REQUEST
    })?;
    let (replies, listener) = mpsc::channel(1 + images.len());
    tokio::spawn(async move {
        let accepted = Reply::Accepted(service.announcer.timeout().as_secs());
        replies.send(accepted).await.ok();
        // It goes on when nothing waits for it any more: the next pull finds what was done.
        for (reference, credentials) in images {
            let reply = publish(&service, reference, credentials).await;
            replies.send(reply).await.ok();
        }
    });
    Ok(lines(listener))
}

async fn publish(service: &Service, reference: Reference, credentials: Option<Credentials>) -> Reply {
    let failed = |why: String| Reply::Failed {
        reference: reference.to_string(),
        why,
    };
    if let Some(credentials) = credentials {
        let repository = reference.repository();
        if let Err(error) = service.root.images.push_credentials(&repository, credentials) {
            return failed(ErrorChain(&error).to_string());
        }
        tracing::info!(%repository, "took credentials of a pull");
    }
    match service.announcer.announce(&reference).await {
        Ok(layer) => Reply::Published(layer),
        Err(error) if error.is_ordinary() => Reply::Ordinary,
        Err(error) => failed(ErrorChain(&error).to_string()),
    }
}

async fn traces(State(service): State<Service>, Json(images): Json<Vec<Digest>>) -> Json<Vec<Digest>> {
    let mut replayed = Vec::new();
    for image in images {
        if service.root.images.replay(&image).await {
            tracing::info!(%image, "a trace was imported, and is replayed");
            replayed.push(image);
        }
    }
    Json(replayed)
}

/// Events, one a line.
struct Lines<T>(mpsc::Receiver<T>);

impl<T: Serialize> Stream for Lines<T> {
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

fn silence(root: &Path) -> String {
    format!("the daemon does not answer on {}", root.join(SOCKET).display())
}

/// Speaks to the daemon. The path must last as long: a connection may be made later than one thinks.
fn client(path: &ShortPath) -> reqwest::Result<reqwest::Client> {
    crate::registry::install_crypto_provider();
    reqwest::Client::builder()
        .unix_socket(path.path.clone())
        .no_proxy()
        .build()
}

/// Announces pulls to the daemon of `root`; nothing if there is none that this user can reach.
pub async fn announce(root: &Path, logins: &Logins) -> anyhow::Result<Option<Listing<Reply>>> {
    let Some(path) = reach(root).await? else {
        return Ok(None);
    };
    Listing::start(root, path, "announcements", logins).await.map(Some)
}

/// Tells the daemon of `root` that there are new traces of `images`. Gives those that are in use and whose traces are replayed now;
/// none if there is no daemon that this user can reach.
pub async fn replay(root: &Path, images: &[Digest]) -> anyhow::Result<Vec<Digest>> {
    let answer = tell(root, "traces", images).await?;
    answer.map_or(Ok(Vec::new()), |answer| {
        serde_json::from_slice(&answer).context("the daemon gives an answer of another kind")
    })
}

/// The socket of the daemon of `root`; nothing if there is no daemon that this user can reach.
async fn reach(root: &Path) -> anyhow::Result<Option<ShortPath>> {
    let silent = || silence(root);
    let path = match ShortPath::new(root) {
        Ok(path) => path,
        Err(error) if is_nobody(&error) => return Ok(None),
        Err(error) => return Err(error).with_context(silent),
    };
    match UnixStream::connect(&path.path).await {
        Ok(_) => Ok(Some(path)),
        Err(error) if is_nobody(&error) => Ok(None),
        Err(error) => Err(error).with_context(silent),
    }
}

/// What the daemon of `root` answers to something of that kind; nothing if there is no daemon that this user can reach.
async fn tell(root: &Path, kind: &str, what: &(impl Serialize + ?Sized)) -> anyhow::Result<Option<Bytes>> {
    let silent = || silence(root);
    let Some(path) = reach(root).await? else {
        return Ok(None);
    };
    let url = format!("http://localhost/v1/{kind}");
    let sent = client(&path)?.post(url).json(what).send().await;
    let response = sent.map_err(reqwest::Error::without_url).with_context(silent)?;
    let status = response.status();
    anyhow::ensure!(status.is_success(), "the daemon does not take the {kind} ({status})");
    let answer = response.bytes().await.map_err(reqwest::Error::without_url);
    answer.map(Some).with_context(silent)
}

/// Whether an error only says that no daemon is there for this user.
fn is_nobody(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused | io::ErrorKind::PermissionDenied
    )
}

/// What a daemon answers, one JSON document a line, as it happens.
pub struct Listing<T> {
    response: reqwest::Response,
    received: Vec<u8>,
    kind: PhantomData<T>,
    /// Of the socket, see [`client`].
    _path: ShortPath,
}

/// A job that a daemon does.
pub type RemoteJob = Listing<Event>;

impl RemoteJob {
    /// Has the daemon of `root` do `job`.
    pub async fn do_job(root: &Path, job: &Job) -> anyhow::Result<Self> {
        let path = ShortPath::new(root).with_context(|| silence(root))?;
        Self::start(root, path, "jobs", job).await
    }
}

impl<T: DeserializeOwned> Listing<T> {
    async fn start(root: &Path, path: ShortPath, kind: &str, what: &impl Serialize) -> anyhow::Result<Self> {
        let client = client(&path)?;
        let sent = client
            .post(format!("http://localhost/v1/{kind}"))
            .json(what)
            .send()
            .await;
        let response = sent
            .map_err(reqwest::Error::without_url)
            .with_context(|| silence(root))?;
        let status = response.status();
        anyhow::ensure!(
            status.is_success(),
            "the daemon does not take the {kind} ({status}): is it of another version?"
        );
        Ok(Self {
            response,
            received: Vec::new(),
            kind: PhantomData,
            _path: path,
        })
    }

    /// The next line.
    pub async fn next(&mut self) -> anyhow::Result<T> {
        loop {
            if let Some(end) = self.received.iter().position(|byte| *byte == b'\n') {
                let line: Vec<_> = self.received.drain(..=end).collect();
                return serde_json::from_slice(&line)
                    .context("the daemon gives an answer of another kind: is it of another version?");
            }
            anyhow::ensure!(self.received.len() < MAX_LINE, "the daemon's answer is too long");
            let chunk = self.response.chunk().await.map_err(reqwest::Error::without_url);
            match chunk.context("the daemon has gone away")? {
                Some(bytes) => self.received.extend_from_slice(&bytes),
                None => anyhow::bail!("the daemon has gone away"),
            }
        }
    }
}
