//! Loads images: fetches, unpacks and parses the bootstrap of a manifest.

use std::{
    collections::HashMap,
    io,
    path::PathBuf,
    sync::{Arc, Weak},
    time::Duration,
};

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::Semaphore;

use super::{
    bootstrap::{self, UnpackError},
    error::ImageError,
    keyed_mutex::KeyedMutex,
    loaded::{Backing, ImageParts, LoadedImage},
    manifest::{Document, ImageManifest, LayerDescriptor, ManifestError, Selection},
    metadata_handle::MetadataHandle,
    reference::Reference,
    upkeep,
};
use crate::{
    digest::Digest,
    registry::{Client, Repository},
    ttl_cache::TtlCache,
};

/// Largest image configuration, in bytes.
pub(super) const MAX_CONFIG_BYTES: u64 = 8 << 20;
/// Maximum number of bootstraps that are unpacked at a time; each takes a core and memory.
const MAX_PARALLEL_UNPACKS: usize = 2;

/// Where content may come from if it is not on disk.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum FetchPolicy {
    /// From nowhere: missing content is an error.
    Disk,
    /// From the registry, which is waited for if it is away.
    Registry,
    /// From the registry, unless it is away.
    ReachableRegistry,
}

/// Loads images and shares those that are in use.
pub(super) struct ImageLoader {
    metadata: MetadataHandle,
    backing: Backing,
    /// Directory for unpacked bootstraps.
    scratch: PathBuf,
    max_bootstrap_size: u64,
    /// Images in use, by repository and manifest.
    loaded: Mutex<HashMap<(Repository, Digest), Weak<LoadedImage>>>,
    /// Images that cannot be loaded although all of their content is on disk.
    broken: TtlCache<Digest, ImageError>,
    /// Serialises loads of the same manifest from the same repository. A slow repository does not delay others.
    loads: KeyedMutex<(Repository, Digest)>,
    /// Serialises unpacking and checking of the same bootstrap layer on disk.
    bootstrap_checks: KeyedMutex<Digest>,
    unpack_permits: Arc<Semaphore>,
}

impl ImageLoader {
    /// Loads images of at most `max_bootstrap_size` uncompressed bytes of bootstrap layer. Failures of intact content
    /// are remembered in `broken`.
    pub(super) fn new(
        metadata: MetadataHandle,
        backing: Backing,
        scratch: PathBuf,
        max_bootstrap_size: u64,
        broken: TtlCache<Digest, ImageError>,
    ) -> Self {
        Self {
            metadata,
            backing,
            scratch,
            max_bootstrap_size,
            broken,
            loaded: Mutex::default(),
            loads: KeyedMutex::default(),
            bootstrap_checks: KeyedMutex::default(),
            unpack_permits: Arc::new(Semaphore::new(MAX_PARALLEL_UNPACKS)),
        }
    }

    pub(super) fn backing(&self) -> &Backing {
        &self.backing
    }

    /// Largest bootstrap layer, in uncompressed bytes.
    pub(super) fn max_bootstrap_size(&self) -> u64 {
        self.max_bootstrap_size
    }

    /// The images in use.
    pub(super) fn loaded(&self) -> Vec<Arc<LoadedImage>> {
        self.loaded.lock().values().filter_map(Weak::upgrade).collect()
    }

    /// Has the next load of the image with this manifest fetch again what is missing on disk. Present users keep it.
    pub(super) fn forget_loaded(&self, manifest: &Digest) {
        self.loaded.lock().retain(|(_, digest), _| digest != manifest);
    }

    /// Forgets that the image with this manifest could not be loaded.
    pub(super) fn forget_failure(&self, manifest: &Digest) {
        self.broken.remove(manifest);
    }

    /// The image with this manifest from the repository of `reference`; loads it unless it is in use.
    pub(super) async fn load(
        &self,
        reference: &Reference,
        digest: Digest,
        policy: FetchPolicy,
    ) -> Result<Arc<LoadedImage>, ImageError> {
        let repository = reference.repository();
        let key = (repository.clone(), digest);
        let _guard = self.loads.lock(&key).await;
        if let Some(image) = self.loaded.lock().get(&key).and_then(Weak::upgrade) {
            return Ok(image);
        }
        if let Some(error) = self.broken.get(&digest) {
            return Err(error);
        }
        let manifest = self.manifest(reference, digest, policy).await?;
        let bootstrap = manifest.bootstrap.ok_or(ImageError::NotNydus)?;
        let config = self.config(&repository, &manifest.config, policy).await?;
        let diff_ids = manifest.diff_ids(&config)?;
        let layer = manifest.layers[bootstrap].clone();
        let parts = ImageParts {
            repository,
            digest,
            manifest,
            diff_ids,
            bootstrap,
        };
        let mut is_new = self.ensure_bootstrap(&parts.repository, &layer, policy).await?;
        let mut outcome = self.unpack(&parts, is_new).await;
        if !is_new && matches!(outcome, Err(ImageError::NotHere(_))) {
            is_new = self.ensure_bootstrap(&parts.repository, &layer, policy).await?;
            outcome = self.unpack(&parts, is_new).await;
        }
        let image = outcome.inspect_err(|error| self.broken.insert(digest, error.clone()))?;
        let mut loaded = self.loaded.lock();
        loaded.retain(|_, image| image.strong_count() > 0);
        loaded.insert(key, Arc::downgrade(&image));
        Ok(image)
    }

