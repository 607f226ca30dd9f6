//! Job that removes what no container, image record or running pull needs.

use std::collections::HashSet;

use super::{Event, Events, RootContext};
use crate::{
    digest::Digest,
    error_chain::ErrorChain,
    image::{
        error::ImageError,
        garbage::{Garbage, GarbageOptions},
    },
    store::{database::Published, error::StoreError},
};

/// Why garbage cannot be removed.
#[derive(Debug, thiserror::Error)]
pub(super) enum GarbageError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("cannot remove unneeded files: {0}")]
    Files(#[source] std::io::Error),
    #[error(transparent)]
    Image(#[from] ImageError),
}

pub(super) async fn run(options: GarbageOptions, root: &RootContext, events: &Events) {
    let event = match collect(options, root, false).await {
        Ok(garbage) => Event::Collected(garbage),
        Err(error) => {
            let why = ErrorChain(&error).to_string();
            tracing::warn!(error = %why, "failed to remove unneeded data");
            let what = "gc".to_owned();
            Event::Failed { what, why }
        }
    };
    events.send(event).await.ok();
}

/// Removes unneeded data. With `spare_loaded`, layers stay published whose tree is in memory.
pub(super) async fn collect(
    options: GarbageOptions,
    root: &RootContext,
    spare_loaded: bool,
) -> Result<Garbage, GarbageError> {
    let root = root.clone();
    let done = tokio::task::spawn_blocking(move || collect_blocking(options, &root, spare_loaded)).await;
    let garbage = done.map_err(|_| ImageError::Aborted)??;
    if !options.dry_run && garbage.bytes > 0 {
        tracing::info!(
            layers = garbage.layers,
            images = garbage.images.len(),
            blobs = garbage.blobs,
            traces = garbage.traces,
            bytes = garbage.bytes,
            "removed unneeded data"
        );
    }
    Ok(garbage)
}

fn collect_blocking(options: GarbageOptions, root: &RootContext, spare_loaded: bool) -> Result<Garbage, GarbageError> {
    let GarbageOptions { min_age, dry_run } = options;
    let spared = if spare_loaded {
        root.images.loaded_manifests()
    } else {
        HashSet::new()
    };
    let is_spared = |manifest: &Digest| spared.contains(manifest);
    // First the layers, then what only they need: at no time is a published layer without its data.
    let withdrawn = root
        .store
        .withdraw_unneeded(min_age, |tree| is_spared(&tree.manifest), dry_run);
    let (layers, published) = withdrawn?;
    let garbage = root.images.remove_garbage(&manifests(&published), options);
    let garbage = garbage.map_err(GarbageError::Files)?;
    Ok(Garbage { layers, ..garbage })
}

/// Manifests of all that is published.
fn manifests(published: &Published) -> HashSet<Digest> {
    let trees = published.layers.values().filter_map(|row| row.tree.as_ref());
    let records = published.images.values().map(|row| row.manifest);
    trees.map(|tree| tree.manifest).chain(records).collect()
}
