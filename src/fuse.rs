//! FUSE: begins or continues sessions, and answers the kernel's requests by a [`crate::vfs::FileSystem`].
//!
//! [`session`] mounts and does the handshake, `server` translates requests, and `abi` has the protocol's structures.

mod abi;
mod channel;
pub mod mountpoint;
mod server;
pub mod session;
mod waiting;
