//! Empty directories: the `diff` of layers without files.
//!
//! Each look-up gives another one, because an image may have the same layer twice, and overlayfs takes no directory twice.
//! They are all alike, so nothing needs to be remembered of them.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::vfs::NodeId;

/// Set in the node of every empty directory, and in no other.
const EMPTY: NodeId = 3 << 62;

/// Gives out empty directories.
#[derive(Default)]
pub struct EmptyDirs(AtomicU64);

impl EmptyDirs {
    /// The node of another one.
    pub fn another(&self) -> NodeId {
        EMPTY | self.0.fetch_add(1, Ordering::Relaxed)
    }
}

/// Whether the node is an empty directory.
pub fn is_empty_dir(node: NodeId) -> bool {
    node & EMPTY == EMPTY
}
