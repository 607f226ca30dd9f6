//! Job that fills the cache.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use super::{
    Event, Events, RootContext, SeedItem, pins,
    registered::{self, RegistrationError},
    source::InvalidSource,
};
use crate::{
    blob::bulk::{BulkLimits, DownloadProgress},
    error_chain::ErrorChain,
    image::{
        error::ImageError,
        reference::Reference,
        seed::{SeedError, Seeded},
    },
};

/// Interval between progress events.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(100);

#[derive(Debug, thiserror::Error)]
enum SeedJobError {
    #[error(transparent)]
    Seed(#[from] SeedError),
    #[error(transparent)]
    Source(#[from] InvalidSource),
    #[error(transparent)]
    Publish(#[from] RegistrationError),
}

pub(super) async fn run(items: Vec<SeedItem>, root: &RootContext, bulk: &Arc<BulkLimits>, events: &Events) {
    for item in items {
        let what = item.source.to_string();
        events.send(Event::Begin(what.clone())).await.ok();
        let event = match seed(item, root, bulk, events).await {
            Ok(seeded) => {
                tracing::info!(names = ?seeded.names, manifest = %seeded.manifest, "preseeded image");
                Event::Seeded(seeded)
            }
            Err(error) => {
                let why = ErrorChain(&error).to_string();
                tracing::warn!(source = %what, error = %why, "failed to preseed image");
                Event::Failed { what, why }
            }
        };
        events.send(event).await.ok();
    }
}

async fn seed(
    item: SeedItem,
    root: &RootContext,
    bulk: &Arc<BulkLimits>,
    events: &Events,
) -> Result<Seeded, SeedJobError> {
    let SeedItem { source, names } = item;
    let opened = tokio::task::spawn_blocking(move || source.open()).await;
    let (seed, own_name) = opened.unwrap_or(Err(ImageError::Aborted)).map_err(SeedError::from)?;
    let names = match names.as_slice() {
        [] => vec![own_name?],
        given => given
            .iter()
            .map(|name| name.parse())
            .collect::<Result<Vec<Reference>, _>>()
            .map_err(InvalidSource::from)?,
    };
    let progress = Arc::new(DownloadProgress::default());
    let mut work = std::pin::pin!(root.images.seed(&seed, &names, bulk, &progress));
    loop {
        let seeded = tokio::time::timeout(PROGRESS_INTERVAL, &mut work).await;
        let value = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
        let event = Event::Progress {
            there: value(&progress.cached),
            total: value(&progress.total),
            fetched: value(&progress.fetched),
        };
        // Skipped if the listener is slow; the next event carries newer numbers.
        events.try_send(event).ok();
        if let Ok(seeded) = seeded {
            let (seeded, _not_evicted_meanwhile) = seeded?;
            publish(root, &seeded, &names).await?;
            pins::warn_of_excess(root, seeded.bytes, events).await;
            return Ok(seeded);
        }
    }
}

/// Publishes a seeded image by its names.
async fn publish(root: &RootContext, seeded: &Seeded, names: &[Reference]) -> Result<(), RegistrationError> {
    let [source, ..] = names else { return Ok(()) };
    let image = root
        .images
        .load_manifest(seeded.manifest, &[source.to_string()])
        .await?;
    registered::publish(root, &image, source, names, true).await.map(|_| ())
}
