//! The benchmarks of `nydus-store bench`.
//!
//! [`fetch`] fetches an image's chunks with the store's client, decompression and verification, in the order of a
//! [`workload`], and times the steps of each request. [`read`] reads a directory on any file system. Both return a
//! [`report::BenchReport`] with rows of [`sample`]s. [`table`] prints and compares reports, [`plot`] draws them.

pub mod fetch;
pub mod order;
pub mod plot;
pub mod read;
pub mod report;
pub mod sample;
pub mod stop;
pub mod table;
pub mod workload;
