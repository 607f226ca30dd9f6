//! Manifests and indexes: which image of an index, which layer is what.
//!
//! The annotations and media types are those of the Nydus image converters (containerd/nydus-snapshotter and acceld):
//! `containerd.io/snapshot/nydus-bootstrap` marks the bootstrap layer, `containerd.io/snapshot/nydus-blob` a data
//! blob, and `os.features: ["nydus.remoteimage.v1"]` a Nydus manifest within an index.

use oci_spec::image::{Descriptor, ImageConfiguration, ImageIndex, ImageManifest, Platform};
use serde::Serialize;

use crate::digest::Digest;

const BOOTSTRAP: &str = "containerd.io/snapshot/nydus-bootstrap";
const NYDUS_BLOB: &str = "application/vnd.oci.image.layer.nydus.blob.v1";
const NYDUS_FEATURE: &str = "nydus.remoteimage.v1";
const NYDUS_ARTIFACT: &str = "application/vnd.nydus.image.manifest.v1+json";
const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const INDEX: &str = "application/vnd.oci.image.index.v1+json";
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
    /// An index: the digest of the manifest for this machine, a Nydus one where there is one.
    Index(Digest),
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

/// Which of its two names a layer was looked up by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LookedUpBy {
    /// The layer's digest: Podman up to 5.0.
    Digest,
    /// Its TOC digest, which the mirror has made up: Podman from 5.1 on.
    Toc,
}

/// A layer's `info` file, as containers/storage reads it (`drivers.AdditionalLayer` there).
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum LayerInfo {
    /// Of a layer that was looked up by its digest.
    #[serde(rename_all = "kebab-case")]
    Digest {
        /// Digest of the layer as it is in the registry.
        compressed_diff_digest: Digest,
        /// Its length there.
        compressed_size: i64,
        /// Digest of the uncompressed layer.
        diff_digest: Digest,
        /// Never −1 for "unknown": containers/storage does not open images with such a layer.
        diff_size: i64,
        /// containers/storage's numbering (`archive.Compression`): 0 none, 2 gzip, 4 zstd.
        compression: u8,
    },
    /// Of a layer that was looked up by its TOC digest.
    #[serde(rename_all = "kebab-case")]
    Toc {
        /// As above.
        diff_size: i64,
        /// As above: by it, what reads `blob` knows to decompress it.
        compression: u8,
        /// The digest that was looked up; any other and the pull fails.
        toc_digest: Digest,
        /// What containers/image takes the layer's diff id from.
        flags: TocFlags,
    },
}

/// The `flags` of a [`LayerInfo::Toc`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct TocFlags {
    expected_layer_diffid: Digest,
}

impl Document {
    /// Reads a manifest or an index.
    pub fn parse(bytes: &[u8]) -> Result<Self, ManifestError> {
        let value: serde_json::Value =
            serde_json::from_slice(bytes).map_err(malformed("manifest: not JSON, or cut short"))?;
        if let Some(entries) = value.get("manifests") {
            let nydus: Vec<_> = entries.as_array().into_iter().flatten().map(is_nydus).collect();
            let index = serde_json::from_value(value).map_err(malformed("index"))?;
            choose(&index, &nydus).map(Self::Index)
        } else if value.get("layers").is_some() {
            let manifest = serde_json::from_value(value).map_err(malformed("manifest"))?;
            Manifest::new(&manifest).map(Self::Image)
        } else {
            let reason = "neither layers nor manifests (the old first schema is not supported)".to_owned();
            Err(ManifestError::Malformed {
                what: "manifest",
                reason,
            })
        }
    }
}

impl Manifest {
    fn new(manifest: &ImageManifest) -> Result<Self, ManifestError> {
        let descriptors = manifest.layers();
        if descriptors.len() > MAX_LAYERS {
            return Err(ManifestError::TooManyLayers(descriptors.len()));
        }
        let marked = |descriptor: &&Descriptor| {
            descriptor
                .annotations()
                .as_ref()
                .and_then(|all| all.get(BOOTSTRAP))
                .is_some_and(|value| value == "true")
        };
        let bootstraps = descriptors.iter().filter(marked).count();
        if bootstraps > 1 {
            return Err(ManifestError::Bootstraps(bootstraps));
        }
        let bootstrap = descriptors.iter().position(|descriptor| marked(&descriptor));
        Ok(Self {
            config: digest_of(manifest.config())?,
            layers: descriptors.iter().map(Layer::new).collect::<Result<_, _>>()?,
            bootstrap: bootstrap.or_else(|| unmarked_bootstrap(descriptors)),
        })
    }

