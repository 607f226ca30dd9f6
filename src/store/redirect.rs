//! Sends those on who are about to mount a layer with other ids: to an id-mapped copy of the store.
//!
//! For them, and as long as they mount, `diff` is a symbolic link to [`TREE`] of the same layer in the copy. The link's
//! node says which copy and which layer, so nothing needs to be remembered of it.

use std::{ffi::OsStr, os::unix::ffi::OsStrExt as _, path::PathBuf};

use super::names::LayerDir;
use crate::vfs::{Later, NodeId};

/// A layer's `diff` under a name that nobody is sent on from.
pub const TREE: &[u8] = b"tree";

/// What the two highest bits of a link's node are.
const LINKS: NodeId = 2;
const LINKS_SHIFT: u32 = 62;
const COPY_SHIFT: u32 = 32;

/// Id-mapped copies of the store.
pub trait IdMaps: Send + Sync {
    /// The number of the copy for `caller` (a thread), if he is about to mount with other ids. Does not wait itself.
    fn copy_for(&self, caller: u32) -> Later<Option<u32>>;

    /// Where that copy is mounted.
    fn path(&self, copy: u32) -> PathBuf;

    /// Takes all copies away: they hold the store's mount. No more are made.
    fn close(&self);
}

/// A `diff` that leads to a copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Link {
    /// The copy.
    pub copy: u32,
    /// The layer's node.
    pub layer: u32,
}

impl Link {
    /// To `layer` in that copy; `None` if the layer's node has too high a number.
    pub fn new(copy: u32, layer: &LayerDir) -> Option<Self> {
        let layer = u32::try_from(layer.node).ok()?;
        (copy < 1 << 30).then_some(Self { copy, layer })
    }

    /// The link that has that node.
    pub fn of(node: NodeId) -> Option<Self> {
        let is_link = node >> LINKS_SHIFT == LINKS;
        is_link.then_some(Self {
            copy: (node >> COPY_SHIFT) as u32 & ((1 << 30) - 1),
            layer: node as u32,
        })
    }

    /// Its node.
    pub fn node(self) -> NodeId {
        LINKS << LINKS_SHIFT | NodeId::from(self.copy) << COPY_SHIFT | NodeId::from(self.layer)
    }
}

/// Where a link to `layer` leads, in a copy at `copy`.
pub fn target(copy: PathBuf, layer: &LayerDir) -> Vec<u8> {
    let reference = OsStr::from_bytes(&layer.parent.name);
    let path = copy.join(reference).join(layer.digest.to_string());
    path.join(OsStr::from_bytes(TREE)).into_os_string().into_encoded_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::empty::EmptyDirs;

    #[test]
    fn a_node_says_all() {
        let link = Link {
            copy: (1 << 30) - 1,
            layer: u32::MAX - 3,
        };
        assert_eq!(Link::of(link.node()), Some(link));
        // The root, the last node of the last instance, and an empty directory.
        for other in [1, (1 << 62) - 1, EmptyDirs::default().another()] {
            assert_eq!(Link::of(other), None);
        }
    }
}
