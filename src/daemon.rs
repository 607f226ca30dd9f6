//! The daemon: everything that `nydus-store serve` runs, put together.

use std::{
    fs::{File, OpenOptions},
    io::{Read as _, Seek as _, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::Path,
    sync::Arc,
};

use anyhow::Context as _;
use rustix::fs::{FlockOperation, flock};
use sd_notify::NotifyState;
use tokio::runtime::Handle;

use crate::{
    atomic_file,
    config::Config,
    error_chain::ErrorChain,
    fuse::{
        mountpoint,
        session::{self, Mounted},
    },
    image::resolve::Images,
    jobs::{
        RootContext,
        control::{ControlSocket, SOCKET},
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

/// A running store.
pub struct Daemon {
    /// The layers' files.
    overlay: Mounted,
    /// Where older versions announce pulls.
    layer_store: Mounted,
    root: RootContext,
    announcer: Arc<Announcer>,
    control: ControlSocket,
    layout: StoreLayout,
    _lock: RootLock,
}

/// Holds a root for this process alone.
#[derive(Debug)]
pub struct RootLock(#[expect(dead_code, reason = "the lock is held as long as the file is open")] File);

impl RootLock {
    /// Takes the root, which is made if it is missing.
    pub fn take(root: &Path) -> anyhow::Result<Self> {
        Self::try_take(root)?.map_err(|holder| {
            anyhow::anyhow!(
                "another nydus-store (process {holder}) is using {}: stop it, or choose another directory with --root",
                root.display()
            )
        })
    }

    /// The same; or else gives the process id of the holder, as it wrote it.
    pub fn try_take(root: &Path) -> anyhow::Result<Result<Self, String>> {
        refuse_foreign(root)?;
        atomic_file::make_private_dir(root).with_context(|| format!("cannot make {}", root.display()))?;
        let path = root.join("lock");
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .with_context(|| format!("cannot open {}", path.display()))?;
        if flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
            let mut holder = String::new();
            file.read_to_string(&mut holder).ok();
            return Ok(Err(holder.trim().to_owned()));
        }
        let noted = file.set_len(0).and_then(|()| file.rewind());
        noted
            .and_then(|()| write!(file, "{}", std::process::id()))
            .with_context(|| format!("cannot write to {}", path.display()))?;
        Ok(Ok(Self(file)))
    }
}

/// What a root holds; and a file system of its own holds the last.
const OURS: [&str; 11] = [
    "lock",
    "store",
    "layers",
    "published.redb",
    // Of earlier versions.
    "mapped",
    "cache",
    "images",
    "traces",
    "scratch",
    SOCKET,
    "lost+found",
];

/// A root is closed to all but its owner, which would do harm to a directory that serves something else.
fn refuse_foreign(root: &Path) -> anyhow::Result<()> {
    // A root that was used before may hold more.
    if root.join("lock").is_file() {
        return Ok(());
    }
    let Ok(entries) = root.read_dir() else { return Ok(()) };
    let foreign = entries
        .flatten()
        .map(|entry| entry.file_name())
        .find(|name| OURS.iter().all(|ours| name != ours));
    match foreign {
        Some(name) => anyhow::bail!(
            "{} holds {}, which is not nydus-store's: choose an empty or a new directory with --root",
            root.display(),
            name.display()
        ),
        None => Ok(()),
    }
}

impl Daemon {
    /// Serves the image store below `dir`. Tells systemd when it is ready.
    pub fn start(dir: &Path, config: &Config, runtime: &Handle) -> anyhow::Result<Self> {
        anyhow::ensure!(
            rustix::process::geteuid().is_root(),
            "serving needs root: mounting and the cache are root's"
        );
        let lock = RootLock::take(dir)?;
        let dir = dir
            .canonicalize()
            .with_context(|| format!("cannot find {}", dir.display()))?;
        allow_many_files();
        let layout = StoreLayout::new(&dir);
        // An earlier version mounted the store itself.
        remove_stale_mounts(&layout.store())?;
        layout::create_empty(&dir).with_context(|| format!("cannot prepare {}", layout.store().display()))?;
        remove_stale_mounts(&layout.overlay())?;
        remove_stale_mounts(&layout.layer_store())?;
        let client = registry::Client::new(config.registry_options())?;
        let images = Images::open(&dir, client, config.limits());
        let images = Arc::new(images.with_context(|| format!("cannot prepare {}", dir.display()))?);
        let store = Arc::new(ImageStore::open(&dir, &config.store.graph_roots)?);
        let overlay_fs = Arc::new(OverlayFs::new(Arc::clone(&store), Arc::clone(&images)));
        let announcer = Announcer::new(Arc::clone(&images), Arc::clone(&store), Arc::clone(&overlay_fs));
        let announcer = Arc::new(announcer);
        let options = session::MountOptions {
            threads: config.fuse.threads,
            name: "nydus-store".to_owned(),
        };
        let overlay = session::mount(overlay_fs, &layout.overlay(), &options, runtime.clone())?;
        let layer_store = mount_layer_store(&layout, &announcer, runtime)?;
        update_set_up(&dir);
        let root = RootContext { images, store };
        let control = ControlSocket::serve(&dir, root.clone(), Arc::clone(&announcer), runtime)?;
        tracing::info!(store = %layout.store().display(), id_mapped_mounts = overlay.idmap, "serving");
        if let Err(error) = sd_notify::notify(&[NotifyState::Ready]) {
            tracing::warn!(%error, "cannot tell systemd that the service is ready");
        }
        Ok(Self {
            overlay,
            layer_store,
            root,
            announcer,
            control,
            layout,
            _lock: lock,
        })
    }

    /// The mount of the layers' files.
    pub fn mounted(&self) -> &Mounted {
        &self.overlay
    }

    /// Where the store's files are.
    pub fn layout(&self) -> &StoreLayout {
        &self.layout
    }

    /// What is served.
    pub fn root(&self) -> &RootContext {
        &self.root
    }

    /// Publishes images that are about to be pulled.
    pub fn announcer(&self) -> &Arc<Announcer> {
        &self.announcer
    }

    /// Unmounts the store and gives the root free.
    pub fn stop(self) {
        sd_notify::notify(&[NotifyState::Stopping]).ok();
        // The next process that takes the root has a socket of its own there.
        drop(self.control);
        self.root.images.save_traces();
        self.layer_store.unmount();
        if self.overlay.unmount() {
            tracing::info!("stopped");
        } else {
            tracing::warn!("stopped while containers were using the store: they cannot read their images any more");
        }
    }
}

/// Brings what `nydus-store setup` has written up to date: a newer Podman may read it from another file.
fn update_set_up(dir: &Path) {
    let layout = Layout::new(None, |name| std::env::var_os(name));
    match update_if_needed(layout, dir) {
        Ok(Some(updated)) => tracing::info!("updated the set-up: {updated}"),
        Ok(None) => {}
        Err(error) => tracing::warn!(
            "failed to update the set-up: {}; see `nydus-store doctor`",
            ErrorChain(&error)
        ),
    }
}

fn remove_stale_mounts(dir: &Path) -> anyhow::Result<()> {
    mountpoint::remove_stale_mounts(dir).with_context(|| format!("cannot mount on {}", dir.display()))
}

fn mount_layer_store(layout: &StoreLayout, announcer: &Arc<Announcer>, runtime: &Handle) -> anyhow::Result<Mounted> {
    let options = session::MountOptions {
        threads: 1,
        name: "nydus-store".to_owned(),
    };
    let dir = layout.layer_store();
    let fs = Arc::new(LayerStoreFs::new(Arc::clone(announcer)));
    let mounted = session::mount(fs, &dir, &options, runtime.clone())?;
    // From now on the kernel knows what it is, even without this process: containers/storage does not start unless it finds
    // a directory.
    dir.metadata()
        .with_context(|| format!("cannot look at {}", dir.display()))?;
    Ok(mounted)
}

/// Each cached blob takes two descriptors, and the usual soft limit is 1024.
fn allow_many_files() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    if let Err(error) = setrlimit(
        Resource::Nofile,
        Rlimit {
            current: limit.maximum,
            maximum: limit.maximum,
        },
    ) {
        tracing::debug!(%error, "cannot raise the limit of open files");
    }
}
