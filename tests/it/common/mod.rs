//! Test harness: the daemon as a process, paths in its store, registries, and Podman with its own storage.

mod image_store;
mod lab;
mod mount_namespace;
mod podman;
mod process;
mod registry;
mod rootless;
mod serve;

pub use image_store::empty_image_store;
pub use lab::{Lab, Sample, bootstrap_layer, descriptor, image_config, manifest_json};
pub use podman::{Podman, Release, RunPodman};
pub use process::{Guard, copy_program, failure_with, free_port, output, text, wait_until};
pub use registry::{Access, DockerRegistry};
pub use rootless::Rootless;
pub use serve::{BINARY, Serve, StoreLayer};