    /// The layers that belong to the Nydus image: what lies above the bootstrap are ordinary ones, which somebody has
    /// added. None in an ordinary image.
    pub fn nydus_layers(&self) -> &[Layer] {
        &self.layers[..self.bootstrap.map_or(0, |bootstrap| bootstrap + 1)]
    }

    /// Where the layer of that digest or TOC digest stands among [`Self::nydus_layers`].
    pub fn find(&self, key: &Digest) -> Option<(usize, LookedUpBy)> {
        let layers = self.nydus_layers();
        let by_digest = layers.iter().position(|layer| layer.digest == *key);
        let by_toc = || layers.iter().position(|layer| layer.toc_digest() == *key);
        by_digest
            .map(|position| (position, LookedUpBy::Digest))
            .or_else(|| by_toc().map(|position| (position, LookedUpBy::Toc)))
    }

    /// Whether the layers below the bootstrap are ordinary ones, which an ordinary image may have too.
    pub fn has_original_layers(&self) -> bool {
        let below = self.bootstrap.unwrap_or(0);
        self.layers[..below].iter().any(|layer| layer.media_type != NYDUS_BLOB)
    }

    /// Its layers that are no tars, which only a Nydus image has.
    pub fn rafs_blobs(&self) -> impl Iterator<Item = Digest> {
        let blobs = self
            .nydus_layers()
            .iter()
            .filter(|layer| layer.media_type == NYDUS_BLOB);
        blobs.map(|layer| layer.digest)
    }

    /// Whether it is an ordinary image that has the layer.
    pub fn is_ordinary_with(&self, layer: &Digest) -> bool {
        self.bootstrap.is_none() && self.layers.iter().any(|candidate| candidate.digest == *layer)
    }

    /// The diff ids from the image's configuration, one for each layer.
    pub fn diff_ids(&self, config: &[u8]) -> Result<Vec<Digest>, ManifestError> {
        let config: ImageConfiguration = serde_json::from_slice(config).map_err(malformed("configuration"))?;
        let texts = config.rootfs().diff_ids();
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
            digest: digest_of(descriptor)?,
            size: descriptor.size(),
            media_type: descriptor.media_type().to_string(),
        })
    }

    /// The TOC digest that the mirror gives the layer. It is made up, since a Nydus layer has no table of contents of the
    /// kind that Podman means; but it is another digest than the layer's own, so that the store can tell by which of
    /// them it is asked and answer in the form that goes with it. It stays what it is from version to version: there are
    /// registries with manifests that the mirror has made.
    pub fn toc_digest(&self) -> Digest {
        Digest::of(format!("nydus-store toc {}", self.digest).as_bytes())
    }

    /// The layer's `info` for who looks it up so. `diff_size` is the length of the uncompressed layer, as far as it is
    /// known; else the compressed length stands for it.
    pub fn info(&self, by: LookedUpBy, diff_id: Digest, diff_size: Option<u64>) -> LayerInfo {
        let diff_size = signed(diff_size.unwrap_or(self.size));
        match by {
            LookedUpBy::Digest => LayerInfo::Digest {
                compressed_diff_digest: self.digest,
                compressed_size: signed(self.size),
                diff_digest: diff_id,
                diff_size,
                compression: self.compression(),
            },
            // No more than this: by its digests containers/storage would take the layer, which is empty here, for an
            // ordinary image's of which it is a part too.
            LookedUpBy::Toc => LayerInfo::Toc {
                diff_size,
                compression: self.compression(),
                toc_digest: self.toc_digest(),
                flags: TocFlags {
                    expected_layer_diffid: diff_id,
                },
            },
        }
    }

    fn compression(&self) -> u8 {
        match self.media_type.as_str() {
            gzip if gzip.ends_with("gzip") => 2,
            zstd if zstd.ends_with("zstd") => 4,
            _ => 0,
        }
    }
}

/// `podman push` drops the annotations of layers. What follows nothing but data blobs can still only be the bootstrap.
fn unmarked_bootstrap(layers: &[Descriptor]) -> Option<usize> {
    let is_data = |layer: &Descriptor| layer.media_type().to_string() == NYDUS_BLOB;
    let (last, others) = layers.split_last()?;
    (!others.is_empty() && others.iter().all(is_data) && !is_data(last)).then_some(others.len())
}

/// The media type that a manifest or an index says of itself. In OCI's, saying so is optional.
pub fn media_type(bytes: &[u8]) -> String {
    let value: serde_json::Value = serde_json::from_slice(bytes).unwrap_or_default();
    let said = value.get("mediaType").and_then(serde_json::Value::as_str);
    let kind = if value.get("manifests").is_some() {
        INDEX
    } else {
        MANIFEST
    };
    said.unwrap_or(kind).to_owned()
}

