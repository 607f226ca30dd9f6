//! Why a chunk cannot be read.

use std::{io, sync::Arc};

use super::{codec::DecompressError, meta::MetaError, source::SourceError};

/// A chunk could not be read. Cloned to all callers that wait for the chunk.
#[derive(Debug, Clone, thiserror::Error)]
#[error("failed to read chunk {chunk} of blob {blob}: {cause}")]
pub struct ReadError {
    /// The blob's id.
    pub blob: String,
    /// Index of the chunk in the blob.
    pub chunk: u32,
    /// What went wrong.
    #[source]
    pub cause: ReadCause,
}

/// The cause of a [`ReadError`].
#[derive(Debug, Clone, thiserror::Error)]
pub enum ReadCause {
    /// The source did not deliver the bytes.
    #[error("fetch failed: {0}")]
    Fetch(#[source] SourceError),
    /// The fetched bytes do not hash to the digest in the image.
    #[error("digest mismatch: the blob was altered at its source or on the way")]
    Digest,
    /// The fetched bytes do not decompress.
    #[error("fetched bytes are corrupt: {0}")]
    Decompress(#[from] DecompressError),
    /// The fetched part of a gzip stream cannot be inflated.
    #[error("fetched bytes are corrupt: {0}")]
    Inflate(String),
    /// The blob meta is malformed, so that the chunk cannot be located.
    #[error(transparent)]
    Meta(#[from] MetaError),
    /// The cache file cannot be read.
    #[error("failed to read the blob cache: {0}")]
    CacheRead(#[source] Arc<io::Error>),
    /// The cache file cannot be written to.
    #[error("failed to write to the blob cache: {0}")]
    CacheWrite(#[source] Arc<io::Error>),
    /// The fetch took longer than so many seconds, including the wait for permits and memory.
    #[error("timed out after {0} seconds")]
    TimedOut(u64),
    /// The chunks that the image lists for the file end before the range that is read.
    #[error("the image lists too few chunks for the file")]
    Uncovered,
    /// The task ended without an outcome: the program is stopping, or the task panicked.
    #[error("the read was aborted")]
    Aborted,
}

impl ReadCause {
    /// Whether the fetched bytes were wrong. The same request may deliver the right ones, from another endpoint.
    pub(super) fn is_corruption(&self) -> bool {
        matches!(self, Self::Digest | Self::Decompress(_) | Self::Inflate(_))
    }

    /// Whether no other range of the blob can be fetched at present either.
    pub(super) fn is_blob_unavailable(&self) -> bool {
        matches!(self, Self::Fetch(SourceError::BlobUnavailable(_)))
    }

    /// Whether a wrong blob meta may be the reason: it may locate the chunk in other bytes, or outside of the blob.
    pub(super) fn may_be_wrong_meta(&self) -> bool {
        self.is_corruption() || matches!(self, Self::Meta(_) | Self::Fetch(SourceError::RangeFailed(_)))
    }
}
