//! From a manifest to an image that is ready to be read: fetches, unpacks and reads the bootstrap.

use std::{
    io,
    sync::{Arc, Weak},
};

use bytes::Bytes;

use super::{
    bootstrap::{self, UnpackError},
    error::ImageError,
    loaded::{Backing, LoadedImage, Parts},
    manifest::{Layer, Manifest},
    reference::Reference,
    resolve::{Images, Reach},
};
use crate::{digest::Digest, registry::Repository};

/// Largest image configuration, in bytes.
pub(super) const MAX_CONFIG: u64 = 8 << 20;

impl Images {
    fn loaded(&self, key: &(Repository, Digest)) -> Option<Arc<LoadedImage>> {
        self.loaded.lock().get(key).and_then(Weak::upgrade)
    }

    /// Loads the image of that manifest, or gives the one that is loaded.
    pub(super) async fn load(
        &self,
        reference: &Reference,
        digest: Digest,
        reach: Reach,
    ) -> Result<Arc<LoadedImage>, ImageError> {
        let _turn = self.loading.take(&digest).await;
        let repository = reference.repository();
        let key = (repository.clone(), digest);
        if let Some(image) = self.loaded(&key) {
            return Ok(image);
        }
        if let Some(error) = self.broken.get(&digest) {
            return Err(error);
        }
        let manifest = self.manifest(reference, digest, reach).await?;
        let position = manifest.bootstrap.ok_or(ImageError::NotNydus)?;
        let config = self.config(&repository, &manifest.config, reach).await?;
        let diff_ids = manifest.diff_ids(&config)?;
        let layer = manifest.layers[position].clone();
        let fetched = self.have_bootstrap(&repository, &layer, reach).await?;
        let mut outcome = self
            .unpack(digest, manifest.clone(), diff_ids.clone(), &repository, position)
            .await;
        let damaged = matches!(&outcome, Err(ImageError::Unpack(error)) if error.is_damage());
        // Perhaps only what was kept of it is damaged.
        if !fetched && damaged && self.removed_damaged(&layer.digest).await? {
            self.have_bootstrap(&repository, &layer, reach).await?;
            outcome = self.unpack(digest, manifest, diff_ids, &repository, position).await;
        }
        let image = outcome.inspect_err(|error| self.broken.keep(digest, error.clone()))?;
        let mut all = self.loaded.lock();
        all.retain(|_, image| image.strong_count() > 0);
        all.insert(key, Arc::downgrade(&image));
        Ok(image)
    }

    async fn unpack(
        &self,
        digest: Digest,
        manifest: Manifest,
        diff_ids: Vec<Digest>,
        repository: &Repository,
        position: usize,
    ) -> Result<Arc<LoadedImage>, ImageError> {
        let bootstrap_layer = manifest.layers[position].digest;
        let (limit, scratch, diff_id) = (self.limits.max_bootstrap_size, self.scratch.clone(), diff_ids[position]);
        let backing = Backing {
            client: self.client.clone(),
            repository: repository.clone(),
            cache: Arc::clone(&self.cache),
            fetching: Arc::clone(&self.fetching),
            library: Arc::clone(&self.library),
            traces: Arc::clone(&self.traces),
            prefetch: self.limits.prefetch,
        };
        let work = move || {
            let file = backing.library.file(&bootstrap_layer);
            let file = file.map_err(ImageError::io("cannot open the bootstrap layer"))?;
            let unpacked = bootstrap::unpack(file, diff_id, limit, &scratch).map_err(Arc::new)?;
            let parts = Parts {
                digest,
                manifest,
                diff_ids,
                bootstrap_layer,
                unpacked,
            };
            LoadedImage::new(parts, backing).map(Arc::new)
        };
        let _permit = self.unpacking.acquire().await;
        tokio::task::spawn_blocking(work)
            .await
            .unwrap_or(Err(ImageError::Aborted))
    }

    /// Sees to it that the bootstrap layer is on disk. Tells whether it was fetched now; if it was there, only
    /// unpacking tells whether it is undamaged.
    async fn have_bootstrap(&self, repository: &Repository, layer: &Layer, reach: Reach) -> Result<bool, ImageError> {
        let limit = self.limits.max_bootstrap_size;
        if layer.size > limit {
            return Err(Arc::new(UnpackError::TooLarge(limit)).into());
        }
        if self.library.has(&layer.digest) {
            return Ok(false);
        }
        self.fetch(repository, &layer.digest, layer.size, reach)
            .await
            .map(|_| true)
    }

    /// Removes what is kept under that digest, if it is not what it should be; tells whether it was so.
    pub(super) async fn removed_damaged(&self, digest: &Digest) -> Result<bool, ImageError> {
        let (library, digest) = (Arc::clone(&self.library), *digest);
        let removed = tokio::task::spawn_blocking(move || library.remove_damaged(&digest)).await;
        let removed = removed.map_err(|_| ImageError::Aborted)?;
        removed.map_err(ImageError::io(format!("cannot remove {digest}, which is damaged")))
    }

    async fn config(&self, repository: &Repository, digest: &Digest, reach: Reach) -> Result<Bytes, ImageError> {
        match self.library.get(digest) {
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
        reach: Reach,
    ) -> Result<Bytes, ImageError> {
        if reach == Reach::Disk {
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
        let (library, digest) = (Arc::clone(&self.library), *digest);
        let kept = on_disk(move || library.put(&digest, &bytes)).await;
        kept.map_err(ImageError::io(format!("cannot keep {digest}")))
    }
}

/// Does what waits for a disk where it holds up nobody else.
pub(super) async fn on_disk(work: impl FnOnce() -> io::Result<()> + Send + 'static) -> io::Result<()> {
    tokio::task::spawn_blocking(work).await.map_err(io::Error::other)?
}
