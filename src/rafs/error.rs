//! Errors of loading a bootstrap.

use std::{borrow::Cow, io};

/// Why a bootstrap was rejected.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The file could not be read.
    #[error("cannot read the bootstrap: {0}")]
    Io(#[from] io::Error),
    /// The file is not a RAFS bootstrap.
    #[error("not a RAFS bootstrap: neither a version 5 nor a version 6 superblock")]
    NotRafs,
    /// The superblock or the blob table is inconsistent.
    #[error("invalid RAFS superblock or blob table: {what}")]
    Superblock {
        /// Description of the inconsistency, possibly from nydus-rafs.
        what: String,
    },
    /// A valid image with a feature that is not supported.
    #[error("unsupported image: {what}")]
    Unsupported {
        /// The feature.
        what: String,
    },
    /// A version 6 bootstrap without the table that locates its chunks.
    #[error(
        "unsupported image: the bootstrap has no chunk table, as old builders left it; \
         convert the image again with nydus-image 2.1 or newer"
    )]
    NoChunkTable,
    /// The contents are inconsistent.
    #[error("malformed bootstrap: {location}: {what}")]
    Malformed {
        /// Path of the affected file in the image.
        location: String,
        /// What is wrong with it.
        what: String,
    },
    /// A limit was exceeded.
    #[error("bootstrap too large: {what}")]
    TooLarge {
        /// The limit.
        what: String,
    },
    /// A library panicked. This is a bug to be reported; the image is only rejected.
    #[error("reading the bootstrap failed unexpectedly: {message}")]
    Panicked {
        /// Message of the panic.
        message: String,
    },
}

/// A [`LoadError`] whose location in the image is not known yet.
#[derive(Debug)]
pub(super) enum FormatError {
    Malformed(Cow<'static, str>),
    Unsupported(Cow<'static, str>),
    TooLarge(&'static str),
    NoChunkTable,
}

impl FormatError {
    pub(super) const fn malformed(what: &'static str) -> Self {
        Self::Malformed(Cow::Borrowed(what))
    }

    pub(super) const fn unsupported(what: &'static str) -> Self {
        Self::Unsupported(Cow::Borrowed(what))
    }

    /// Adds the location. `location` is called only if the error has one.
    pub(super) fn at(self, location: impl FnOnce() -> String) -> LoadError {
        match self {
            Self::Malformed(what) => LoadError::Malformed {
                location: location(),
                what: what.into_owned(),
            },
            Self::Unsupported(what) => LoadError::Unsupported {
                what: what.into_owned(),
            },
            Self::TooLarge(what) => LoadError::TooLarge { what: what.to_owned() },
            Self::NoChunkTable => LoadError::NoChunkTable,
        }
    }
}
