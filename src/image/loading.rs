//! From a manifest to an image that is ready to be read: fetches, unpacks and reads the bootstrap.

use std::{
    io,
    sync::{Arc, Weak},
};

use bytes::Bytes;
use tokio::sync::Semaphore;

use super::{
    bootstrap::{self, UnpackError},
    error::ImageError,
    loaded::{Backing, LoadedImage, Parts},
    manifest::{Layer, Manifest},
    metadata_store::{MetadataStore, Named},
    reference::Reference,
    resolve::{FetchPolicy, Images},
};
use crate::{digest::Digest, registry::Repository};

/// Largest image configuration, in bytes.
pub(super) const MAX_CONFIG: u64 = 8 << 20;

impl Images {
    fn loaded(&self, key: &(Repository, Digest)) -> Option<Arc<LoadedImage>> {
        self.loaded.lock().get(key).and_then(Weak::upgrade)
    }

    /// Loads the image of that manifest, or gives the one that is loaded.
    ///
    /// A turn is that of one repository, so that a slow one does not hold up the same image from another.
    pub(super) async fn load(
        &self,
        reference: &Reference,
        digest: Digest,
        reach: FetchPolicy,
    ) -> Result<Arc<LoadedImage>, ImageError> {
        let repository = reference.repository();
        let key = (repository.clone(), digest);
        let _turn = self.loading.take(&key).await;
        if let Some(image) = self.loaded(&key) {
            return Ok(image);
        }
        if let Some(error) = self.broken.get(&digest) {
            return Err(error);
        }
        let manifest = self.manifest(reference, digest, reach).await?;
        let bootstrap = manifest.bootstrap.ok_or(ImageError::NotNydus)?;
        let config = self.config(&repository, &manifest.config, reach).await?;
        let diff_ids = manifest.diff_ids(&config)?;
        let layer = manifest.layers[bootstrap].clone();
        let image = Unloaded {
            repository,
            digest,
            manifest,
            diff_ids,
            bootstrap,
        };
        let mut is_new = self.have_bootstrap(&image.repository, &layer, reach).await?;
        let mut outcome = self.unpack(&image, is_new).await;
        if !is_new && matches!(outcome, Err(ImageError::NotHere(_))) {
            is_new = self.have_bootstrap(&image.repository, &layer, reach).await?;
            outcome = self.unpack(&image, is_new).await;
        }
        let image = outcome.inspect_err(|error| self.broken.insert(digest, error.clone()))?;
        let mut all = self.loaded.lock();
        all.retain(|_, image| image.strong_count() > 0);
        all.insert(key, Arc::downgrade(&image));
        Ok(image)
    }

    /// Unpacks the bootstrap layer and reads it.
    ///
    /// # Errors
    /// [`ImageError::NotHere`] if the layer is gone, or was damaged and is gone by now. Only one that was there before
    /// (`is_new` is false) can be damaged.
    async fn unpack(&self, image: &Unloaded, is_new: bool) -> Result<Arc<LoadedImage>, ImageError> {
        let layer = image.manifest.layers[image.bootstrap].digest;
        // No other task reads the layer between the failure and its removal: loads from other repositories find it either
        // right or gone.
        let _turn = self.checking.take(&layer).await;
        let outcome = self.unpack_once(image.clone()).await;
        let is_damaged = matches!(&outcome, Err(ImageError::Unpack(error)) if error.is_damage());
        if is_damaged && !is_new && self.removed_damaged(&layer).await? {
            return Err(ImageError::NotHere(layer));
        }
        outcome
    }

    async fn unpack_once(&self, image: Unloaded) -> Result<Arc<LoadedImage>, ImageError> {
        let (limit, scratch) = (self.limits.max_bootstrap_size, self.scratch.clone());
        let backing = Backing {
            client: self.client.clone(),
            repository: image.repository,
            cache: Arc::clone(&self.cache),
            fetching: Arc::clone(&self.fetching),
            traces: Arc::clone(&self.traces),
            prefetch: self.limits.prefetch,
        };
        let library = Arc::clone(&self.library);
        let (bootstrap_layer, diff_id) = (
            image.manifest.layers[image.bootstrap].digest,
            image.diff_ids[image.bootstrap],
        );
        let work = move || {
            let file = library.file(&bootstrap_layer).map_err(|error| match error.kind() {
                io::ErrorKind::NotFound => ImageError::NotHere(bootstrap_layer),
                _ => ImageError::io("cannot open the bootstrap layer")(error),
            })?;
            let unpacked = bootstrap::unpack(file, diff_id, limit, &scratch).map_err(Arc::new)?;
            let parts = Parts {
                digest: image.digest,
                manifest: image.manifest,
                diff_ids: image.diff_ids,
                bootstrap_layer,
                unpacked,
            };
            LoadedImage::new(parts, backing).map(Arc::new)
        };
        with_permit(&self.unpacking, work).await?
    }

