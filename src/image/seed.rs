//! Fetches all of an image, so that no registry is needed to read it.
//!
//! A name is recorded only after all content is on disk. An interrupted attempt leaves only chunks, which the next
//! attempt need not fetch.

use std::sync::{Arc, atomic::Ordering};

use serde::{Deserialize, Serialize};

use super::{
    error::ImageError,
    image_source::{ImageSource, TopDocument},
    index::Selected,
    kept::KeptImage,
    loaded::RegistrySource,
    loader::{FetchPolicy, MAX_CONFIG_BYTES},
    manifest::{Document, ManifestError, Selection},
    metadata_store::{ContentState, NamedManifest},
    oci_layout::OciLayout,
    reference::Reference,
    resolve::Images,
};
use crate::{
    blob::{
        bulk::{self, BulkLimits, DownloadProgress},
        cache::Hold,
        download_all::download_all,
        error::ReadError,
    },
    digest::Digest,
};

/// What an image is seeded from.
#[derive(Clone)]
pub enum Seed {
    /// The image that the reference names in its registry.
    Registry(Reference),
    /// The manifest or index with this digest in a layout.
    Layout(Arc<OciLayout>, Digest),
}

/// An image that is completely on disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seeded {
    /// The recorded names.
    pub names: Vec<String>,
    /// Digest of the manifest.
    pub manifest: Digest,
    /// Total length of the chunks, in uncompressed bytes.
    pub bytes: u64,
    /// Stored bytes that had to be fetched.
    pub fetched: u64,
}

/// Why an image cannot be seeded.
#[derive(Debug, thiserror::Error)]
pub enum SeedError {
    /// The image cannot be resolved or loaded.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// A chunk cannot be fetched or stored.
    #[error(transparent)]
    Chunk(#[from] ReadError),
    /// The digest in a name differs from that of the image.
    #[error("cannot record the image as {0}: its digest is {1}")]
    OtherDigest(String, Digest),
    /// The image is an ordinary one.
    #[error("not a Nydus image; use `podman save` and `podman load` for ordinary images")]
    NotNydus,
}

impl Images {
    /// Fetches all missing content of the image, then records it under these names. The image stays
    /// complete as long as the returned [`KeptImage`] exists; the caller pins it meanwhile.
    pub async fn seed(
        &self,
        seed: &Seed,
        names: &[Reference],
        bulk: &Arc<BulkLimits>,
        progress: &Arc<DownloadProgress>,
    ) -> Result<(Seeded, KeptImage), SeedError> {
        let (source, top) = self.open_source(seed).await?;
        let (digest, bytes) = match Document::parse(&top.bytes, Selection::PreferNydus).map_err(ImageError::from)? {
            Document::Image(_) => (top.digest, top.bytes.clone()),
            Document::Index(Selected { manifest, .. }) => (manifest, source.manifest(&manifest).await?),
        };
        let manifest = match Document::parse(&bytes, Selection::PreferNydus).map_err(ImageError::from)? {
            Document::Image(manifest) => manifest,
            Document::Index(_) => return Err(ImageError::from(ManifestError::nested_index()).into()),
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
        let mut kept = self.kept.keep(digest);
        self.metadata.put(&top.digest, top.bytes).await?;
        self.metadata.put(&digest, bytes).await?;
        self.ensure_blob(&source, &manifest.config, MAX_CONFIG_BYTES).await?;
        let layer = &manifest.layers[bootstrap];
        self.ensure_blob(&source, &layer.digest, layer.size.min(self.loader.max_bootstrap_size()))
            .await?;
        let (bytes, holds) = self.ensure_chunks(&source, names, digest, bulk, progress).await?;
        kept.holds = holds;
        self.record_names(names, digest, top.digest).await?;
        let seeded = Seeded {
            names: names.iter().map(ToString::to_string).collect(),
            manifest: digest,
            bytes,
            fetched: progress.fetched.load(Ordering::Relaxed),
        };
        Ok((seeded, kept))
    }

    async fn open_source(&self, seed: &Seed) -> Result<(ImageSource, TopDocument), ImageError> {
        match seed {
            Seed::Registry(reference) => {
                let repository = reference.repository();
                let top = self.client.manifest(&repository, reference.selector()).await?;
                let source = RegistrySource::new(self.client.clone(), repository);
                Ok((ImageSource::Registry(source), top.into()))
            }
            Seed::Layout(layout, digest) => {
                let source = ImageSource::Layout(Arc::clone(layout));
                let bytes = source.manifest(digest).await?;
                Ok((source, TopDocument { digest: *digest, bytes }))
            }
        }
    }

    /// Fetches and stores a small blob, unless it is on disk.
    async fn ensure_blob(&self, source: &ImageSource, digest: &Digest, limit: u64) -> Result<(), ImageError> {
        if self.metadata.state(digest).await? == ContentState::Intact {
            return Ok(());
        }
        let bytes = source.blob(digest, limit).await?;
        self.metadata.put(digest, bytes).await
    }

    /// Fetches all missing chunks, and holds them. Returns the total length of all chunks.
    async fn ensure_chunks(
        &self,
        source: &ImageSource,
        names: &[Reference],
        manifest: Digest,
        limits: &Arc<BulkLimits>,
        progress: &Arc<DownloadProgress>,
    ) -> Result<(u64, Vec<Hold>), SeedError> {
        let name = names.first().ok_or(ImageError::Aborted)?;
        self.loader.forget_failure(&manifest);
        let image = self.loader.load(name, manifest, FetchPolicy::Disk).await?;
        let blobs = image.contents.blobs();
        let bytes = blobs.iter().map(|blob| blob.chunk_bytes()).sum();
        progress.total.store(bytes, Ordering::Relaxed);
        let mut holds = Vec::with_capacity(blobs.len());
        for blob in blobs {
            holds.push(bulk::hold(blob.fetcher()).await?);
            download_all(blob.fetcher(), &|digest| source.source(digest), limits, progress).await?;
        }
        Ok((bytes, holds))
    }

    async fn record_names(&self, names: &[Reference], manifest: Digest, top: Digest) -> Result<(), ImageError> {
        for name in names {
            self.metadata.record(name, NamedManifest { manifest, top }).await?;
            self.forget_failure(name);
        }
        Ok(())
    }
}
