//! Publishes an image because a pull of it begins.
//!
//! containers/image runs `nydus-store auth-helper` after it has the manifest and before it looks for layers, and waits for
//! it; older versions look in the [`layer_store`](super::layer_store). When an announcement ends, the layers are
//! published, or the pull goes on as that of an ordinary image.

use std::{sync::Arc, time::Duration};

use super::{
    error::StoreError,
    image_store::{ImageStore, layer_ids},
    overlay_fs::OverlayFs,
    publication,
};
use crate::{
    digest::Digest,
    error_chain::ErrorChain,
    image::{error::ImageError, reference::Reference, resolve::Images},
};

/// Publishes images that are about to be pulled.
pub struct Announcer {
    images: Arc<Images>,
    store: Arc<ImageStore>,
    overlay: Arc<OverlayFs>,
}

/// Why an announced image is not published.
#[derive(Debug, Clone, thiserror::Error)]
pub enum AnnounceError {
    /// It cannot be resolved or loaded, or is no Nydus image.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// It cannot be published.
    #[error(transparent)]
    Store(#[from] Arc<StoreError>),
}

impl AnnounceError {
    /// Whether this is nothing to report: the image is an ordinary one, or there is none.
    pub fn is_ordinary(&self) -> bool {
        matches!(self, Self::Image(error) if error.is_ordinary())
    }
}

impl Announcer {
    /// Publishes `images` in `store`; `overlay` shows them.
    pub fn new(images: Arc<Images>, store: Arc<ImageStore>, overlay: Arc<OverlayFs>) -> Self {
        Self { images, store, overlay }
    }

    /// How long an announcement takes at most.
    pub fn timeout(&self) -> Duration {
        self.images.resolve_timeout()
    }

    /// Whether `layer` is known to be one of an ordinary image that `reference` names, so that there is nothing to announce.
    pub fn is_ordinary(&self, reference: &Reference, layer: &Digest) -> bool {
        self.images.is_ordinary(reference, layer)
    }

    /// The image that `reference` names is about to be pulled. Publishes its layers; the id of the topmost. Logs why, if it
    /// cannot.
    pub async fn announce(&self, reference: &Reference) -> Result<String, AnnounceError> {
        let limit = self.timeout();
        let announced = tokio::time::timeout(limit, self.publish(reference)).await;
        let outcome = announced.unwrap_or_else(|_| {
            let error = ImageError::TimedOut(limit.as_secs());
            self.images.refuse(reference, &error);
            Err(error.into())
        });
        match &outcome {
            Ok(layer) => tracing::info!(image = %reference, layer, "announced image is published"),
            Err(error) if error.is_ordinary() => {
                tracing::debug!(image = %reference, "announced image is not published: {}", ErrorChain(error));
            }
            Err(error) => {
                tracing::warn!(image = %reference, "failed to publish announced image: {}", ErrorChain(error))
            }
        }
        outcome
    }

    async fn publish(&self, reference: &Reference) -> Result<String, AnnounceError> {
        let _turn = self.images.turn(reference).await;
        let described = self.images.announced(reference).await?;
        let diff_ids = described.diff_ids[..described.manifest.nydus_layers().len()].to_vec();
        let top = layer_ids(diff_ids).pop().ok_or(ImageError::NotNydus)?;
        let (store, id, source) = (Arc::clone(&self.store), top.clone(), reference.to_string());
        if blocking(move || store.publish_again(&id, &source))
            .await?
            .map_err(Arc::new)?
        {
            self.overlay.add_repository(&top, reference.repository());
            return Ok(top);
        }
        let image = self.images.load_described(reference, &described).await?;
        let publication = publication::of_layers(&image, reference);
        let store = Arc::clone(&self.store);
        let top = blocking(move || store.publish(&publication)).await?.map_err(Arc::new)?;
        image.prepare().await;
        self.overlay.hold(image);
        Ok(top)
    }
}

/// Does what waits for a disk where it holds up nothing else.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, ImageError> {
    tokio::task::spawn_blocking(work).await.map_err(|_| ImageError::Aborted)
}
