//! Resolves references to images that are ready to be read.

use std::{
    collections::HashSet,
    io,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::sync::OwnedMutexGuard;

use super::{
    error::ImageError,
    index::Selected,
    kept::{KeptImage, KeptImages},
    keyed_mutex::KeyedMutex,
    loaded::{Backing, LoadedImage},
    loader::{FetchPolicy, ImageLoader},
    manifest::{Document, ImageManifest, Selection},
    metadata_handle::MetadataHandle,
    metadata_store::{MetadataStore, NamedManifest},
    prefetch::PrefetchOptions,
    reference::Reference,
    trace::Traces,
};
use crate::{
    atomic_file,
    blob::{scheduler::FetchScheduler, shared::SharedBlobs, size_limit::SizeLimit},
    digest::Digest,
    error_chain::ErrorChain,
    registry::{self, Client, Credentials, Repository},
    ttl_cache::TtlCache,
    waits::{WaitKind, Waits},
};

/// Maximum number of remembered failures of each kind.
const MAX_REMEMBERED: usize = 1 << 16;

/// How long it is remembered that a manifest is that of an ordinary image. Long, because a digest never changes its
/// meaning.
const ORDINARY_TTL: Duration = Duration::from_secs(24 * 3600);

/// Pause between two attempts to resolve a reference whose registry is away.
const RETRY_PAUSE: Duration = Duration::from_secs(1);

/// Limits and options of images.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// How long resolving a reference may take.
    pub resolve_timeout: Duration,
    /// How long a failed look-up is remembered.
    pub negative_ttl: Duration,
    /// Largest bootstrap layer, in uncompressed bytes.
    pub max_bootstrap_size: u64,
    /// How long loading the tree of a published image may take, with the wait for a registry that is away.
    pub load_timeout: Duration,
    /// How long a read may wait for a chunk.
    pub chunk_timeout: Duration,
    /// Whether to read ahead of sequential readers.
    pub read_ahead: bool,
    /// How much disk space images may use.
    pub cache: SizeLimit,
    /// What to prefetch of images in use.
    pub prefetch: PrefetchOptions,
}

/// An image as described by its manifest and configuration.
#[derive(Debug, Clone)]
pub struct ImageDescription {
    /// Digest of the manifest.
    pub digest: Digest,
    /// The manifest.
    pub manifest: ImageManifest,
    /// Diff ID of each layer: the digest of the uncompressed layer.
    pub diff_ids: Vec<Digest>,
}

/// The images of a root: resolves references, and has the images loaded.
pub struct Images {
    pub(super) client: Client,
    pub(super) metadata: MetadataHandle,
    pub(super) loader: ImageLoader,
    /// Images that are being fetched.
    pub(super) kept: KeptImages,
    resolve_timeout: Duration,
    load_timeout: Duration,
    /// References that cannot be resolved or loaded. An older Podman announces each layer and should not wait each
    /// time.
    failures: TtlCache<Reference, ImageError>,
    /// Layers of ordinary images, by manifest; only of images that an index does not mark.
    ordinary: TtlCache<Digest, Arc<[Digest]>>,
    /// Layers of ordinary images, by the reference that named the image.
    ordinary_layers: TtlCache<(Reference, Digest), ()>,
    /// Serialises look-ups of the same reference, so that simultaneous ones send one request.
    reference_locks: KeyedMutex<Reference>,
}

impl Images {
    /// Opens the images of `root`. Removes unfinished files of an earlier process.
    pub fn open(root: &Path, client: Client, limits: Limits) -> io::Result<Self> {
        atomic_file::make_private_dir(root)?;
        let scratch = root.join("scratch");
        if scratch.exists() {
            atomic_file::unless_unwritable(std::fs::remove_dir_all(&scratch))?;
        }
        // Without the directory, bootstraps are unpacked in memory.
        atomic_file::unless_unwritable(atomic_file::make_private_dir(&scratch))?;
        let (metadata, cache) = (
            MetadataStore::open(&root.join("images"))?,
            SharedBlobs::open(&root.join("cache"), limits.cache)?,
        );
        metadata.remove_unfinished()?;
        let traces = Traces::open(&root.join("traces"))?;
        traces.remove_unfinished()?;
        let scheduler = FetchScheduler::new(limits.chunk_timeout, limits.read_ahead, client.max_prefetches());
        let backing = Backing {
            client: client.clone(),
            cache: Arc::new(cache),
            scheduler: Arc::new(scheduler),
            traces: Arc::new(traces),
            prefetch: limits.prefetch,
        };
        let metadata = MetadataHandle::new(metadata);
        let broken = TtlCache::new(MAX_REMEMBERED, limits.negative_ttl);
        let images = Self {
            client,
            loader: ImageLoader::new(metadata.clone(), backing, scratch, limits.max_bootstrap_size, broken),
            metadata,
            kept: KeptImages::default(),
            resolve_timeout: limits.resolve_timeout,
            load_timeout: limits.load_timeout,
            failures: TtlCache::new(MAX_REMEMBERED, limits.negative_ttl),
            ordinary: TtlCache::new(MAX_REMEMBERED, ORDINARY_TTL),
            ordinary_layers: TtlCache::new(MAX_REMEMBERED, limits.negative_ttl),
            reference_locks: KeyedMutex::default(),
        };
        images.count_metadata()?;
        Ok(images)
    }