    /// Sees to it that the bootstrap layer is on disk. Tells whether it was fetched now; if it was there, only
    /// unpacking tells whether it is undamaged.
    async fn have_bootstrap(
        &self,
        repository: &Repository,
        layer: &Layer,
        reach: FetchPolicy,
    ) -> Result<bool, ImageError> {
        let limit = self.limits.max_bootstrap_size;
        if layer.size > limit {
            return Err(Arc::new(UnpackError::TooLarge(limit)).into());
        }
        let digest = layer.digest;
        if self.in_library(move |library| library.has(&digest)).await? {
            return Ok(false);
        }
        self.fetch(repository, &layer.digest, layer.size, reach)
            .await
            .map(|_| true)
    }

    /// Removes what is kept under that digest, if it is not what it should be; tells whether it was so.
    pub(super) async fn removed_damaged(&self, digest: &Digest) -> Result<bool, ImageError> {
        let kept = *digest;
        let removed = self.in_library(move |library| library.remove_damaged(&kept)).await?;
        removed.map_err(ImageError::io(format!("cannot remove {digest}, which is damaged")))
    }

    pub(super) async fn config(
        &self,
        repository: &Repository,
        digest: &Digest,
        reach: FetchPolicy,
    ) -> Result<Bytes, ImageError> {
        match self.kept(digest).await {
            Some(bytes) => Ok(bytes),
            None => self.fetch(repository, digest, MAX_CONFIG, reach).await,
        }
    }

    /// Fetches a whole blob and keeps it on disk.
    async fn fetch(
        &self,
        repository: &Repository,
        digest: &Digest,
        limit: u64,
        reach: FetchPolicy,
    ) -> Result<Bytes, ImageError> {
        if reach == FetchPolicy::Disk {
            return Err(ImageError::NotHere(*digest));
        }
        let fetched = self.client.blob(repository, digest, limit).await;
        let bytes = fetched.map_err(|error| match error.is_not_found() {
            true => ImageError::Incomplete(error),
            false => error.into(),
        })?;
        self.keep(digest, bytes.clone()).await?;
        Ok(bytes)
    }

    pub(super) async fn keep(&self, digest: &Digest, bytes: Bytes) -> Result<(), ImageError> {
        let kept = *digest;
        let put = self.in_library(move |library| library.put(&kept, &bytes)).await?;
        put.map_err(ImageError::io(format!("cannot keep {digest}")))
    }

    /// The bytes of that digest, if they are on disk and undamaged.
    pub(super) async fn kept(&self, digest: &Digest) -> Option<Bytes> {
        let digest = *digest;
        self.in_library(move |library| library.get(&digest))
            .await
            .ok()
            .flatten()
    }

    /// What `reference` has named, newest first.
    pub(super) async fn named(&self, reference: &Reference) -> Vec<Named> {
        let reference = reference.clone();
        let named = self.in_library(move |library| library.named(&reference)).await;
        named.unwrap_or_default()
    }

    /// Notes what the reference names.
    pub(super) async fn remember(&self, reference: &Reference, named: Named) -> Result<(), ImageError> {
        let reference = reference.clone();
        let noted = self
            .in_library(move |library| library.remember(&reference, named))
            .await?;
        noted.map_err(ImageError::io("cannot note the image's manifest"))
    }

    /// Has the library do what waits for a disk or a lock, where that holds up no other task.
    pub(super) async fn in_library<T: Send + 'static>(
        &self,
        work: impl FnOnce(&MetadataStore) -> T + Send + 'static,
    ) -> Result<T, ImageError> {
        let library = Arc::clone(&self.library);
        let done = tokio::task::spawn_blocking(move || work(&library)).await;
        done.map_err(|_| ImageError::Aborted)
    }
}

/// An image to be loaded, all of which that is needed for it is on disk.
#[derive(Clone)]
struct Unloaded {
    repository: Repository,
    /// Of its manifest.
    digest: Digest,
    manifest: Manifest,
    diff_ids: Vec<Digest>,
    /// Position of the bootstrap layer.
    bootstrap: usize,
}

/// Does `work`, which blocks, once there is a permit for it. The permit is held until the work ends, even if its caller
/// does not wait for it any more.
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
