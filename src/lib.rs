//! nydus-store runs Nydus container images with Podman and CRI-O before they are downloaded.
//!
//! It provides an *additional image store* to containers/storage, with layers that are ready to mount. File contents
//! are fetched chunk by chunk from the registry when they are read. `docs/ARCHITECTURE.md` describes how the modules
//! work together.

pub mod atomic_file;
pub mod bench;
pub mod blob;
pub mod cli;
pub mod config;
pub mod daemon;
pub mod digest;
pub mod doctor;
pub mod fuse;
pub mod image;
#[cfg(test)]
mod log_messages;
mod printable;
mod ttl_cache;

pub mod error_chain;
#[path = "../fixtures/fixtures.rs"]
pub mod fixtures;
pub mod humanize;
pub mod jobs;
pub mod rafs;
pub mod registries_conf;
pub mod registry;
pub mod setup;
pub mod store;
pub mod vfs;
