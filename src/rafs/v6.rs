//! The inodes of a RAFS version 6 bootstrap, which is an EROFS image.
//!
//! Format: `metadata/layout/v6.rs` in nydus-rafs, and `fs/erofs/erofs_fs.h` in Linux. Blocks are 4 KiB. Inode number
//! (nid) `n` is at `meta_blkaddr * 4096 + n * 32` and is 32 or 64 bytes, followed by extended attributes, followed by a
//! list of chunk addresses (regular files) or the last, incomplete block of data (directories and links). What RAFS
//! adds is a table of chunks, from which each chunk address is resolved.

use std::{cell::OnceCell, collections::HashMap};

use super::{
    blobs::RawChunk,
    bytes::{Fields, Image},
    error::Fault,
    v5::{CHUNK_RECORD_SIZE, raw_chunk},
    walk::{Attributes, EachChunk, EachEntry, EachXattr, Format},
};

const BLOCK: u64 = 4096;
const SLOT: u64 = 32;
const DIRENT: usize = 12;
/// Offset of `s_build_time` in the image.
const BUILD_TIME: u64 = 1024 + 24;

// Inode data layouts, from bit 1 of `i_format`; bit 0 tells 64-byte inodes.
const FLAT_PLAIN: u16 = 0;
const FLAT_INLINE: u16 = 2;
const CHUNK_BASED: u16 = 4;

/// Where things are in a version 6 bootstrap.
pub(super) struct V6<'a> {
    pub(super) image: Image<'a>,
    /// Offset of inode 0.
    pub(super) meta_offset: u64,
    pub(super) root_nid: u16,
    pub(super) chunk_table_offset: u64,
    /// Length in bytes; 0 if there is no table.
    pub(super) chunk_table_size: u64,
    /// Chunk address to offset of the chunk's record, made at the first file with data.
    pub(super) chunk_map: OnceCell<HashMap<ChunkAddress, u64>>,
}

/// Blob and chunk number, and the chunk's block in the uncompressed blob, as `RafsV6InodeChunkAddr` has them.
pub(super) type ChunkAddress = [u8; 8];

/// An inode's fields, as far as they are needed.
#[derive(Clone, Copy)]
pub(super) struct Node {
    attributes: Attributes,
    layout: u16,
    /// `i_u`: the first data block.
    block: u32,
    /// Where extended attributes start.
    xattrs_at: u64,
    /// Their length, header included.
    xattrs_len: u64,
}