fn signed(size: u64) -> i64 {
    i64::try_from(size).unwrap_or(i64::MAX)
}

fn digest_of(descriptor: &Descriptor) -> Result<Digest, ManifestError> {
    descriptor.digest().to_string().parse().map_err(malformed("manifest"))
}

fn malformed<E: ToString>(what: &'static str) -> impl Fn(E) -> ManifestError {
    move |error| ManifestError::Malformed {
        what,
        reason: error.to_string(),
    }
}

/// This machine's architecture in the words of Go and OCI.
fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        "x86" => "386",
        "powerpc64" => "ppc64le",
        other => other,
    }
}

/// The manifest for this machine: among those of the right platform a Nydus one, else the first. `nydus` tells of each
/// whether it is one.
fn choose(index: &ImageIndex, nydus: &[bool]) -> Result<Digest, ManifestError> {
    let (os, architecture) = ("linux", architecture());
    let fits =
        |platform: &Platform| platform.os().to_string() == os && platform.architecture().to_string() == architecture;
    // A manifest without a platform is for any machine.
    let candidates = || {
        index
            .manifests()
            .iter()
            .zip(nydus)
            .filter(|(entry, _)| entry.platform().as_ref().is_none_or(fits))
    };
    let chosen = candidates().find(|(_, nydus)| **nydus).or_else(|| candidates().next());
    chosen
        .ok_or(ManifestError::NoPlatform { os, architecture })
        .and_then(|(entry, _)| digest_of(entry))
}

/// Whether an index marks an entry as a Nydus image's manifest. This reads the JSON itself, because `oci-spec` looks for
/// `os_features` where the specification writes `os.features`.
fn is_nydus(entry: &serde_json::Value) -> bool {
    let features = entry
        .get("platform")
        .and_then(|platform| platform.get("os.features"))
        .and_then(serde_json::Value::as_array);
    let artifact = entry.get("artifactType").and_then(serde_json::Value::as_str);
    features.is_some_and(|all| all.iter().any(|feature| feature == NYDUS_FEATURE)) || artifact == Some(NYDUS_ARTIFACT)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn entry(name: &str) -> serde_json::Value {
        json!({
            "mediaType": MANIFEST, "digest": Digest::of(name.as_bytes()), "size": 1,
            "platform": {"architecture": architecture(), "os": "linux"},
        })
    }

    #[test]
    fn an_index_gives_its_nydus_manifest_wherever_it_stands() {
        let mut by_feature = entry("feature");
        by_feature["platform"]["os.features"] = json!(["nydus.remoteimage.v1"]);
        let mut by_artifact = entry("artifact");
        by_artifact["artifactType"] = json!(NYDUS_ARTIFACT);
        let mut elsewhere = entry("elsewhere");
        elsewhere["platform"]["architecture"] = json!("vax");
        elsewhere["artifactType"] = json!(NYDUS_ARTIFACT);
        for (entries, expected) in [
            (vec![elsewhere.clone(), entry("plain"), by_feature], "feature"),
            (vec![entry("plain"), by_artifact], "artifact"),
            (vec![elsewhere, entry("plain")], "plain"),
        ] {
            let index = json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": entries});
            let Document::Index(chosen) = Document::parse(index.to_string().as_bytes()).unwrap() else {
                panic!("an index");
            };
            assert_eq!(chosen, Digest::of(expected.as_bytes()));
        }
    }

    #[test]
    fn a_layer_has_two_names() {
        let layer = |name: &[u8]| Layer {
            digest: Digest::of(name),
            size: 1,
            media_type: String::new(),
        };
        let manifest = Manifest {
            config: Digest::of(b""),
            layers: [&b"data"[..], b"bootstrap", b"above"].map(layer).to_vec(),
            bootstrap: Some(1),
        };
        for (position, layer) in manifest.nydus_layers().iter().enumerate() {
            assert_eq!(manifest.find(&layer.digest), Some((position, LookedUpBy::Digest)));
            assert_eq!(manifest.find(&layer.toc_digest()), Some((position, LookedUpBy::Toc)));
        }
        assert_eq!(manifest.find(&manifest.layers[2].digest), None);
        assert_eq!(manifest.find(&manifest.layers[2].toc_digest()), None);
        // As it is in registries.
        assert_eq!(
            manifest.layers[0].toc_digest().to_string(),
            "sha256:fbc000e61daaf0a68a3bdf86f0ee579ca46e1d9ede320dd6fe4f1275b64ce01d"
        );
    }
}
