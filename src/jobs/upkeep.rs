//! What the daemon does regularly: keeps the root within its bounds.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::runtime::Handle;

use super::{RootContext, gc};
use crate::{error_chain::ErrorChain, image::garbage::GarbageOptions};

/// Interval between two looks at the free space of the disk.
const INTERVAL: Duration = Duration::from_secs(15);
/// Interval between two removals of unneeded data.
const GARBAGE_INTERVAL: Duration = Duration::from_secs(3600);
/// How long an image is kept after its last use although nothing needs it, so that it need not be fetched for the next
/// pull.
const GARBAGE_AGE: Duration = Duration::from_secs(7 * 24 * 3600);
/// The same while the cache is full: there, unneeded data displaces needed data.
const GARBAGE_AGE_UNDER_PRESSURE: Duration = Duration::from_secs(3600);

/// Does upkeep on `runtime`, as long as the root is in use.
pub fn start(root: &RootContext, runtime: &Handle) {
    let (images, store) = (Arc::downgrade(&root.images), Arc::downgrade(&root.store));
    runtime.spawn(async move {
        let mut last_collection = Instant::now();
        loop {
            let (Some(images), Some(store)) = (images.upgrade(), store.upgrade()) else {
                break;
            };
            let root = RootContext { images, store };
            maintain(&root).await;
            if last_collection.elapsed() >= GARBAGE_INTERVAL {
                collect(&root).await;
                last_collection = Instant::now();
            }
            drop(root);
            tokio::time::sleep(INTERVAL).await;
        }
    });
}

async fn maintain(root: &RootContext) {
    let images = Arc::clone(&root.images);
    if let Ok(Err(error)) = tokio::task::spawn_blocking(move || images.maintain()).await {
        tracing::warn!(error = %ErrorChain(&error), "failed to compute the disk space of the cache");
    }
}

/// Removes unneeded data. Layers stay published whose tree is in memory: a container may use them whose storage the
/// configuration does not name.
async fn collect(root: &RootContext) {
    let min_age = match root.images.cache().is_nearly_full() {
        true => GARBAGE_AGE_UNDER_PRESSURE,
        false => GARBAGE_AGE,
    };
    let options = GarbageOptions {
        min_age,
        dry_run: false,
    };
    if let Err(error) = gc::collect(options, root, true).await {
        tracing::warn!(error = %ErrorChain(&error), "failed to remove unneeded data");
    }
}