impl<'a> V6<'a> {
    /// Block `index` of a directory's or link's data, cut at its end.
    fn data_block(&self, node: &Node, index: u64) -> Result<&'a [u8], Fault> {
        let size = node.attributes.size;
        let begin = index.checked_mul(BLOCK).filter(|&begin| begin < size);
        let begin = begin.ok_or(Fault::malformed("data ends early"))?;
        let len = BLOCK.min(size - begin);
        let is_last = size - begin <= BLOCK;
        let at = match node.layout {
            FLAT_INLINE if is_last => node.xattrs_at + node.xattrs_len,
            // Neither overflows: blocks are numbered with 32 bits and `begin` is in the same range or beyond the image.
            FLAT_PLAIN | FLAT_INLINE => (u64::from(node.block) * BLOCK).saturating_add(begin),
            other => return Err(Fault::Malformed(format!("data in layout {other}").into())),
        };
        self.image.slice(at, len)
    }

    fn chunk_map(&self) -> Result<&HashMap<ChunkAddress, u64>, Fault> {
        if let Some(map) = self.chunk_map.get() {
            return Ok(map);
        }
        let map = self.read_chunk_table()?;
        Ok(self.chunk_map.get_or_init(|| map))
    }

    fn read_chunk_table(&self) -> Result<HashMap<ChunkAddress, u64>, Fault> {
        if self.chunk_table_size == 0 {
            return Err(Fault::NoChunkTable);
        }
        let table = self.image.slice(self.chunk_table_offset, self.chunk_table_size)?;
        let mut map = HashMap::with_capacity(table.len() / CHUNK_RECORD_SIZE as usize);
        let mut at = self.chunk_table_offset;
        for record in table.chunks_exact(CHUNK_RECORD_SIZE as usize) {
            let chunk = raw_chunk(record)?;
            // A chunk no address can name is of no use; if it should have been, its file will miss it.
            if let Some(address) = address_of(&chunk) {
                map.insert(address, at);
            }
            at += CHUNK_RECORD_SIZE;
        }
        Ok(map)
    }

    fn dir_block(&self, block: &'a [u8], each: EachEntry<'_, 'a>) -> Result<(), Fault> {
        let broken = || Fault::malformed("a directory block is inconsistent");
        // The first name starts where the entries end.
        let names_at = usize::from(Fields(block.get(8..10).ok_or_else(broken)?).u16()?);
        if names_at == 0 || names_at % DIRENT != 0 {
            return Err(broken());
        }
        let mut entries = block
            .get(..names_at)
            .ok_or_else(broken)?
            .chunks_exact(DIRENT)
            .peekable();
        while let Some(entry) = entries.next() {
            let mut entry = Fields(entry);
            let (nid, begin) = (entry.u64()?, usize::from(entry.u16()?));
            let name = match entries.peek() {
                Some(next) => {
                    let end = usize::from(Fields(next.get(8..10).ok_or_else(broken)?).u16()?);
                    block.get(begin..end).ok_or_else(broken)?
                }
                // The last name ends with the block or at a NUL.
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

/// The address by which files refer to a chunk, if there can be one.
fn address_of(chunk: &RawChunk) -> Option<ChunkAddress> {
    // Blob numbers count from 1 in addresses, 0 being the bootstrap itself.
    let blob = u8::try_from(chunk.blob).ok()?.checked_add(1)?;
    let [low, mid, high, 0] = chunk.index.to_le_bytes() else {
        return None;
    };
    // nydus keeps the lower 32 bits of the block number.
    let [a, b, c, d, ..] = (chunk.uncompressed_offset / BLOCK).to_le_bytes();
    Some([low, mid, blob, high, a, b, c, d])
}

/// The prefix that stands for a name index (`EROFS_XATTR_INDEX_*`).
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
    type Node = Node;

    fn root(&self) -> u64 {
        u64::from(self.root_nid)
    }

    fn node(&self, id: u64) -> Result<Node, Fault> {
        let at = id
            .checked_mul(SLOT)
            .and_then(|offset| offset.checked_add(self.meta_offset));
        let at = at.ok_or(Fault::malformed("an inode number is out of range"))?;
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
        inode.u32()?; // the number for `stat`, which is ours to choose
        let (uid, gid, mtime, mtime_nsec) = if extended {
            (inode.u32()?, inode.u32()?, inode.u64()?, inode.u32()?)
        } else {
            // Short inodes are as old as the image.
            let mut built = self.image.record(BUILD_TIME, 12)?;
            (
                u32::from(inode.u16()?),
                u32::from(inode.u16()?),
                built.u64()?,
                built.u32()?,
            )
        };
        if format >> 4 != 0 {
            return Err(Fault::Malformed(format!("inode format {format:#x}").into()));
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
        Ok(Node {
            attributes,
            layout: format >> 1,
            block,
            xattrs_at: at + inode_size,
            xattrs_len,
        })
    }

    fn attributes<'n>(&self, node: &'n Node) -> &'n Attributes {
        &node.attributes
    }

    fn entries(&self, dir: &Node, each: EachEntry<'_, 'a>) -> Result<(), Fault> {
        for index in 0..dir.attributes.size.div_ceil(BLOCK) {
            self.dir_block(self.data_block(dir, index)?, each)?;
        }
        Ok(())
    }

    fn target(&self, link: &Node) -> Result<&'a [u8], Fault> {
        if link.attributes.size >= BLOCK {
            return Err(Fault::malformed("the link target is too long"));
        }
        self.data_block(link, 0)
    }

    /// A header of 12 bytes; then, each aligned to 4, name length, name index, value length, name and value.
    fn xattrs(&self, node: &Node, each: EachXattr<'_, 'a>) -> Result<(), Fault> {
        if node.xattrs_len == 0 {
            return Ok(());
        }
        let mut area = self.image.record(node.xattrs_at, node.xattrs_len)?;
        area.u32()?;
        if area.u8()? != 0 {
            return Err(Fault::unsupported("shared extended attributes"));
        }
        area.bytes(7)?;
        while !area.0.is_empty() {
            let (name_len, index) = (usize::from(area.u8()?), area.u8()?);
            let value_len = usize::from(area.u16()?);
            let prefix = xattr_prefix(index).ok_or(Fault::malformed("an extended attribute of unknown kind"))?;
            each(prefix, area.bytes(name_len)?, area.bytes(value_len)?)?;
            let padding = (name_len + value_len).next_multiple_of(4) - (name_len + value_len);
            area.bytes(padding)?;
        }
        Ok(())
    }

    fn chunks(&self, file: &Node, count: u64, each: EachChunk<'_>) -> Result<(), Fault> {
        if count == 0 {
            return Ok(());
        }
        if file.layout != CHUNK_BASED {
            return Err(Fault::Malformed(
                format!("a file's data in layout {}", file.layout).into(),
            ));
        }
        let map = self.chunk_map()?;
        let at = (file.xattrs_at + file.xattrs_len).next_multiple_of(8);
        let (addresses, _) = self.image.slice(at, count.saturating_mul(8))?.as_chunks::<8>();
        for address in addresses {
            let record = map
                .get(address)
                .ok_or(Fault::malformed("a chunk is not in the chunk table"))?;
            let chunk = raw_chunk(self.image.slice(*record, CHUNK_RECORD_SIZE)?)?;
            // The record tells of the first file that had the chunk.
            each(RawChunk {
                file_offset: None,
                ..chunk
            })?;
        }
        Ok(())
    }
}
