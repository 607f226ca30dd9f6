//! `nydus-store mount`: mounts one image in the foreground.

use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::Context as _;
use clap::Args;
use tempfile::TempDir;

use super::{ConfigArg, image_arg::ImageArg, runtime, signals::StopSignals};
use crate::{
    blob::{
        scheduler::FetchScheduler,
        shared::SharedBlobs,
        size_limit::SizeLimit,
        source::{Pending, Source, SourceError},
    },
    config::Config,
    daemon::RootLock,
    digest::Digest,
    fuse::session,
    image::{
        contents::{ChunkStorage, Contents},
        loaded::LoadedImage,
        oci_layout::FilePart,
        reference::Reference,
        resolve::Images,
    },
    registry,
    store::single_image_fs::SingleImageFs,
};

/// Mount a single image in the foreground, without Podman
///
/// SIGINT or SIGTERM unmounts it.
#[derive(Debug, Args)]
pub struct MountCommand {
    /// Image in a registry, or a bootstrap file
    #[arg(value_name = "REF|BOOTSTRAP")]
    image: String,

    /// Mount point, an existing directory
    #[arg(value_name = "DIR")]
    dir: PathBuf,

    /// Cache directory [default: a temporary directory, deleted at exit]
    #[arg(long, value_name = "DIR")]
    root: Option<PathBuf>,

    /// With BOOTSTRAP: OCI layout, or directory with the data blobs in files named by id [default: the bootstrap's
    /// directory]
    #[arg(long, value_name = "DIR")]
    blobs: Option<PathBuf>,

    #[command(flatten)]
    config: ConfigArg,
}

/// The cache directory: `--root`, or a temporary directory that is deleted when dropped.
pub(super) enum Workspace {
    Kept(
        PathBuf,
        #[expect(dead_code, reason = "held while the directory is in use")] RootLock,
    ),
    Temporary(TempDir),
}

impl Workspace {
    pub(super) fn open(root: Option<&Path>) -> anyhow::Result<Self> {
        Ok(match root {
            Some(root) => Self::Kept(root.to_owned(), RootLock::take(root)?),
            None => Self::Temporary(tempfile::Builder::new().prefix("nydus-store-").tempdir()?),
        })
    }

    pub(super) fn path(&self) -> &Path {
        match self {
            Self::Kept(path, _) => path,
            Self::Temporary(dir) => dir.path(),
        }
    }
}

impl MountCommand {
    pub fn run(&self) -> anyhow::Result<()> {
        let config = self.config.load()?;
        let image = ImageArg::new(&self.image)?;
        // Checks the mount point before fetching anything.
        let dir = self.dir.display();
        let metadata = self.dir.metadata().with_context(|| format!("cannot mount on {dir}"))?;
        anyhow::ensure!(metadata.is_dir(), "cannot mount on {dir}: it is not a directory");
        let workspace = Workspace::open(self.root.as_deref())?;
        let runtime = runtime()?;
        let mut stop = StopSignals::new(&runtime)?;
        // Loading spawns read-ahead tasks.
        let inside = runtime.enter();
        let (loaded, contents) = match image {
            ImageArg::Bootstrap(bootstrap) => {
                let blobs = self.blobs.as_deref().or(bootstrap.parent()).unwrap_or(Path::new("."));
                (None, load_from_files(bootstrap, blobs, workspace.path(), &config)?)
            }
            ImageArg::Reference(reference) => {
                let (images, image) = runtime.block_on(load_from_registry(&reference, &config, workspace.path()))?;
                let contents = Arc::clone(&image.contents);
                (Some((images, image)), contents)
            }
        };
        drop(inside);
        let fs = Arc::new(SingleImageFs::new(contents, self.image.clone()));
        let options = session::MountOptions {
            threads: config.fuse.threads,
            name: self.image.clone(),
        };
        let mounted = session::mount(fs, &self.dir, &options, runtime.handle().clone())?;
        tracing::info!(image = %self.image, dir = %self.dir.display(), "mounted image; press Ctrl-C to unmount");
        let asked = runtime.block_on(stop.wait(&mounted));
        mounted.unmount();
        if let Some((_, image)) = loaded {
            image.save_trace();
        }
        runtime.shutdown_background();
        asked.map(drop)
    }
}

async fn load_from_registry(
    reference: &Reference,
    config: &Config,
    root: &Path,
) -> anyhow::Result<(Images, Arc<LoadedImage>)> {
    let client = registry::Client::new(config.registry_options())?;
    let images = Images::open(root, client, config.limits())?;
    let loaded = images
        .resolve(reference)
        .await
        .with_context(|| format!("cannot use {reference}"))?;
    loaded.prepare().await;
    Ok((images, loaded))
}

fn load_from_files(bootstrap: &Path, blobs: &Path, root: &Path, config: &Config) -> anyhow::Result<Arc<Contents>> {
    let cache = SharedBlobs::open(&root.join("cache"), SizeLimit::NONE)?;
    let image = Digest::of(&std::fs::read(bootstrap)?).hex();
    let metas = metas_beside(bootstrap);
    let cached = ChunkStorage {
        cache: &cache,
        scheduler: FetchScheduler::new(Duration::from_secs(60), config.fetch.read_ahead, usize::MAX).registry(""),
        image,
    };
    let source = |blob: Digest| Arc::new(LocalBlob::find(blobs, &blob)) as Arc<dyn Source>;
    let contents = Contents::load(bootstrap, &metas, &cached, source);
    Ok(Arc::new(
        contents.with_context(|| format!("cannot use {}", bootstrap.display()))?,
    ))
}

/// Finds the `<blob>.blob.meta` files beside the bootstrap, by blob id.
fn metas_beside(bootstrap: &Path) -> std::collections::HashMap<String, PathBuf> {
    let dir = bootstrap
        .parent()
        .filter(|dir| !dir.as_os_str().is_empty())
        .unwrap_or(Path::new("."));
    let Ok(entries) = dir.read_dir() else {
        return Default::default();
    };
    let meta = |entry: std::fs::DirEntry| {
        let name = entry.file_name().into_string().ok()?;
        Some((name.strip_suffix(".blob.meta")?.to_owned(), entry.path()))
    };
    entries.flatten().filter_map(meta).collect()
}

/// A data blob in a local file. If the file cannot be opened, each read returns that error.
struct LocalBlob(Result<FilePart, SourceError>);

impl LocalBlob {
    fn find(dir: &Path, blob: &Digest) -> Self {
        let in_layout = dir.join("blobs/sha256").join(blob.hex());
        let path = if in_layout.is_file() {
            in_layout
        } else {
            dir.join(blob.hex())
        };
        let failed = |error| SourceError::blob_unavailable(io::Error::other(format!("{}: {error}", path.display())));
        Self(FilePart::open(&path).map_err(failed))
    }
}

impl Source for LocalBlob {
    fn read(&self, offset: u64, len: usize) -> Pending {
        match &self.0 {
            Ok(part) => part.read(offset, len),
            Err(error) => Box::pin(std::future::ready(Err(error.clone()))),
        }
    }
}
