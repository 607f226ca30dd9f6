//! Where the stored bytes of a blob come from.

use std::{error::Error, pin::Pin, sync::Arc};

use bytes::Bytes;

/// Why a source could not give the bytes. Shared by all who wait for them.
pub type SourceError = Arc<dyn Error + Send + Sync>;

/// What a source's answer is awaited as.
pub type Pending = Pin<Box<dyn Future<Output = Result<Bytes, SourceError>> + Send>>;

/// Gives ranges of one blob's stored bytes: a registry, or a file.
pub trait Source: Send + Sync {
    /// Exactly `len` bytes from `offset` on, or an error, in bounded time. The bytes are not trusted.
    fn read(&self, offset: u64, len: usize) -> Pending;

    /// Tells that the last bytes were not what they should be: the next ones come from elsewhere, if there is another place.
    fn distrust(&self) {}
}