    /// Unpacks and parses the bootstrap layer. A damaged layer that is not new is removed.
    ///
    /// # Errors
    /// [`ImageError::NotHere`] if the layer is missing, or was damaged and has been removed.
    async fn unpack(&self, parts: &ImageParts, is_new: bool) -> Result<Arc<LoadedImage>, ImageError> {
        let layer = parts.manifest.layers[parts.bootstrap].digest;
        // No other task reads the layer between the failure and its removal, so loads from other repositories find it
        // either intact or missing.
        let _guard = self.bootstrap_checks.lock(&layer).await;
        let outcome = self.unpack_once(parts.clone()).await;
        let is_damaged = matches!(&outcome, Err(ImageError::Unpack(error)) if error.is_damage());
        if is_damaged && !is_new && self.metadata.remove_damaged(&layer).await? {
            return Err(ImageError::NotHere(layer));
        }
        outcome
    }

    async fn unpack_once(&self, parts: ImageParts) -> Result<Arc<LoadedImage>, ImageError> {
        let (limit, scratch) = (self.max_bootstrap_size, self.scratch.clone());
        let (metadata, backing) = (self.metadata.clone(), self.backing.clone());
        let (layer, diff_id) = (
            parts.manifest.layers[parts.bootstrap].digest,
            parts.diff_ids[parts.bootstrap],
        );
        let work = move || {
            let open = || {
                metadata.reader(&layer).map_err(|error| match error.kind() {
                    io::ErrorKind::NotFound => ImageError::NotHere(layer),
                    _ => ImageError::io("cannot open the bootstrap layer")(error),
                })
            };
            let unpacked = match bootstrap::unpack(open()?, diff_id, limit, &scratch) {
                Err(error) if error.is_of_disk() => bootstrap::unpack_in_memory(open()?, diff_id, limit),
                unpacked => unpacked,
            };
            // New images may have added much. If it fails, the next upkeep reports it.
            upkeep::count_metadata(metadata.blocking(), &backing).ok();
            LoadedImage::new(parts, unpacked.map_err(Arc::new)?, backing).map(Arc::new)
        };
        with_permit(&self.unpack_permits, work).await?
    }

    /// Fetches the bootstrap layer unless it is on disk. Returns whether it was fetched; otherwise only unpacking shows
    /// whether it is intact.
    async fn ensure_bootstrap(
        &self,
        repository: &Repository,
        layer: &LayerDescriptor,
        policy: FetchPolicy,
    ) -> Result<bool, ImageError> {
        let limit = self.max_bootstrap_size;
        if layer.size > limit {
            return Err(Arc::new(UnpackError::TooLarge(limit)).into());
        }
        if self.metadata.has(&layer.digest).await? {
            return Ok(false);
        }
        self.fetch(repository, &layer.digest, layer.size, policy)
            .await
            .map(|_| true)
    }

    /// The image manifest with this digest. A Nydus image's manifest is stored.
    pub(super) async fn manifest(
        &self,
        reference: &Reference,
        digest: Digest,
        policy: FetchPolicy,
    ) -> Result<ImageManifest, ImageError> {
        let stored = self.metadata.get(&digest).await;
        let bytes = match &stored {
            Some(bytes) => bytes.clone(),
            None if policy == FetchPolicy::Disk => return Err(ImageError::NotHere(digest)),
            None => {
                let (client, repository) = (self.client(policy), reference.repository());
                client.manifest(&repository, &digest.to_string()).await?.bytes
            }
        };
        let Document::Image(manifest) = Document::parse(&bytes, Selection::PreferNydus)? else {
            return Err(ManifestError::nested_index().into());
        };
        if stored.is_none() && manifest.bootstrap.is_some() {
            self.metadata.keep(&digest, bytes).await?;
        }
        Ok(manifest)
    }

    /// The image configuration with this digest.
    pub(super) async fn config(
        &self,
        repository: &Repository,
        digest: &Digest,
        policy: FetchPolicy,
    ) -> Result<Bytes, ImageError> {
        match self.metadata.get(digest).await {
            Some(bytes) => Ok(bytes),
            None => self.fetch(repository, digest, MAX_CONFIG_BYTES, policy).await,
        }
    }

    /// The client that `policy` asks for.
    fn client(&self, policy: FetchPolicy) -> Client {
        let client = &self.backing.client;
        match policy {
            FetchPolicy::ReachableRegistry => client.with_patience(Duration::ZERO),
            FetchPolicy::Disk | FetchPolicy::Registry => client.clone(),
        }
    }

    /// Fetches a blob of at most `limit` bytes and stores it.
    async fn fetch(
        &self,
        repository: &Repository,
        digest: &Digest,
        limit: u64,
        policy: FetchPolicy,
    ) -> Result<Bytes, ImageError> {
        if policy == FetchPolicy::Disk {
            return Err(ImageError::NotHere(*digest));
        }
        let fetched = self.client(policy).blob(repository, digest, limit).await;
        let bytes = fetched.map_err(|error| match error.is_not_found() {
            true => ImageError::Incomplete(error),
            false => error.into(),
        })?;
        self.metadata.keep(digest, bytes.clone()).await?;
        Ok(bytes)
    }
}

/// Runs `work`, which blocks, once a permit is available. The permit is held until the work ends, even if the caller
/// stops waiting for it.
async fn with_permit<T: Send + 'static>(
    permits: &Arc<Semaphore>,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, ImageError> {
    let permit = Arc::clone(permits).acquire_owned().await;
    let permit = permit.map_err(|_| ImageError::Aborted)?;
    let done = tokio::task::spawn_blocking(move || {
        let _permit = permit;
        work()
    });
    done.await.map_err(|_| ImageError::Aborted)
}

#[cfg(test)]
mod tests;
