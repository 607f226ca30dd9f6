//! Derives from a loaded image what is published of it, in the terms of containers/storage.

use serde_json::{Map, Value, json};

use super::image_store::{NewImage, NewLayer, Publication};
use crate::{
    digest::Digest,
    image::{loaded::LoadedImage, reference::Reference},
};

const MANIFEST_MEDIA_TYPE: &str = "application/vnd.oci.image.manifest.v1+json";
const CONFIG_MEDIA_TYPE: &str = "application/vnd.oci.image.config.v1+json";
const LAYER_MEDIA_TYPE: &str = "application/vnd.oci.image.layer.v1.tar";

/// The image's layers as a pull by containers/image looks for them: those up to the bootstrap.
pub fn of_layers(image: &LoadedImage, source: &Reference) -> Publication {
    let layers = image.manifest.nydus_layers().iter().zip(image.diff_ids());
    let layer = |(position, (layer, diff_id)): (usize, (&crate::image::manifest::LayerDescriptor, &Digest))| NewLayer {
        digest: layer.digest,
        size: layer.size,
        diff_id: *diff_id,
        diff_size: image.uncompressed_size(position),
        compression: layer.compression(),
    };
    publication(image, source, layers.enumerate().map(layer).collect())
}

/// The image's tree as one synthetic layer, which no pull finds. Used for images whose data is in ordinary layers:
/// these must not be published, because other images share them.
fn of_tree(image: &LoadedImage, source: &Reference) -> Publication {
    let tree = Digest::of(format!("nydus-store tree {}", image.digest).as_bytes());
    let sizes = image.manifest.nydus_layers().iter().map(|layer| layer.size);
    let layer = NewLayer {
        digest: tree,
        size: sizes.fold(0, u64::saturating_add),
        diff_id: tree,
        diff_size: image.contents.tree.total_bytes(),
        compression: 0,
    };
    publication(image, source, vec![layer])
}

fn publication(image: &LoadedImage, source: &Reference, layers: Vec<NewLayer>) -> Publication {
    Publication {
        layers,
        manifest: image.digest,
        inodes: image.contents.tree.len(),
        source: source.to_string(),
    }
}

/// The image's own documents, as stored in its registry.
pub struct RegistryDocuments {
    /// The manifest.
    pub manifest: String,
    /// The configuration: a JSON object.
    pub config: String,
}

/// An image to be known by `names` (at least one), and its publication.
///
/// Its manifest has ordinary media types, because containers/image refuses to build upon others.
pub fn of_image(
    image: &LoadedImage,
    documents: RegistryDocuments,
    source: &Reference,
    names: &[Reference],
    is_pinned: bool,
) -> (Publication, NewImage) {
    let RegistryDocuments { manifest, config } = documents;
    let (publication, config) = if image.manifest.has_original_layers() {
        let publication = of_tree(image, source);
        let diff_id = publication.layers[0].diff_id;
        (publication, with_one_layer(&config, diff_id))
    } else {
        (of_layers(image, source), config)
    };
    let layers: Vec<_> = publication.layers.iter().map(descriptor).collect();
    let ordinary = json!({
        "schemaVersion": 2,
        "mediaType": MANIFEST_MEDIA_TYPE,
        "config": {"mediaType": CONFIG_MEDIA_TYPE, "digest": Digest::of(config.as_bytes()), "size": config.len()},
        "layers": layers,
    });
    let record = NewImage {
        names: names.iter().map(ToString::to_string).collect(),
        ordinary_manifest: ordinary.to_string(),
        config,
        registry_manifest: manifest,
        is_pinned,
    };
    (publication, record)
}

fn descriptor(layer: &NewLayer) -> Value {
    let suffix = match layer.compression {
        2 => "+gzip",
        4 => "+zstd",
        _ => "",
    };
    json!({"mediaType": format!("{LAYER_MEDIA_TYPE}{suffix}"), "digest": layer.digest, "size": layer.size})
}

/// The configuration of the same image with a single layer.
fn with_one_layer(config: &str, diff_id: Digest) -> String {
    let mut config: Map<String, Value> = serde_json::from_str(config).unwrap_or_default();
    config.insert("rootfs".to_owned(), json!({"type": "layers", "diff_ids": [diff_id]}));
    // Dropped, because it has an entry for each of the former layers.
    config.remove("history");
    Value::from(config).to_string()
}
