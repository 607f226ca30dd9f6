//! Verifies images on disk by hashing.

use std::{collections::HashMap, io, sync::Arc};

use serde::{Deserialize, Serialize};

use super::{
    error::ImageError,
    loader::FetchPolicy,
    manifest::ImageManifest,
    metadata_store::{ContentState, NamedManifest, RecordedReferences},
    reference::Reference,
    resolve::Images,
};
use crate::{
    blob::{
        bulk::BulkLimits,
        verify::{Tally, verify},
    },
    digest::Digest,
    error_chain::ErrorChain,
};

/// How much of an image is on disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Condition {
    /// All content is on disk and intact: no registry is needed to read the image.
    Complete,
    /// Some content is missing, and is fetched when it is read; the rest is intact.
    Incomplete,
    /// Some content is corrupt.
    Corrupt,
}

/// Result of verifying an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VerifiedImage {
    /// Name of the image.
    pub reference: String,
    /// Digest of the manifest.
    pub manifest: Digest,
    /// Whether the name refers to a newer image now.
    pub superseded: bool,
    /// Condition of the image as a whole.
    pub condition: Condition,
    /// Counts of its chunks.
    pub chunks: Tally,
    /// Descriptions of other missing, corrupt or unreadable content.
    pub problems: Vec<String>,
    /// Whether corrupt content remains: it was not to be removed, or could not be.
    pub stays: bool,
}

/// Verifies images one after the other. Hashes shared content once.
pub struct ImageVerifier<'a> {
    images: &'a Images,
    bulk: &'a Arc<BulkLimits>,
    repair: bool,
    /// Verified chunks: by name of the cached blob and chunk index, whether the chunk is intact.
    seen: HashMap<String, HashMap<u32, bool>>,
}

/// Cached blobs that no image in the root uses. They cannot be verified.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnknownBlobs {
    /// Number of blobs.
    pub blobs: u64,
    /// Disk usage, in bytes.
    pub bytes: u64,
}

impl<'a> ImageVerifier<'a> {
    /// With `repair`, removes corrupt content, so that it is fetched again.
    pub fn new(images: &'a Images, bulk: &'a Arc<BulkLimits>, repair: bool) -> Self {
        Self {
            images,
            bulk,
            repair,
            seen: HashMap::new(),
        }
    }

    /// All recorded references.
    pub fn recorded(&self) -> io::Result<RecordedReferences> {
        self.images.metadata.blocking().all()
    }

    /// Verifies one of the images that the reference has named.
    pub async fn verify(&mut self, reference: &Reference, named: NamedManifest, superseded: bool) -> VerifiedImage {
        let mut verified = VerifiedImage {
            reference: reference.to_string(),
            manifest: named.manifest,
            superseded,
            condition: Condition::Complete,
            chunks: Tally::default(),
            problems: Vec::new(),
            stays: false,
        };
        if let Err(error) = self.verify_content(reference, named, &mut verified).await {
            verified.stays = true;
            verified.add_problem(Condition::Corrupt, ErrorChain(&error).to_string());
        }
        let Tally { missing, corrupt, .. } = verified.chunks;
        match (corrupt, missing) {
            (0, 0) => {}
            (0, _) => verified.condition = verified.condition.worse(Condition::Incomplete),
            _ => {
                verified.condition = Condition::Corrupt;
                verified.stays |= !self.repair;
            }
        }
        verified
    }

    async fn verify_content(
        &mut self,
        reference: &Reference,
        named: NamedManifest,
        verified: &mut VerifiedImage,
    ) -> Result<(), ImageError> {
        if !self.verify_stored("manifest", named.manifest, verified).await? {
            return Ok(());
        }
        let manifest = self
            .images
            .loader
            .manifest(reference, named.manifest, FetchPolicy::Disk)
            .await?;
        let whole = self.verify_metadata(&manifest, verified).await?;
        if !whole {
            return Ok(());
        }
        let image = self
            .images
            .loader
            .load(reference, named.manifest, FetchPolicy::Disk)
            .await?;
        for blob in image.contents.blobs() {
            let seen = self.seen.entry(blob.cache_name().to_owned()).or_default();
            match verify(blob.fetcher(), self.bulk, self.repair, seen).await {
                Ok(tally) => verified.chunks = verified.chunks.plus(tally),
                Err(error) => {
                    verified.stays = true;
                    verified.add_problem(Condition::Corrupt, ErrorChain(&error).to_string());
                }
            }
        }
        Ok(())
    }

    /// Verifies everything except the manifest and the chunks. Returns whether the metadata needed to find the chunks
    /// is intact.
    async fn verify_metadata(
        &self,
        manifest: &ImageManifest,
        verified: &mut VerifiedImage,
    ) -> Result<bool, ImageError> {
        let mut whole = self.verify_stored("configuration", manifest.config, verified).await?;
        let position = manifest.bootstrap.ok_or(ImageError::NotNydus)?;
        whole &= self
            .verify_stored("bootstrap", manifest.layers[position].digest, verified)
            .await?;
        for layer in &manifest.layers[position + 1..] {
            // Not needed here: only Podman reads these layers.
            self.verify_stored("ordinary layer", layer.digest, verified).await?;
        }
        Ok(whole)
    }

    /// Verifies stored content. Returns whether it is intact.
    async fn verify_stored(
        &self,
        what: &str,
        digest: Digest,
        verified: &mut VerifiedImage,
    ) -> Result<bool, ImageError> {
        let store = Arc::clone(self.images.metadata.blocking());
        let repair = self.repair;
        let checked_now = tokio::task::spawn_blocking(move || {
            let state = store.state(&digest);
            let drop = state == ContentState::Damaged && repair;
            (state, drop && store.remove_damaged(&digest).is_ok())
        });
        match checked_now.await.map_err(|_| ImageError::Aborted)? {
            (ContentState::Intact, _) => return Ok(true),
            (ContentState::Missing, _) => {
                verified.add_problem(Condition::Incomplete, format!("the {what} ({digest}) is missing"));
            }
            (ContentState::Damaged, dropped) => {
                verified.stays |= !dropped;
                verified.add_problem(Condition::Corrupt, format!("the {what} ({digest}) is corrupt"));
            }
        }
        Ok(false)
    }

    /// Cached blobs of none of the verified images.
    pub fn unknown(&self) -> UnknownBlobs {
        let mut unknown = UnknownBlobs::default();
        for (name, bytes) in self.images.loader.backing().cache.cache().sizes() {
            if !self.seen.contains_key(&name) {
                unknown.blobs += 1;
                unknown.bytes += bytes;
            }
        }
        unknown
    }
}

impl VerifiedImage {
    fn add_problem(&mut self, condition: Condition, problem: String) {
        self.condition = self.condition.worse(condition);
        self.problems.push(problem);
    }
}

impl Condition {
    /// The worse one of two conditions.
    fn worse(self, other: Self) -> Self {
        match (self, other) {
            (Self::Corrupt, _) | (_, Self::Corrupt) => Self::Corrupt,
            (Self::Incomplete, _) | (_, Self::Incomplete) => Self::Incomplete,
            _ => Self::Complete,
        }
    }
}
