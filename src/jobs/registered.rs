//! Registered images: publishes, lists and removes them.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::{Event, Events, RootContext, pins};
use crate::{
    digest::Digest,
    error_chain::ErrorChain,
    image::{
        error::ImageError,
        loaded::LoadedImage,
        reference::{InvalidReference, Reference},
    },
    store::{
        database::ImageRow,
        error::StoreError,
        graph_roots::RequiredLayers,
        image_store::{ImageStore, layer_chain},
        publication::{self, RegistryDocuments},
    },
};

/// A registered image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RegisteredImage {
    /// Names of the image. Empty if only a container still requires it.
    pub names: Vec<String>,
    /// Id as shown by Podman.
    pub id: String,
    /// Digest of the manifest in the registry.
    pub digest: Digest,
    /// Sum of the layers' lengths in the registry, in bytes.
    pub size: u64,
    /// Cached and total uncompressed bytes of its data; both 0 if it cannot be loaded.
    pub cached: (u64, u64),
    /// Whether the cache keeps all of the image.
    pub pinned: bool,
    /// Number of layers.
    pub layers: usize,
    /// Number of layers that Podman's or CRI-O's storage requires.
    pub layers_in_use: usize,
}

/// Why an image cannot be published, listed or removed.
#[derive(Debug, thiserror::Error)]
pub(super) enum RegistrationError {
    #[error(transparent)]
    Image(#[from] ImageError),
    #[error(transparent)]
    Reference(#[from] InvalidReference),
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Publishes images by name, without fetching their data.
pub(super) async fn pull(references: &[String], root: &RootContext, events: &Events) {
    for text in references {
        events.send(Event::Begin(text.clone())).await.ok();
        let event = match pull_one(text, root).await {
            Ok(image) => Event::Pulled(image),
            Err(error) => {
                tracing::warn!(image = %text, error = %ErrorChain(&error), "failed to publish image by name");
                failed(text, &error)
            }
        };
        events.send(event).await.ok();
    }
}

async fn pull_one(text: &str, root: &RootContext) -> Result<RegisteredImage, RegistrationError> {
    let reference: Reference = text.parse()?;
    let image = root.images.resolve_patiently(&reference).await?;
    let id = publish(root, &image, &reference, std::slice::from_ref(&reference), false).await?;
    tracing::info!(image = %reference, id, "published image by name");
    let (row, required) = find_row(root, id.clone()).await?;
    Ok(describe(root, &id, &row, &required).await)
}

/// Publishes a loaded image by `names`. Returns its id.
pub(super) async fn publish(
    root: &RootContext,
    image: &Arc<LoadedImage>,
    source: &Reference,
    names: &[Reference],
    is_pinned: bool,
) -> Result<String, RegistrationError> {
    if image.manifest.nydus_layers().len() < image.manifest.layers.len() {
        return Err(ImageError::LayersOnTop.into());
    }
    let (manifest, config) = root.images.documents(image).await?;
    let documents = RegistryDocuments { manifest, config };
    let (publication, record) = publication::of_image(image, documents, source, names, is_pinned);
    let id = on_store(root, move |store| store.publish_image(&publication, record)).await?;
    pins::apply(root);
    Ok(id)
}

/// Lists all registered images.
pub(super) async fn list(root: &RootContext, events: &Events) {
    let found = on_store(root, |store| Ok((store.published(), required_layers(store)))).await;
    let (published, required) = match found {
        Ok(found) => found,
        Err(error) => {
            tracing::warn!(error = %ErrorChain(&error), "failed to list images");
            events.send(failed("images", &error)).await.ok();
            return;
        }
    };
    for (id, row) in &published.images {
        events
            .send(Event::Listed(describe(root, id, row, &required).await))
            .await
            .ok();
    }
}

/// Removes names of images.
pub(super) async fn remove(names: &[String], is_resumed: bool, root: &RootContext, events: &Events) {
    for (position, text) in names.iter().enumerate() {
        let event = match remove_one(text, root).await {
            // An earlier run has removed it and ended before it said so.
            Err(RegistrationError::Store(StoreError::UnknownName(name))) if is_resumed && position == 0 => {
                Event::Removed(name)
            }
            Ok(name) => {
                tracing::info!(image = %name, "removed image name");
                Event::Removed(name)
            }
            Err(error) => {
                tracing::warn!(image = %text, error = %ErrorChain(&error), "failed to remove image name");
                failed(text, &error)
            }
        };
        events.send(event).await.ok();
    }
}

/// Pins images, or unpins them.
pub(super) async fn pin(names: &[String], is_pinned: bool, root: &RootContext, events: &Events) {
    for text in names {
        let event = match pin_one(text, is_pinned, root, events).await {
            Ok(image) => {
                tracing::info!(names = ?image.names, is_pinned, "set whether image is pinned");
                Event::Pinned(image)
            }
            Err(error) => {
                tracing::warn!(image = %text, error = %ErrorChain(&error), "failed to set whether image is pinned");
                failed(text, &error)
            }
        };
        events.send(event).await.ok();
    }
}

async fn pin_one(
    text: &str,
    is_pinned: bool,
    root: &RootContext,
    events: &Events,
) -> Result<RegisteredImage, RegistrationError> {
    let name = text.parse::<Reference>()?.to_string();
    let id = on_store(root, move |store| store.set_pinned(&name, is_pinned)).await?;
    pins::apply(root);
    let (row, required) = find_row(root, id.clone()).await?;
    let image = describe(root, &id, &row, &required).await;
    // Also if little of it has been cached so far.
    pins::warn_of_excess(root, if is_pinned { image.cached.1 } else { 0 }, events).await;
    Ok(image)
}

async fn remove_one(text: &str, root: &RootContext) -> Result<String, RegistrationError> {
    let name = text.parse::<Reference>()?.to_string();
    let removed = name.clone();
    on_store(root, move |store| store.remove_name(&removed)).await?;
    pins::apply(root);
    Ok(name)
}

fn failed(what: &str, error: &(dyn std::error::Error + 'static)) -> Event {
    let (what, why) = (what.to_owned(), ErrorChain(error).to_string());
    Event::Failed { what, why }
}

async fn find_row(root: &RootContext, id: String) -> Result<(ImageRow, RequiredLayers), RegistrationError> {
    let found = on_store(root, move |store| {
        let row = store.published().images.remove(&id);
        Ok((row.ok_or(StoreError::UnknownName(id))?, required_layers(store)))
    });
    found.await
}

/// The layers that the graph roots require, for display; none if this cannot be determined.
fn required_layers(store: &ImageStore) -> RequiredLayers {
    let required = store.required_layers();
    required.unwrap_or_else(|error| {
        tracing::warn!(error = %ErrorChain(&error), "failed to determine which layers are in use");
        RequiredLayers::default()
    })
}

async fn describe(root: &RootContext, id: &str, row: &ImageRow, required: &RequiredLayers) -> RegisteredImage {
    let layers = &root.store.published().layers;
    let chain = layer_chain(layers, &row.layer);
    let sources = layers.get(&row.layer).and_then(|layer| layer.tree.as_ref());
    let sources = sources.map_or(&[][..], |tree| &tree.sources);
    let cached = match root.images.load_manifest(row.manifest, sources).await {
        Ok(image) => image.contents.blobs().iter().fold((0, 0), |(cached, all), blob| {
            (cached + blob.cached_bytes(), all + blob.chunk_bytes())
        }),
        Err(error) => {
            tracing::warn!(
                names = ?row.names,
                manifest = %row.manifest,
                error = %ErrorChain(&error),
                "failed to load image"
            );
            (0, 0)
        }
    };
    RegisteredImage {
        names: row.names.clone(),
        id: id.to_owned(),
        digest: row.manifest,
        size: row.size,
        cached,
        pinned: row.is_pinned,
        layers: chain.len(),
        layers_in_use: chain.iter().filter(|id| required.layers.contains(*id)).count(),
    }
}

/// Runs `work` on a blocking thread, because the image store waits for a disk.
async fn on_store<T: Send + 'static>(
    root: &RootContext,
    work: impl FnOnce(&ImageStore) -> Result<T, StoreError> + Send + 'static,
) -> Result<T, RegistrationError> {
    let store = Arc::clone(&root.store);
    let done = tokio::task::spawn_blocking(move || work(&store)).await;
    Ok(done.map_err(|_| ImageError::Aborted)??)
}
