//! An image of a registry that is ready to be read: its layers and its contents.

use std::{
    io,
    os::unix::fs::FileExt as _,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use bytes::Bytes;
use tokio::{runtime::Handle, sync::mpsc};

use super::{
    bootstrap::Unpacked,
    contents::{Cached, Contents},
    error::ImageError,
    library::Library,
    manifest::{LayerInfo, LookedUpBy, Manifest},
    needs::Needs,
    prefetch,
    trace::{Trace, Traces},
};
use crate::{
    blob::{
        cache::BlobCache,
        fetching::Fetching,
        layout::Packing,
        source::{Given, Origin, Pending, Source, SourceError},
    },
    digest::Digest,
    registry::{self, Client, Giver, Repository},
    report::Report,
};

/// An image that is ready to be read.
pub struct LoadedImage {
    /// Digest of the image's manifest.
    pub digest: Digest,
    /// The manifest.
    pub manifest: Manifest,
    /// The files.
    pub contents: Arc<Contents>,
    diff_ids: Vec<Digest>,
    bootstrap_layer: Digest,
    /// Length of the uncompressed bootstrap layer.
    bootstrap_size: u64,
    registry: RegistrySource,
    library: Arc<Library>,
    traces: Arc<Traces>,
    prefetch: prefetch::Options,
    is_used: AtomicBool,
}

/// Reads a blob from a repository.
#[derive(Clone)]
pub(super) struct RegistrySource {
    pub(super) client: Client,
    pub(super) repository: Repository,
}

/// One blob of a [`RegistrySource`].
pub(super) struct RegistryBlob {
    source: RegistrySource,
    digest: Digest,
}

/// What [`LoadedImage::new`] is made from.
pub struct Parts {
    /// Digest of the manifest.
    pub digest: Digest,
    /// The manifest.
    pub manifest: Manifest,
    /// One for each layer.
    pub diff_ids: Vec<Digest>,
    /// Digest of the bootstrap layer.
    pub bootstrap_layer: Digest,
    /// The files of the bootstrap layer.
    pub unpacked: Unpacked,
}

/// Where an image's bytes come from and go to.
pub struct Backing {
    /// The registry client.
    pub client: Client,
    /// The repository that holds the image's blobs.
    pub repository: Repository,
    /// The cache of chunks.
    pub cache: Arc<BlobCache>,
    /// What all readers share.
    pub fetching: Arc<Fetching>,
    /// The library that holds the bootstrap layer.
    pub library: Arc<Library>,
    /// What starts of images have needed.
    pub traces: Arc<Traces>,
    /// What to fetch beforehand.
    pub prefetch: prefetch::Options,
}

impl LoadedImage {
    /// Reads the bootstrap and prepares the blobs. Blocks, but does not use the network.
    pub fn new(parts: Parts, backing: Backing) -> Result<Self, ImageError> {
        let Parts {
            digest,
            manifest,
            diff_ids,
            bootstrap_layer,
            unpacked,
        } = parts;
        let registry = RegistrySource::new(backing.client, backing.repository);
        let source = |digest| Arc::new(registry.blob(digest)) as Arc<dyn Source>;
        let cached = Cached {
            cache: &backing.cache,
            lane: backing.fetching.lane(&registry.repository.registry),
            image: bootstrap_layer.hex(),
        };
        let contents = Contents::load(&unpacked.bootstrap, &unpacked.metas, &cached, source)?;
        let (library, bootstrap_size) = (backing.library, unpacked.size);
        Ok(Self {
            digest,
            manifest,
            contents: Arc::new(contents.keeping(unpacked.without_bootstrap())),
            diff_ids,
            bootstrap_layer,
            bootstrap_size,
            registry,
            library,
            traces: backing.traces,
            prefetch: backing.prefetch,
            is_used: AtomicBool::new(false),
        })
    }

    /// Somebody is going to read the image: what will be needed first is fetched from now on, and what is needed is noted.
    /// Within a runtime.
    pub async fn prepare(&self) {
        if self.is_used.swap(true, Ordering::Relaxed) {
            return;
        }
        let trace = self.trace().await;
        let runtime = Handle::current();
        if self.prefetch.noted {
            let (blobs, traces) = (self.contents.tree.blobs().to_vec(), Arc::clone(&self.traces));
            let needs = Needs::new(self.digest, blobs, traces, trace.clone());
            needs.save_regularly(&runtime);
            self.contents.note_in(needs);
        }
        prefetch::start(&self.contents, trace, self.prefetch, &runtime);
    }

    /// A trace of the image was put in the place of the one that was there. If the image is in use, what it names is fetched
    /// from now on; otherwise [`Self::prepare`] will find it. Tells whether it is so. Within a runtime.
    pub async fn replay(&self) -> bool {
        if !self.prefetch.learned || !self.is_used.load(Ordering::Relaxed) {
            return false;
        }
        let trace = self.trace().await;
        let is_there = trace.is_some();
        let traced = prefetch::Options {
            listed: false,
            all: false,
            ..self.prefetch
        };
        prefetch::start(&self.contents, trace, traced, &Handle::current());
        is_there
    }

    /// What earlier starts needed, as it is on disk.
    async fn trace(&self) -> Option<Trace> {
        let (traces, image) = (Arc::clone(&self.traces), self.digest);
        match tokio::task::spawn_blocking(move || traces.get(&image)).await {
            Ok(Ok(trace)) => trace.filter(|trace| trace.image == self.digest),
            Ok(Err(error)) => {
                tracing::warn!(image = %self.digest, "what earlier starts needed is not known: {}", Report(&error));
                None
            }
            Err(_) => None,
        }
    }

    /// Keeps what was needed so far for the next start.
    pub fn save_needs(&self) {
        if let Some(needs) = self.contents.needs() {
            needs.save();
        }
    }

    /// Whether the layer at `position` is the one whose `diff` shows the files.
    pub fn is_bootstrap(&self, position: usize) -> bool {
        self.manifest.bootstrap == Some(position)
    }

    /// The `info` of the layer at `position`, in the form that goes with how it was looked up.
    pub fn info(&self, position: usize, by: LookedUpBy) -> LayerInfo {
        let layer = &self.manifest.layers[position];
        let size = if self.is_bootstrap(position) {
            Some(self.bootstrap_size)
        } else {
            self.uncompressed_size(&layer.digest)
        };
        layer.info(by, self.diff_ids[position], size)
    }

    /// The bytes of files in an original gzip layer: about the length of its tar, which the bootstrap does not tell.
    /// A RAFS blob's own uncompressed form is the blob itself.
    fn uncompressed_size(&self, layer: &Digest) -> Option<u64> {
        let (blobs, id) = (self.contents.tree.blobs(), layer.hex());
        let blob = blobs
            .iter()
            .find(|blob| blob.packing == Packing::Zran && blob.id == id)?;
        Some(blob.uncompressed_size)
    }

    /// The raw bytes of the layer at `position`, fetched as asked. They are not verified here: whoever reads a layer
    /// whole knows its digest.
    pub async fn read_layer(&self, position: usize, offset: u64, len: usize) -> Result<Bytes, SourceError> {
        let layer = &self.manifest.layers[position];
        let len = usize::try_from(layer.size.saturating_sub(offset)).map_or(len, |left| len.min(left));
        if len == 0 {
            return Ok(Bytes::new());
        }
        if layer.digest == self.bootstrap_layer
            && let Some(bytes) = self.read_kept(offset, len).await
        {
            return Ok(bytes);
        }
        Ok(self.registry.read(layer.digest, offset, len).await?.bytes)
    }

    /// Bytes of the bootstrap layer, if they are on disk.
    async fn read_kept(&self, offset: u64, len: usize) -> Option<Bytes> {
        let (library, digest) = (Arc::clone(&self.library), self.bootstrap_layer);
        let read = move || {
            let mut bytes = vec![0; len];
            library.file(&digest)?.read_exact_at(&mut bytes, offset)?;
            io::Result::Ok(bytes.into())
        };
        tokio::task::spawn_blocking(read).await.ok()?.ok()
    }
}

impl RegistrySource {
    pub(super) fn new(client: Client, repository: Repository) -> Self {
        Self { client, repository }
    }

    /// One of the repository's blobs.
    pub(super) fn blob(&self, digest: Digest) -> RegistryBlob {
        let source = self.clone();
        RegistryBlob { source, digest }
    }

    fn read(&self, digest: Digest, offset: u64, len: usize) -> Pending {
        let Self { client, repository } = self.clone();
        Box::pin(async move {
            let read = client.blob_range_and_giver(&repository, &digest, offset, len).await;
            let (bytes, giver) = read.map_err(failed)?;
            let origin = Origin::new(giver);
            Ok(Given { bytes, origin })
        })
    }
}

fn failed(error: registry::Error) -> SourceError {
    if error.is_of_range() {
        SourceError::of_range(error)
    } else {
        SourceError::of_all(error)
    }
}

impl Source for RegistryBlob {
    fn read(&self, offset: u64, len: usize) -> Pending {
        self.source.read(self.digest, offset, len)
    }

    fn read_parts(&self, offset: u64, len: usize, is_ahead: bool, parts: mpsc::Sender<Given>) -> Pending<()> {
        let (RegistrySource { client, repository }, digest) = (self.source.clone(), self.digest);
        Box::pin(async move {
            let Some(last) = (len as u64).checked_sub(1).and_then(|more| offset.checked_add(more)) else {
                return Ok(());
            };
            let opened = client.open_range(&repository, &digest, (offset, last), is_ahead).await;
            let mut stream = opened.map_err(failed)?;
            let origin = Origin::new(stream.giver().clone());
            while let Some(bytes) = stream.next().await.map_err(failed)? {
                let origin = origin.clone();
                if parts.send(Given { bytes, origin }).await.is_err() {
                    break;
                }
            }
            Ok(())
        })
    }

    fn can_seek(&self) -> bool {
        let RegistrySource { client, repository } = &self.source;
        client.gives_ranges(repository, &self.digest)
    }

    fn distrust(&self, origin: &Origin) {
        if let Some(giver) = origin.place::<Giver>() {
            self.source.client.distrust(giver);
        }
    }
}
