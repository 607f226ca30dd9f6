//! Counters of the blob cache: what readers found in it, and what went wrong with it.

use std::{
    io,
    sync::atomic::{AtomicU64, Ordering},
    time::Instant,
};

use parking_lot::Mutex;

/// Counters that all blobs of a cache share.
#[derive(Debug, Default)]
pub struct CacheCounters {
    hits: ReadCounters,
    misses: ReadCounters,
    corrupt_chunks: AtomicU64,
    failed_writes: AtomicU64,
    evicted_bytes: AtomicU64,
    last_failed_write: Mutex<Option<FailedWrite>>,
}

#[derive(Debug, Default)]
struct ReadCounters {
    chunks: AtomicU64,
    bytes: AtomicU64,
}

/// What readers asked for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ReadTotals {
    /// Parts of chunks that were read.
    pub chunks: u64,
    /// Uncompressed bytes of these parts.
    pub bytes: u64,
}

/// Totals since the cache was opened.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CacheStats {
    /// Reads that the cache answered.
    pub hits: ReadTotals,
    /// Reads that waited for a source, such as a registry.
    pub misses: ReadTotals,
    /// Cached chunks that did not match their digests.
    pub corrupt_chunks: u64,
    /// Chunks that could not be written.
    pub failed_writes: u64,
    /// Disk space that was freed to keep the limit, in bytes.
    pub evicted_bytes: u64,
}

/// The last chunk that could not be written.
#[derive(Debug, Clone)]
pub struct FailedWrite {
    /// The cause.
    pub error: String,
    /// When it happened.
    pub at: Instant,
}

impl CacheCounters {
    /// Counts the read of `bytes` bytes from `chunks` chunks that were in the cache.
    pub fn record_hits(&self, chunks: usize, bytes: usize) {
        self.hits.add(chunks as u64, bytes as u64);
    }

    /// Counts the read of `bytes` bytes from a chunk that was not in the cache.
    pub fn record_miss(&self, bytes: usize) {
        self.misses.add(1, bytes as u64);
    }

    /// Counts a cached chunk that does not match its digest.
    pub fn record_corrupt_chunk(&self) {
        self.corrupt_chunks.fetch_add(1, Ordering::Relaxed);
    }

    /// Counts a chunk that could not be written.
    pub fn record_failed_write(&self, error: &io::Error) {
        self.failed_writes.fetch_add(1, Ordering::Relaxed);
        let (error, at) = (error.to_string(), Instant::now());
        *self.last_failed_write.lock() = Some(FailedWrite { error, at });
    }

    /// Counts disk space that was freed to keep the limit.
    pub fn record_eviction(&self, bytes: u64) {
        self.evicted_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// The totals so far.
    pub fn stats(&self) -> CacheStats {
        CacheStats {
            hits: self.hits.totals(),
            misses: self.misses.totals(),
            corrupt_chunks: self.corrupt_chunks.load(Ordering::Relaxed),
            failed_writes: self.failed_writes.load(Ordering::Relaxed),
            evicted_bytes: self.evicted_bytes.load(Ordering::Relaxed),
        }
    }

    /// The last chunk that could not be written, if there is one.
    pub fn last_failed_write(&self) -> Option<FailedWrite> {
        self.last_failed_write.lock().clone()
    }
}

impl ReadCounters {
    fn add(&self, chunks: u64, bytes: u64) {
        self.chunks.fetch_add(chunks, Ordering::Relaxed);
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    fn totals(&self) -> ReadTotals {
        ReadTotals {
            chunks: self.chunks.load(Ordering::Relaxed),
            bytes: self.bytes.load(Ordering::Relaxed),
        }
    }
}
