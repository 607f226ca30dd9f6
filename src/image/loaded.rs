//! An image of a registry that is ready to be read: its layers and its contents.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use parking_lot::RwLock;
use tokio::{runtime::Handle, sync::mpsc};

use super::{
    access_recorder::AccessRecorder,
    bootstrap::Unpacked,
    contents::{ChunkStorage, Contents},
    error::ImageError,
    manifest::ImageManifest,
    prefetch::{self, PrefetchOptions},
    trace::{Trace, Traces},
};
use crate::{
    blob::{
        layout::{BlobLayout, Packing},
        scheduler::FetchScheduler,
        shared::SharedBlobs,
        source::{HostWait, Pending, Provenance, Source, SourceError, SourcedBytes},
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
    pub manifest: ImageManifest,
    /// The files.
    pub contents: Arc<Contents>,
    diff_ids: Vec<Digest>,
    /// Length of the uncompressed bootstrap layer, in bytes.
    bootstrap_size: u64,
    registry: RegistrySource,
    traces: Arc<Traces>,
    prefetch: PrefetchOptions,
    is_used: AtomicBool,
}

/// Reads blobs from a repository, or from other repositories that have the same image.
#[derive(Clone)]
pub(super) struct RegistrySource {
    pub(super) client: Client,
    /// For ranges of blobs: their readers wait for a registry without what they hold.
    hasty: Client,
    pub(super) repository: Repository,
    /// Other repositories that the image was pulled from. They are used when the main one fails.
    others: Arc<RwLock<Vec<Repository>>>,
}

/// One blob of a [`RegistrySource`].
pub(super) struct RegistryBlob {
    source: RegistrySource,
    digest: Digest,
}

/// An image to be loaded.
#[derive(Clone)]
pub(super) struct ImageParts {
    /// The repository that has the image's blobs.
    pub(super) repository: Repository,
    /// Digest of the manifest.
    pub(super) digest: Digest,
    pub(super) manifest: ImageManifest,
    /// One for each layer.
    pub(super) diff_ids: Vec<Digest>,
    /// Position of the bootstrap layer.
    pub(super) bootstrap: usize,
}

/// What all images of a root share.
#[derive(Clone)]
pub(super) struct Backing {
    pub(super) client: Client,
    pub(super) cache: Arc<SharedBlobs>,
    pub(super) scheduler: Arc<FetchScheduler>,
    pub(super) traces: Arc<Traces>,
    pub(super) prefetch: PrefetchOptions,
}

impl LoadedImage {
    /// Parses the unpacked bootstrap and prepares the blobs. Blocks, but does not use the network.
    pub(super) fn new(parts: ImageParts, unpacked: Unpacked, backing: Backing) -> Result<Self, ImageError> {
        let registry = RegistrySource::new(backing.client, parts.repository);
        let source = |digest| Arc::new(registry.blob(digest)) as Arc<dyn Source>;
        let storage = ChunkStorage {
            cache: &backing.cache,
            scheduler: backing.scheduler.registry(&registry.repository.registry),
            image: parts.manifest.layers[parts.bootstrap].digest.hex(),
        };
        let contents = Contents::load(&unpacked.bootstrap, &unpacked.metas, &storage, source)?;
        let bootstrap_size = unpacked.size;
        Ok(Self {
            digest: parts.digest,
            manifest: parts.manifest,
            contents: Arc::new(contents.with_unpacked(unpacked.without_bootstrap())),
            diff_ids: parts.diff_ids,
            bootstrap_size,
            registry,
            traces: backing.traces,
            prefetch: backing.prefetch,
            is_used: AtomicBool::new(false),
        })
    }

    /// Starts to prefetch and to record accesses, before the image is first read. Later calls have no effect. Must be
    /// called within a runtime.
    pub async fn prepare(&self) {
        if self.is_used.swap(true, Ordering::Relaxed) {
            return;
        }
        let trace = self.trace().await;
        let runtime = Handle::current();
        if self.prefetch.record_accesses {
            let (blobs, traces) = (self.contents.tree.blobs().to_vec(), Arc::clone(&self.traces));
            let recorder = AccessRecorder::new(self.digest, blobs, traces, trace.clone());
            recorder.save_regularly(&runtime);
            self.contents.record_in(recorder);
        }
        prefetch::start(&self.contents, trace, self.prefetch, &runtime);
    }

    /// Prefetches the chunks of the trace, which was just replaced, if the image is in use. Otherwise does nothing:
    /// [`Self::prepare`] will read the trace. Returns whether chunks are prefetched. Must be called within a runtime.
    pub async fn replay(&self) -> bool {
        if !self.prefetch.replay_trace || !self.is_used.load(Ordering::Relaxed) {
            return false;
        }
        let trace = self.trace().await;
        let is_there = trace.is_some();
        let traced = PrefetchOptions {
            builder_list: false,
            whole_image: false,
            ..self.prefetch
        };
        prefetch::start(&self.contents, trace, traced, &Handle::current());
        is_there
    }

    /// The image's trace on disk.
    async fn trace(&self) -> Option<Trace> {
        let (traces, image) = (Arc::clone(&self.traces), self.digest);
        match tokio::task::spawn_blocking(move || traces.get(&image)).await {
            Ok(Ok(trace)) => trace.filter(|trace| trace.image == self.digest),
            Ok(Err(error)) => {
                tracing::warn!(manifest = %self.digest, error = %ErrorChain(&error), "failed to read trace");
                None
            }
            Err(_) => None,
        }
    }

    /// Writes the recorded accesses to the trace on disk.
    pub fn save_trace(&self) {
        if let Some(recorder) = self.contents.recorder() {
            recorder.save();
        }
    }

    /// Whether the layer at `position` is the bootstrap, whose `diff` shows the files.
    pub fn is_bootstrap(&self, position: usize) -> bool {
        self.manifest.bootstrap == Some(position)
    }

    /// Diff ID of each layer: the digest of the uncompressed layer.
    pub fn diff_ids(&self) -> &[Digest] {
        &self.diff_ids
    }

    /// Adds repositories that have the image too. They are used when its own repository fails.
    pub fn add_repositories(&self, repositories: impl IntoIterator<Item = Repository>) {
        let mut others = self.registry.others.write();
        for repository in repositories {
            if repository != self.registry.repository && !others.contains(&repository) {
                others.push(repository);
            }
        }
    }

    /// Length of the uncompressed layer at `position` in bytes, as far as it is known without fetching the layer. For
    /// an original gzip layer, this is the length of its files, which is about that of its tar. The uncompressed form
    /// of a RAFS blob is the blob itself.
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
            hasty: client.with_patience(Duration::ZERO),
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

    /// The repositories in the order in which they are used.
    fn repositories(&self) -> Vec<Repository> {
        let others = self.others.read();
        std::iter::once(&self.repository).chain(&*others).cloned().collect()
    }

    /// Opens a range of a blob in the first repository that succeeds. Returns the error of the main repository.
    async fn open_range(
        &self,
        digest: &Digest,
        range: (u64, u64),
        is_ahead: bool,
    ) -> Result<registry::BlobStream, SourceError> {
        let mut failure = None;
        for repository in self.repositories() {
            match self.hasty.open_range(&repository, digest, range, is_ahead).await {
                Ok(stream) => return Ok(stream),
                Err(error) => _ = failure.get_or_insert(error),
            }
        }
        Err(self.first(failure))
    }

    /// Reads a range of a blob in the same way.
    async fn read(&self, digest: Digest, offset: u64, len: usize) -> Result<SourcedBytes, SourceError> {
        let mut failure = None;
        for repository in self.repositories() {
            let read = self.hasty.blob_range_with_origin(&repository, &digest, offset, len);
            match read.await {
                Ok((bytes, giver)) => {
                    let provenance = Provenance::new(giver);
                    return Ok(SourcedBytes { bytes, provenance });
                }
                Err(error) => _ = failure.get_or_insert(error),
            }
        }
        Err(self.first(failure))
    }

    /// The error of a read whose first failure is `failure`.
    fn first(&self, failure: Option<registry::Error>) -> SourceError {
        match failure {
            Some(error) if self.client.may_wait_after(&error) => SourceError::HostAway(Arc::new(error)),
            Some(error) => failed(error),
            None => SourceError::blob_unavailable(ImageError::Aborted),
        }
    }

    /// Waits for the main repository's registry, after `failure`.
    async fn wait(&self, failure: SourceError, wait: HostWait) -> Result<(), SourceError> {
        let SourceError::HostAway(cause) = &failure else {
            return Err(failure);
        };
        let Some(error) = cause.downcast_ref::<registry::Error>() else {
            return Err(failure.into_final());
        };
        let HostWait { since, count } = wait;
        let waited = self.client.wait_for_host(&self.repository, error, since, count).await;
        waited.map_err(failed)
    }
}

fn failed(error: registry::Error) -> SourceError {
    if error.is_range_failure() {
        SourceError::range_failed(error)
    } else {
        SourceError::blob_unavailable(error)
    }
}

impl Source for RegistryBlob {
    fn read(&self, offset: u64, len: usize) -> Pending {
        let (source, digest) = (self.source.clone(), self.digest);
        Box::pin(async move { source.read(digest, offset, len).await })
    }

    fn wait_for_host(&self, failure: SourceError, wait: HostWait) -> Pending<()> {
        let source = self.source.clone();
        Box::pin(async move { source.wait(failure, wait).await })
    }

    fn read_parts(&self, offset: u64, len: usize, is_ahead: bool, parts: mpsc::Sender<SourcedBytes>) -> Pending<()> {
        let (source, digest) = (self.source.clone(), self.digest);
        Box::pin(async move {
            let Some(last) = (len as u64).checked_sub(1).and_then(|more| offset.checked_add(more)) else {
                return Ok(());
            };
            let mut stream = source.open_range(&digest, (offset, last), is_ahead).await?;
            let provenance = Provenance::new(stream.served_by().clone());
            while let Some(bytes) = stream.next().await.map_err(failed)? {
                let provenance = provenance.clone();
                if parts.send(SourcedBytes { bytes, provenance }).await.is_err() {
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

    fn report_corrupt(&self, provenance: &Provenance) {
        if let Some(served_by) = provenance.endpoint::<ServedBy>() {
            self.source.client.report_corrupt(served_by);
        }
    }
}
