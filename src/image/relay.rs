//! What the mirror needs of images: manifests by tag and by digest, and the small blobs that are on disk.

use std::sync::Arc;

use bytes::Bytes;

use super::{
    error::ImageError,
    manifest::{Document, Manifest, Selection, media_type},
    oci_layout::FilePart,
    reference::Reference,
    resolve::Images,
};
use crate::{
    digest::Digest,
    registry::{self, Client, Repository},
};

/// What a tag names.
pub enum Tagged {
    /// A Nydus image for this machine.
    Nydus {
        /// Its manifest.
        manifest: Manifest,
        /// The manifest's bytes.
        bytes: Bytes,
        /// The manifest's media type.
        media_type: String,
        /// The index that the tag names, if it is one and the registry could be asked.
        index: Option<registry::Manifest>,
    },
    /// Anything else, as the registry gave it.
    Other(registry::Manifest),
}

impl Images {
    /// The registry client.
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// What the reference names now, or what it named last if its registry cannot be reached.
    pub async fn tagged(&self, reference: &Reference) -> Result<Tagged, ImageError> {
        let limit = self.limits.resolve_timeout;
        let asked = tokio::time::timeout(limit, self.ask_tagged(reference)).await;
        let error = match asked.unwrap_or(Err(ImageError::TimedOut(limit.as_secs()))) {
            Err(error) if error.is_unreachable() => error,
            answered => return answered,
        };
        let (library, of) = (Arc::clone(&self.library), reference.clone());
        let known = tokio::task::spawn_blocking(move || {
            let named = library.named(&of).first().copied()?;
            nydus(library.get(&named.manifest)?, None, None)
        });
        let known = known.await.ok().flatten().ok_or_else(|| error.clone())?;
        tracing::warn!(
            %reference,
            "the registry cannot be reached, so the mirror gives the last known manifest: {}",
            crate::report::Report(&error)
        );
        Ok(known)
    }

    async fn ask_tagged(&self, reference: &Reference) -> Result<Tagged, ImageError> {
        let _turn = self.turns.take(reference).await;
        let (repository, selector) = (reference.repository(), reference.selector());
        let top = self.client.manifest(&repository, selector).await?;
        match self.settle(reference, &top).await {
            Ok((named, _)) if named.manifest == top.digest => {
                let said = Some(top.media_type.clone());
                Ok(nydus(top.bytes.clone(), said, None).unwrap_or(Tagged::Other(top)))
            }
            Ok((named, _)) => {
                let bytes = self.kept(&named.manifest).await;
                let bytes = bytes.ok_or(ImageError::NotHere(named.manifest))?;
                Ok(nydus(bytes, None, Some(top.clone())).unwrap_or(Tagged::Other(top)))
            }
            // The rest is Podman's business: it may know better what to make of it.
            Err(ImageError::NotNydus | ImageError::Manifest(_)) => Ok(Tagged::Other(top)),
            Err(ImageError::Registry(error)) if error.is_not_found() => Ok(Tagged::Other(top)),
            Err(error) => Err(error),
        }
    }

    /// Keeps a manifest or index that the mirror has made. No registry has it, and Podman may ask for it again by its digest: the
    /// mirror for the manifest, and the store for a layer.
    pub async fn keep_made(&self, digest: &Digest, bytes: &Bytes) {
        if let Err(error) = self.keep(digest, bytes.clone()).await {
            tracing::warn!("{}", crate::report::Report(&error));
        }
    }

    /// The manifest or index of that digest.
    pub async fn by_digest(&self, repository: &Repository, digest: &Digest) -> Result<registry::Manifest, ImageError> {
        if let Some(bytes) = self.kept(digest).await
            && Document::parse(&bytes, Selection::PreferNydus).is_ok()
        {
            return Ok(registry::Manifest {
                media_type: media_type(&bytes),
                bytes,
                digest: *digest,
            });
        }
        Ok(self.client.manifest(repository, &digest.to_string()).await?)
    }

    /// A manifest, configuration or layer that is on disk.
    pub async fn kept_blob(&self, digest: &Digest) -> Option<Kept> {
        let (library, of) = (Arc::clone(&self.library), *digest);
        let part = tokio::task::spawn_blocking(move || library.part(&of).ok())
            .await
            .ok()??;
        if part.len() <= SMALL {
            return self.kept(digest).await.map(Kept::Bytes);
        }
        Some(Kept::File(part))
    }

    /// Removes what [`Kept::File`] has given and is not what it should be.
    pub async fn forget_damaged(&self, digest: &Digest) {
        if let Err(error) = self.removed_damaged(digest).await {
            tracing::warn!("{}", crate::report::Report(&error));
        }
    }
}

/// Something that is on disk.
pub enum Kept {
    /// In memory, and verified.
    Bytes(Bytes),
    /// Too long for that: an ordinary layer, which whoever reads it whole verifies.
    File(FilePart),
}

/// Bytes of what is read into memory and verified.
const SMALL: u64 = 8 << 20;

/// `None` unless it is the manifest of a Nydus image.
fn nydus(bytes: Bytes, said: Option<String>, index: Option<registry::Manifest>) -> Option<Tagged> {
    match Document::parse(&bytes, Selection::PreferNydus) {
        Ok(Document::Image(manifest)) if manifest.bootstrap.is_some() => Some(Tagged::Nydus {
            manifest,
            media_type: said.unwrap_or_else(|| media_type(&bytes)),
            bytes,
            index,
        }),
        _ => None,
    }
}
