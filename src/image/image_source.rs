//! Source of a whole image: a repository of a registry, or an OCI layout in files.

use std::sync::Arc;

use bytes::Bytes;

use super::{error::ImageError, loaded::RegistrySource, oci_layout::OciLayout};
use crate::{
    blob::source::{Source, SourceError},
    digest::Digest,
    registry,
};

/// Largest manifest in a layout, in bytes; the registry client has the same limit.
const MAX_MANIFEST_BYTES: u64 = 4 << 20;

/// Where the content of an image is read from.
pub(super) enum ImageSource {
    Registry(RegistrySource),
    Layout(Arc<OciLayout>),
}

impl ImageSource {
    /// The manifest or index with this digest.
    pub(super) async fn manifest(&self, digest: &Digest) -> Result<Bytes, ImageError> {
        match self {
            Self::Registry(source) => {
                let given = source.client.manifest(&source.repository, &digest.to_string()).await?;
                Ok(given.bytes)
            }
            Self::Layout(layout) => read(layout, digest, MAX_MANIFEST_BYTES).await,
        }
    }

    /// A whole blob of at most `limit` bytes.
    pub(super) async fn blob(&self, digest: &Digest, limit: u64) -> Result<Bytes, ImageError> {
        match self {
            Self::Registry(source) => {
                let fetched = source.client.blob(&source.repository, digest, limit).await;
                fetched.map_err(|error| match error.is_not_found() {
                    true => ImageError::Incomplete(error),
                    false => error.into(),
                })
            }
            Self::Layout(layout) => read(layout, digest, limit).await,
        }
    }

    /// Opens a blob for reading.
    pub(super) fn source(&self, digest: Digest) -> Arc<dyn Source> {
        match self {
            Self::Registry(source) => Arc::new(source.blob(digest)),
            Self::Layout(layout) => match layout.blob(&digest) {
                Ok(part) => Arc::new(part),
                Err(error) => Arc::new(UnreadableBlob(SourceError::blob_unavailable(error))),
            },
        }
    }
}

async fn read(layout: &Arc<OciLayout>, digest: &Digest, limit: u64) -> Result<Bytes, ImageError> {
    let (layout, digest) = (Arc::clone(layout), *digest);
    let read = tokio::task::spawn_blocking(move || layout.read(&digest, limit)).await;
    read.map_err(|_| ImageError::Aborted)?
        .map_err(|error| ImageError::Layout(Arc::new(error)))
}

/// A blob that cannot be opened.
struct UnreadableBlob(SourceError);

impl Source for UnreadableBlob {
    fn read(&self, _: u64, _: usize) -> crate::blob::source::Pending {
        Box::pin(std::future::ready(Err(self.0.clone())))
    }
}

/// The document that a name refers to: a manifest or an index.
pub(super) struct TopDocument {
    pub(super) digest: Digest,
    pub(super) bytes: Bytes,
}

impl From<registry::Manifest> for TopDocument {
    fn from(given: registry::Manifest) -> Self {
        Self {
            digest: given.digest,
            bytes: given.bytes,
        }
    }
}
