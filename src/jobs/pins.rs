//! Tells the cache which blobs belong to pinned images, and must not be evicted.

use super::{Event, Events, RootContext};
use crate::{
    digest::Digest,
    error_chain::ErrorChain,
    humanize::size,
    image::manifest::{Document, Selection},
    store::database::ImageRow,
};

/// Protects the blobs of the images that are pinned now, and only these. To be called after each change of records.
pub(super) fn apply(root: &RootContext) {
    let images = root.store.published().images;
    let pinned = images.values().filter(|row| row.is_pinned);
    let blobs: Vec<_> = pinned.flat_map(layers).collect();
    root.images.set_pinned(&blobs);
}

/// Warns if pinned images exceed the limit of the cache. `bytes` is what one of them takes once all of it is cached.
pub(super) async fn warn_of_excess(root: &RootContext, bytes: u64, events: &Events) {
    let cache = root.images.cache();
    let (pinned, (_, limit)) = (cache.pinned_usage().max(bytes), cache.usage());
    if pinned <= limit {
        return;
    }
    tracing::warn!(
        pinned,
        limit,
        "pinned images exceed the limit of the cache; unpin images or raise the limit"
    );
    let warning = format!(
        "pinned images take {}, more than the limit of the cache, {}: nothing else stays cached; unpin images, or raise \
         `limit` in the table [cache] of the configuration",
        size(pinned),
        size(limit)
    );
    events.send(Event::Warning(warning)).await.ok();
}

/// Digests of the layers of a registered image, which include its blobs: a registry deletes what no manifest lists.
fn layers(row: &ImageRow) -> Vec<Digest> {
    match Document::parse(row.registry_manifest.as_bytes(), Selection::PreferNydus) {
        Ok(Document::Image(manifest)) => manifest.layers.iter().map(|layer| layer.digest).collect(),
        // Cannot happen: the image was published by this manifest.
        Ok(Document::Index(_)) => Vec::new(),
        Err(error) => {
            tracing::warn!(manifest = %row.manifest, error = %ErrorChain(&error), "failed to pin image");
            Vec::new()
        }
    }
}