    /// Writes the traces of the images in use to disk.
    pub fn save_traces(&self) {
        self.loader.loaded().iter().for_each(|image| image.save_trace());
    }

    /// Prefetches the chunks of the image's trace, which was just replaced, if the image is in use. Returns whether it
    /// does. Must be called within a runtime.
    pub async fn replay(&self, image: &Digest) -> bool {
        let mut is_replayed = false;
        for loaded in self.loader.loaded() {
            if loaded.digest == *image {
                is_replayed |= loaded.replay().await;
            }
        }
        is_replayed
    }

    /// Uses credentials of a pull, see [`Client::push_credentials`]. Forgets failures, because they may have been due
    /// to missing credentials.
    pub fn push_credentials(&self, repository: &Repository, credentials: Credentials) -> Result<(), registry::Error> {
        self.client.push_credentials(repository, credentials)?;
        self.failures.clear();
        Ok(())
    }

    /// Credentials of [`Self::push_credentials`] that are in use, for the next process.
    pub fn pushed_credentials(&self) -> Vec<(Repository, Credentials)> {
        self.client.pushed_credentials()
    }

    /// The images in use. Each counts as used as long as the result exists.
    pub fn loaded(&self) -> Vec<Arc<LoadedImage>> {
        self.loader.loaded()
    }

    /// What readers, pulls and look-ups wait for at present.
    pub fn waits(&self) -> &Arc<Waits> {
        self.loader.backing().scheduler.waits()
    }

    /// The client that asks registries.
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// Keeps the image with this manifest, published or not, as long as the result exists.
    pub fn keep(&self, manifest: Digest) -> KeptImage {
        self.kept.keep(manifest)
    }

    /// Manifests of the images whose trees are in memory.
    pub fn loaded_manifests(&self) -> HashSet<Digest> {
        self.loader.loaded().iter().map(|image| image.digest).collect()
    }

    /// How long resolving a reference may take.
    pub fn resolve_timeout(&self) -> Duration {
        self.resolve_timeout
    }

    /// Waits until no other task resolves the reference; dropping the guard lets the next one continue.
    pub async fn lock_reference(&self, reference: &Reference) -> OwnedMutexGuard<()> {
        self.reference_locks.lock(reference).await
    }

    /// Remembers for a while that the reference cannot be used.
    pub fn remember_failure(&self, reference: &Reference, error: &ImageError) {
        self.failures.insert(reference.clone(), error.clone());
    }

    /// Describes the image that a pull of `reference` is about to take. Fails for an image that cannot be published,
    /// and remembers that for a while. The caller holds the lock of the reference.
    pub async fn describe_for_pull(&self, reference: &Reference) -> Result<ImageDescription, ImageError> {
        if let Some(error) = self.failures.get(reference) {
            return Err(error);
        }
        let described = self.describe(reference).await;
        described.inspect_err(|error| {
            // Not remembered: the tag may be moved to a converted image at any time.
            if !matches!(error, ImageError::NotNydus) {
                self.remember_failure(reference, error);
            }
        })
    }

    /// Whether `layer` belongs to an ordinary image that the reference recently named. An older Podman announces each
    /// layer.
    pub fn is_ordinary(&self, reference: &Reference, layer: &Digest) -> bool {
        self.ordinary_layers.get(&(reference.clone(), *layer)).is_some()
    }

