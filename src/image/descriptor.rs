//! JSON forms of manifests, indexes and configurations, limited to the fields that are read here.
//!
//! Podman uses Go's decoder, for which a missing field and `null` are the same. Some images lack fields that the OCI
//! image specification requires, so all fields are optional here.

use std::collections::HashMap;

use serde::Deserialize;

use super::manifest::{ManifestError, malformed};
use crate::digest::Digest;

/// An image manifest.
#[derive(Debug, Default, Deserialize)]
pub(super) struct ManifestJson {
    pub(super) config: Option<Descriptor>,
    pub(super) layers: Option<Vec<Descriptor>>,
}

/// An index, or the `index.json` of an OCI image layout.
#[derive(Debug, Default, Deserialize)]
pub(super) struct IndexJson {
    pub(super) manifests: Option<Vec<Descriptor>>,
}

/// An image configuration.
#[derive(Debug, Default, Deserialize)]
pub(super) struct ConfigJson {
    pub(super) rootfs: Option<RootFsJson>,
}

/// `rootfs` of a [`ConfigJson`].
#[derive(Debug, Default, Deserialize)]
pub(super) struct RootFsJson {
    pub(super) diff_ids: Option<Vec<String>>,
}

/// An entry of a manifest or an index.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Descriptor {
    pub(super) media_type: Option<String>,
    pub(super) artifact_type: Option<String>,
    digest: Option<String>,
    size: Option<i64>,
    annotations: Option<HashMap<String, Option<String>>>,
    pub(super) platform: Option<Platform>,
}

/// The platform of an index entry.
#[derive(Debug, Default, Deserialize)]
pub(super) struct Platform {
    pub(super) os: Option<String>,
    pub(super) architecture: Option<String>,
    pub(super) variant: Option<String>,
    #[serde(rename = "os.features")]
    pub(super) os_features: Option<Vec<String>>,
}

impl Descriptor {
    pub(super) fn digest(&self) -> Result<Digest, ManifestError> {
        self.digest
            .as_deref()
            .unwrap_or_default()
            .parse()
            .map_err(malformed("manifest"))
    }

    /// Length in bytes.
    pub(super) fn size(&self) -> Result<u64, ManifestError> {
        let size = self.size.and_then(|size| u64::try_from(size).ok());
        size.ok_or_else(|| {
            let digest = self.digest.as_deref().unwrap_or_default().escape_debug();
            malformed("manifest")(format!("layer {digest} has no size"))
        })
    }

    pub(super) fn media_type(&self) -> &str {
        self.media_type.as_deref().unwrap_or_default()
    }

    pub(super) fn annotation(&self, key: &str) -> Option<&str> {
        self.annotations.as_ref()?.get(key)?.as_deref()
    }
}
