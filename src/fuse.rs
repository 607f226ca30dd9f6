//! The kernel's side: opens the FUSE session and translates its requests.
//!
//! [`session`] mounts and shakes hands, [`adapter`] translates between `fuser` and a [`crate::vfs::FileSystem`], and
//! [`idmap`] maps mounts to the ids of user namespaces.

pub mod adapter;
pub mod donor;
pub mod idmap;
pub mod mountpoint;
pub mod session;
