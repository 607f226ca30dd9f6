//! Images: references, manifests, the role of each layer, and the bootstrap.
//!
//! [`resolve::Images`] turns a [`reference::Reference`] into a [`loaded::LoadedImage`]. It takes the manifest from the
//! [`metadata_store`] on disk or from the registry, and picks this machine's manifest from an index. The loader
//! then fetches the configuration and the bootstrap layer, verifies and unpacks the layer ([`bootstrap`]), and has
//! [`crate::rafs`] parse the file tree. An image with several references in a repository is loaded once, and dropped
//! when it is not in use any more.
//!
//! When an image is first used, [`prefetch`] fetches the chunks in its [`trace`] (those that earlier starts needed) and
//! the files that the image's builder listed.
//!
//! Three modules work on whole images: [`seed`] fetches all of one from a registry or an [`oci_layout`], [`verify`]
//! hashes what is on disk, and [`garbage`] removes what nothing needs.

mod access_recorder;
pub mod bootstrap;
pub mod contents;
mod descriptor;
pub mod error;
pub mod garbage;
mod image_source;
pub mod index;
mod kept;
pub mod keyed_mutex;
pub mod loaded;
mod loader;
pub mod manifest;
mod metadata_handle;
pub mod metadata_store;
pub mod oci_layout;
pub mod prefetch;
pub mod reference;
pub mod resolve;
pub mod seed;
pub mod trace;
mod unstored;
mod upkeep;
pub mod verify;
