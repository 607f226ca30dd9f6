//! Errors of resolving and loading images.

use std::{io, sync::Arc};

use super::{bootstrap::UnpackError, manifest::ManifestError, oci_layout::LayoutError, reference::InvalidReference};
use crate::{digest::Digest, rafs, registry};

/// Why an image cannot be served. Cloneable, because all waiters share it.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ImageError {
    /// The text is not a reference.
    #[error(transparent)]
    Reference(#[from] InvalidReference),
    /// The registry did not return a manifest, a configuration or a bootstrap.
    #[error(transparent)]
    Registry(#[from] registry::Error),
    /// The registry has the manifest of a Nydus image, but lacks content that it names.
    #[error("the image is incomplete: {0}")]
    Incomplete(#[source] registry::Error),
    /// An OCI layout did not contain the image.
    #[error(transparent)]
    Layout(#[from] Arc<LayoutError>),
    /// The image is an ordinary one, which Podman pulls without this program.
    #[error("not a Nydus image: no layer is marked as its bootstrap")]
    NotNydus,
    /// The image's data is in ordinary layers. These cannot be published for a pull: other images that share them would
    /// find them empty.
    #[error("the image's data is in ordinary layers, which a pull downloads; use `nydus-store pull` instead")]
    OriginalLayers,
    /// The image has ordinary layers on top, such as those of `podman build`. Only a pull can unpack them.
    #[error("the image has ordinary layers on top, which only a pull can unpack; use `podman pull`")]
    LayersOnTop,
    /// The manifest, index or configuration is malformed.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    /// The bootstrap layer is malformed.
    #[error("bootstrap layer: {0}")]
    Unpack(#[from] Arc<UnpackError>),
    /// The bootstrap is malformed or of an unsupported kind.
    #[error("bootstrap: {0}")]
    Rafs(#[from] Arc<rafs::LoadError>),
    /// A file below the root cannot be read or written.
    #[error("{what}: {source}")]
    Io {
        /// The operation and its object.
        what: String,
        /// The cause.
        source: Arc<io::Error>,
    },
    /// Content is not on disk, and the registry must not be queried.
    #[error("{0} is not on this host")]
    NotHere(Digest),
    /// The time limit of a look-up has passed.
    #[error("timed out after {0} seconds")]
    TimedOut(u64),
    /// Loading was abandoned: the program is stopping, or a thread panicked.
    #[error("loading was abandoned")]
    Aborted,
}

impl ImageError {
    pub(super) fn io(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        |source| Self::Io {
            what: what.into(),
            source: Arc::new(source),
        }
    }

    /// Whether the registry did not answer, or its answer tells nothing about the image.
    pub fn is_unreachable(&self) -> bool {
        match self {
            Self::Registry(error) => error.is_unreachable(),
            Self::TimedOut(_) => true,
            _ => false,
        }
    }

    /// Whether the registry is away at present, and may be back soon.
    pub fn is_away(&self) -> bool {
        matches!(self, Self::Registry(error) | Self::Incomplete(error) if error.is_away())
    }

    /// Whether this is expected and not worth a warning: the image is an ordinary one or does not exist.
    pub fn is_ordinary(&self) -> bool {
        match self {
            Self::NotNydus | Self::OriginalLayers => true,
            Self::Registry(error) => error.is_not_found(),
            _ => false,
        }
    }
}
