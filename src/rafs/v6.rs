//! Inodes of a RAFS version 6 bootstrap, which is an EROFS image.
//!
//! Format: `metadata/layout/v6.rs` in nydus-rafs, and `fs/erofs/erofs_fs.h` in Linux. Blocks have 4 KiB. The inode with
//! number (nid) `n` is at `meta_blkaddr * 4096 + n * 32` and has 32 or 64 bytes. Extended attributes follow, then a
//! list of chunk addresses (regular files) or the last, incomplete block of data (directories and links). RAFS adds a
//! table of chunks, by which chunk addresses are resolved.

use std::{cell::OnceCell, collections::HashMap};

use super::{
    blobs::RawChunk,
    bytes::{BootstrapBytes, Fields},
    error::FormatError,
    v5::{CHUNK_RECORD_SIZE, raw_chunk},
    walk::{Attributes, EachChunk, EachEntry, EachXattr, Format},
};

const BLOCK_SIZE: u64 = 4096;
const INODE_SLOT_SIZE: u64 = 32;
const DIRENT_SIZE: usize = 12;
/// Offset of `s_build_time` in the image.
const BUILD_TIME_OFFSET: u64 = 1024 + 24;

// Inode data layouts, from bit 1 of `i_format`. Bit 0 marks 64-byte inodes.
const FLAT_PLAIN: u16 = 0;
const FLAT_INLINE: u16 = 2;
const CHUNK_BASED: u16 = 4;

/// Decoder of a version 6 bootstrap.
pub(super) struct V6<'a> {
    pub(super) image: BootstrapBytes<'a>,
    /// Offset of inode 0.
    pub(super) meta_offset: u64,
    pub(super) root_nid: u16,
    pub(super) chunk_table_offset: u64,
    /// Length in bytes; 0 if there is no table.
    pub(super) chunk_table_size: u64,
    /// Chunk address → offset of the chunk's record. Built at the first file with data.
    pub(super) chunk_map: OnceCell<HashMap<ChunkAddress, u64>>,
}

/// Blob number, chunk number, and the chunk's block in the uncompressed blob, as in `RafsV6InodeChunkAddr`.
pub(super) type ChunkAddress = [u8; 8];

/// The relevant fields of an inode.
#[derive(Clone, Copy)]
pub(super) struct V6Inode {
    attributes: Attributes,
    layout: u16,
    /// `i_u`: the first data block.
    block: u32,
    /// Offset of the extended attributes.
    xattrs_at: u64,
    /// Length of the extended attributes with their header.
    xattrs_len: u64,
}

