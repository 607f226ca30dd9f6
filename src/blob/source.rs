//! Where the stored bytes of a blob come from.

use std::{any::Any, error::Error, fmt, pin::Pin, sync::Arc};

use bytes::Bytes;
use tokio::sync::mpsc;

/// Why a source could not give the bytes. Shared by all who wait for them.
#[derive(Debug, Clone)]
pub struct SourceError {
    cause: Arc<dyn Error + Send + Sync>,
    of_all: bool,
}

/// What a source's answer is awaited as.
pub type Pending<T = SourcedBytes> = Pin<Box<dyn Future<Output = Result<T, SourceError>> + Send>>;

/// Bytes that are not trusted yet.
#[derive(Debug, Clone)]
pub struct SourcedBytes {
    /// The bytes.
    pub bytes: Bytes,
    /// Who is to be blamed if they are wrong.
    pub origin: Provenance,
}

/// Which of a source's places has given something. Only the source knows what that is; one that has a single place tells nothing.
#[derive(Debug, Clone, Default)]
pub struct Provenance(Option<Arc<dyn Any + Send + Sync>>);

/// Gives ranges of one blob's stored bytes: a registry, or a file.
pub trait Source: Send + Sync {
    /// Exactly `len` bytes from `offset` on, or an error, in bounded time. The bytes are not trusted.
    fn read(&self, offset: u64, len: usize) -> Pending;

    /// The same bytes, given to `parts` as they come, all from one origin. After an error, those given are right but not all.
    /// If nobody waits for any of them yet (`is_ahead`), it leaves places to what is waited for. Whoever receives them decides
    /// how fast that goes, and keeps a place from others meanwhile: so he waits for no other request. When nobody receives any
    /// more, it ends.
    fn read_parts(&self, offset: u64, len: usize, _is_ahead: bool, parts: mpsc::Sender<SourcedBytes>) -> Pending<()> {
        let whole = self.read(offset, len);
        Box::pin(async move {
            // That nobody wants them is no error.
            parts.send(whole.await?).await.ok();
            Ok(())
        })
    }

    /// Whether it comes to a range without all that lies before it, as far as is known. Where it does not, nothing is fetched on a
    /// guess.
    fn can_seek(&self) -> bool {
        true
    }

    /// Tells that bytes of that origin were not what they should be: the next ones come from elsewhere, if there is another
    /// place.
    fn distrust(&self, _origin: &Provenance) {}
}

impl SourceError {
    /// Another range, or a part of this one, may well be had.
    pub fn of_range(cause: impl Error + Send + Sync + 'static) -> Self {
        let (cause, of_all) = (Arc::new(cause), false);
        Self { cause, of_all }
    }

    /// It says nothing about the range: at present, no other one is to be had either.
    pub fn of_all(cause: impl Error + Send + Sync + 'static) -> Self {
        let (cause, of_all) = (Arc::new(cause), true);
        Self { cause, of_all }
    }

    /// Whether no other range is to be had either.
    pub fn is_of_all(&self) -> bool {
        self.of_all
    }
}

// Whoever shows it sees the cause.
impl fmt::Display for SourceError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.cause.fmt(f)
    }
}

impl Error for SourceError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.cause.source()
    }
}

impl Provenance {
    /// Stands for a place, in the source's own terms.
    pub fn new(place: impl Any + Send + Sync) -> Self {
        Self(Some(Arc::new(place)))
    }

    /// The place, for who has made it.
    pub fn place<T: Any>(&self) -> Option<&T> {
        self.0.as_deref()?.downcast_ref()
    }
}

impl From<Bytes> for SourcedBytes {
    fn from(bytes: Bytes) -> Self {
        let origin = Provenance::default();
        Self { bytes, origin }
    }
}
