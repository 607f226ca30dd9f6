//! The kernel's side: opens the FUSE session and translates its requests.
//!
//! [`session`] mounts and shakes hands, and [`adapter`] translates between `fuser` and a [`crate::vfs::FileSystem`].

pub mod adapter;
pub mod mountpoint;
pub mod session;
