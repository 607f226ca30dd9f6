//! The daemon: everything that `nydus-store serve` runs, put together.

use std::{
    ffi::OsStr,
    fs::{File, OpenOptions},
    io::{Read as _, Seek as _, Write as _},
    os::unix::{ffi::OsStrExt as _, fs::OpenOptionsExt as _},
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::Context as _;
use fuser::{INodeNo, Notifier};
use rustix::fs::{FlockOperation, flock};
use sd_notify::NotifyState;
use tokio::runtime::Handle;

use crate::{
    config::Config,
    files,
    fuse::{
        idmap::MappedCopies,
        mountpoint,
        session::{self, Mounted},
    },
    image::resolve::Images,
    mirror::{self, Mirror},
    registry,
    store::{Store, letting_go::Forgetful},
    upkeep::control::{Control, SOCKET},
    vfs::NodeId,
};

/// A running store.
pub struct Daemon {
    mounted: Mounted,
    images: Arc<Images>,
    store: Arc<Store>,
    mirror: Option<Mirror>,
    control: Control,
    store_dir: PathBuf,
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

    /// The same; or else gives the process id of who holds it, in its own words.
    pub fn try_take(root: &Path) -> anyhow::Result<Result<Self, String>> {
        refuse_foreign(root)?;
        files::make_private_dir(root).with_context(|| format!("cannot make {}", root.display()))?;
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
const OURS: [&str; 9] = [
    "lock",
    "store",
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
    // Who has been here before may have left what he likes.
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

/// Makes the kernel drop names by the session's notifications.
struct KernelNames(Notifier);

impl Forgetful for KernelNames {
    fn drop_name(&self, parent: NodeId, name: &[u8]) {
        if let Err(error) = self.0.inval_entry(INodeNo(parent), OsStr::from_bytes(name)) {
            tracing::debug!(parent, name = %String::from_utf8_lossy(name), %error, "the kernel keeps a name");
        }
    }
}

impl Daemon {
    /// Mounts the store on `root`/store and serves it, and the mirror. Tells systemd when it is ready.
    pub fn start(root: &Path, config: &Config, runtime: &Handle) -> anyhow::Result<Self> {
        anyhow::ensure!(
            rustix::process::geteuid().is_root(),
            "serving needs root: mounting and the cache are root's"
        );
        let lock = RootLock::take(root)?;
        let root = root
            .canonicalize()
            .with_context(|| format!("cannot find {}", root.display()))?;
        allow_many_files();
        let port = mirror::Bound::take(&config.mirror)?;
        let store_dir = root.join("store");
        prepare_mountpoint(&store_dir)?;
        let mut options = config.registry_options();
        options.own_mirror = port.as_ref().map(mirror::Bound::address).or(options.own_mirror);
        let client = registry::Client::new(options)?;
        let images = Images::open(&root, client, config.limits());
        let images = Arc::new(images.with_context(|| format!("cannot prepare {}", root.display()))?);
        let store = Arc::new(Store::new(Arc::clone(&images)));
        let options = session::Options {
            threads: config.fuse.threads,
            name: "nydus-store".to_owned(),
            read_only: false,
        };
        let mounted = session::mount(Arc::clone(&store), &store_dir, &options, runtime.clone())?;
        let forgetful = Box::new(KernelNames(mounted.notifier()));
        store.set_forgetful(forgetful).context("cannot start a thread")?;
        if mounted.idmap {
            match MappedCopies::new(&store_dir, &root.join("mapped"), runtime) {
                Ok(copies) => store.set_id_maps(Box::new(copies)),
                Err(error) => {
                    tracing::warn!(%error, "cannot prepare for user namespaces: files will be nobody's there")
                }
            }
        }
        let images_of_mirror = Arc::clone(&images);
        let mirror = port.map(|port| port.serve(&config.mirror, images_of_mirror, runtime));
        let mirror = mirror.transpose()?;
        let control = Control::serve(&root, Arc::clone(&images), runtime)?;
        tracing::info!(store = %store_dir.display(), id_mapped_mounts = mounted.idmap, "serving");
        if let Err(error) = sd_notify::notify(&[NotifyState::Ready]) {
            tracing::warn!(%error, "cannot tell systemd that the service is ready");
        }
        Ok(Self {
            mounted,
            images,
            store,
            mirror,
            control,
            store_dir,
            _lock: lock,
        })
    }

    /// The store's mount.
    pub fn mounted(&self) -> &Mounted {
        &self.mounted
    }

    /// Where the store is mounted.
    pub fn store_dir(&self) -> &Path {
        &self.store_dir
    }

    /// The images.
    pub fn images(&self) -> &Images {
        &self.images
    }

    /// The store.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// The mirror, unless it is turned off.
    pub fn mirror(&self) -> Option<&Mirror> {
        self.mirror.as_ref()
    }

    /// Unmounts the store and gives the root free.
    pub fn stop(self) {
        sd_notify::notify(&[NotifyState::Stopping]).ok();
        // Who takes the root next has a socket of its own there.
        drop(self.control);
        self.images.save_needs();
        self.store.close_id_maps();
        if self.mounted.unmount() {
            tracing::info!("stopped");
        } else {
            tracing::warn!("stopped while containers were using the store: they cannot read their images any more");
        }
    }
}

fn prepare_mountpoint(dir: &Path) -> anyhow::Result<()> {
    mountpoint::take_over(dir).with_context(|| format!("cannot mount on {}", dir.display()))?;
    files::make_private_dir(dir).with_context(|| format!("cannot make {}", dir.display()))
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
