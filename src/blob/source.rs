//! Where the stored bytes of a blob come from.

use std::{any::Any, error::Error, fmt, pin::Pin, sync::Arc, time::Instant};

use bytes::Bytes;
use tokio::sync::mpsc;

/// Why a source did not deliver a range. Cloned to all callers that wait for it.
#[derive(Debug, Clone)]
pub enum SourceError {
    /// Another range of the blob, or a part of this one, may still be available.
    RangeFailed(Arc<dyn Error + Send + Sync>),
    /// No range of the blob is available at present: it is missing, access is denied, or the host does not answer.
    BlobUnavailable(Arc<dyn Error + Send + Sync>),
    /// The host is away, and may be back soon: [`Source::wait_for_host`] waits for it.
    HostAway(Arc<dyn Error + Send + Sync>),
}

/// How long a reader has waited for a host that is away.
#[derive(Debug, Clone, Copy)]
pub struct HostWait {
    /// When the reader began.
    pub since: Instant,
    /// Number of waits before.
    pub count: u32,
}

/// The pending answer of a source.
pub type Pending<T = SourcedBytes> = Pin<Box<dyn Future<Output = Result<T, SourceError>> + Send>>;

/// Bytes from a source, not verified yet.
#[derive(Debug, Clone)]
pub struct SourcedBytes {
    /// The bytes.
    pub bytes: Bytes,
    /// Which endpoint served them.
    pub provenance: Provenance,
}

/// Which endpoint of a source served some bytes, in terms of the source. Empty for a source with a single endpoint.
#[derive(Debug, Clone, Default)]
pub struct Provenance(Option<Arc<dyn Any + Send + Sync>>);

/// Delivers ranges of one blob's stored bytes, from a registry or a file.
pub trait Source: Send + Sync {
    /// Exactly `len` bytes from `offset` on, or an error, in bounded time. The bytes are not trusted. Does not wait for
    /// a host that is away.
    fn read(&self, offset: u64, len: usize) -> Pending;

    /// Waits until it makes sense to read again, after `failure`, which is [`SourceError::HostAway`]. The caller holds
    /// no permit.
    ///
    /// # Errors
    /// The final error, if the reader has waited for too long, or the host has been away for too long.
    fn wait_for_host(&self, failure: SourceError, _wait: HostWait) -> Pending<()> {
        Box::pin(std::future::ready(Err(failure.into_final())))
    }

    /// Sends the same bytes to `parts` as they come, all from one endpoint. Ends when the receiver is dropped. After an
    /// error, the bytes that were sent are valid but not complete.
    ///
    /// With `_is_ahead`, no reader waits for the bytes yet, and some request slots stay free for readers. A request
    /// keeps its slot until it ends, and the receiver sets its pace. So the receiver must not wait for another request
    /// meanwhile: that could deadlock.
    fn read_parts(&self, offset: u64, len: usize, _is_ahead: bool, parts: mpsc::Sender<SourcedBytes>) -> Pending<()> {
        let whole = self.read(offset, len);
        Box::pin(async move {
            // A dropped receiver is no error.
            parts.send(whole.await?).await.ok();
            Ok(())
        })
    }

    /// Whether the source can deliver a range without all bytes before it, as far as is known. Requests to a source
    /// that cannot are not coalesced.
    fn can_seek(&self) -> bool {
        true
    }

    /// Reports that bytes of that provenance were corrupt, so that further requests use another endpoint if there is
    /// one.
    fn report_corrupt(&self, _provenance: &Provenance) {}
}

impl SourceError {
    /// A [`SourceError::RangeFailed`].
    pub fn range_failed(cause: impl Error + Send + Sync + 'static) -> Self {
        Self::RangeFailed(Arc::new(cause))
    }

    /// A [`SourceError::BlobUnavailable`].
    pub fn blob_unavailable(cause: impl Error + Send + Sync + 'static) -> Self {
        Self::BlobUnavailable(Arc::new(cause))
    }

    /// The error of a reader that does not wait for the host.
    pub fn into_final(self) -> Self {
        match self {
            Self::HostAway(cause) => Self::BlobUnavailable(cause),
            other => other,
        }
    }

    fn cause(&self) -> &(dyn Error + Send + Sync + 'static) {
        match self {
            Self::RangeFailed(cause) | Self::BlobUnavailable(cause) | Self::HostAway(cause) => cause.as_ref(),
        }
    }
}

// Transparent: displays and chains as its cause.
impl fmt::Display for SourceError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self.cause(), f)
    }
}

impl Error for SourceError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.cause().source()
    }
}

/// Reads from `source`, and waits for its host if that is away. What `reserve` returns, such as permits that other
/// readers need too, is held during each request, but not while this waits.
pub(super) async fn read_patiently<P, F: Future<Output = P>>(
    source: &dyn Source,
    (offset, len): (u64, usize),
    reserve: impl Fn() -> F,
) -> Result<(SourcedBytes, P), SourceError> {
    let mut wait = HostWait {
        since: Instant::now(),
        count: 0,
    };
    loop {
        let reserved = reserve().await;
        match source.read(offset, len).await {
            Err(failure @ SourceError::HostAway(_)) => {
                drop(reserved);
                source.wait_for_host(failure, wait).await?;
                wait.count += 1;
            }
            read => return read.map(|bytes| (bytes, reserved)),
        }
    }
}

impl Provenance {
    /// Names `endpoint`, in terms of the source.
    pub fn new(endpoint: impl Any + Send + Sync) -> Self {
        Self(Some(Arc::new(endpoint)))
    }

    /// The endpoint, for the source that named it.
    pub fn endpoint<T: Any>(&self) -> Option<&T> {
        self.0.as_deref()?.downcast_ref()
    }
}

impl From<Bytes> for SourcedBytes {
    fn from(bytes: Bytes) -> Self {
        let provenance = Provenance::default();
        Self { bytes, provenance }
    }
}
