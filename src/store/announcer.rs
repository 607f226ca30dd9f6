//! Publishes an image when a pull of it begins.
//!
//! containers/image runs `nydus-store auth-helper` after it has read the manifest and before it looks for layers, and
//! waits for it to exit. Older versions look into the [`layer_store`](super::layer_store) instead. After an
//! announcement either the layers are published, or the pull continues as that of an ordinary image.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use super::{
    error::StoreError,
    image_store::{ImageStore, layer_ids},
    overlay_fs::OverlayFs,
    publication,
};
use crate::{
    digest::Digest,
    error_chain::ErrorChain,
    histogram::DurationHistogram,
    image::{error::ImageError, reference::Reference, resolve::Images},
    waits::WaitKind,
};

/// Publishes images that are about to be pulled.
pub struct Announcer {
    images: Arc<Images>,
    store: Arc<ImageStore>,
    overlay: Arc<OverlayFs>,
    counters: AnnouncementCounters,
}

/// Counts announcements, and how long pulls have waited for them.
#[derive(Debug, Default)]
pub struct AnnouncementCounters {
    published: AtomicU64,
    ordinary: AtomicU64,
    failed: AtomicU64,
    /// The time from an announcement to its outcome.
    pub duration: DurationHistogram,
}

/// Why an announced image was not published.
#[derive(Debug, Clone, thiserror::Error)]
pub enum AnnounceError {
    /// The image cannot be resolved or loaded, or is not a Nydus image.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The image store cannot be changed.
    #[error(transparent)]
    Store(#[from] Arc<StoreError>),
}

impl AnnounceError {
    /// Whether this is expected and not worth a warning: the image is an ordinary one or does not exist.
    pub fn is_ordinary(&self) -> bool {
        matches!(self, Self::Image(error) if error.is_ordinary())
    }
}

impl Announcer {
    /// Publishes `images` in `store`; `overlay` serves their files.
    pub fn new(images: Arc<Images>, store: Arc<ImageStore>, overlay: Arc<OverlayFs>) -> Self {
        Self {
            images,
            store,
            overlay,
            counters: AnnouncementCounters::default(),
        }
    }

    /// Counts of announcements.
    pub fn counters(&self) -> &AnnouncementCounters {
        &self.counters
    }

    /// Upper bound for one announcement.
    pub fn timeout(&self) -> Duration {
        self.images.resolve_timeout()
    }

    /// Whether `layer` is known to belong to an ordinary image that `reference` names. Then there is nothing to
    /// announce.
    pub fn is_ordinary(&self, reference: &Reference, layer: &Digest) -> bool {
        self.images.is_ordinary(reference, layer)
    }

    /// Publishes the layers of the image that `reference` names, because a pull of it begins. Returns the id of the
    /// topmost layer. Logs a failure.
    pub async fn announce(&self, reference: &Reference) -> Result<String, AnnounceError> {
        let _wait = self.images.waits().begin(WaitKind::Announcement, reference.to_string());
        let (started, limit) = (Instant::now(), self.timeout());
        let announced = tokio::time::timeout(limit, self.publish(reference)).await;
        let outcome = announced.unwrap_or_else(|_| {
            let error = ImageError::TimedOut(limit.as_secs());
            self.images.remember_failure(reference, &error);
            Err(error.into())
        });
        match &outcome {
            Ok(layer) => tracing::info!(image = %reference, layer, "published announced image"),
            Err(error) if error.is_ordinary() => {
                tracing::debug!(image = %reference, error = %ErrorChain(error), "skipped announced image");
            }
            Err(error) => {
                tracing::warn!(image = %reference, error = %ErrorChain(error), "failed to publish announced image");
            }
        }
        self.counters.record(&outcome, started.elapsed());
        outcome
    }

    async fn publish(&self, reference: &Reference) -> Result<String, AnnounceError> {
        let _guard = self.images.lock_reference(reference).await;
        let described = self.images.describe_for_pull(reference).await?;
        let diff_ids = described.diff_ids[..described.manifest.nydus_layers().len()].to_vec();
        let top = layer_ids(diff_ids).pop().ok_or(ImageError::NotNydus)?;
        let (store, id, source) = (Arc::clone(&self.store), top.clone(), reference.to_string());
        if blocking(move || store.republish(&id, &source))
            .await?
            .map_err(Arc::new)?
        {
            self.overlay.add_repository(&top, reference.repository());
            return Ok(top);
        }
        let _kept = self.images.keep(described.digest);
        let image = self.images.load_described(reference, &described).await?;
        let publication = publication::of_layers(&image, reference);
        let store = Arc::clone(&self.store);
        let top = blocking(move || store.publish(&publication)).await?.map_err(Arc::new)?;
        image.prepare().await;
        self.overlay.hold(image);
        Ok(top)
    }
}

impl AnnouncementCounters {
    /// Numbers of announcements by outcome: the image was published; it is an ordinary one, or does not exist; or it
    /// could not be published.
    pub fn outcomes(&self) -> [(&'static str, u64); 3] {
        let outcomes = [
            ("published", &self.published),
            ("ordinary", &self.ordinary),
            ("failed", &self.failed),
        ];
        outcomes.map(|(outcome, counter)| (outcome, counter.load(Ordering::Relaxed)))
    }

    /// Number of images that could not be published.
    pub fn failed(&self) -> u64 {
        self.failed.load(Ordering::Relaxed)
    }

    fn record(&self, outcome: &Result<String, AnnounceError>, duration: Duration) {
        let counter = match outcome {
            Ok(_) => &self.published,
            Err(error) if error.is_ordinary() => &self.ordinary,
            Err(_) => &self.failed,
        };
        counter.fetch_add(1, Ordering::Relaxed);
        self.duration.observe(duration);
    }
}

/// Runs `work`, which waits for a disk, on a blocking thread.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, ImageError> {
    tokio::task::spawn_blocking(work).await.map_err(|_| ImageError::Aborted)
}
