//! What the daemon does regularly: keeps the root within its bounds.

use std::{sync::Arc, time::Duration};

use tokio::runtime::Handle;

use super::RootContext;
use crate::{error_chain::ErrorChain, image::resolve::Images};

/// Interval between two looks at the free space of the disk.
const INTERVAL: Duration = Duration::from_secs(15);
/// Does upkeep on `runtime`, as long as the root is in use.
pub fn start(root: &RootContext, runtime: &Handle) {
    let images = Arc::downgrade(&root.images);
    runtime.spawn(async move {
        loop {
            tokio::time::sleep(INTERVAL).await;
            let Some(images) = images.upgrade() else { break };
            maintain(images).await;
        }
    });
}

async fn maintain(images: Arc<Images>) {
    if let Ok(Err(error)) = tokio::task::spawn_blocking(move || images.maintain()).await {
        tracing::warn!(error = %ErrorChain(&error), "failed to compute the disk space of the cache");
    }
}