impl<'a> V6<'a> {
    /// Block `index` of the data of a directory or link, truncated at the end of the data.
    fn data_block(&self, node: &V6Inode, index: u64) -> Result<&'a [u8], FormatError> {
        let size = node.attributes.size;
        let begin = index.checked_mul(BLOCK_SIZE).filter(|&begin| begin < size);
        let begin = begin.ok_or(FormatError::malformed("data ends early"))?;
        let len = BLOCK_SIZE.min(size - begin);
        let is_last = size - begin <= BLOCK_SIZE;
        let at = match node.layout {
            FLAT_INLINE if is_last => node.xattrs_at + node.xattrs_len,
            // Cannot overflow: block numbers have 32 bits, and `begin` is in the same range or beyond the image.
            FLAT_PLAIN | FLAT_INLINE => (u64::from(node.block) * BLOCK_SIZE).saturating_add(begin),
            other => return Err(FormatError::Malformed(format!("data in layout {other}").into())),
        };
        self.image.slice(at, len)
    }

    fn chunk_map(&self) -> Result<&HashMap<ChunkAddress, u64>, FormatError> {
        if let Some(map) = self.chunk_map.get() {
            return Ok(map);
        }
        let map = self.read_chunk_table()?;
        Ok(self.chunk_map.get_or_init(|| map))
    }

    fn read_chunk_table(&self) -> Result<HashMap<ChunkAddress, u64>, FormatError> {
        if self.chunk_table_size == 0 {
            return Err(FormatError::NoChunkTable);
        }
        let table = self.image.slice(self.chunk_table_offset, self.chunk_table_size)?;
        let mut map = HashMap::with_capacity(table.len() / CHUNK_RECORD_SIZE as usize);
        let mut at = self.chunk_table_offset;
        for record in table.chunks_exact(CHUNK_RECORD_SIZE as usize) {
            let chunk = raw_chunk(record)?;
            // Skips chunks without an address. A file that refers to one fails later.
            if let Some(address) = address_of(&chunk) {
                map.insert(address, at);
            }
            at += CHUNK_RECORD_SIZE;
        }
        Ok(map)
    }

    fn dir_block(&self, block: &'a [u8], each: EachEntry<'_, 'a>) -> Result<(), FormatError> {
        let broken = || FormatError::malformed("a directory block is inconsistent");
        // The first name starts at the end of the entries.
        let names_at = usize::from(Fields(block.get(8..10).ok_or_else(broken)?).u16()?);
        if names_at == 0 || names_at % DIRENT_SIZE != 0 {
            return Err(broken());
        }
        let mut entries = block
            .get(..names_at)
            .ok_or_else(broken)?
            .chunks_exact(DIRENT_SIZE)
            .peekable();
        while let Some(entry) = entries.next() {
            let mut entry = Fields(entry);
            let (nid, begin) = (entry.u64()?, usize::from(entry.u16()?));
            let name = match entries.peek() {
                Some(next) => {
                    let end = usize::from(Fields(next.get(8..10).ok_or_else(broken)?).u16()?);
                    block.get(begin..end).ok_or_else(broken)?
                }
                // The last name ends at a NUL or at the end of the block.
                None => block
                    .get(begin..)
                    .and_then(|rest| rest.split(|&byte| byte == 0).next())
                    .ok_or_else(broken)?,
            };
            each(name, nid)?;
        }
        Ok(())
    }
}

/// The address by which files refer to a chunk; `None` if the chunk cannot be addressed.
fn address_of(chunk: &RawChunk) -> Option<ChunkAddress> {
    // Blob numbers in addresses count from 1; 0 is the bootstrap itself.
    let blob = u8::try_from(chunk.blob).ok()?.checked_add(1)?;
    let [low, mid, high, 0] = chunk.index.to_le_bytes() else {
        return None;
    };
    // nydus stores the lower 32 bits of the block number.
    let [a, b, c, d, ..] = (chunk.uncompressed_offset / BLOCK_SIZE).to_le_bytes();
    Some([low, mid, blob, high, a, b, c, d])
}

/// Prefix that a name index stands for (`EROFS_XATTR_INDEX_*`).
fn xattr_prefix(index: u8) -> Option<&'static str> {
    Some(match index {
        1 => "user.",
        2 => "system.posix_acl_access",
        3 => "system.posix_acl_default",
        4 => "trusted.",
        6 => "security.",
        _ => return None,
    })
}

