//! An image of a registry that is ready to be read: its layers and its contents.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use parking_lot::RwLock;
use tokio::{runtime::Handle, sync::mpsc};

use super::{
    access_recorder::AccessRecorder,
    bootstrap::Unpacked,
    contents::{Cached, Contents},
    error::ImageError,
    manifest::Manifest,
    prefetch,
    trace::{Trace, Traces},
};
use crate::{
    blob::{
        cache::BlobCache,
        layout::{BlobLayout, Packing},
        scheduler::FetchScheduler,
        source::{Pending, Provenance, Source, SourceError, SourcedBytes},
    },
    digest::Digest,
    error_chain::ErrorChain,
    registry::{self, Client, Repository, ServedBy},
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
    /// Length of the uncompressed bootstrap layer.
    bootstrap_size: u64,
    registry: RegistrySource,
    traces: Arc<Traces>,
    prefetch: prefetch::Options,
    is_used: AtomicBool,
}

/// Reads a blob from a repository, or from others that have the same image.
#[derive(Clone)]
pub(super) struct RegistrySource {
    pub(super) client: Client,
    pub(super) repository: Repository,
    /// Where else the image was pulled from: asked when the repository fails.
    others: Arc<RwLock<Vec<Repository>>>,
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
    pub fetching: Arc<FetchScheduler>,
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
        let bootstrap_size = unpacked.size;
        Ok(Self {
            digest,
            manifest,
            contents: Arc::new(contents.keeping(unpacked.without_bootstrap())),
            diff_ids,
            bootstrap_size,
            registry,
            traces: backing.traces,
            prefetch: backing.prefetch,
            is_used: AtomicBool::new(false),
        })
    }

    /// The image is going to be read: what will be needed first is fetched from now on, and what is needed is noted.
    /// Within a runtime.
    pub async fn prepare(&self) {
        if self.is_used.swap(true, Ordering::Relaxed) {
            return;
        }
        let trace = self.trace().await;
        let runtime = Handle::current();
        if self.prefetch.noted {
            let (blobs, traces) = (self.contents.tree.blobs().to_vec(), Arc::clone(&self.traces));
            let needs = AccessRecorder::new(self.digest, blobs, traces, trace.clone());
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
                tracing::warn!(image = %self.digest, "what earlier starts needed is not known: {}", ErrorChain(&error));
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

    /// One for each layer: digests of the uncompressed layers.
    pub fn diff_ids(&self) -> &[Digest] {
        &self.diff_ids
    }

    /// The image is in these repositories too: they are read from when its own fails.
    pub fn add_repositories(&self, repositories: impl IntoIterator<Item = Repository>) {
        let mut others = self.registry.others.write();
        for repository in repositories {
            if repository != self.registry.repository && !others.contains(&repository) {
                others.push(repository);
            }
        }
    }

    /// Length of the uncompressed layer at `position` in bytes, as far as it is known without fetching it: of an original
    /// gzip layer it is the bytes of its files, about the length of its tar. A RAFS blob's uncompressed form is the blob.
    pub fn uncompressed_size(&self, position: usize) -> u64 {
        if self.is_bootstrap(position) {
            return self.bootstrap_size;
        }
        let Some(layer) = self.manifest.layers.get(position) else {
            return 0;
        };
        let id = layer.digest.hex();
        let original = |blob: &&Arc<BlobLayout>| blob.packing == Packing::Zran && blob.id == id;
        let original = self.contents.tree.blobs().iter().find(original);
        original.map_or(layer.size, |blob| blob.uncompressed_size)
    }
}

impl RegistrySource {
    pub(super) fn new(client: Client, repository: Repository) -> Self {
        Self {
            client,
            repository,
            others: Arc::default(),
        }
    }

    /// One of the repository's blobs.
    pub(super) fn blob(&self, digest: Digest) -> RegistryBlob {
        let source = self.clone();
        RegistryBlob { source, digest }
    }

    /// The repositories to ask, in order.
    fn repositories(&self) -> Vec<Repository> {
        let others = self.others.read();
        std::iter::once(&self.repository).chain(&*others).cloned().collect()
    }

    /// Opens a range of a blob where it can be had.
    async fn open_range(
        &self,
        digest: &Digest,
        range: (u64, u64),
        is_ahead: bool,
    ) -> Result<registry::BlobStream, registry::Error> {
        let first = self.client.open_range(&self.repository, digest, range, is_ahead).await;
        let Err(error) = first else { return first };
        let others = self.others.read().clone();
        for repository in others {
            if let Ok(stream) = self.client.open_range(&repository, digest, range, is_ahead).await {
                return Ok(stream);
            }
        }
        Err(error)
    }

    fn read(&self, digest: Digest, offset: u64, len: usize) -> Pending {
        let (client, repositories) = (self.client.clone(), self.repositories());
        Box::pin(async move {
            let mut failure = None;
            for repository in repositories {
                match client.blob_range_with_origin(&repository, &digest, offset, len).await {
                    Ok((bytes, giver)) => {
                        let origin = Provenance::new(giver);
                        return Ok(SourcedBytes { bytes, origin });
                    }
                    // The first one's is the image's own.
                    Err(error) => _ = failure.get_or_insert(error),
                }
            }
            Err(failure.map_or_else(|| SourceError::of_all(ImageError::Aborted), failed))
        })
    }
}

fn failed(error: registry::Error) -> SourceError {
    if error.is_range_failure() {
        SourceError::of_range(error)
    } else {
        SourceError::of_all(error)
    }
}

impl Source for RegistryBlob {
    fn read(&self, offset: u64, len: usize) -> Pending {
        self.source.read(self.digest, offset, len)
    }

    fn read_parts(&self, offset: u64, len: usize, is_ahead: bool, parts: mpsc::Sender<SourcedBytes>) -> Pending<()> {
        let (source, digest) = (self.source.clone(), self.digest);
        Box::pin(async move {
            let Some(last) = (len as u64).checked_sub(1).and_then(|more| offset.checked_add(more)) else {
                return Ok(());
            };
            let mut stream = source
                .open_range(&digest, (offset, last), is_ahead)
                .await
                .map_err(failed)?;
            let origin = Provenance::new(stream.served_by().clone());
            while let Some(bytes) = stream.next().await.map_err(failed)? {
                let origin = origin.clone();
                if parts.send(SourcedBytes { bytes, origin }).await.is_err() {
                    break;
                }
            }
            Ok(())
        })
    }

    fn can_seek(&self) -> bool {
        let RegistrySource { client, repository, .. } = &self.source;
        client.supports_ranges(repository, &self.digest)
    }

    fn distrust(&self, origin: &Provenance) {
        if let Some(giver) = origin.place::<ServedBy>() {
            self.source.client.report_corrupt(giver);
        }
    }
}
