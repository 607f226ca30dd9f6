//! Manifests and indexes: which image of an index, which layer is what.
//!
//! The annotations and media types are those of the Nydus image converters (containerd/nydus-snapshotter and acceld):
//! `containerd.io/snapshot/nydus-bootstrap` marks the bootstrap layer, `containerd.io/snapshot/nydus-blob` a data
//! blob, and `os.features: ["nydus.remoteimage.v1"]` a Nydus manifest within an index.

use super::{
    descriptor::{ConfigJson, Descriptor, IndexJson, ManifestJson},
    index::{self, Selected},
};
use crate::digest::Digest;

const BOOTSTRAP: &str = "containerd.io/snapshot/nydus-bootstrap";
const NYDUS_BLOB: &str = "application/vnd.oci.image.layer.nydus.blob.v1";
/// More layers than any image has: overlay mounts stop at 500.
const MAX_LAYERS: usize = 1000;

/// A manifest, index or configuration is not what it should be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ManifestError {
    /// It is not JSON, or not of the expected form.
    #[error("malformed {what}: {reason}")]
    Malformed {
        /// Manifest, index or configuration.
        what: &'static str,
        /// The parser's words.
        reason: String,
    },
    /// The index has nothing for this machine.
    #[error("the index has no image for {os}/{architecture}")]
    NoPlatform {
        /// This machine's operating system.
        os: &'static str,
        /// This machine's architecture, in Go's words.
        architecture: &'static str,
    },
    /// The configuration does not go with the manifest.
    #[error("the manifest has {layers} layers, the configuration {diff_ids} diff ids")]
    LayerCount {
        /// Layers in the manifest.
        layers: usize,
        /// Diff ids in the configuration.
        diff_ids: usize,
    },
    /// More layers than an image can have.
    #[error("the manifest has {0} layers, more than an image can have")]
    TooManyLayers(usize),
    /// More than one bootstrap, or one that is not the last layer.
    #[error("the manifest marks {0} layers as the bootstrap")]
    Bootstraps(usize),
}

/// What a manifest's bytes turned out to be.
pub enum Document {
    /// An image.
    Image(Manifest),
    /// An index: its entry for this machine.
    Index(Selected),
}

/// Which manifest of an index is wanted, of those for this machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Selection {
    /// The one that containers/image takes.
    LikePodman,
    /// One that the index marks as a Nydus image's, if there is one; otherwise as [`Self::LikePodman`].
    PreferNydus,
}

/// The manifest of one image.
#[derive(Debug, Clone)]
pub struct Manifest {
    /// The configuration's digest.
    pub config: Digest,
    /// The layers, lowest first.
    pub layers: Vec<Layer>,
    /// Which of them is the bootstrap; `None` in an ordinary image.
    pub bootstrap: Option<usize>,
}

/// One layer as the manifest lists it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layer {
    /// Digest of the layer as it is in the registry.
    pub digest: Digest,
    /// Its length there, in bytes.
    pub size: u64,
    /// Its media type.
    pub media_type: String,
}

impl Document {
    /// Reads a manifest or an index, of which `selection` says which entry is wanted.
    pub fn parse(bytes: &[u8], selection: Selection) -> Result<Self, ManifestError> {
        let value: serde_json::Value =
            serde_json::from_slice(bytes).map_err(malformed("manifest: not JSON, or cut short"))?;
        let has = |key: &str| value.get(key).is_some_and(|value| !value.is_null());
        if has("manifests") {
            let index: IndexJson = serde_json::from_value(value).map_err(malformed("index"))?;
            index::select(&index, selection).map(Self::Index)
        } else if has("layers") {
            let manifest = serde_json::from_value(value).map_err(malformed("manifest"))?;
            Manifest::new(&manifest).map(Self::Image)
        } else {
            let reason = "neither layers nor manifests (the old first schema is not supported)";
            Err(malformed("manifest")(reason))
        }
    }
}

impl Manifest {
    fn new(manifest: &ManifestJson) -> Result<Self, ManifestError> {
        let descriptors = manifest.layers.as_deref().unwrap_or_default();
        if descriptors.len() > MAX_LAYERS {
            return Err(ManifestError::TooManyLayers(descriptors.len()));
        }
        let marked = |descriptor: &&Descriptor| descriptor.annotation(BOOTSTRAP) == Some("true");
        let bootstraps = descriptors.iter().filter(marked).count();
        if bootstraps > 1 {
            return Err(ManifestError::Bootstraps(bootstraps));
        }
        let bootstrap = descriptors.iter().position(|descriptor| marked(&descriptor));
        let config = manifest.config.as_ref();
        let config = config.ok_or_else(|| malformed("manifest")("it has no configuration"))?;
        Ok(Self {
            config: config.digest()?,
            layers: descriptors.iter().map(Layer::new).collect::<Result<_, _>>()?,
            bootstrap: bootstrap.or_else(|| unmarked_bootstrap(descriptors)),
        })
    }

    /// The layers that belong to the Nydus image: what lies above the bootstrap are ordinary ones, which somebody has
    /// added. None in an ordinary image.
    pub fn nydus_layers(&self) -> &[Layer] {
        &self.layers[..self.bootstrap.map_or(0, |bootstrap| bootstrap + 1)]
    }

    /// Whether the layers below the bootstrap are ordinary ones, which an ordinary image may have too.
    pub fn has_original_layers(&self) -> bool {
        let below = self.bootstrap.unwrap_or(0);
        self.layers[..below].iter().any(|layer| layer.media_type != NYDUS_BLOB)
    }

    /// The diff ids from the image's configuration, one for each layer.
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

impl Layer {
    fn new(descriptor: &Descriptor) -> Result<Self, ManifestError> {
        Ok(Self {
            digest: descriptor.digest()?,
            size: descriptor.size()?,
            media_type: descriptor.media_type().to_owned(),
        })
    }

    /// How it is compressed, in containers/storage's numbering (`archive.Compression`): 0 none, 2 gzip, 4 zstd.
    pub fn compression(&self) -> u8 {
        match self.media_type.as_str() {
            gzip if gzip.ends_with("gzip") => 2,
            zstd if zstd.ends_with("zstd") => 4,
            _ => 0,
        }
    }
}

/// `podman push` drops the annotations of layers. What follows nothing but data blobs can still only be the bootstrap.
fn unmarked_bootstrap(layers: &[Descriptor]) -> Option<usize> {
    let is_data = |layer: &Descriptor| layer.media_type() == NYDUS_BLOB;
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

    fn parse_image(json: &serde_json::Value) -> Result<Manifest, ManifestError> {
        match Document::parse(json.to_string().as_bytes(), Selection::LikePodman)? {
            Document::Image(manifest) => Ok(manifest),
            Document::Index(_) => panic!("an index"),
        }
    }

    #[test]
    fn only_what_is_needed_of_a_manifest_must_be_there() {
        let digest = |name: &[u8]| Digest::of(name);
        let data = json!({"digest": digest(b"data"), "size": 5, "mediaType": NYDUS_BLOB, "annotations": null});
        let boot = json!({"digest": digest(b"boot"), "size": 7, "annotations": {BOOTSTRAP: "true", "other": null}});
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
    fn only_diff_ids_of_a_configuration_must_be_there() {
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
