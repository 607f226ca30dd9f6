//! Image manifests and the role of each layer.
//!
//! The annotations and media types are those of the Nydus image converters (containerd/nydus-snapshotter and acceld):
//! `containerd.io/snapshot/nydus-bootstrap` marks the bootstrap layer, `containerd.io/snapshot/nydus-blob` a data blob,
//! and `os.features: ["nydus.remoteimage.v1"]` a Nydus manifest within an index.

use super::{
    descriptor::{ConfigJson, Descriptor, IndexJson, ManifestJson},
    index::{self, Selected},
};
use crate::digest::Digest;

const BOOTSTRAP_ANNOTATION: &str = "containerd.io/snapshot/nydus-bootstrap";
const NYDUS_BLOB_MEDIA_TYPE: &str = "application/vnd.oci.image.layer.nydus.blob.v1";
/// More layers than any image can have: overlay mounts stop at 500.
const MAX_LAYERS: usize = 1000;

/// Why a manifest, index or configuration cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ManifestError {
    /// The document is not JSON, or does not have the expected form.
    #[error("malformed {what}: {reason}")]
    Malformed {
        /// Manifest, index or configuration.
        what: &'static str,
        /// Message of the parser.
        reason: String,
    },
    /// The index has no entry for this machine.
    #[error("the index has no image for {os}/{architecture}")]
    NoPlatform {
        /// This machine's operating system.
        os: &'static str,
        /// This machine's architecture in Go's terms.
        architecture: &'static str,
    },
    /// The configuration does not match the manifest.
    #[error("the manifest has {layers} layers, the configuration {diff_ids} diff IDs")]
    LayerCount {
        /// Layers in the manifest.
        layers: usize,
        /// Diff IDs in the configuration.
        diff_ids: usize,
    },
    /// More layers than an image can have.
    #[error("the manifest has {0} layers, more than an image can have")]
    TooManyLayers(usize),
    /// Several layers are marked as the bootstrap.
    #[error("the manifest marks {0} layers as the bootstrap")]
    Bootstraps(usize),
}

impl ManifestError {
    /// The entry of an index is an index itself.
    pub(super) fn nested_index() -> Self {
        malformed("index")("an index lists another index")
    }
}

/// A parsed manifest or index.
pub enum Document {
    /// An image.
    Image(ImageManifest),
    /// An index, reduced to its entry for this machine.
    Index(Selected),
}

/// Which manifest of an index to select among those for this machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Selection {
    /// The one that containers/image selects.
    LikePodman,
    /// One that the index marks as a Nydus image's, if there is one; otherwise like [`Self::LikePodman`].
    PreferNydus,
}

/// The manifest of one image.
#[derive(Debug, Clone)]
pub struct ImageManifest {
    /// Digest of the configuration.
    pub config: Digest,
    /// The layers, lowest first.
    pub layers: Vec<LayerDescriptor>,
    /// Index of the bootstrap layer; `None` in an ordinary image.
    pub bootstrap: Option<usize>,
}

/// A layer as listed in the manifest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerDescriptor {
    /// Digest of the layer as stored in the registry.
    pub digest: Digest,
    /// Length of the layer as stored in the registry, in bytes.
    pub size: u64,
    /// Media type of the layer.
    pub media_type: String,
}

impl Document {
    /// Parses a manifest or an index; `selection` determines the entry of an index.
    pub fn parse(bytes: &[u8], selection: Selection) -> Result<Self, ManifestError> {
        let value: serde_json::Value =
            serde_json::from_slice(bytes).map_err(malformed("manifest: not JSON, or cut short"))?;
        let has = |key: &str| value.get(key).is_some_and(|value| !value.is_null());
        if has("manifests") {
            let index: IndexJson = serde_json::from_value(value).map_err(malformed("index"))?;
            index::select(&index, selection).map(Self::Index)
        } else if has("layers") {
            let manifest = serde_json::from_value(value).map_err(malformed("manifest"))?;
            ImageManifest::new(&manifest).map(Self::Image)
        } else {
            let reason = "neither layers nor manifests (schema 1 is not supported)";
            Err(malformed("manifest")(reason))
        }
    }
}

impl ImageManifest {
    fn new(manifest: &ManifestJson) -> Result<Self, ManifestError> {
        let descriptors = manifest.layers.as_deref().unwrap_or_default();
        if descriptors.len() > MAX_LAYERS {
            return Err(ManifestError::TooManyLayers(descriptors.len()));
        }
        let marked = |descriptor: &&Descriptor| descriptor.annotation(BOOTSTRAP_ANNOTATION) == Some("true");
        let bootstraps = descriptors.iter().filter(marked).count();
        if bootstraps > 1 {
            return Err(ManifestError::Bootstraps(bootstraps));
        }
        let bootstrap = descriptors.iter().position(|descriptor| marked(&descriptor));
        let config = manifest.config.as_ref();
        let config = config.ok_or_else(|| malformed("manifest")("no configuration"))?;
        Ok(Self {
            config: config.digest()?,
            layers: descriptors.iter().map(LayerDescriptor::new).collect::<Result<_, _>>()?,
            bootstrap: bootstrap.or_else(|| unmarked_bootstrap(descriptors)),
        })
    }

    /// The layers of the Nydus image. Layers above the bootstrap are ordinary ones that were added later. Empty for an
    /// ordinary image.
    pub fn nydus_layers(&self) -> &[LayerDescriptor] {
        &self.layers[..self.bootstrap.map_or(0, |bootstrap| bootstrap + 1)]
    }

