//! Images: references, manifests, which layer is what, and the bootstrap.
//!
//! [`resolve::Images`] turns a [`reference::Reference`] into a [`loaded::LoadedImage`]: it takes the manifest from the
//! [`library`] on disk or the registry, picks this machine's from an index, fetches the configuration and the bootstrap
//! layer, verifies and unpacks it ([`bootstrap`]), and has [`crate::rafs`] read the tree of files. Images that several
//! references name are loaded once, and dropped when nobody holds them.

pub mod bootstrap;
pub mod contents;
pub mod error;
pub mod library;
pub mod loaded;
mod loading;
pub mod manifest;
pub mod recent;
pub mod reference;
pub mod relay;
pub mod resolve;
