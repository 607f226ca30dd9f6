//! Images: references, manifests, which layer is what, and the bootstrap.
//!
//! [`resolve::Images`] turns a [`reference::Reference`] into a [`loaded::LoadedImage`]: it takes the manifest from the
//! [`library`] on disk or the registry, picks this machine's from an index, fetches the configuration and the bootstrap
//! layer, verifies and unpacks it ([`bootstrap`]), and has [`crate::rafs`] read the tree of files. Images that several
//! references name are loaded once, and dropped when nobody holds them.
//!
//! Once an image is to be read, [`prefetch`] fetches what it will need first: what its builder has listed, and what earlier
//! starts have needed, of which a [`trace`] is kept.
//!
//! What concerns a whole image at a time is in [`seed`], which fetches all of one from a registry or an
//! [`oci_layout`], and [`check`], which hashes what there is of it.

mod access_recorder;
pub mod bootstrap;
pub mod contents;
mod descriptor;
pub mod error;
pub mod index;
pub mod keyed_mutex;
pub mod loaded;
mod loading;
pub mod manifest;
pub mod metadata_store;
pub mod oci_layout;
mod origin;
pub mod prefetch;
pub mod reference;
pub mod resolve;
pub mod seed;
pub mod trace;
pub mod verify;
