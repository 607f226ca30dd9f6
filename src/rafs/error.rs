//! What can be wrong with a bootstrap.

use std::{borrow::Cow, io};

/// Why a bootstrap was refused.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The file could not be read.
    #[error("cannot read the bootstrap: {0}")]
    Io(#[from] io::Error),
    /// The file is no RAFS bootstrap at all.
    #[error("not a RAFS bootstrap: neither a version 5 nor a version 6 superblock")]
    NotRafs,
    /// The superblock or the table of blobs does not hold together.
    #[error("invalid RAFS superblock or blob table: {what}")]
    Superblock {
        /// What was found, in nydus-rafs' or our own words.
        what: String,
    },
    /// A valid image, of a kind that cannot be served.
    #[error("unsupported image: {what}")]
    Unsupported {
        /// The feature in question.
        what: String,
    },
    /// A version 6 bootstrap without the table that says where its chunks are.
    #[error(
        "unsupported image: the bootstrap has no chunk table, as old builders left it; \
         convert the image again with nydus-image 2.1 or newer"
    )]
    NoChunkTable,
    /// The contents contradict themselves.
    #[error("malformed bootstrap: {location}: {what}")]
    Malformed {
        /// Path in the image of what is wrong.
        location: String,
        /// What is wrong with it.
        what: String,
    },
    /// More than is reasonable, of something.
    #[error("bootstrap too large: {what}")]
    TooLarge {
        /// The limit that was exceeded.
        what: String,
    },
    /// A library gave up; a bug, to be reported, with which an image may still be turned away.
    #[error("reading the bootstrap failed unexpectedly: {message}")]
    Panicked {
        /// What the library said.
        message: String,
    },
}

/// A [`LoadError`] of which the place in the image is not known yet.
#[derive(Debug)]
pub(super) enum Fault {
    Malformed(Cow<'static, str>),
    Unsupported(Cow<'static, str>),
    TooLarge(&'static str),
    NoChunkTable,
}

impl Fault {
    pub(super) const fn malformed(what: &'static str) -> Self {
        Self::Malformed(Cow::Borrowed(what))
    }

    pub(super) const fn unsupported(what: &'static str) -> Self {
        Self::Unsupported(Cow::Borrowed(what))
    }

    /// Names the place. `location` is asked only if the error has one.
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