    /// Whether the layers below the bootstrap are ordinary ones, which ordinary images may share.
    pub fn has_original_layers(&self) -> bool {
        let below = self.bootstrap.unwrap_or(0);
        self.layers[..below]
            .iter()
            .any(|layer| layer.media_type != NYDUS_BLOB_MEDIA_TYPE)
    }

    /// The diff IDs from the image's configuration, one for each layer.
    pub fn diff_ids(&self, config: &[u8]) -> Result<Vec<Digest>, ManifestError> {
        let config: ConfigJson = serde_json::from_slice(config).map_err(malformed("configuration"))?;
        let texts = config.rootfs.and_then(|rootfs| rootfs.diff_ids).unwrap_or_default();
        if texts.len() != self.layers.len() {
            return Err(ManifestError::LayerCount {
                layers: self.layers.len(),
                diff_ids: texts.len(),
            });
        }
        texts
            .iter()
            .map(|text| text.parse().map_err(malformed("configuration")))
            .collect()
    }
}

impl LayerDescriptor {
    fn new(descriptor: &Descriptor) -> Result<Self, ManifestError> {
        Ok(Self {
            digest: descriptor.digest()?,
            size: descriptor.size()?,
            media_type: descriptor.media_type().to_owned(),
        })
    }

    /// Compression in containers/storage's numbering (`archive.Compression`): 0 none, 2 gzip, 4 zstd.
    pub fn compression(&self) -> u8 {
        match self.media_type.as_str() {
            gzip if gzip.ends_with("gzip") => 2,
            zstd if zstd.ends_with("zstd") => 4,
            _ => 0,
        }
    }
}

/// Finds a bootstrap without annotations, which `podman push` drops: the last layer, if all others are data blobs.
fn unmarked_bootstrap(layers: &[Descriptor]) -> Option<usize> {
    let is_data = |layer: &Descriptor| layer.media_type() == NYDUS_BLOB_MEDIA_TYPE;
    let (last, others) = layers.split_last()?;
    (!others.is_empty() && others.iter().all(is_data) && !is_data(last)).then_some(others.len())
}

pub(super) fn malformed<E: ToString>(what: &'static str) -> impl Fn(E) -> ManifestError {
    move |error| ManifestError::Malformed {
        what,
        reason: error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn parse_image(json: &serde_json::Value) -> Result<ImageManifest, ManifestError> {
        match Document::parse(json.to_string().as_bytes(), Selection::LikePodman)? {
            Document::Image(manifest) => Ok(manifest),
            Document::Index(_) => panic!("an index"),
        }
    }

    #[test]
    fn only_the_necessary_fields_of_a_manifest_are_required() {
        let digest = |name: &[u8]| Digest::of(name);
        let data =
            json!({"digest": digest(b"data"), "size": 5, "mediaType": NYDUS_BLOB_MEDIA_TYPE, "annotations": null});
        let boot =
            json!({"digest": digest(b"boot"), "size": 7, "annotations": {BOOTSTRAP_ANNOTATION: "true", "other": null}});
        let manifest = json!({"config": {"digest": digest(b"config")}, "layers": [data, boot], "annotations": 5});
        let parsed = parse_image(&manifest).unwrap();
        assert_eq!((parsed.config, parsed.bootstrap), (digest(b"config"), Some(1)));
        let layers: Vec<_> = parsed.layers.iter().map(|layer| (layer.digest, layer.size)).collect();
        assert_eq!(layers, [(digest(b"data"), 5), (digest(b"boot"), 7)]);
        for (place, value) in [
            ("/config", json!(null)),
            ("/layers/0/size", json!(-1)),
            ("/layers/1/digest", json!("")),
        ] {
            let mut other = manifest.clone();
            *other.pointer_mut(place).unwrap() = value;
            assert!(parse_image(&other).is_err(), "{place}");
        }
    }

    #[test]
    fn only_diff_ids_of_a_configuration_are_required() {
        let layer = json!({"digest": Digest::of(b"layer"), "size": 1});
        let manifest = json!({"config": {"digest": Digest::of(b"config")}, "layers": [layer]});
        let manifest = parse_image(&manifest).unwrap();
        let diff_ids = |config: serde_json::Value| manifest.diff_ids(config.to_string().as_bytes());
        let diff_id = Digest::of(b"diff id");
        let config = json!({
            "config": {"Volumes": {"/data": null}, "ExposedPorts": {"80/tcp": null}, "Env": null, "User": 5},
            "rootfs": {"diff_ids": [diff_id]},
        });
        assert_eq!(diff_ids(config), Ok(vec![diff_id]));
        for lacking in [
            json!({}),
            json!({"rootfs": null}),
            json!({"rootfs": {"diff_ids": null}}),
        ] {
            let (layers, diff_ids_there) = (1, 0);
            let expected = ManifestError::LayerCount {
                layers,
                diff_ids: diff_ids_there,
            };
            assert_eq!(diff_ids(lacking), Err(expected));
        }
    }

    #[test]
    fn index_gives_its_entry_for_this_machine() {
        let entry = json!({"digest": Digest::of(b"any"), "size": 1});
        let index = json!({"schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": [entry], "layers": null});
        let parsed = Document::parse(index.to_string().as_bytes(), Selection::PreferNydus).unwrap();
        assert!(matches!(parsed, Document::Index(selected) if selected.manifest == Digest::of(b"any")));
    }
}
