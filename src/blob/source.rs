//! Where the stored bytes of a blob come from.

use std::{error::Error, pin::Pin, sync::Arc};

use bytes::Bytes;
use tokio::sync::mpsc;

/// Why a source could not give the bytes. Shared by all who wait for them.
pub type SourceError = Arc<dyn Error + Send + Sync>;

/// What a source's answer is awaited as.
pub type Pending<T = Bytes> = Pin<Box<dyn Future<Output = Result<T, SourceError>> + Send>>;

/// Gives ranges of one blob's stored bytes: a registry, or a file.
pub trait Source: Send + Sync {
    /// Exactly `len` bytes from `offset` on, or an error, in bounded time. The bytes are not trusted.
    fn read(&self, offset: u64, len: usize) -> Pending;

    /// The same bytes, given to `parts` as they come. After an error, those given are right but not all. Whoever
    /// receives them decides how fast that goes; when nobody does any more, it ends.
    fn read_parts(&self, offset: u64, len: usize, parts: mpsc::Sender<Bytes>) -> Pending<()> {
        let whole = self.read(offset, len);
        Box::pin(async move {
            // That nobody wants them is no error.
            parts.send(whole.await?).await.ok();
            Ok(())
        })
    }

    /// Tells that the last bytes were not what they should be: the next ones come from elsewhere, if there is another place.
    fn distrust(&self) {}
}
