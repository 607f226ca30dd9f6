//! End-to-end tests: the real binary, real mounts, the real Podman and a real registry.
//!
//! They need root, FUSE, Podman, `docker-registry` and skopeo, and fail where one is missing. `scripts/test` installs
//! them.

#![allow(
    unsafe_code,
    missing_docs,
    clippy::missing_docs_in_private_items,
    clippy::needless_pass_by_value,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "tests panic when they fail, and show unsafe calls to the kernel"
)]

mod common;

mod air_gap;
mod bench;
mod bounds;
mod cli;
mod concurrency;
mod credentials;
mod daemon;
mod damage;
mod demo;
mod each_release;
mod faults;
mod fleet;
mod full_disk;
mod hosts;
mod images;
mod malformed;
mod monitor;
mod neighbours;
mod outages;
mod podman;
mod poison;
mod power_cut;
mod prefetch;
mod preseed;
mod releases;
mod restart;
mod setup;
mod smoke;
mod stalls;
