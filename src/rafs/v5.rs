//! The inodes of a RAFS version 5 bootstrap.
//!
//! Format: `metadata/layout/v5.rs` in nydus-rafs. All numbers are little-endian, all records aligned to 8 bytes. An
//! inode is 128 bytes, its name, its link target, then its table of extended attributes, then its chunks. A table of
//! 32-bit entries gives inode `n`'s offset divided by 8 at index `n - 1`. Children have consecutive numbers. A hard
//! link has an inode of its own, that states the number of the first.

use super::{
    blobs::RawChunk,
    bytes::Image,
    error::Fault,
    walk::{Attributes, EachChunk, EachEntry, EachXattr, Format},
};

const ROOT: u64 = 1;
const INODE_SIZE: u64 = 128;
const CHUNK_SIZE: u64 = 80;
/// `RafsInodeFlags::XATTR`
const HAS_XATTR: u64 = 0x4;
/// `RafsInodeFlags::HAS_HOLE`
const HAS_HOLE: u64 = 0x8;

/// The inode table of a version 5 bootstrap.
pub(super) struct V5<'a> {
    image: Image<'a>,
    table_offset: u64,
    table_entries: u64,
}

/// An inode's fields, as far as they are needed.
#[derive(Clone, Copy)]
pub(super) struct Node {
    at: u64,
    attributes: Attributes,
    flags: u64,
    child_index: u32,
    child_count: u32,
    name_size: u16,
    symlink_size: u16,
}

impl<'a> V5<'a> {
    pub(super) fn new(image: Image<'a>, table_offset: u64, table_entries: u32) -> Self {
        Self {
            image,
            table_offset,
            table_entries: u64::from(table_entries),
        }
    }

    fn offset_of(&self, number: u64) -> Result<u64, Fault> {
        if !(1..=self.table_entries).contains(&number) {
            return Err(Fault::Malformed(
                format!("inode {number} is not in the inode table").into(),
            ));
        }
        let slot = self.table_offset.saturating_add((number - 1) * 4);
        Ok(u64::from(self.image.record(slot, 4)?.u32()?) * 8)
    }

    fn name(&self, node: &Node) -> Result<&'a [u8], Fault> {
        self.image.slice(node.at + INODE_SIZE, u64::from(node.name_size))
    }

    /// Where the link target starts.
    fn target_at(node: &Node) -> u64 {
        node.at + INODE_SIZE + aligned(u64::from(node.name_size))
    }

    /// Where the extended attributes or, if there are none, the chunks start.
    fn tail_at(node: &Node) -> u64 {
        Self::target_at(node) + aligned(u64::from(node.symlink_size))
    }

    /// The table of extended attributes, and where it ends.
    fn xattr_table(&self, node: &Node) -> Result<(&'a [u8], u64), Fault> {
        let at = Self::tail_at(node);
        if node.flags & HAS_XATTR == 0 {
            return Ok((&[], at));
        }
        let size = self.image.record(at, 8)?.u64()?;
        let table = self.image.slice(at + 8, size)?;
        Ok((table, at + 8 + aligned(size)))
    }
}

const fn aligned(len: u64) -> u64 {
    len.next_multiple_of(8)
}

impl<'a> Format<'a> for V5<'a> {
    type Node = Node;

    fn root(&self) -> u64 {
        ROOT
    }

    fn node(&self, id: u64) -> Result<Node, Fault> {
        let at = self.offset_of(id)?;
        let mut inode = self.image.record(at, INODE_SIZE)?;
        inode.bytes(32 + 8)?; // digest, parent
        let key = inode.u64()?;
        let (uid, gid) = (inode.u32()?, inode.u32()?);
        inode.u32()?; // project
        let (mode, size) = (inode.u32()?, inode.u64()?);
        inode.u64()?; // blocks
        let flags = inode.u64()?;
        inode.u32()?; // links
        let (child_index, child_count) = (inode.u32()?, inode.u32()?);
        let (name_size, symlink_size) = (inode.u16()?, inode.u16()?);
        let rdev = inode.u32()?;
        let (mtime_nsec, mtime) = (inode.u32()?, inode.u64()?);
        let attributes = Attributes {
            key,
            mode,
            uid,
            gid,
            size,
            mtime: mtime.cast_signed(),
            mtime_nsec,
            rdev,
        };
        Ok(Node {
            at,
            attributes,
            flags,
            child_index,
            child_count,
            name_size,
            symlink_size,
        })
    }

    fn attributes<'n>(&self, node: &'n Node) -> &'n Attributes {
        &node.attributes
    }

    fn entries(&self, dir: &Node, each: EachEntry<'_, 'a>) -> Result<(), Fault> {
        let first = u64::from(dir.child_index);
        for number in first..first + u64::from(dir.child_count) {
            let child = self.node(number)?;
            each(self.name(&child)?, number)?;
        }
        Ok(())
    }

    fn target(&self, link: &Node) -> Result<&'a [u8], Fault> {
        self.image.slice(Self::target_at(link), u64::from(link.symlink_size))
    }

    /// Pairs of a 32-bit length and that many bytes: name, NUL, value.
    fn xattrs(&self, node: &Node, each: EachXattr<'_, 'a>) -> Result<(), Fault> {
        let (mut rest, _) = self.xattr_table(node)?;
        let broken = || Fault::malformed("the table of extended attributes is inconsistent");
        while !rest.is_empty() {
            let (len, tail) = rest.split_first_chunk().ok_or_else(broken)?;
            let len = usize::try_from(u32::from_le_bytes(*len)).map_err(|_| broken())?;
            let (pair, tail) = tail.split_at_checked(len).ok_or_else(broken)?;
            // Looking no further than a name can reach keeps this linear in the number of attributes.
            let name_len = pair.iter().take(256).position(|&byte| byte == 0).ok_or_else(broken)?;
            let (name, value) = pair.split_at(name_len);
            each("", name, value.get(1..).unwrap_or_default())?;
            rest = tail;
        }
        Ok(())
    }

    fn chunks(&self, file: &Node, count: u64, each: EachChunk<'_>) -> Result<(), Fault> {
        if file.flags & HAS_HOLE != 0 {
            return Err(Fault::unsupported("files with holes"));
        }
        if u64::from(file.child_count) != count {
            let what = format!("{} chunks where the size asks for {count}", file.child_count);
            return Err(Fault::Malformed(what.into()));
        }
        let (_, at) = self.xattr_table(file)?;
        // No overflow: count is a u32 here.
        let table = self.image.slice(at, count * CHUNK_SIZE)?;
        for record in table.chunks_exact(CHUNK_SIZE as usize) {
            each(raw_chunk(record)?)?;
        }
        Ok(())
    }
}

/// Length of a chunk's record, which version 6 has, too.
pub(super) const CHUNK_RECORD_SIZE: u64 = CHUNK_SIZE;

/// Reads a chunk's record (`RafsV5ChunkInfo`).
pub(super) fn raw_chunk(record: &[u8]) -> Result<RawChunk, Fault> {
    let mut chunk = super::bytes::Fields(record);
    let digest = chunk.array()?;
    let (blob, flags) = (chunk.u32()?, chunk.u32()?);
    let (compressed_size, uncompressed_size) = (chunk.u32()?, chunk.u32()?);
    let (compressed_offset, uncompressed_offset) = (chunk.u64()?, chunk.u64()?);
    let (file_offset, index) = (Some(chunk.u64()?), chunk.u32()?);
    Ok(RawChunk {
        blob,
        flags,
        digest,
        index,
        compressed_offset,
        compressed_size,
        uncompressed_offset,
        uncompressed_size,
        file_offset,
    })
}
