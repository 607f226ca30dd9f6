//! Reads the chunks of data blobs: from the cache on disk, or fetched, verified and cached.
//!
//! Lower layers know nothing of upper ones:
//!
//! 1. [`layout`] (what a bootstrap says of a blob), [`source`] (where stored bytes come from), [`cache`] (what is on
//!    disk), [`meta`] and [`unit`] (which stored bytes give which chunks), `span` (units that one request fetches),
//!    `singleflight`, and [`scheduler`] (limits and priorities).
//! 2. [`fetcher`]: fetches units. Concurrent callers share a flight, and are answered from memory once the unit is
//!    verified. The disk only serves later reads, so that reads still succeed on a full disk.
//! 3. `prefetcher`: fetches ahead of sequential readers and from lists, and coalesces requests.
//! 4. [`reader`]: the facade that images use.
//!
//! Operations on whole blobs ([`download_all`], [`verify`], [`steps`]) stand on the fetcher. Images that use the same
//! cached blob also share its flights ([`shared`]).
//!
//! No chunk is handed out unless this process has verified it against its digest in the bootstrap.

pub mod atomic_bit_set;
pub mod bulk;
pub mod cache;
pub mod cache_counters;
pub mod cache_dir;
mod cache_file;
mod chunk_journal;
mod chunk_order;
mod chunk_table;
pub mod codec;
mod disk_budget;
pub mod download_all;
pub mod error;
mod eviction;
pub mod fetcher;
pub mod layout;
mod link_estimator;
pub mod meta;
mod prefetcher;
mod quarantine;
pub mod reader;
mod region_uses;
pub mod scheduler;
pub mod shared;
mod singleflight;
pub mod size_limit;
pub mod source;
mod span;
pub mod steps;
pub mod unit;
mod unit_map;
pub mod verify;
mod write_log;

#[cfg(test)]
mod tests;
