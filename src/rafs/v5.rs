//! Inodes of a RAFS version 5 bootstrap.
//!
//! Format: `metadata/layout/v5.rs` in nydus-rafs. All numbers are little-endian, and all records are aligned to 8
//! bytes. An inode has 128 bytes, followed by its name, its link target, its table of extended attributes and its
//! chunks. At index `n - 1`, a table of 32-bit entries has the offset of inode `n`, divided by 8. Children have
//! consecutive numbers. A hard link has an inode of its own, which states the number of the first one.

use super::{
    blobs::RawChunk,
    bytes::BootstrapBytes,
    error::FormatError,
    walk::{Attributes, EachChunk, EachEntry, EachXattr, Format},
};

const ROOT: u64 = 1;
const INODE_SIZE: u64 = 128;
const CHUNK_SIZE: u64 = 80;
/// `RafsInodeFlags::XATTR`
const HAS_XATTR: u64 = 0x4;
/// `RafsInodeFlags::HAS_HOLE`
const HAS_HOLE: u64 = 0x8;

/// Decoder of a version 5 bootstrap.
pub(super) struct V5<'a> {
    image: BootstrapBytes<'a>,
    table_offset: u64,
    table_entries: u64,
}

/// The relevant fields of an inode.
#[derive(Clone, Copy)]
pub(super) struct V5Inode {
    at: u64,
    attributes: Attributes,
    flags: u64,
    child_index: u32,
    child_count: u32,
    name_size: u16,
    symlink_size: u16,
}

impl<'a> V5<'a> {
    pub(super) fn new(image: BootstrapBytes<'a>, table_offset: u64, table_entries: u32) -> Self {
        Self {
            image,
            table_offset,
            table_entries: u64::from(table_entries),
        }
    }

    fn offset_of(&self, number: u64) -> Result<u64, FormatError> {
        if !(1..=self.table_entries).contains(&number) {
            return Err(FormatError::Malformed(
                format!("inode {number} is not in the inode table").into(),
            ));
        }
        let slot = self.table_offset.saturating_add((number - 1) * 4);
        Ok(u64::from(self.image.record(slot, 4)?.u32()?) * 8)
    }

    fn name(&self, node: &V5Inode) -> Result<&'a [u8], FormatError> {
        self.image.slice(node.at + INODE_SIZE, u64::from(node.name_size))
    }

    /// Offset of the link target.
    fn target_at(node: &V5Inode) -> u64 {
        node.at + INODE_SIZE + aligned(u64::from(node.name_size))
    }

    /// Offset of the extended attributes or, if there are none, of the chunks.
    fn tail_at(node: &V5Inode) -> u64 {
        Self::target_at(node) + aligned(u64::from(node.symlink_size))
    }

    /// The table of extended attributes, and the offset of its end.
    fn xattr_table(&self, node: &V5Inode) -> Result<(&'a [u8], u64), FormatError> {
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
    type RawInode = V5Inode;

    fn root(&self) -> u64 {
        ROOT
    }

    fn node(&self, id: u64) -> Result<V5Inode, FormatError> {
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
        Ok(V5Inode {
            at,
            attributes,
            flags,
            child_index,
            child_count,
            name_size,
            symlink_size,
        })
    }

    fn attributes<'n>(&self, node: &'n V5Inode) -> &'n Attributes {
        &node.attributes
    }

    fn entries(&self, dir: &V5Inode, each: EachEntry<'_, 'a>) -> Result<(), FormatError> {
        let first = u64::from(dir.child_index);
        for number in first..first + u64::from(dir.child_count) {
            let child = self.node(number)?;
            each(self.name(&child)?, number)?;
        }
        Ok(())
    }

    fn target(&self, link: &V5Inode) -> Result<&'a [u8], FormatError> {
        self.image.slice(Self::target_at(link), u64::from(link.symlink_size))
    }

    /// The table consists of pairs: a 32-bit length and this many bytes (name, NUL, value).
    fn xattrs(&self, node: &V5Inode, each: EachXattr<'_, 'a>) -> Result<(), FormatError> {
        let (mut rest, _) = self.xattr_table(node)?;
        let broken = || FormatError::malformed("the table of extended attributes is inconsistent");
        while !rest.is_empty() {
            let (len, tail) = rest.split_first_chunk().ok_or_else(broken)?;
            let len = usize::try_from(u32::from_le_bytes(*len)).map_err(|_| broken())?;
            let (pair, tail) = tail.split_at_checked(len).ok_or_else(broken)?;
            // Searches only as far as a name may reach, which keeps the time linear in the number of attributes.
            let name_len = pair.iter().take(256).position(|&byte| byte == 0).ok_or_else(broken)?;
            let (name, value) = pair.split_at(name_len);
            each("", name, value.get(1..).unwrap_or_default())?;
            rest = tail;
        }
        Ok(())
    }

    fn chunks(&self, file: &V5Inode, count: u64, each: EachChunk<'_>) -> Result<(), FormatError> {
        if file.flags & HAS_HOLE != 0 {
            return Err(FormatError::unsupported("files with holes"));
        }
        if u64::from(file.child_count) != count {
            let what = format!("{} chunks, but the size requires {count}", file.child_count);
            return Err(FormatError::Malformed(what.into()));
        }
        let (_, at) = self.xattr_table(file)?;
        // Cannot overflow, because `count` is a u32 here.
        let table = self.image.slice(at, count * CHUNK_SIZE)?;
        for record in table.chunks_exact(CHUNK_SIZE as usize) {
            each(raw_chunk(record)?)?;
        }
        Ok(())
    }
}

/// Length of a chunk record, which version 6 shares.
pub(super) const CHUNK_RECORD_SIZE: u64 = CHUNK_SIZE;

/// Decodes a chunk record (`RafsV5ChunkInfo`).
pub(super) fn raw_chunk(record: &[u8]) -> Result<RawChunk, FormatError> {
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