    async fn describe(&self, reference: &Reference) -> Result<ImageDescription, ImageError> {
        let named = match self.metadata.named(reference).await.first().copied() {
            Some(named) if reference.is_by_digest() => named,
            known => match (self.query_for_pull(reference, known.is_some()).await, known) {
                (Ok(named), _) => named,
                (Err(error), Some(known)) if error.is_unreachable() => {
                    let error = ErrorChain(&error);
                    tracing::warn!(image = %reference, %error, "failed to reach registry; publishing last known image");
                    known
                }
                (Err(error), _) => return Err(error),
            },
        };
        let policy = FetchPolicy::Registry;
        let manifest = self.loader.manifest(reference, named.manifest, policy).await?;
        if manifest.has_original_layers() {
            return Err(ImageError::OriginalLayers);
        }
        let repository = reference.repository();
        let config = self.loader.config(&repository, &manifest.config, policy).await?;
        Ok(ImageDescription {
            diff_ids: manifest.diff_ids(&config)?,
            digest: named.manifest,
            manifest,
        })
    }

    /// As [`Self::query`], for a pull that waits. If another manifest can be used instead, does not wait for a registry
    /// that is away. Else ends early enough for the error to tell what is wrong.
    async fn query_for_pull(&self, reference: &Reference, has_other: bool) -> Result<NamedManifest, ImageError> {
        let patience = match has_other {
            true => Duration::ZERO,
            false => self.resolve_timeout / 2,
        };
        let client = self.client.with_patience(patience);
        self.query(&client, reference, Selection::LikePodman).await
    }

    /// Loads the described image. Remembers a failure for a while.
    pub async fn load_described(
        &self,
        reference: &Reference,
        described: &ImageDescription,
    ) -> Result<Arc<LoadedImage>, ImageError> {
        let loaded = self
            .loader
            .load(reference, described.digest, FetchPolicy::Registry)
            .await;
        loaded.inspect_err(|error| self.remember_failure(reference, error))
    }

    /// Loads the image with this manifest, from disk or from the registries of `references`, of which the newest is
    /// last.
    pub async fn load_manifest(&self, manifest: Digest, references: &[String]) -> Result<Arc<LoadedImage>, ImageError> {
        let mut references: Vec<Reference> = references.iter().rev().filter_map(|text| text.parse().ok()).collect();
        let mut seen = HashSet::new();
        references.retain(|reference| seen.insert(reference.repository()));
        let limit = self.load_timeout;
        let name = references
            .first()
            .map_or_else(|| manifest.to_string(), ToString::to_string);
        let _wait = self.waits().begin(WaitKind::Image, name);
        let loaded = tokio::time::timeout(limit, self.load_from(manifest, &references)).await;
        let image = loaded.unwrap_or(Err(ImageError::TimedOut(limit.as_secs())))?;
        image.add_repositories(references.iter().map(Reference::repository));
        Ok(image)
    }

    async fn load_from(&self, manifest: Digest, references: &[Reference]) -> Result<Arc<LoadedImage>, ImageError> {
        let mut failure = ImageError::NotHere(manifest);
        let policies = [FetchPolicy::Disk, FetchPolicy::ReachableRegistry, FetchPolicy::Registry];
        let mut left: Vec<_> = references.iter().collect();
        for policy in policies {
            let mut still_left = Vec::new();
            for reference in left {
                match self.loader.load(reference, manifest, policy).await {
                    Ok(image) => return Ok(image),
                    Err(error) => {
                        if policy == FetchPolicy::Disk || error.is_away() {
                            still_left.push(reference);
                        }
                        failure = error;
                    }
                }
            }
            left = still_left;
        }
        Err(failure)
    }

    /// Manifest and configuration of a loaded image, as stored in its registry.
    pub async fn documents(&self, image: &LoadedImage) -> Result<(String, String), ImageError> {
        let text = async |digest: &Digest| {
            let bytes = self.metadata.get(digest).await.ok_or(ImageError::NotHere(*digest))?;
            String::from_utf8(bytes.to_vec())
                .map_err(|error| ImageError::io("manifest or configuration")(io::Error::other(error)))
        };
        Ok((text(&image.digest).await?, text(&image.manifest.config).await?))
    }

