//! Damaged and hostile bootstraps: loading returns a consistent tree or an error.

use std::{fs, os::unix::fs::FileExt, path::Path, time::Instant};

use nydus_rafs::metadata::RafsVersion;

use super::*;
use crate::{fixtures::content::Random, fuzzing::read_everything};

/// Overwrites a few bytes, mostly non-zero ones, with values that are likely to break a parser.
fn damage(bytes: &mut Vec<u8>, random: &mut Random, used: &[usize]) {
    let mut below = |bound: usize| random.below(bound as u64) as usize;
    for _ in 0..=below(3) {
        let at = match below(8) {
            0 => below(2048.min(bytes.len())),
            1 => below(bytes.len()),
            _ => used[below(used.len())].min(bytes.len() - 1),
        };
        match below(6) {
            0 => bytes[at] ^= 1 << below(8),
            1 => bytes[at] = below(256) as u8,
            2 => bytes[at..].iter_mut().take(4).for_each(|byte| *byte = 0xff),
            3 => bytes[at..].iter_mut().take(8).for_each(|byte| *byte = 0),
            4 => {
                let (from, len) = (below(bytes.len()), 1 + below(64));
                let part: Vec<u8> = bytes[from..].iter().copied().take(len).collect();
                bytes[at..].iter_mut().zip(part).for_each(|(byte, new)| *byte = new);
            }
            _ => bytes[at] = bytes[at].wrapping_add(1),
        }
    }
    if below(20) == 0 {
        bytes.truncate(1 + below(bytes.len()));
    }
    if below(20) == 0 {
        let len = bytes.len().div_ceil(4096) * 4096;
        bytes.resize(len, 0);
    }
}

fn load_damaged(version: RafsVersion, rounds: usize) {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source");
    tests::sample(&source, 40);
    let bootstrap = tests::build(&source, dir.path(), version);
    let whole = fs::read(bootstrap).unwrap();
    let used: Vec<usize> = (0..whole.len()).filter(|&at| whole[at] != 0).collect();
    let target = dir.path().join("damaged");
    let (mut random, mut loaded, mut panicked) = (Random::new(0x5eed + u64::from(version.is_v6())), 0, Vec::new());
    for round in 0..rounds {
        let mut bytes = whole.clone();
        damage(&mut bytes, &mut random, &used);
        fs::write(&target, &bytes).unwrap();
        let begun = Instant::now();
        match Tree::load(&target) {
            Ok(tree) => {
                read_everything(&tree);
                loaded += 1;
            }
            Err(LoadError::Panicked { message }) => panicked.push((round, message)),
            Err(error) => assert!(error.to_string().len() < 10_000),
        }
        assert!(begun.elapsed().as_secs() < 30, "round {round}");
    }
    // Checks that the damage is neither always fatal nor always harmless.
    assert!(
        loaded > rounds / 20 && loaded < rounds * 19 / 20,
        "{loaded} of {rounds}"
    );
    assert!(panicked.is_empty(), "{panicked:?}");
}

#[test]
fn damaged_version_5_loads_consistently_or_fails() {
    load_damaged(RafsVersion::V5, 3000);
}

#[test]
fn damaged_version_6_loads_consistently_or_fails() {
    load_damaged(RafsVersion::V6, 3000);
}

/// Builds a small version 6 image, changes it and loads it.
fn load_changed(change: impl FnOnce(&fs::File, &Path)) -> Result<Tree, LoadError> {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source");
    tests::sample(&source, 3);
    let bootstrap = tests::build(&source, dir.path(), RafsVersion::V6);
    change(
        &fs::File::options().read(true).write(true).open(&bootstrap).unwrap(),
        &bootstrap,
    );
    Tree::load(&bootstrap)
}

/// Offset of `s_chunk_table_size` in the extended superblock.
const CHUNK_TABLE_SIZE_OFFSET: u64 = 1024 + 128 + 32;
/// Offset of `s_blob_table_size`, which follows `s_blob_table_offset`.
const BLOB_TABLE_SIZE_OFFSET: u64 = 1024 + 128 + 16;

fn blob_table(file: &fs::File) -> u64 {
    let mut offset = [0; 8];
    file.read_exact_at(&mut offset, BLOB_TABLE_SIZE_OFFSET - 8).unwrap();
    u64::from_le_bytes(offset)
}

#[test]
fn version_6_without_chunk_table_is_rejected() {
    let result = load_changed(|file, _| file.write_all_at(&[0; 8], CHUNK_TABLE_SIZE_OFFSET).unwrap());
    assert!(matches!(result, Err(LoadError::NoChunkTable)), "{result:?}");
}

#[test]
fn oversized_blob_table_is_rejected() {
    let result = load_changed(|file, _| file.write_all_at(&[0xff; 4], BLOB_TABLE_SIZE_OFFSET).unwrap());
    assert!(matches!(result, Err(LoadError::TooLarge { .. })), "{result:?}");
}

#[test]
fn blob_ids_that_are_no_digests_are_rejected() {
    let result = load_changed(|file, _| file.write_all_at(b"../../../etc/passwd", blob_table(file)).unwrap());
    assert!(matches!(result, Err(LoadError::Malformed { .. })), "{result:?}");
    let result = load_changed(|file, _| file.write_all_at(b"ABCDEF", blob_table(file)).unwrap());
    assert!(matches!(result, Err(LoadError::Malformed { .. })), "{result:?}");
}

/// Redirects the directory entry `from` of the root to the root itself or to an invalid inode.
fn redirect_entry(file: &fs::File, path: &Path, from: &[u8], to_root: bool) {
    let bytes = fs::read(path).unwrap();
    let meta_block = u32::from_le_bytes(bytes[1024 + 40..][..4].try_into().unwrap());
    let root_nid = u64::from(u16::from_le_bytes(bytes[1024 + 14..][..2].try_into().unwrap()));
    // The root's entries: the block that contains `.`, `..` and the name. Each entry has 12 bytes; names follow.
    let root = meta_block as usize * 4096 + root_nid as usize * 32;
    let plain = bytes[root] >> 1 & 7 == 0;
    let inode_size = if bytes[root] & 1 == 0 { 32 } else { 64 };
    let block = u32::from_le_bytes(bytes[root + 16..][..4].try_into().unwrap());
    let at = if plain {
        block as usize * 4096
    } else {
        root + inode_size
    };
    let data = &bytes[at..];
    let count = usize::from(u16::from_le_bytes([data[8], data[9]])) / 12;
    let name_at = |n: usize| usize::from(u16::from_le_bytes([data[n * 12 + 8], data[n * 12 + 9]]));
    let entry = (0..count - 1)
        .find(|&n| &data[name_at(n)..name_at(n + 1)] == from)
        .unwrap();
    let nid = if to_root { root_nid } else { u64::MAX / 32 };
    file.write_all_at(&nid.to_le_bytes(), (at + entry * 12) as u64).unwrap();
}

#[test]
fn directory_cycles_and_invalid_inodes_are_rejected() {
    let result = load_changed(|file, path| redirect_entry(file, path, b"empty", true));
    assert!(
        matches!(&result, Err(LoadError::Malformed { location, .. }) if location == "/empty"),
        "{result:?}"
    );
    let result = load_changed(|file, path| redirect_entry(file, path, b"empty", false));
    assert!(
        matches!(&result, Err(LoadError::Malformed { location, .. }) if location == "/empty"),
        "{result:?}"
    );
}