impl<'a> Format<'a> for V6<'a> {
    type RawInode = V6Inode;

    fn root(&self) -> u64 {
        u64::from(self.root_nid)
    }

    fn node(&self, id: u64) -> Result<V6Inode, FormatError> {
        let at = id
            .checked_mul(INODE_SLOT_SIZE)
            .and_then(|offset| offset.checked_add(self.meta_offset));
        let at = at.ok_or(FormatError::malformed("an inode number is out of range"))?;
        let extended = self.image.record(at, 2)?.u16()? & 1 != 0;
        let inode_size = if extended { 64 } else { 32 };
        let mut inode = self.image.record(at, inode_size)?;
        let (format, xattr_count) = (inode.u16()?, inode.u16()?);
        let mode = u32::from(inode.u16()?);
        inode.u16()?; // links, or reserved
        let size = if extended {
            inode.u64()?
        } else {
            u64::from(inode.u32()?)
        };
        if !extended {
            inode.u32()?;
        }
        let block = inode.u32()?;
        inode.u32()?; // inode number for `stat`, not used
        let (uid, gid, mtime, mtime_nsec) = if extended {
            (inode.u32()?, inode.u32()?, inode.u64()?, inode.u32()?)
        } else {
            // Short inodes have the build time of the image.
            let mut built = self.image.record(BUILD_TIME_OFFSET, 12)?;
            (
                u32::from(inode.u16()?),
                u32::from(inode.u16()?),
                built.u64()?,
                built.u32()?,
            )
        };
        if format >> 4 != 0 {
            return Err(FormatError::Malformed(format!("inode format {format:#x}").into()));
        }
        let xattrs_len = if xattr_count == 0 {
            0
        } else {
            12 + (u64::from(xattr_count) - 1) * 4
        };
        let mtime = mtime.cast_signed();
        let attributes = Attributes {
            key: id,
            mode,
            uid,
            gid,
            size,
            mtime,
            mtime_nsec,
            rdev: block,
        };
        Ok(V6Inode {
            attributes,
            layout: format >> 1,
            block,
            xattrs_at: at + inode_size,
            xattrs_len,
        })
    }

    fn attributes<'n>(&self, node: &'n V6Inode) -> &'n Attributes {
        &node.attributes
    }

    fn entries(&self, dir: &V6Inode, each: EachEntry<'_, 'a>) -> Result<(), FormatError> {
        for index in 0..dir.attributes.size.div_ceil(BLOCK_SIZE) {
            self.dir_block(self.data_block(dir, index)?, each)?;
        }
        Ok(())
    }

    fn target(&self, link: &V6Inode) -> Result<&'a [u8], FormatError> {
        if link.attributes.size >= BLOCK_SIZE {
            return Err(FormatError::malformed("the link target is too long"));
        }
        self.data_block(link, 0)
    }

    /// A header of 12 bytes is followed by entries, each aligned to 4: name length, name index, value length, name,
    /// value.
    fn xattrs(&self, node: &V6Inode, each: EachXattr<'_, 'a>) -> Result<(), FormatError> {
        if node.xattrs_len == 0 {
            return Ok(());
        }
        let mut area = self.image.record(node.xattrs_at, node.xattrs_len)?;
        area.u32()?;
        if area.u8()? != 0 {
            return Err(FormatError::unsupported("shared extended attributes"));
        }
        area.bytes(7)?;
        while !area.0.is_empty() {
            let (name_len, index) = (usize::from(area.u8()?), area.u8()?);
            let value_len = usize::from(area.u16()?);
            let prefix = xattr_prefix(index).ok_or(FormatError::malformed("an extended attribute of unknown kind"))?;
            each(prefix, area.bytes(name_len)?, area.bytes(value_len)?)?;
            let padding = (name_len + value_len).next_multiple_of(4) - (name_len + value_len);
            area.bytes(padding)?;
        }
        Ok(())
    }

    fn chunks(&self, file: &V6Inode, count: u64, each: EachChunk<'_>) -> Result<(), FormatError> {
        if count == 0 {
            return Ok(());
        }
        if file.layout != CHUNK_BASED {
            return Err(FormatError::Malformed(
                format!("a file's data in layout {}", file.layout).into(),
            ));
        }
        let map = self.chunk_map()?;
        let at = (file.xattrs_at + file.xattrs_len).next_multiple_of(8);
        let (addresses, _) = self.image.slice(at, count.saturating_mul(8))?.as_chunks::<8>();
        for address in addresses {
            let record = map
                .get(address)
                .ok_or(FormatError::malformed("a chunk is not in the chunk table"))?;
            let chunk = raw_chunk(self.image.slice(*record, CHUNK_RECORD_SIZE)?)?;
            // The offset in the record is that of the first file with this chunk.
            each(RawChunk {
                file_offset: None,
                ..chunk
            })?;
        }
        Ok(())
    }
}
