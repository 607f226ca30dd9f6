//! Node ids of the mount on `overlay/`.
//!
//! All ids are below 2^32, because 32-bit programs get EOVERFLOW for larger inode numbers. Id 1 is the root and id 2 is
//! the directory of links. Each layer has a range of ids: a few for its directory and the files in it, then one for
//! each inode of its tree.

use std::collections::BTreeMap;

/// Node id of the directory `l`.
pub const LINKS_DIR: u32 = 2;
/// Start of the first range.
const FIRST_LAYER_NODE: u32 = 16;
/// Number of ids of a layer before those of its tree.
pub const LAYER_NODES: u32 = 8;

/// The nodes of a layer outside its tree. The value is the offset from the start of the layer's range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum LayerNode {
    /// `overlay/<id>`.
    Dir = 0,
    /// `overlay/<id>/diff` of a layer without files. Listings also use it for the root of a tree that is not loaded
    /// yet.
    EmptyDiff = 1,
    /// `overlay/<id>/link`.
    Link = 2,
    /// `overlay/<id>/lower`.
    Lower = 3,
    /// `overlay/l/<link>`.
    Symlink = 4,
}

impl LayerNode {
    /// The node at `offset` in a layer's range; `None` for a node of the tree and for an unused id.
    pub fn at(offset: u32) -> Option<Self> {
        [Self::Dir, Self::EmptyDiff, Self::Link, Self::Lower, Self::Symlink]
            .into_iter()
            .find(|node| *node as u32 == offset)
    }
}

/// The first id of a free range of `len` ids; `None` if there is no such range. `taken` maps the first id of each range
/// in use to its length. Ids below `floor` have been in use since the mount was made.
///
/// Ranges are allocated in ascending order. Ids of withdrawn layers are reused only when the ids above are exhausted,
/// because the kernel may still cache nodes of the earlier layer.
pub fn allocate(taken: &BTreeMap<u32, u32>, floor: u32, len: u32) -> Option<u32> {
    let end = taken
        .last_key_value()
        .map_or(FIRST_LAYER_NODE, |(first, len)| first + len)
        .max(floor);
    if end.checked_add(len).is_some() {
        return Some(end);
    }
    let mut free = FIRST_LAYER_NODE;
    for (first, taken) in taken {
        if first - free >= len {
            return Some(free);
        }
        free = first + taken;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_ascend_and_gaps_are_used_last() {
        let mut taken = BTreeMap::new();
        assert_eq!(allocate(&taken, 0, 100), Some(FIRST_LAYER_NODE));
        taken.insert(FIRST_LAYER_NODE, 100);
        assert_eq!(allocate(&taken, 500, 100), Some(500));
        assert_eq!(allocate(&taken, 0, u32::MAX - 116), Some(116));
        taken.insert(200, u32::MAX - 210);
        assert_eq!(allocate(&taken, 0, 10), Some(u32::MAX - 10));
        assert_eq!(allocate(&taken, 0, 84), Some(116));
        assert_eq!(allocate(&taken, 0, 85), None);
    }
}
