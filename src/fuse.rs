//! FUSE: opens sessions and translates the kernel's requests.
//!
//! [`session`] mounts and does the handshake, and [`adapter`] translates between `fuser` and a
//! [`crate::vfs::FileSystem`].

pub mod adapter;
pub mod mountpoint;
pub mod session;
