//! `nydus-store mount`

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

/// Mount one image by itself, until interrupted
#[derive(Debug, Args)]
pub struct Mount {
    /// An image in a registry, or the file of a bootstrap
    #[arg(value_name = "REF|BOOTSTRAP")]
    image: String,

    /// Where to mount it
    #[arg(value_name = "DIR")]
    dir: PathBuf,

    /// Where to keep what is fetched [default: a temporary directory, deleted at the end]
    #[arg(long, value_name = "DIR")]
    root: Option<PathBuf>,

    /// With a bootstrap: the directory that holds its data blobs, named by their ids, or an OCI layout
    /// [default: where the bootstrap is]
    #[arg(long, value_name = "DIR")]
    blobs: Option<PathBuf>,

    #[command(flatten)]
    config: ConfigArg,
}

/// A directory for what is fetched: the one asked for, or one that is deleted at the end.
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

impl Mount {
    pub fn run(&self) -> anyhow::Result<()> {
        let config = self.config.load()?;
        let image = ImageArg::new(&self.image)?;
        // Before anything is fetched.
        let dir = self.dir.display();
        let metadata = self.dir.metadata().with_context(|| format!("cannot mount on {dir}"))?;
        anyhow::ensure!(metadata.is_dir(), "cannot mount on {dir}: it is not a directory");
        let workspace = Workspace::open(self.root.as_deref())?;
        let runtime = runtime()?;
        let mut stop = StopSignals::new(&runtime)?;
        // Reading ahead takes a runtime.
        let inside = runtime.enter();
        let (loaded, contents) = match image {
            ImageArg::Bootstrap(bootstrap) => {
                let blobs = self.blobs.as_deref().or(bootstrap.parent()).unwrap_or(Path::new("."));
                (None, local(bootstrap, blobs, workspace.path(), &config)?)
            }
            ImageArg::Reference(reference) => {
                let (images, image) = runtime.block_on(remote(&reference, &config, workspace.path()))?;
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
        tracing::info!(image = self.image, dir = %self.dir.display(), "mounted; interrupt to unmount");
        let asked = runtime.block_on(stop.wait(&mounted));
        mounted.unmount();
        if let Some((_, image)) = loaded {
            image.save_trace();
        }
        runtime.shutdown_background();
        asked
    }
}

async fn remote(reference: &Reference, config: &Config, root: &Path) -> anyhow::Result<(Images, Arc<LoadedImage>)> {
    let client = registry::Client::new(config.registry_options())?;
    let images = Images::open(root, client, config.limits())?;
    let loaded = images
        .resolve(reference)
        .await
        .with_context(|| format!("cannot use {reference}"))?;
    loaded.prepare().await;
    Ok((images, loaded))
}

fn local(bootstrap: &Path, blobs: &Path, root: &Path, config: &Config) -> anyhow::Result<Arc<Contents>> {
    let cache = SharedBlobs::open(&root.join("cache"))?;
    let image = Digest::of(&std::fs::read(bootstrap)?).hex();
    let metas = metas_beside(bootstrap);
    let cached = ChunkStorage {
        cache: &cache,
        scheduler: FetchScheduler::new(Duration::from_secs(60), config.fetch.read_ahead, usize::MAX).lane(""),
        image,
    };
    let source = |blob: Digest| Arc::new(BlobFile::find(blobs, &blob)) as Arc<dyn Source>;
    let contents = Contents::load(bootstrap, &metas, &cached, source);
    Ok(Arc::new(
        contents.with_context(|| format!("cannot use {}", bootstrap.display()))?,
    ))
}

/// The `<blob>.blob.meta` files in the bootstrap's directory, as in a bootstrap layer.
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

/// A data blob in a local file, which may not be there.
struct BlobFile(Result<FilePart, SourceError>);

impl BlobFile {
    fn find(dir: &Path, blob: &Digest) -> Self {
        let in_layout = dir.join("blobs/sha256").join(blob.hex());
        let path = if in_layout.is_file() {
            in_layout
        } else {
            dir.join(blob.hex())
        };
        let failed = |error| SourceError::of_all(io::Error::other(format!("{}: {error}", path.display())));
        Self(FilePart::open(&path).map_err(failed))
    }
}

impl Source for BlobFile {
    fn read(&self, offset: u64, len: usize) -> Pending {
        match &self.0 {
            Ok(part) => part.read(offset, len),
            Err(error) => Box::pin(std::future::ready(Err(error.clone()))),
        }
    }
}
