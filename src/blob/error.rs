//! Why a chunk cannot be read.

use std::{io, sync::Arc};

use super::{codec::DecompressError, meta::MetaError, source::SourceError};

/// A chunk could not be read. Cloned to all who waited for it.
#[derive(Debug, Clone, thiserror::Error)]
#[error("blob {blob}, chunk {chunk}: {cause}")]
pub struct ReadError {
    /// The blob's id.
    pub blob: String,
    /// Number of the chunk in the blob.
    pub chunk: u32,
    /// What went wrong.
    #[source]
    pub cause: ReadCause,
}

/// What can go wrong in reading a chunk.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ReadCause {
    /// The bytes could not be had.
    #[error("cannot fetch it: {0}")]
    Fetch(#[source] SourceError),
    /// The bytes that came do not hash to the digest in the image.
    #[error("what was fetched does not match the chunk's digest: the registry or something before it altered the blob")]
    Digest,
    /// The bytes that came do not decompress.
    #[error("what was fetched is damaged: {0}")]
    Decompress(#[from] DecompressError),
    /// The gzip stream cannot be inflated from the middle.
    #[error("what was fetched is damaged: {0}")]
    Inflate(String),
    /// The blob meta is wrong, so the chunk cannot be found.
    #[error(transparent)]
    Meta(#[from] MetaError),
    /// The cache file cannot be read.
    #[error("cannot read the blob cache: {0}")]
    Cache(#[source] Arc<io::Error>),
    /// The cache file cannot be written to.
    #[error("cannot write to the blob cache: {0}")]
    Keep(#[source] Arc<io::Error>),
    /// It took too long, waiting for its turn included.
    #[error("it was not fetched within {0} seconds")]
    TimedOut(u64),
    /// The image's list of chunks does not reach to the end of what is read.
    #[error("the file's chunks end too early")]
    Uncovered,
    /// The work was given up: the program is stopping, or has a fault.
    #[error("reading was given up")]
    Aborted,
}

impl ReadCause {
    /// Whether the same request may well give other bytes: something on the way altered them.
    pub(super) fn is_damage(&self) -> bool {
        matches!(self, Self::Digest | Self::Decompress(_) | Self::Inflate(_))
    }

    /// Whether nothing else of the blob can be fetched either, at present.
    pub(super) fn is_of_all(&self) -> bool {
        matches!(self, Self::Fetch(error) if error.is_of_all())
    }

    /// Whether a wrong blob meta leads to that: it may point at other bytes, or at none.
    pub(super) fn may_be_misled(&self) -> bool {
        self.is_damage() || matches!(self, Self::Meta(_) | Self::Fetch(_)) && !self.is_of_all()
    }
}