    /// Loads the image that `reference` names now. Sends a request to the registry, unless the reference has a digest
    /// and is known. Does not wait for a registry that is away.
    pub async fn resolve(&self, reference: &Reference) -> Result<Arc<LoadedImage>, ImageError> {
        let _wait = self.waits().begin(WaitKind::Image, reference.to_string());
        let limit = self.resolve_timeout;
        let resolved = tokio::time::timeout(limit, async {
            let digest = match self.metadata.named(reference).await.first() {
                Some(named) if reference.is_by_digest() => named.manifest,
                Some(named) if self.may_still_name(reference, named.top).await? => named.manifest,
                _ => {
                    let client = self.client.with_patience(Duration::ZERO);
                    self.query(&client, reference, Selection::PreferNydus).await?.manifest
                }
            };
            self.loader
                .load(reference, digest, FetchPolicy::ReachableRegistry)
                .await
        });
        resolved.await.unwrap_or(Err(ImageError::TimedOut(limit.as_secs())))
    }

    /// Like [`Self::resolve`], but waits for a registry that is away.
    pub async fn resolve_patiently(&self, reference: &Reference) -> Result<Arc<LoadedImage>, ImageError> {
        let end = Instant::now() + self.load_timeout;
        loop {
            match self.resolve(reference).await {
                Err(error) if error.is_away() && Instant::now() < end => tokio::time::sleep(RETRY_PAUSE).await,
                outcome => return outcome,
            }
        }
    }

    /// Like [`Self::still_names`], but assumes so if the registry cannot be reached.
    async fn may_still_name(&self, reference: &Reference, top: Digest) -> Result<bool, ImageError> {
        match self.still_names(reference, top).await {
            Err(error) if error.is_unreachable() => {
                let error = ErrorChain(&error);
                tracing::warn!(image = %reference, %error, "failed to reach registry; using last known image");
                Ok(true)
            }
            answered => answered,
        }
    }

    /// Whether the registry still returns `top` for the tag. Costs one HEAD request.
    async fn still_names(&self, reference: &Reference, top: Digest) -> Result<bool, ImageError> {
        let repository = reference.repository();
        let client = self.client.with_patience(Duration::ZERO);
        Ok(client.manifest_digest(&repository, reference.selector()).await? == top)
    }

    /// Queries the registry for the manifest that the reference names on this machine, and records it if the image is a
    /// Nydus image.
    async fn query(
        &self,
        client: &Client,
        reference: &Reference,
        selection: Selection,
    ) -> Result<NamedManifest, ImageError> {
        let repository = reference.repository();
        let stored = match reference.digest() {
            // The content may have been stored under a tag.
            Some(digest) => self.metadata.get(&digest).await.map(|bytes| (digest, bytes)),
            None => None,
        };
        let (top, bytes) = match stored {
            Some(stored) => stored,
            None => {
                let fetched = client.manifest(&repository, reference.selector()).await?;
                (fetched.digest, fetched.bytes)
            }
        };
        let (digest, manifest) = match Document::parse(&bytes, selection)? {
            Document::Image(manifest) => (top, manifest),
            // If an index marks Nydus images at all, then an unmarked entry is an ordinary one.
            Document::Index(selected) if selected.has_nydus && !selected.is_nydus => return Err(ImageError::NotNydus),
            Document::Index(Selected { manifest, .. }) => {
                if let Some(layers) = self.ordinary.get(&manifest) {
                    return Err(self.not_nydus(reference, &layers));
                }
                let loaded = self.loader.manifest(reference, manifest, FetchPolicy::Registry).await?;
                (manifest, loaded)
            }
        };
        if manifest.bootstrap.is_none() {
            let layers: Arc<[_]> = manifest.layers.iter().map(|layer| layer.digest).collect();
            self.ordinary.insert(digest, Arc::clone(&layers));
            return Err(self.not_nydus(reference, &layers));
        }
        // An index too: a reference by its digest can then be resolved without the registry.
        if self.metadata.get(&top).await.is_none() {
            self.metadata.keep(&top, bytes).await?;
        }
        let named = NamedManifest { manifest: digest, top };
        self.metadata.keep_record(reference, named).await?;
        self.failures.remove(reference);
        Ok(named)
    }

    /// Remembers the layers of an ordinary image.
    fn not_nydus(&self, reference: &Reference, layers: &[Digest]) -> ImageError {
        for layer in layers {
            self.ordinary_layers.insert((reference.clone(), *layer), ());
        }
        ImageError::NotNydus
    }

    /// Forgets that the reference could not be used.
    pub(super) fn forget_failure(&self, reference: &Reference) {
        self.failures.remove(reference);
    }
}
