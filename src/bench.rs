//! Measurements that a person asks for: how fast chunks come from a registry, and how fast a mounted tree is read.
//!
//! [`fetch`] fetches an image's chunks by the client, the decompression and the verification that the store uses, in a
//! [`workload`]'s order, and times the steps of each request. [`read`] reads a directory, on whatever file system. Both
//! give a [`error_chain::ErrorChain`]: rows of [`sample`]s, which [`table`] shows and compares, which is written and read as JSON, and
//! which [`plot`] draws.

pub mod fetch;
pub mod order;
pub mod plot;
pub mod read;
pub mod report;
pub mod sample;
pub mod stop;
pub mod table;
pub mod workload;
