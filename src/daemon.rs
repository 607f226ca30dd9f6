//! [`Daemon`]: everything that `nydus-store serve` runs. It holds the root's lock, the mounts and the control socket.

use std::{
    fs::{File, OpenOptions},
    io::{self, Read as _, Seek as _, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use rustix::fs::{FlockOperation, flock};
use sd_notify::NotifyState;
use tokio::{runtime::Handle, sync::mpsc};

use crate::{
    atomic_file,
    config::Config,
    error_chain::ErrorChain,
    fuse::{
        mountpoint,
        session::{FuseSession, Mounted},
    },
    handover::{self, Handover, Inherited, supervisor},
    image::resolve::Images,
    jobs::{
        RootContext,
        control::{ControlService, ControlSocket, SOCKET},
        upkeep,
    },
    monitor::{
        Monitor,
        fuse_counters::FuseCounters,
        listener::{LoopbackAddress, MetricsListener},
        metered_fs::MeteredFs,
    },
    registry,
    setup::{layout::Layout, update::update_if_needed},
    store::{
        announcer::Announcer,
        image_store::ImageStore,
        layer_store::LayerStoreFs,
        layout::{self, StoreLayout},
        overlay_fs::OverlayFs,
    },
};

mod watchdog;

/// A running store.
pub struct Daemon {
    /// The mount with the layers' files.
    pub overlay: Mounted,
    /// Is sent what ends the daemon for good.
    pub stop_requests: mpsc::Receiver<()>,
    /// The additional layer store, in which older engine versions announce pulls.
    layer_store: Mounted,
    root: RootContext,
    announcer: Arc<Announcer>,
    control: ControlSocket,
    handover: Arc<Handover>,
    _metrics: Option<MetricsListener>,
    layout: StoreLayout,
    _lock: RootLock,
}

/// How long to wait for the lock of a root whose sessions this process is to continue.
const LOCK_TIMEOUT: Duration = Duration::from_secs(30);

/// An exclusive lock of a root. Only the holder writes to it.
#[derive(Debug)]
pub struct RootLock(#[expect(dead_code, reason = "the lock is held as long as the file is open")] File);

impl RootLock {
    /// Locks the root, and creates it if it is missing. Fails if another process holds the lock.
    pub fn take(root: &Path) -> anyhow::Result<Self> {
        Self::try_take(root)?.map_err(|holder| {
            anyhow::anyhow!(
                "another nydus-store (process {holder}) is using {}: stop it, or choose another directory with --root",
                root.display()
            )
        })
    }

    /// Locks the root, and waits for a command that holds the lock. Fails after `timeout`.
    fn wait(root: &Path, timeout: Duration) -> anyhow::Result<Self> {
        let start = Instant::now();
        while start.elapsed() < timeout {
            if let Ok(lock) = Self::try_take(root)? {
                return Ok(lock);
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        Self::take(root)
    }

    /// Locks the root, or returns the process id of the holder (from the lock file).
    pub fn try_take(root: &Path) -> anyhow::Result<Result<Self, String>> {
        refuse_foreign_files(root)?;
        atomic_file::make_private_dir(root).with_context(|| format!("cannot create {}", root.display()))?;
        let path = root.join("lock");
        let mut file = open_lock(&path).with_context(|| format!("cannot open {}", path.display()))?;
        if flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
            let mut holder = String::new();
            file.read_to_string(&mut holder).ok();
            return Ok(Err(holder.trim().to_owned()));
        }
        let noted = file.set_len(0).and_then(|()| file.rewind());
        let noted = noted.and_then(|()| write!(file, "{}", std::process::id()));
        // Only a message would have used it.
        if let Err(error) = noted {
            tracing::debug!(%error, "failed to note process id in lock file");
        }
        Ok(Ok(Self(file)))
    }
}

/// Opens the lock file, which is created if it is missing; on a read-only file system for reading, since flock(2) needs
/// no more.
fn open_lock(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false).mode(0o600);
    match options.open(path) {
        Err(error) if atomic_file::is_unwritable(&error) => File::open(path),
        opened => opened,
    }
}

/// Names in a root. The last one exists in the root directory of a file system.
const ROOT_ENTRIES: [&str; 13] = [
    "lock",
    "store",
    "layers",
    "published.redb",
    "reserve",
    // Created by earlier versions.
    "mapped",
    "cache",
    "images",
    "traces",
    "scratch",
    SOCKET,
    supervisor::SOCKET,
    "lost+found",
];

/// Fails if `root` contains foreign files. Its mode becomes 0700, which would break a directory of other programs.
fn refuse_foreign_files(root: &Path) -> anyhow::Result<()> {
    // A root in use before may contain more.
    if root.join("lock").is_file() {
        return Ok(());
    }
    let Ok(entries) = root.read_dir() else { return Ok(()) };
    let foreign = entries
        .flatten()
        .map(|entry| entry.file_name())
        .filter(|name| !atomic_file::is_unfinished(name))
        .find(|name| ROOT_ENTRIES.iter().all(|ours| name != ours));
    match foreign {
        Some(name) => anyhow::bail!(
            "{} contains {}, which does not belong to nydus-store: choose an empty or new directory with --root",
            root.display(),
            name.display()
        ),
        None => Ok(()),
    }
}

impl Daemon {
    /// Starts serving the image store below `dir`, and notifies systemd when it is ready. Continues the sessions of an
    /// earlier process, as far as `inherited` has their descriptors.
    pub fn start(dir: &Path, config: &Config, mut inherited: Inherited, runtime: &Handle) -> anyhow::Result<Self> {
        anyhow::ensure!(
            rustix::process::geteuid().is_root(),
            "serving needs root, to mount file systems and to own the cache"
        );
        let handover = Handover::new(&mut inherited)?;
        let lock = match inherited.has(handover::OVERLAY) {
            true => RootLock::wait(dir, LOCK_TIMEOUT)?,
            false => RootLock::take(dir)?,
        };
        let dir = dir
            .canonicalize()
            .with_context(|| format!("cannot find {}", dir.display()))?;
        raise_open_file_limit();
        let layout = StoreLayout::new(&dir);
        // Earlier versions mounted the store itself.
        remove_stale_mounts(&layout.store())?;
        layout::create_empty(&dir).with_context(|| format!("cannot prepare {}", layout.store().display()))?;
        let overlay = session(&layout.overlay(), handover::OVERLAY, &handover, &mut inherited)?;
        let layer_store = session(&layout.layer_store(), handover::LAYER_STORE, &handover, &mut inherited)?;
        let (images, store) = open_root(&dir, config)?;
        restore_credentials(&handover, &images);
        let _inside = runtime.enter();
        let overlay_fs = Arc::new(OverlayFs::new(Arc::clone(&store), Arc::clone(&images)));
        overlay_fs.drop_unused_trees();
        let announcer = Announcer::new(Arc::clone(&images), Arc::clone(&store), Arc::clone(&overlay_fs));
        let announcer = Arc::new(announcer);
        let fuse = Arc::<FuseCounters>::default();
        let overlay_fs = Arc::new(MeteredFs::new(overlay_fs, Arc::clone(&fuse)));
        let overlay = overlay.serve(overlay_fs, config.fuse.threads, runtime.clone())?;
        let layer_store = serve_layer_store(layer_store, &layout, &announcer, runtime)?;
        update_setup(&dir);
        let root = RootContext::new(images, store);
        upkeep::start(&root, runtime);
        let monitor = Monitor::new(&root, Arc::clone(&announcer), fuse, handover.takeovers());
        let (stop, stop_requests) = mpsc::channel(1);
        let service = ControlService {
            root: root.clone(),
            announcer: Arc::clone(&announcer),
            handover: Arc::clone(&handover),
            stop,
            bulk: Arc::default(),
        };
        let control = ControlSocket::serve(&dir, service, monitor.routes(), &mut inherited, runtime)?;
        let listen = config.metrics.listen;
        let metrics = listen.and_then(|address| serve_metrics(address, &monitor, runtime));
        announce_readiness(&layout, &overlay, &handover);
        watchdog::start(layout.overlay(), runtime.clone())?;
        Ok(Self {
            overlay,
            stop_requests,
            layer_store,
            root,
            announcer,
            control,
            handover,
            _metrics: metrics,
            layout,
            _lock: lock,
        })
    }

    /// Paths of the store's files.
    pub fn layout(&self) -> &StoreLayout {
        &self.layout
    }

    /// The served images and the store.
    pub fn root(&self) -> &RootContext {
        &self.root
    }

    /// The announcer, which publishes images that are about to be pulled.
    pub fn announcer(&self) -> &Arc<Announcer> {
        &self.announcer
    }

    /// Whether a holder keeps the sessions beyond the death of this process.
    pub fn is_held(&self) -> bool {
        // A supervisor that was killed does not answer.
        self.handover.is_held && sd_notify::notify(&[NotifyState::Stopping]).is_ok()
    }

    /// Unmounts the store and releases the root.
    pub fn stop(self) {
        sd_notify::notify(&[NotifyState::Stopping]).ok();
        // Removes the socket before the lock, so that it does not remove that of the next holder.
        self.control.remove();
        self.root.images.save_traces();
        self.handover.release();
        self.layer_store.unmount();
        if self.overlay.unmount() {
            tracing::info!("stopped");
        } else {
            tracing::warn!("stopped while containers were using the store; they can no longer read their images");
        }
    }

    /// Leaves the mounts and the control socket to the next process.
    pub fn leave(self) {
        sd_notify::notify(&[NotifyState::Stopping]).ok();
        self.root.images.save_traces();
        self.layer_store.leave();
        self.overlay.leave();
        tracing::info!("stopped; the next process continues");
    }

    /// Replaces this process by the program on disk, which continues. Returns only on failure.
    pub fn execute(&self) -> io::Error {
        self.root.images.save_traces();
        match std::env::current_exe() {
            Ok(program) => self.handover.execute(&program),
            Err(error) => error,
        }
    }
}

/// Opens the images and the store of the root.
fn open_root(dir: &Path, config: &Config) -> anyhow::Result<(Arc<Images>, Arc<ImageStore>)> {
    let client = registry::Client::new(config.registry_options())?;
    let images = Images::open(dir, client, config.limits());
    let images = images.with_context(|| format!("cannot prepare {}", dir.display()))?;
    let store = ImageStore::open(dir, &config.store.graph_roots)?;
    Ok((Arc::new(images), Arc::new(store)))
}

fn announce_readiness(layout: &StoreLayout, overlay: &Mounted, handover: &Handover) {
    tracing::info!(
        store = %layout.store().display(),
        id_mapped_mounts = overlay.idmap,
        takeovers = handover.takeovers(),
        "serving"
    );
    if let Err(error) = sd_notify::notify(&[NotifyState::Ready]) {
        tracing::warn!(%error, "failed to notify systemd of readiness");
    }
}

/// Continues the session on `dir`, or begins one in its place.
fn session(
    dir: &Path,
    name: &'static str,
    handover: &Handover,
    inherited: &mut Inherited,
) -> anyhow::Result<FuseSession> {
    if let (Some(device), Some(info)) = (inherited.take(name), handover.session(name))
        && let Some(session) = FuseSession::resume(dir, device, info.clone())
    {
        handover.keep_session(name, &session, &info)?;
        return Ok(session);
    }
    // An earlier session that is not mounted here any more.
    handover.forget(name);
    remove_stale_mounts(dir)?;
    let session = FuseSession::begin(dir, "nydus-store")?;
    handover.keep_session(name, &session, session.info())?;
    Ok(session)
}

fn restore_credentials(handover: &Handover, images: &Images) {
    for (repository, credentials) in handover.credentials() {
        if let Err(error) = images.push_credentials(&repository, credentials) {
            tracing::warn!(%repository, error = %ErrorChain(&error), "failed to restore credentials");
        }
    }
}

/// Updates what `nydus-store setup` wrote: an upgraded Podman may read another file.
fn update_setup(dir: &Path) {
    let layout = Layout::new(None, |name| std::env::var_os(name));
    match update_if_needed(layout, dir) {
        Ok(Some(updated)) => tracing::info!(changes = %updated, "updated set-up"),
        Ok(None) => {}
        Err(error) => tracing::warn!(error = %ErrorChain(&error), "failed to update set-up; run nydus-store doctor"),
    }
}

/// Removes the mounts that a dead daemon left below `root`, whose lock the caller holds.
pub fn remove_mounts(root: &Path) -> anyhow::Result<()> {
    let layout = StoreLayout::new(root);
    remove_stale_mounts(&layout.overlay())?;
    remove_stale_mounts(&layout.layer_store())
}

/// Serves metrics on loopback. A failure is logged only: containers need the store more than anybody needs metrics.
fn serve_metrics(address: LoopbackAddress, monitor: &Arc<Monitor>, runtime: &Handle) -> Option<MetricsListener> {
    let listener = MetricsListener::serve(address, monitor, runtime);
    let log = |error: &io::Error| tracing::error!(%address, %error, "failed to listen for requests of metrics");
    listener.inspect_err(log).ok()
}

fn remove_stale_mounts(dir: &Path) -> anyhow::Result<()> {
    mountpoint::remove_stale_mounts(dir).with_context(|| format!("cannot mount on {}", dir.display()))
}

fn serve_layer_store(
    session: FuseSession,
    layout: &StoreLayout,
    announcer: &Arc<Announcer>,
    runtime: &Handle,
) -> anyhow::Result<Mounted> {
    let dir = layout.layer_store();
    let fs = Arc::new(LayerStoreFs::new(Arc::clone(announcer)));
    let mounted = session.serve(fs, 1, runtime.clone())?;
    // Makes the kernel cache the root's attributes for good. containers/storage does not start unless it finds a
    // directory there, even if this process is gone.
    dir.metadata()
        .with_context(|| format!("cannot access {}", dir.display()))?;
    Ok(mounted)
}

/// Raises the soft limit of open files to the hard limit. Each cached blob takes two descriptors, and the usual soft
/// limit is 1024.
fn raise_open_file_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    if let Err(error) = setrlimit(
        Resource::Nofile,
        Rlimit {
            current: limit.maximum,
            maximum: limit.maximum,
        },
    ) {
        tracing::debug!(%error, "failed to raise open file limit");
    }
}
