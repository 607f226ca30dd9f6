//! Why an image cannot be served.

use std::{io, sync::Arc};

use super::{bootstrap::UnpackError, manifest::ManifestError, oci_layout::LayoutError, reference::InvalidReference};
use crate::{digest::Digest, rafs, registry};

/// Why an image cannot be served. Cloned to all who waited for it.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ImageError {
    /// The reference is not one.
    #[error(transparent)]
    Reference(#[from] InvalidReference),
    /// The registry did not give a manifest, a configuration or a bootstrap.
    #[error(transparent)]
    Registry(#[from] registry::Error),
    /// The registry has a Nydus image's manifest, but not all that it names.
    #[error("the image is incomplete: {0}")]
    Incomplete(#[source] registry::Error),
    /// An OCI layout in files did not give it.
    #[error(transparent)]
    Layout(#[from] Arc<LayoutError>),
    /// It is an ordinary image: Podman pulls it the ordinary way.
    #[error("it is not a Nydus image: no layer is marked as its bootstrap")]
    NotNydus,
    /// Its data is in ordinary layers, which cannot be published for a pull: images that share them would find them empty.
    #[error(
        "its data is in ordinary layers, which a pull takes whole; `nydus-store pull` makes it known by name instead"
    )]
    OriginalLayers,
    /// It has ordinary layers on top, as `podman build` puts them there, which only a pull can unpack.
    #[error("it has ordinary layers on top, which only a pull unpacks: use `podman pull`")]
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
    /// A file of the root cannot be read or written.
    #[error("{what}: {source}")]
    Io {
        /// What was done to which file.
        what: String,
        /// The cause.
        source: Arc<io::Error>,
    },
    /// Something is not on disk, and the registry was not to be asked.
    #[error("{0} is not on this host")]
    NotHere(Digest),
    /// No answer in the time allowed for a look-up.
    #[error("no answer within {0} seconds")]
    TimedOut(u64),
    /// The work was given up: the program is stopping, or has a fault.
    #[error("loading was given up")]
    Aborted,
}

impl ImageError {
    pub(super) fn io(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        |source| Self::Io {
            what: what.into(),
            source: Arc::new(source),
        }
    }

    /// Whether the registry gave no answer, or none that tells anything of the image.
    pub fn is_unreachable(&self) -> bool {
        match self {
            Self::Registry(error) => error.is_unreachable(),
            Self::TimedOut(_) => true,
            _ => false,
        }
    }

    /// Whether this is nothing to report: the image is an ordinary one, or there is none.
    pub fn is_ordinary(&self) -> bool {
        match self {
            Self::NotNydus | Self::OriginalLayers => true,
            Self::Registry(error) => error.is_not_found(),
            _ => false,
        }
    }
}
