//! Asynchronous access to the [`MetadataStore`], and to what it could not store.

use std::{
    io::{self, Read},
    sync::{Arc, Weak},
    time::Duration,
};

use bytes::{Buf as _, Bytes};

use super::{
    error::ImageError,
    metadata_store::{ContentState, MetadataStore, NamedManifest},
    reference::Reference,
    unstored::Unstored,
};
use crate::{atomic_file::is_unwritable, digest::Digest};

/// Interval in which what is kept in memory is tried to be stored.
const RETRY_INTERVAL: Duration = Duration::from_secs(5);

/// A [`MetadataStore`] whose operations run on blocking threads, because they wait for a disk or a lock.
#[derive(Clone)]
pub(super) struct MetadataHandle {
    store: Arc<MetadataStore>,
    unstored: Arc<Unstored>,
}

impl MetadataHandle {
    pub(super) fn new(store: MetadataStore) -> Self {
        Self {
            store: Arc::new(store),
            unstored: Arc::default(),
        }
    }

    /// The store itself, for callers on blocking threads.
    pub(super) fn blocking(&self) -> &Arc<MetadataStore> {
        &self.store
    }

    /// The content with this digest, if it is present and intact.
    pub(super) async fn get(&self, digest: &Digest) -> Option<Bytes> {
        if let Some(bytes) = self.unstored.get(digest) {
            return Some(bytes);
        }
        let digest = *digest;
        self.run(move |store| store.get(&digest)).await.ok().flatten()
    }

    /// Opens the content with this digest. Blocks.
    pub(super) fn reader(&self, digest: &Digest) -> io::Result<Box<dyn Read>> {
        match self.unstored.get(digest) {
            Some(bytes) => Ok(Box::new(bytes.reader())),
            None => Ok(Box::new(self.store.file(digest)?)),
        }
    }

    /// Like [`Self::put`], but keeps the bytes in memory while the disk cannot be written to.
    pub(super) async fn keep(&self, digest: &Digest, bytes: Bytes) -> Result<(), ImageError> {
        match self.put(digest, bytes.clone()).await {
            Err(ImageError::Io { source, .. }) if is_unwritable(&source) && self.unstored.keep(digest, &bytes) => {
                self.retry_later(&source);
                Ok(())
            }
            stored => stored,
        }
    }

    /// Like [`Self::record`], but keeps the record in memory while the disk cannot be written to.
    pub(super) async fn keep_record(&self, reference: &Reference, named: NamedManifest) -> Result<(), ImageError> {
        match self.record(reference, named).await {
            Err(ImageError::Io { source, .. })
                if is_unwritable(&source) && self.unstored.keep_name(reference, named) =>
            {
                self.retry_later(&source);
                Ok(())
            }
            recorded => recorded,
        }
    }

    /// Starts a task that tries to store what is in memory, unless there is one.
    fn retry_later(&self, error: &io::Error) {
        if !self.unstored.begin_retries() {
            return;
        }
        tracing::warn!(%error, "failed to store image metadata; keeping it in memory until the disk can be written to");
        let (store, unstored) = (Arc::downgrade(&self.store), Arc::downgrade(&self.unstored));
        tokio::spawn(async move {
            loop {
                tokio::time::sleep(RETRY_INTERVAL).await;
                let (Some(store), Some(unstored)) = (Weak::upgrade(&store), Weak::upgrade(&unstored)) else {
                    return;
                };
                let stored = tokio::task::spawn_blocking(move || unstored.store_in(&store)).await;
                if stored.unwrap_or(true) {
                    tracing::info!("stored image metadata that was kept in memory");
                    return;
                }
            }
        });
    }

    /// Stores `bytes`, whose digest the caller has verified.
    pub(super) async fn put(&self, digest: &Digest, bytes: Bytes) -> Result<(), ImageError> {
        let owned = *digest;
        let put = self.run(move |store| store.put(&owned, &bytes)).await?;
        put.map_err(ImageError::io(format!("cannot store {digest}")))
    }

    /// Whether the content with this digest is present; on disk, it may be damaged.
    pub(super) async fn has(&self, digest: &Digest) -> Result<bool, ImageError> {
        if self.unstored.get(digest).is_some() {
            return Ok(true);
        }
        let digest = *digest;
        self.run(move |store| store.has(&digest)).await
    }

    /// Hashes the content with this digest on disk.
    pub(super) async fn state(&self, digest: &Digest) -> Result<ContentState, ImageError> {
        let digest = *digest;
        self.run(move |store| store.state(&digest)).await
    }

    /// Removes the content with this digest if it is damaged. Returns whether it was.
    pub(super) async fn remove_damaged(&self, digest: &Digest) -> Result<bool, ImageError> {
        let owned = *digest;
        let removed = self.run(move |store| store.remove_damaged(&owned)).await?;
        removed.map_err(ImageError::io(format!("cannot remove damaged {digest}")))
    }

    /// The manifests that `reference` has named, newest first.
    pub(super) async fn named(&self, reference: &Reference) -> Vec<NamedManifest> {
        let unstored = self.unstored.named(reference);
        let reference = reference.clone();
        let named = self.run(move |store| store.named(&reference)).await;
        unstored.into_iter().chain(named.unwrap_or_default()).collect()
    }

    /// Records which manifest `reference` names.
    pub(super) async fn record(&self, reference: &Reference, named: NamedManifest) -> Result<(), ImageError> {
        let reference = reference.clone();
        let recorded = self.run(move |store| store.record(&reference, named)).await?;
        recorded.map_err(ImageError::io("cannot record the image's manifest"))
    }

    async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce(&MetadataStore) -> T + Send + 'static,
    ) -> Result<T, ImageError> {
        let store = Arc::clone(&self.store);
        let done = tokio::task::spawn_blocking(move || work(&store)).await;
        done.map_err(|_| ImageError::Aborted)
    }
}
