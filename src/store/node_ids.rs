//! Node numbers of the mount on `overlay/`.
//!
//! All of them are below 2^32, because programs of 32 bits get EOVERFLOW for inode numbers above. Number 1 is the root and
//! 2 the directory of links. Every layer has a range of its own: a few numbers for its directory and the files in it,
//! then one for each inode of its tree.

use std::collections::BTreeMap;

/// The directory `l`.
pub const LINKS: u32 = 2;
/// Where ranges begin.
const FIRST: u32 = 16;
/// Numbers of a layer that are not its tree's.
pub const NAMES: u32 = 8;

/// Which of a layer's own numbers stands for what, from the start of its range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum LayerNode {
    /// `overlay/<id>`.
    Dir = 0,
    /// `overlay/<id>/diff` of a layer without files. It also stands for a tree's root in listings, before the tree is
    /// loaded.
    EmptyDiff = 1,
    /// `overlay/<id>/link`.
    Link = 2,
    /// `overlay/<id>/lower`.
    Lower = 3,
    /// `overlay/l/<link>`.
    Symlink = 4,
}

impl LayerNode {
    /// What the number at `offset` within a layer's range stands for; `None` if it is the tree's or nothing.
    pub fn at(offset: u32) -> Option<Self> {
        [Self::Dir, Self::EmptyDiff, Self::Link, Self::Lower, Self::Symlink]
            .into_iter()
            .find(|node| *node as u32 == offset)
    }
}

/// The first number of a free range of `len` numbers; `None` if there is none. `taken` has the lengths of the ranges in use
/// by their first numbers. Numbers below `floor` have been in use since the mount was made.
///
/// Ranges are given out in ascending order. Numbers of layers that were withdrawn are only reused when the numbers above
/// are used up: until then the kernel may still know an earlier layer's.
pub fn allocate(taken: &BTreeMap<u32, u32>, floor: u32, len: u32) -> Option<u32> {
    let end = taken
        .last_key_value()
        .map_or(FIRST, |(first, len)| first + len)
        .max(floor);
    if end.checked_add(len).is_some() {
        return Some(end);
    }
    let mut free = FIRST;
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
        assert_eq!(allocate(&taken, 0, 100), Some(FIRST));
        taken.insert(FIRST, 100);
        assert_eq!(allocate(&taken, 500, 100), Some(500));
        assert_eq!(allocate(&taken, 0, u32::MAX - 116), Some(116));
        taken.insert(200, u32::MAX - 210);
        assert_eq!(allocate(&taken, 0, 10), Some(u32::MAX - 10));
        assert_eq!(allocate(&taken, 0, 84), Some(116));
        assert_eq!(allocate(&taken, 0, 85), None);
    }
}
