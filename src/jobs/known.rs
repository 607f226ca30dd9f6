//! Images that are known by name: makes them known, lists and forgets them.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::{Event, Events, Root};
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

/// An image that is known by name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KnownImage {
    /// Its names; none if only a container still needs it.
    pub names: Vec<String>,
    /// The id that Podman shows.
    pub id: String,
    /// Digest of its manifest in the registry.
    pub digest: Digest,
    /// Length of its layers in the registry, in bytes.
    pub size: u64,
    /// Uncompressed bytes of its data that are cached, and of all of it. Both 0 if it cannot be loaded.
    pub cached: (u64, u64),
    /// Whether the cache keeps all of it.
    pub pinned: bool,
    /// How many layers it is made of.
    pub layers: usize,
    /// How many of them Podman's or CRI-O's storage needs.
    pub layers_in_use: usize,
}

/// Why an image cannot be made known, listed or forgotten.
#[derive(Debug, thiserror::Error)]
pub(super) enum KnownError {
    #[error(transparent)]
    Image(#[from] ImageError),
    #[error(transparent)]
    Reference(#[from] InvalidReference),
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Makes images known by name without fetching their data.
pub(super) async fn pull(references: &[String], root: &Root, events: &Events) {
    for text in references {
        events.send(Event::Begin(text.clone())).await.ok();
        let event = match pull_one(text, root).await {
            Ok(image) => Event::Pulled(image),
            Err(error) => failed(text, &error),
        };
        events.send(event).await.ok();
    }
}

async fn pull_one(text: &str, root: &Root) -> Result<KnownImage, KnownError> {
    let reference: Reference = text.parse()?;
    let image = root.images.resolve(&reference).await?;
    let id = publish(root, &image, &reference, std::slice::from_ref(&reference), false).await?;
    tracing::info!(image = %reference, id, "image is known by name");
    let (row, needs) = look(root, id.clone()).await?;
    Ok(known(root, &id, &row, &needs).await)
}

/// Makes a loaded image known by `names`; its id.
pub(super) async fn publish(
    root: &Root,
    image: &Arc<LoadedImage>,
    source: &Reference,
    names: &[Reference],
    is_pinned: bool,
) -> Result<String, KnownError> {
    if image.manifest.nydus_layers().len() < image.manifest.layers.len() {
        return Err(ImageError::LayersOnTop.into());
    }
    let (manifest, config) = root.images.documents(image).await?;
    let documents = RegistryDocuments { manifest, config };
    let (publication, record) = publication::of_image(image, documents, source, names, is_pinned);
    let id = on_store(root, move |store| store.publish_image(&publication, record)).await?;
    Ok(id)
}

/// Tells of all images that are known by name.
pub(super) async fn list(root: &Root, events: &Events) {
    let found = on_store(root, |store| Ok((store.published(), needs(store)))).await;
    let (published, needs) = match found {
        Ok(found) => found,
        Err(error) => {
            events.send(failed("images", &error)).await.ok();
            return;
        }
    };
    for (id, row) in &published.images {
        events.send(Event::Known(known(root, id, row, &needs).await)).await.ok();
    }
}

/// Forgets images by name.
pub(super) async fn remove(names: &[String], root: &Root, events: &Events) {
    for text in names {
        let event = match remove_one(text, root).await {
            Ok(name) => {
                tracing::info!(image = name, "image is forgotten");
                Event::Removed(name)
            }
            Err(error) => failed(text, &error),
        };
        events.send(event).await.ok();
    }
}

async fn remove_one(text: &str, root: &Root) -> Result<String, KnownError> {
    let name = text.parse::<Reference>()?.to_string();
    let forgotten = name.clone();
    on_store(root, move |store| store.remove_name(&forgotten)).await?;
    Ok(name)
}

fn failed(what: &str, error: &(dyn std::error::Error + 'static)) -> Event {
    let why = ErrorChain(error).to_string();
    tracing::warn!(image = what, error = why, "failed to change or list known images");
    let what = what.to_owned();
    Event::Failed { what, why }
}

async fn look(root: &Root, id: String) -> Result<(ImageRow, RequiredLayers), KnownError> {
    let looked = on_store(root, move |store| {
        let row = store.published().images.remove(&id);
        Ok((row.ok_or(StoreError::UnknownName(id))?, needs(store)))
    });
    looked.await
}

/// What the graph roots need, for showing it; nothing if that cannot be told.
fn needs(store: &ImageStore) -> RequiredLayers {
    let needs = store.required_layers();
    needs.unwrap_or_else(|error| {
        tracing::warn!("failed to find out which layers are in use: {}", ErrorChain(&error));
        RequiredLayers::default()
    })
}

async fn known(root: &Root, id: &str, row: &ImageRow, needs: &RequiredLayers) -> KnownImage {
    let layers = &root.store.published().layers;
    let chain = layer_chain(layers, &row.layer);
    let sources = layers.get(&row.layer).and_then(|layer| layer.tree.as_ref());
    let sources = sources.map_or(&[][..], |tree| &tree.sources);
    let cached = match root.images.load_manifest(row.manifest, sources).await {
        Ok(image) => image.contents.blobs().iter().fold((0, 0), |(cached, all), blob| {
            (cached + blob.cached_bytes(), all + blob.chunk_bytes())
        }),
        Err(error) => {
            tracing::warn!(id, "failed to load known image: {}", ErrorChain(&error));
            (0, 0)
        }
    };
    KnownImage {
        names: row.names.clone(),
        id: id.to_owned(),
        digest: row.manifest,
        size: row.size,
        cached,
        pinned: row.is_pinned,
        layers: chain.len(),
        layers_in_use: chain.iter().filter(|id| needs.layers.contains(*id)).count(),
    }
}

/// Works on the image store where waiting for a disk holds up nothing else.
async fn on_store<T: Send + 'static>(
    root: &Root,
    work: impl FnOnce(&ImageStore) -> Result<T, StoreError> + Send + 'static,
) -> Result<T, KnownError> {
    let store = Arc::clone(&root.store);
    let done = tokio::task::spawn_blocking(move || work(&store)).await;
    Ok(done.map_err(|_| ImageError::Aborted)??)
}
