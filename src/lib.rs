//! nydus-store runs Nydus container images with Podman and CRI-O before they are downloaded.
//!
//! It provides an *additional image store* to containers/storage, with layers that are ready to mount. File contents
//! are fetched chunk by chunk from the registry when they are read. `docs/ARCHITECTURE.md` describes how the modules
//! work together.
//!
//! This library is for the program, its tests and its benchmarks. Nothing in it is stable.

mod atomic_file;
mod bench;
mod blob;
mod cli;
mod config;
mod daemon;
mod digest;
mod disk_usage;
mod doctor;
mod error_chain;
#[path = "../fixtures/fixtures.rs"]
pub mod fixtures;
mod fuse;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;
mod handover;
mod histogram;
mod humanize;
mod image;
mod jobs;
mod log_limit;
#[cfg(test)]
mod log_messages;
mod memory;
mod monitor;
mod printable;
mod rafs;
mod registries_conf;
mod registry;
mod setup;
mod store;
mod ttl_cache;
mod vfs;
mod waits;

pub use cli::Cli;
pub use error_chain::ErrorChain;

/// What tests and benchmarks look into.
pub mod internals {
    pub use crate::{
        blob::layout::{BlobLayout, Chunk},
        config::Config,
        daemon::RootLock,
        digest::Digest,
        image::{
            resolve::Images,
            trace::{Trace, TracePart, Traces},
        },
        jobs::{
            announcement::{Logins, Reply},
            control,
        },
        rafs::{ROOT, Tree},
        registry::{Client, install_crypto_provider},
        store::image_store::ImageStore,
    };
}
