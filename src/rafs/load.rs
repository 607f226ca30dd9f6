//! Loads a bootstrap file into a [`Tree`].

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
    BootstrapSummary, LoadError, Tree,
    blobs::Blobs,
    bytes::BootstrapBytes,
    catch_panic,
    summary::flag_names,
    v5::V5,
    v6::V6,
    walk::{TreeInput, walk},
};
use crate::blob::layout::MAX_CHUNK_SIZE;

/// Largest bootstrap, in bytes. 1 GiB is about ten million files.
pub const MAX_BOOTSTRAP_BYTES: u64 = 1 << 30;
/// Smallest bootstrap, in bytes: the superblock alone has this size.
const MIN_BOOTSTRAP_BYTES: u64 = 4096;
/// Largest blob table, in bytes. It has room for thousands of blobs; nydus-rafs takes about 40 times its length of
/// memory.
const MAX_BLOB_TABLE_BYTES: u32 = 1 << 20;
/// Maximum number of entries of the prefetch table. The rest of a longer table is ignored.
const MAX_PREFETCH_ENTRIES: usize = 1 << 16;

impl Tree {
    /// Loads a bootstrap. The path may also be one like `/proc/self/fd/N`: its name has no meaning.
    ///
    /// The file is read into memory and must not be larger than [`MAX_BOOTSTRAP_BYTES`]. Takes about 1 µs for each
    /// inode.
    pub fn load(bootstrap: &Path) -> Result<Self, LoadError> {
        let mut file = File::open(bootstrap)?;
        let bytes = read(&mut file)?;
        match catch_panic::catch(|| build(&file, &bytes)) {
            Ok(result) => result,
            Err(message) => Err(LoadError::Panicked { message }),
        }
    }
}

fn read(file: &mut File) -> Result<Vec<u8>, LoadError> {
    let mut bytes = Vec::new();
    let read = file.take(MAX_BOOTSTRAP_BYTES + 1).read_to_end(&mut bytes)? as u64;
    if read < MIN_BOOTSTRAP_BYTES {
        return Err(LoadError::NotRafs);
    }
    if read > MAX_BOOTSTRAP_BYTES {
        let what = "more than 1 GiB".to_owned();
        return Err(LoadError::TooLarge { what });
    }
    Ok(bytes)
}

fn build(file: &File, bytes: &[u8]) -> Result<Tree, LoadError> {
    let image = BootstrapBytes(bytes);
    check_head(image)?;
    let (meta, blobs) = superblock(file)?;
    check_meta(&meta)?;
    let input = TreeInput {
        bootstrap_len: image.len(),
        chunk_size: meta.chunk_size,
        explicit_owners: meta.explicit_uidgid(),
        blobs: Blobs::new(&blobs)?,
        prefetch: prefetch_list(image, &meta),
        summary: summary(image, &meta),
    };
    drop(blobs);
    if meta.is_v5() {
        walk(
            &V5::new(image, meta.inode_table_offset, meta.inode_table_entries),
            input,
        )
    } else {
        let format = V6 {
            image,
            meta_offset: u64::from(meta.meta_blkaddr) * 4096,
            root_nid: meta.root_nid,
            chunk_table_offset: meta.chunk_table_offset,
            chunk_table_size: meta.chunk_table_size,
            chunk_map: OnceCell::new(),
        };
        walk(&format, input)
    }
}

/// Checks what nydus-rafs relies on: that the file is a bootstrap (otherwise nydus-rafs looks for one elsewhere), and
/// that the blob table is not oversized.
fn check_head(image: BootstrapBytes<'_>) -> Result<(), LoadError> {
    let u32_at = |at| image.record(at, 4).and_then(|mut field| field.u32()).ok();
    // Version 5: magic, version and `s_blob_table_size` of RafsV5SuperBlock. Version 6: magic of RafsV6SuperBlock at
    // offset 1024, and `s_blob_table_size` of RafsV6SuperBlockExt, 128 bytes later.
    let table_size = match (u32_at(0), u32_at(4), u32_at(1024)) {
        (Some(0x5241_4653), Some(0x500), _) => u32_at(64),
        (_, _, Some(0xE0F5_E1E2)) => u32_at(1024 + 128 + 16),
        _ => return Err(LoadError::NotRafs),
    };
    match table_size {
        Some(..=MAX_BLOB_TABLE_BYTES) => Ok(()),
        _ => Err(LoadError::TooLarge {
            what: "blob table of more than 1 MiB".to_owned(),
        }),
    }
}

/// Has nydus-rafs parse and check the superblock and the blob table.
fn superblock(file: &File) -> Result<(RafsSuperMeta, Vec<Arc<BlobInfo>>), LoadError> {
    // The path refers to the very file that was read. nydus-rafs takes some blob ids from its last component; the ids
    // in the table are used instead.
    let path = format!("/proc/self/fd/{}", file.as_fd().as_raw_fd());
    // Without a backend, no blob is ever opened.
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

/// The inode numbers in the prefetch table. The table is only a hint, so an invalid one counts as empty.
fn prefetch_list(image: BootstrapBytes<'_>, meta: &RafsSuperMeta) -> Vec<u32> {
    let entries = (meta.prefetch_table_entries as usize).min(MAX_PREFETCH_ENTRIES);
    // Old builders leave the offset 0 if there is nothing to prefetch.
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

fn summary(image: BootstrapBytes<'_>, meta: &RafsSuperMeta) -> BootstrapSummary {
    BootstrapSummary {
        version: if meta.is_v5() { 5 } else { 6 },
        compressor: meta.get_compressor().to_string(),
        digester: meta.get_digester().to_string().to_lowercase(),
        chunk_size: meta.chunk_size,
        features: flag_names(&meta.flags),
        explicit_owners: meta.explicit_uidgid(),
        bootstrap_size: image.len(),
        ..BootstrapSummary::default()
    }
}
