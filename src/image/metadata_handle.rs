//! Asynchronous access to the [`MetadataStore`].

use std::sync::Arc;

use bytes::Bytes;

use super::{
    error::ImageError,
    metadata_store::{ContentState, MetadataStore, NamedManifest},
    reference::Reference,
};
use crate::digest::Digest;

/// A [`MetadataStore`] whose operations run on blocking threads, because they wait for a disk or a lock.
#[derive(Clone)]
pub(super) struct MetadataHandle(Arc<MetadataStore>);

impl MetadataHandle {
    pub(super) fn new(store: MetadataStore) -> Self {
        Self(Arc::new(store))
    }

    /// The store itself, for callers on blocking threads.
    pub(super) fn blocking(&self) -> &Arc<MetadataStore> {
        &self.0
    }

    /// The content with this digest, if it is on disk and intact.
    pub(super) async fn get(&self, digest: &Digest) -> Option<Bytes> {
        let digest = *digest;
        self.run(move |store| store.get(&digest)).await.ok().flatten()
    }

    /// Stores `bytes`, whose digest the caller has verified.
    pub(super) async fn put(&self, digest: &Digest, bytes: Bytes) -> Result<(), ImageError> {
        let owned = *digest;
        let put = self.run(move |store| store.put(&owned, &bytes)).await?;
        put.map_err(ImageError::io(format!("cannot store {digest}")))
    }

    /// Whether the content with this digest is on disk; it may be damaged.
    pub(super) async fn has(&self, digest: &Digest) -> Result<bool, ImageError> {
        let digest = *digest;
        self.run(move |store| store.has(&digest)).await
    }

    /// Hashes the content with this digest.
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
        let reference = reference.clone();
        let named = self.run(move |store| store.named(&reference)).await;
        named.unwrap_or_default()
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
        let store = Arc::clone(&self.0);
        let done = tokio::task::spawn_blocking(move || work(&store)).await;
        done.map_err(|_| ImageError::Aborted)
    }
}
