//! Fetches all of an image, so that it can be read without a registry from then on.
//!
//! A name is noted only after everything it stands for is on disk, so that an attempt that was cut short leaves chunks
//! that the next one need not fetch, and nothing else.

use std::sync::{Arc, atomic::Ordering};

use serde::{Deserialize, Serialize};

use super::{
    error::ImageError,
    index::Selected,
    loaded::RegistrySource,
    loading::MAX_CONFIG,
    manifest::{Document, ManifestError, Selection},
    metadata_store::{Named, State},
    oci_layout::OciLayout,
    origin::{Origin, Top},
    reference::Reference,
    resolve::{FetchPolicy, Images},
};
use crate::{
    blob::{
        bulk::{BulkLimits, DownloadProgress},
        download_all::download_all,
        error::ReadError,
    },
    digest::Digest,
};

/// What an image was seeded from.
#[derive(Clone)]
pub enum Seed {
    /// What the reference names in its registry.
    Registry(Reference),
    /// The manifest or index of that digest in a layout.
    Layout(Arc<OciLayout>, Digest),
}

/// An image that is here whole.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seeded {
    /// The names it was noted under.
    pub names: Vec<String>,
    /// Digest of its manifest.
    pub manifest: Digest,
    /// Uncompressed bytes of its chunks.
    pub bytes: u64,
    /// Stored bytes that had to be fetched for them.
    pub fetched: u64,
}

/// An image cannot be had whole.
#[derive(Debug, thiserror::Error)]
pub enum SeedError {
    /// It cannot be used at all.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// A chunk cannot be had, or not be kept.
    #[error(transparent)]
    Chunk(#[from] ReadError),
    /// A name with a digest cannot stand for anything else.
    #[error("it cannot be noted as {0}, since its digest is {1}")]
    OtherDigest(String, Digest),
    /// It is an ordinary image.
    #[error(
        "it is not a Nydus image, and so of no use in this cache: move ordinary images with `podman save` and `podman load`"
    )]
    NotNydus,
}

impl Images {
    /// Sees to it that all of the image is here, then notes it under these names.
    pub async fn seed(
        &self,
        seed: &Seed,
        names: &[Reference],
        bulk: &Arc<BulkLimits>,
        progress: &Arc<DownloadProgress>,
    ) -> Result<Seeded, SeedError> {
        let (origin, top) = self.origin_of(seed).await?;
        let (digest, bytes) = match Document::parse(&top.bytes, Selection::PreferNydus).map_err(ImageError::from)? {
            Document::Image(_) => (top.digest, top.bytes.clone()),
            Document::Index(Selected { manifest, .. }) => (manifest, origin.manifest(&manifest).await?),
        };
        let manifest = match Document::parse(&bytes, Selection::PreferNydus).map_err(ImageError::from)? {
            Document::Image(manifest) => manifest,
            Document::Index(_) => {
                let reason = "an index lists another index".to_owned();
                return Err(ImageError::from(ManifestError::Malformed { what: "index", reason }).into());
            }
        };
        let bootstrap = manifest.bootstrap.ok_or(SeedError::NotNydus)?;
        if manifest.layers.len() > bootstrap + 1 {
            return Err(ImageError::LayersOnTop.into());
        }
        let other = |name: &&Reference| {
            name.digest()
                .is_some_and(|named| named != top.digest && named != digest)
        };
        if let Some(name) = names.iter().find(other) {
            return Err(SeedError::OtherDigest(name.to_string(), digest));
        }
        self.keep(&top.digest, top.bytes).await?;
        self.keep(&digest, bytes).await?;
        self.have(&origin, &manifest.config, MAX_CONFIG).await?;
        let layer = &manifest.layers[bootstrap];
        self.have(&origin, &layer.digest, layer.size.min(self.limits.max_bootstrap_size))
            .await?;
        let bytes = self.have_chunks(&origin, names, digest, bulk, progress).await?;
        self.note(names, digest, top.digest).await?;
        Ok(Seeded {
            names: names.iter().map(ToString::to_string).collect(),
            manifest: digest,
            bytes,
            fetched: progress.fetched.load(Ordering::Relaxed),
        })
    }

    async fn origin_of(&self, seed: &Seed) -> Result<(Origin, Top), ImageError> {
        match seed {
            Seed::Registry(reference) => {
                let repository = reference.repository();
                let top = self.client.manifest(&repository, reference.selector()).await?;
                let source = RegistrySource::new(self.client.clone(), repository);
                Ok((Origin::Registry(source), top.into()))
            }
            Seed::Layout(layout, digest) => {
                let origin = Origin::Layout(Arc::clone(layout));
                let bytes = origin.manifest(digest).await?;
                Ok((origin, Top { digest: *digest, bytes }))
            }
        }
    }

    /// Sees to it that a small blob is on disk.
    async fn have(&self, origin: &Origin, digest: &Digest, limit: u64) -> Result<(), ImageError> {
        if self.state(digest).await? == State::Good {
            return Ok(());
        }
        let bytes = origin.blob(digest, limit).await?;
        self.keep(digest, bytes).await
    }

    async fn state(&self, digest: &Digest) -> Result<State, ImageError> {
        let digest = *digest;
        self.in_library(move |library| library.state(&digest)).await
    }

    /// Sees to it that all chunks are in the cache; gives their length.
    async fn have_chunks(
        &self,
        origin: &Origin,
        names: &[Reference],
        manifest: Digest,
        bulk: &Arc<BulkLimits>,
        progress: &Arc<DownloadProgress>,
    ) -> Result<u64, SeedError> {
        let name = names.first().ok_or(ImageError::Aborted)?;
        self.broken.remove(&manifest);
        let image = self.load(name, manifest, FetchPolicy::Disk).await?;
        let blobs = image.contents.blobs();
        let bytes = blobs.iter().map(|blob| blob.chunk_bytes()).sum();
        progress.total.store(bytes, Ordering::Relaxed);
        for blob in blobs {
            download_all(blob.fetcher(), &|digest| origin.source(digest), bulk, progress).await?;
        }
        Ok(bytes)
    }

    async fn note(&self, names: &[Reference], manifest: Digest, top: Digest) -> Result<(), ImageError> {
        for name in names {
            self.remember(name, Named { manifest, top }).await?;
            self.reconsider(name);
        }
        Ok(())
    }
}
