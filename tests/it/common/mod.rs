//! What the tests share: the daemon as a process, a store's paths, a real registry, Podman with storage of its own.

mod image_store;
mod lab;
mod place;
mod podman;
mod process;
mod registry;
mod rootless;
mod serve;

pub use image_store::empty_image_store;
pub use lab::{Lab, Sample, bootstrap_layer, config, describe, document};
pub use podman::{Podman, Release};
pub use process::{Guard, copy_program, output, wait_until};
pub use registry::{Access, DockerRegistry};
pub use rootless::Rootless;
pub use serve::{BINARY, Serve, StorePath};
