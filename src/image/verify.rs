//! Hashes what is on disk of images.

use std::{collections::HashMap, io, sync::Arc};

use serde::{Deserialize, Serialize};

use super::{
    error::ImageError,
    manifest::Manifest,
    metadata_store::{Everything, Named, State},
    reference::Reference,
    resolve::{FetchPolicy, Images},
};
use crate::{
    blob::{
        bulk::BulkLimits,
        verify::{Tally, verify},
    },
    digest::Digest,
    error_chain::ErrorChain,
};

/// How much of an image is on this host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Condition {
    /// All of it, and it is right: no registry is needed to read it.
    Complete,
    /// What is here is right, and the rest is fetched when it is read.
    Incomplete,
    /// Some of it is not what it should be.
    Corrupt,
}

/// What was found of an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Checked {
    /// The name it is known by.
    pub reference: String,
    /// Digest of its manifest.
    pub manifest: Digest,
    /// Whether the name stood for another image last.
    pub superseded: bool,
    /// Condition of the whole.
    pub condition: Condition,
    /// Chunks of its data.
    pub chunks: Tally,
    /// What else is missing or corrupt, and what cannot be read, in words.
    pub problems: Vec<String>,
    /// Whether something is corrupt, and stays so: it was not to be dropped, or could not be.
    pub stays: bool,
}

/// Checks images one after the other, hashing what they share once.
pub struct Checker<'a> {
    images: &'a Images,
    bulk: &'a Arc<BulkLimits>,
    repair: bool,
    /// Whether chunks are right, by name of the cached blob and index.
    seen: HashMap<String, HashMap<u32, bool>>,
}

/// Cached blobs that no known image uses: nothing tells what should be in them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unknown {
    /// How many.
    pub blobs: u64,
    /// What they take of the disk, in bytes.
    pub bytes: u64,
}

impl<'a> Checker<'a> {
    /// With `repair`, what is corrupt is dropped, so that it is fetched again.
    pub fn new(images: &'a Images, bulk: &'a Arc<BulkLimits>, repair: bool) -> Self {
        Self {
            images,
            bulk,
            repair,
            seen: HashMap::new(),
        }
    }

    /// All that is known on this host.
    pub fn known(&self) -> io::Result<Everything> {
        self.images.library.all()
    }

    /// Checks one of the images that the name has stood for.
    pub async fn check(&mut self, reference: &Reference, named: Named, superseded: bool) -> Checked {
        let mut checked = Checked {
            reference: reference.to_string(),
            manifest: named.manifest,
            superseded,
            condition: Condition::Complete,
            chunks: Tally::default(),
            problems: Vec::new(),
            stays: false,
        };
        if let Err(error) = self.look_into(reference, named, &mut checked).await {
            checked.stays = true;
            checked.worse(Condition::Corrupt, ErrorChain(&error).to_string());
        }
        let Tally { missing, corrupt, .. } = checked.chunks;
        match (corrupt, missing) {
            (0, 0) => {}
            (0, _) => checked.condition = checked.condition.or(Condition::Incomplete),
            _ => {
                checked.condition = Condition::Corrupt;
                checked.stays |= !self.repair;
            }
        }
        checked
    }

    async fn look_into(
        &mut self,
        reference: &Reference,
        named: Named,
        checked: &mut Checked,
    ) -> Result<(), ImageError> {
        if !self.content("manifest", named.manifest, checked).await? {
            return Ok(());
        }
        let manifest = self
            .images
            .manifest(reference, named.manifest, FetchPolicy::Disk)
            .await?;
        let whole = self.small_parts(&manifest, checked).await?;
        if !whole {
            return Ok(());
        }
        let image = self.images.load(reference, named.manifest, FetchPolicy::Disk).await?;
        for blob in image.contents.blobs() {
            let seen = self.seen.entry(blob.cache_name().to_owned()).or_default();
            match verify(blob.fetcher(), self.bulk, self.repair, seen).await {
                Ok(tally) => checked.chunks = checked.chunks.plus(tally),
                Err(error) => {
                    checked.stays = true;
                    checked.worse(Condition::Corrupt, ErrorChain(&error).to_string());
                }
            }
        }
        Ok(())
    }

    /// Checks all but the manifest and the chunks; tells whether what is needed to find the chunks is there.
    async fn small_parts(&self, manifest: &Manifest, checked: &mut Checked) -> Result<bool, ImageError> {
        let mut whole = self.content("configuration", manifest.config, checked).await?;
        let position = manifest.bootstrap.ok_or(ImageError::NotNydus)?;
        whole &= self
            .content("bootstrap", manifest.layers[position].digest, checked)
            .await?;
        for layer in &manifest.layers[position + 1..] {
            // Nothing is read from it here: it is for Podman.
            self.content("ordinary layer", layer.digest, checked).await?;
        }
        Ok(whole)
    }

    /// Whether what is kept under that digest is there and right.
    async fn content(&self, what: &str, digest: Digest, checked: &mut Checked) -> Result<bool, ImageError> {
        let library = Arc::clone(&self.images.library);
        let repair = self.repair;
        let checked_now = tokio::task::spawn_blocking(move || {
            let state = library.state(&digest);
            let drop = state == State::Damaged && repair;
            (state, drop && library.remove_damaged(&digest).is_ok())
        });
        match checked_now.await.map_err(|_| ImageError::Aborted)? {
            (State::Good, _) => return Ok(true),
            (State::Missing, _) => checked.worse(Condition::Incomplete, format!("the {what} ({digest}) is missing")),
            (State::Damaged, dropped) => {
                checked.stays |= !dropped;
                checked.worse(Condition::Corrupt, format!("the {what} ({digest}) is corrupt"));
            }
        }
        Ok(false)
    }

    /// Cached blobs that belong to none of the images that were checked.
    pub fn unknown(&self) -> io::Result<Unknown> {
        let mut unknown = Unknown::default();
        for (name, bytes) in self.images.cache.sizes()? {
            if !self.seen.contains_key(&name) {
                unknown.blobs += 1;
                unknown.bytes += bytes;
            }
        }
        Ok(unknown)
    }
}

impl Checked {
    fn worse(&mut self, condition: Condition, problem: String) {
        self.condition = self.condition.or(condition);
        self.problems.push(problem);
    }
}

impl Condition {
    /// The worse of the two.
    fn or(self, other: Self) -> Self {
        match (self, other) {
            (Self::Corrupt, _) | (_, Self::Corrupt) => Self::Corrupt,
            (Self::Incomplete, _) | (_, Self::Incomplete) => Self::Incomplete,
            _ => Self::Complete,
        }
    }
}
