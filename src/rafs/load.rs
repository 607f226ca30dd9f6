//! From a file to a [`Tree`].

use std::{
    cell::OnceCell,
    fs::File,
    io::Read,
    os::fd::{AsFd, AsRawFd},
    path::Path,
    sync::Arc,
};

use nydus_api::ConfigV2;
use nydus_rafs::metadata::{RafsSuper, RafsSuperFlags, RafsSuperMeta};
use nydus_storage::device::BlobInfo;
use nydus_utils::crypt;

use super::{
    LoadError, Summary, Tree,
    blobs::Blobs,
    bytes::Image,
    catch_panic,
    summary::flag_names,
    v5::V5,
    v6::V6,
    walk::{TreeInput, walk},
};
use crate::blob::layout::MAX_CHUNK_SIZE;

/// The largest bootstrap, in bytes: 1 GiB is some ten million files.
pub const MAX_BOOTSTRAP: u64 = 1 << 30;
/// No bootstrap is smaller than its superblock.
const MIN_BOOTSTRAP: u64 = 4096;
/// Room for thousands of blobs; nydus-rafs takes some 40 times the table's length of memory.
const MAX_BLOB_TABLE: u32 = 1 << 20;
/// A list of files to read ahead is a hint: beyond some length it is none.
const MAX_PREFETCH: usize = 1 << 16;

pub(super) fn load(bootstrap: &Path) -> Result<Tree, LoadError> {
    let mut file = File::open(bootstrap)?;
    let bytes = read(&mut file)?;
    match catch_panic::catch(|| build(&file, &bytes)) {
        Ok(result) => result,
        Err(message) => Err(LoadError::Panicked { message }),
    }
}

fn read(file: &mut File) -> Result<Vec<u8>, LoadError> {
    let mut bytes = Vec::new();
    let read = file.take(MAX_BOOTSTRAP + 1).read_to_end(&mut bytes)? as u64;
    if read < MIN_BOOTSTRAP {
        return Err(LoadError::NotRafs);
    }
    if read > MAX_BOOTSTRAP {
        let what = "more than 1 GiB".to_owned();
        return Err(LoadError::TooLarge { what });
    }
    Ok(bytes)
}

fn build(file: &File, bytes: &[u8]) -> Result<Tree, LoadError> {
    let image = Image(bytes);
    check_head(image)?;
    let (meta, blobs) = superblock(file)?;
    check_meta(&meta)?;
    let plan = TreeInput {
        bootstrap_len: image.len(),
        chunk_size: meta.chunk_size,
        explicit_owners: meta.explicit_uidgid(),
        blobs: Blobs::new(&blobs)?,
        prefetch: prefetch_list(image, &meta),
        summary: summary(image, &meta),
    };
    drop(blobs);
    if meta.is_v5() {
        walk(&V5::new(image, meta.inode_table_offset, meta.inode_table_entries), plan)
    } else {
        let format = V6 {
            image,
            meta_offset: u64::from(meta.meta_blkaddr) * 4096,
            root_nid: meta.root_nid,
            chunk_table_offset: meta.chunk_table_offset,
            chunk_table_size: meta.chunk_table_size,
            chunk_map: OnceCell::new(),
        };
        walk(&format, plan)
    }
}

/// What must be known before nydus-rafs may see the file: that it is a bootstrap, since it looks for one in all
/// sorts of places otherwise, and that the table of blobs is not out of proportion.
fn check_head(image: Image<'_>) -> Result<(), LoadError> {
    let u32_at = |at| image.record(at, 4).and_then(|mut field| field.u32()).ok();
    // Version 5: magic, version and `s_blob_table_size` of RafsV5SuperBlock. Version 6: magic of RafsV6SuperBlock at
    // 1024, and `s_blob_table_size` of RafsV6SuperBlockExt, 128 bytes later.
    let table_size = match (u32_at(0), u32_at(4), u32_at(1024)) {
        (Some(0x5241_4653), Some(0x500), _) => u32_at(64),
        (_, _, Some(0xE0F5_E1E2)) => u32_at(1024 + 128 + 16),
        _ => return Err(LoadError::NotRafs),
    };
    match table_size {
        Some(..=MAX_BLOB_TABLE) => Ok(()),
        _ => Err(LoadError::TooLarge {
            what: "a table of blobs of more than 1 MiB".to_owned(),
        }),
    }
}

/// Has nydus-rafs read and check the superblock and the table of blobs.
fn superblock(file: &File) -> Result<(RafsSuperMeta, Vec<Arc<BlobInfo>>), LoadError> {
    // The path names the very file that was read, and its last part can be taken for a blob id, as nydus-rafs does for
    // some blobs; we use the ids in the table.
    let path = format!("/proc/self/fd/{}", file.as_fd().as_raw_fd());
    // Without a backend no blob is ever opened.
    let config = Arc::new(ConfigV2::default());
    let (rafs, _) = RafsSuper::load_from_file(path, config, false).map_err(|err| LoadError::Superblock {
        what: err.to_string().trim().to_owned(),
    })?;
    Ok((rafs.meta, rafs.superblock.get_blob_infos()))
}

fn check_meta(meta: &RafsSuperMeta) -> Result<(), LoadError> {
    let unsupported = |what: &str| Err(LoadError::Unsupported { what: what.to_owned() });
    if meta.flags.contains(RafsSuperFlags::TARTFS_MODE) {
        return unsupported("tarfs images");
    }
    if meta.get_cipher() != crypt::Algorithm::None {
        return unsupported("encrypted images");
    }
    if !meta.chunk_size.is_power_of_two() || !(4096..=MAX_CHUNK_SIZE).contains(&meta.chunk_size) {
        return Err(LoadError::Superblock {
            what: format!("chunk size {}", meta.chunk_size),
        });
    }
    Ok(())
}

/// The inode numbers in the prefetch table. The table is a hint: one that is out of range counts as empty.
fn prefetch_list(image: Image<'_>, meta: &RafsSuperMeta) -> Vec<u32> {
    let entries = (meta.prefetch_table_entries as usize).min(MAX_PREFETCH);
    // Old builders left the offset 0 when there was nothing to prefetch.
    if meta.prefetch_table_offset == 0 {
        return Vec::new();
    }
    let table = image
        .slice(meta.prefetch_table_offset, entries as u64 * 4)
        .unwrap_or_default();
    let (numbers, _) = table.as_chunks::<4>();
    // Zeros pad the table.
    numbers
        .iter()
        .map(|number| u32::from_le_bytes(*number))
        .take_while(|number| *number != 0)
        .collect()
}

fn summary(image: Image<'_>, meta: &RafsSuperMeta) -> Summary {
    Summary {
        version: if meta.is_v5() { 5 } else { 6 },
        compressor: meta.get_compressor().to_string(),
        digester: meta.get_digester().to_string().to_lowercase(),
        chunk_size: meta.chunk_size,
        features: flag_names(&meta.flags),
        explicit_owners: meta.explicit_uidgid(),
        bootstrap_size: image.len(),
        ..Summary::default()
    }
}
