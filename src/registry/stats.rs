//! Counters of a client.

use std::sync::atomic::{AtomicU64, Ordering};

/// Totals since the client was made.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Stats {
    /// HTTP requests sent, with retries, redirects and token requests.
    pub requests: u64,
    /// Bytes of bodies received.
    pub bytes_received: u64,
}

#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) requests: AtomicU64,
    pub(super) bytes_received: AtomicU64,
}

impl Counters {
    pub(super) fn stats(&self) -> Stats {
        Stats {
            requests: self.requests.load(Ordering::Relaxed),
            bytes_received: self.bytes_received.load(Ordering::Relaxed),
        }
    }
}
