//! Loads images made by nydus' own builder.

use std::{
    collections::BTreeMap,
    ffi::OsStr,
    fs,
    os::unix::{
        ffi::OsStrExt,
        fs::{MetadataExt, PermissionsExt, symlink},
    },
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

use nydus_api::ConfigV2;
use nydus_builder::{
    ArtifactStorage, BlobManager, BootstrapManager, BuildContext, Builder, ConversionType, DirectoryBuilder, Features,
    Prefetch, WhiteoutSpec, attributes::Attributes,
};
use nydus_rafs::metadata::{RafsSuper, RafsVersion};
use nydus_utils::{compress, digest};

use super::*;
use crate::blob::layout::{MetaLocation, Packing};

pub(super) const CHUNK: u32 = 4096 * 16;

/// Builds an image of `source` in `out` and returns the bootstrap.
pub(super) fn build(source: &Path, out: &Path, version: RafsVersion) -> PathBuf {
    let bootstrap = out.join(format!("v{version}.boot"));
    let blobs = ArtifactStorage::FileDir((out.to_owned(), String::new()));
    let mut context = BuildContext::new(
        String::new(),
        version.is_v6(),
        0,
        compress::Algorithm::Zstd,
        digest::Algorithm::Blake3,
        true,
        WhiteoutSpec::Oci,
        ConversionType::DirectoryToRafs,
        source.to_owned(),
        Prefetch::default(),
        Some(blobs),
        None,
        false,
        Features::new(),
        false,
        Attributes::default(),
    );
    context.set_fs_version(version);
    context.set_chunk_size(CHUNK);
    let mut bootstraps = BootstrapManager::new(Some(ArtifactStorage::SingleFile(bootstrap.clone())), None);
    let mut blobs = BlobManager::new(digest::Algorithm::Blake3, false);
    DirectoryBuilder::new()
        .build(&mut context, &mut bootstraps, &mut blobs)
        .unwrap();
    bootstrap
}

/// Fills a directory with files of all kinds.
pub(super) fn sample(dir: &Path, many: usize) {
    fs::create_dir_all(dir.join("usr/lib/deep/er")).unwrap();
    fs::create_dir(dir.join("empty")).unwrap();
    fs::create_dir(dir.join("many")).unwrap();
    for n in 0..many {
        fs::write(
            dir.join(format!("many/file-{n:05}")),
            if n % 3 == 0 { String::new() } else { n.to_string() },
        )
        .unwrap();
    }
    let noise: Vec<u8> = (0..5 * CHUNK + 123)
        .map(|n| (n.wrapping_mul(2_654_435_761) >> 11) as u8 ^ (n >> 16) as u8)
        .collect();
    fs::write(dir.join("usr/big"), &noise).unwrap();
    fs::write(dir.join("usr/zeros"), vec![0; 3 * CHUNK as usize]).unwrap();
    fs::hard_link(dir.join("usr/big"), dir.join("usr/lib/big-too")).unwrap();
    fs::hard_link(dir.join("usr/big"), dir.join("another")).unwrap();
    symlink("../usr/big", dir.join("usr/link")).unwrap();
    symlink("x".repeat(4000), dir.join("long-link")).unwrap();
    for name in [
        &b"\xff\xfe bytes"[..],
        b"  spaces ",
        b"new\nline",
        "smørrebrød".as_bytes(),
        &[b'n'; 255],
        b"-",
        b"!",
    ] {
        fs::write(dir.join(OsStr::from_bytes(name)), name).unwrap();
    }
    let old = SystemTime::UNIX_EPOCH - Duration::from_secs(86_400 * 365);
    fs::File::options()
        .write(true)
        .open(dir.join("-"))
        .unwrap()
        .set_modified(old)
        .unwrap();
    fs::set_permissions(dir.join("!"), fs::Permissions::from_mode(0o4751)).unwrap();
    std::os::unix::fs::lchown(dir.join("!"), Some(100_000), Some(70_000)).unwrap();
    special_files(dir);
    xattr::set(dir.join("usr/big"), "user.one", b"1").unwrap();
    for name in ["usr/big", "another", "!", "empty"] {
        xattr::set(dir.join(name), "user.same", b"same value").unwrap();
        xattr::set(dir.join(name), "trusted.empty", b"").unwrap();
    }
}

fn special_files(dir: &Path) {
    use rustix::fs::{CWD, FileType, Mode, makedev, mknodat};
    let make = |name: &str, kind, rdev| mknodat(CWD, dir.join(name), kind, Mode::from_raw_mode(0o640), rdev).unwrap();
    make("fifo", FileType::Fifo, 0);
    make("sock", FileType::Socket, 0);
    // Creating devices is not permitted on all test machines.
    if mknodat(
        CWD,
        dir.join("char"),
        FileType::CharacterDevice,
        Mode::from_raw_mode(0o600),
        makedev(5, 300),
    )
    .is_ok()
    {
        make("block", FileType::BlockDevice, makedev(259, 7));
    }
}

struct Case {
    _dir: tempfile::TempDir,
    source: PathBuf,
    bootstrap: PathBuf,
    tree: Tree,
}

fn case(version: RafsVersion, many: usize) -> Case {
    let dir = tempfile::tempdir().unwrap();
    let (source, out) = (dir.path().join("source"), dir.path().join("out"));
    fs::create_dir(&out).unwrap();
    sample(&source, many);
    let bootstrap = build(&source, &out, version);
    let tree = Tree::load(&bootstrap).unwrap();
    Case {
        _dir: dir,
        source,
        bootstrap,
        tree,
    }
}

fn both(test: impl Fn(Case)) {
    for version in [RafsVersion::V5, RafsVersion::V6] {
        test(case(version, 50));
    }
}

fn find(tree: &Tree, path: &str) -> Ino {
    path.split('/').fold(ROOT, |dir, name| {
        tree.lookup(dir, name.as_bytes()).unwrap_or_else(|| panic!("{path}"))
    })
}

/// Compares `dir` of the tree with `path`, recursively. Records which host inode corresponds to which inode of the
/// tree.
fn compare(tree: &Tree, dir: Ino, path: &Path, links: &mut BTreeMap<u64, Ino>) {
    let mut names: Vec<_> = fs::read_dir(path)
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    names.sort_unstable_by(|a, b| a.as_bytes().cmp(b.as_bytes()));
    let listed: Vec<_> = tree.entries(dir).iter().map(|entry| tree.name(entry)).collect();
    assert_eq!(
        listed,
        names.iter().map(|name| name.as_bytes()).collect::<Vec<_>>(),
        "{path:?}"
    );
    for name in &names {
        let (ino, path) = (tree.lookup(dir, name.as_bytes()).unwrap(), path.join(name));
        let (inode, meta) = (tree.inode(ino).unwrap(), fs::symlink_metadata(&path).unwrap());
        assert_eq!(*links.entry(meta.ino()).or_insert(ino), ino, "{path:?}");
        compare_inode(tree, ino, &path, &meta);
        if inode.is_dir() {
            assert_eq!(tree.parent(ino), dir);
            compare(tree, ino, &path, links);
        }
    }
}

fn compare_inode(tree: &Tree, ino: Ino, path: &Path, meta: &fs::Metadata) {
    let inode = tree.inode(ino).unwrap();
    assert_eq!(
        (inode.mode, inode.uid, inode.gid),
        (meta.mode(), meta.uid(), meta.gid()),
        "{path:?}"
    );
    // Version 6 stores no time where a short inode suffices.
    if inode.mtime != 0 {
        assert_eq!(
            (inode.mtime, i64::from(inode.mtime_nsec)),
            (meta.mtime(), meta.mtime_nsec()),
            "{path:?}"
        );
    }
    assert_eq!(u64::from(inode.rdev), meta.rdev(), "{path:?}");
    match inode.kind() {
        FileKind::Directory => {
            let subdirectories = fs::read_dir(path)
                .unwrap()
                .filter(|e| e.as_ref().unwrap().path().is_dir());
            let is_link = |e: &std::io::Result<fs::DirEntry>| e.as_ref().unwrap().file_type().unwrap().is_symlink();
            assert_eq!(inode.nlink as usize, 2 + subdirectories.filter(|e| !is_link(e)).count());
            assert_eq!(inode.size % 4096, 0);
        }
        kind => {
            assert_eq!(u64::from(inode.nlink), meta.nlink(), "{path:?}");
            assert_eq!(inode.size, meta.size(), "{path:?}");
            let target = (kind == FileKind::Symlink).then(|| fs::read_link(path).unwrap().into_os_string());
            assert_eq!(tree.target(ino), target.as_ref().map(|target| target.as_bytes()));
        }
    }
    if inode.kind() != FileKind::Symlink {
        let mut wanted: Vec<_> = xattr::list(path).unwrap().collect();
        wanted.retain(|name| !name.as_bytes().starts_with(b"system.") && !name.as_bytes().starts_with(b"security."));
        wanted.sort_unstable();
        assert_eq!(
            tree.xattrs(ino).map(|(name, _)| name).collect::<Vec<_>>(),
            wanted.iter().map(|n| n.as_bytes()).collect::<Vec<_>>()
        );
        for name in wanted {
            assert_eq!(
                tree.xattr(ino, name.as_bytes()),
                xattr::get(path, &name).unwrap().as_deref()
            );
        }
    }
    compare_chunks(tree, ino, path);
}

fn compare_chunks(tree: &Tree, ino: Ino, path: &Path) {
    if tree.inode(ino).unwrap().kind() != FileKind::Regular {
        assert!(tree.chunks(ino).is_empty());
        return;
    }
    let data = fs::read(path).unwrap();
    assert_eq!(tree.chunks(ino).len(), data.len().div_ceil(CHUNK as usize));
    for (part, reference) in data.chunks(CHUNK as usize).zip(tree.chunks(ino)) {
        let blob = &tree.blobs()[usize::from(reference.blob)];
        let chunk = &blob.chunks[reference.chunk as usize];
        assert_eq!(blob.digester, digest::Algorithm::Blake3);
        assert_eq!(&chunk.digest, blake3::hash(part).as_bytes());
        assert_eq!(chunk.uncompressed_size as usize, part.len());
    }
}

#[test]
fn trees_match_their_source() {
    both(|case| {
        let mut links = BTreeMap::new();
        compare(&case.tree, ROOT, &case.source, &mut links);
        assert_eq!(links.len() as u64 + 1, case.tree.total_files());
        assert_eq!(case.tree.parent(ROOT), ROOT);
        assert_eq!(case.tree.inode(find(&case.tree, "usr/big")).unwrap().nlink, 3);
        assert_eq!(find(&case.tree, "another"), find(&case.tree, "usr/lib/big-too"));
        assert!(case.tree.inode(find(&case.tree, "-")).unwrap().mtime < 0);
    });
}

#[test]
fn blobs_match_the_blob_table() {
    both(|case| {
        let [blob] = case.tree.blobs() else { panic!("one blob") };
        let file = case.bootstrap.with_file_name(&blob.id);
        assert_eq!(fs::metadata(file).unwrap().len(), blob.compressed_size);
        assert_eq!(blob.packing, Packing::PerChunk);
        assert_eq!(blob.compressor, compress::Algorithm::Zstd);
        assert_eq!(blob.chunk_count as usize, blob.chunks.len());
        assert!(blob.chunks.is_sorted_by(|a, b| a.index < b.index));
        assert_eq!(blob.meta != MetaLocation::default(), case.tree.summary().version == 6);
        // All parts of a file of zeros are the same chunk.
        let zeros = case.tree.chunks(find(&case.tree, "usr/zeros"));
        assert!(zeros.len() == 3 && zeros.iter().all(|chunk| *chunk == zeros[0]));
    });
}

#[test]
fn look_ups_of_missing_things_fail() {
    both(|case| {
        let (tree, big) = (&case.tree, find(&case.tree, "usr/big"));
        for name in [&b"."[..], b"..", b"", b"nonesuch", b"usr/big", &[0xff; 256]] {
            assert_eq!(tree.lookup(ROOT, name), None);
        }
        assert_eq!(tree.lookup(big, b"usr"), None);
        assert_eq!(tree.lookup(u32::MAX, b"usr"), None);
        assert!(tree.inode(tree.len()).is_none() && tree.entries(tree.len()).is_empty());
        assert!(tree.entries(big).is_empty() && tree.chunks(ROOT).is_empty() && tree.target(big).is_none());
        assert_eq!(tree.xattr(big, b"user.none"), None);
        assert_eq!(tree.xattrs(u32::MAX).count(), 0);
        assert_eq!(tree.parent(u32::MAX), ROOT);
    });
}

#[test]
fn summary_counts_files_and_chunks() {
    both(|case| {
        let summary = case.tree.summary();
        let kinds = summary.kinds;
        assert_eq!(
            (kinds.directories, kinds.symlinks, kinds.fifos, kinds.sockets),
            (7, 2, 1, 1)
        );
        assert_eq!(kinds.regular, 50 + 2 + 7);
        assert_eq!(
            (summary.hard_links, summary.chunk_size, summary.xattr_sets),
            (2, CHUNK, 2)
        );
        assert_eq!((&*summary.compressor, &*summary.digester), ("zstd", "blake3"));
        assert!(
            summary.features.iter().any(|name| name == "EXPLICIT_UID_GID"),
            "{:?}",
            summary.features
        );
        assert_eq!(summary.blobs[0].chunks_used, summary.chunks);
        assert!(summary.chunk_refs > summary.chunks && summary.chunk_bytes < summary.file_bytes);
        serde_json::to_string(summary).unwrap();
    });
}

/// Adds the table afterwards, because the builder reads its prefetch list from standard input only.
#[test]
fn prefetch_lists_become_inode_numbers() {
    both(|case| {
        let mut bytes = fs::read(&case.bootstrap).unwrap();
        let at = bytes.len() as u64;
        let mut put = |at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);
        // Offset of the table and number of its entries (version 5) or bytes (version 6) in the superblock.
        let root = if case.tree.summary().version == 5 {
            put(40, &at.to_le_bytes());
            put(60, &6_u32.to_le_bytes());
            1
        } else {
            put(1024 + 128 + 40, &at.to_le_bytes());
            put(1024 + 128 + 48, &24_u32.to_le_bytes());
            u32::from(u16::from_le_bytes([bytes[1024 + 14], bytes[1024 + 15]]))
        };
        for number in [root, 0x7fff_ffff, root, 0, root, 0] {
            bytes.extend_from_slice(&u32::to_le_bytes(number));
        }
        bytes.resize(bytes.len().next_multiple_of(4096), 0);
        let path = case.bootstrap.with_file_name("prefetch");
        fs::write(&path, bytes).unwrap();
        assert_eq!(Tree::load(&path).unwrap().summary().prefetch, [ROOT]);
        assert!(case.tree.summary().prefetch.is_empty());
    });
}

#[test]
fn inode_numbers_are_stable_and_independent_of_the_file_name() {
    both(|case| {
        let odd = case.bootstrap.with_file_name(OsStr::from_bytes(b"...\xff"));
        fs::copy(&case.bootstrap, &odd).unwrap();
        let again = Tree::load(&odd).unwrap();
        let file = fs::File::open(&odd).unwrap();
        fs::remove_file(&odd).unwrap();
        let unlinked = Tree::load(Path::new(&format!(
            "/proc/self/fd/{}",
            std::os::fd::AsRawFd::as_raw_fd(&file)
        )))
        .unwrap();
        for tree in [again, unlinked] {
            assert_eq!(tree.arena, case.tree.arena);
            assert_eq!(tree.chunks, case.tree.chunks);
            assert_eq!(tree.blobs[0].id, case.tree.blobs[0].id);
            let inos = |tree: &Tree| tree.entries.iter().map(|entry| entry.ino).collect::<Vec<_>>();
            assert_eq!(inos(&tree), inos(&case.tree));
        }
    });
}

/// Compares the decoding with that of nydus-rafs.
#[test]
fn chunks_match_those_of_nydus_rafs() {
    both(|case| {
        let (rafs, _) = RafsSuper::load_from_file(&case.bootstrap, Arc::new(ConfigV2::default()), false).unwrap();
        let mut seen = 0;
        rafs.walk_directory::<PathBuf>(rafs.superblock.root_ino(), None, &mut |theirs, path| {
            let path = path.strip_prefix("/").unwrap();
            let ino = path
                .iter()
                .fold(ROOT, |dir, name| case.tree.lookup(dir, name.as_bytes()).unwrap());
            for (k, ours) in case.tree.chunks(ino).iter().enumerate() {
                let theirs = theirs.get_chunk_info(k as u32)?;
                let ours = &case.tree.blobs()[usize::from(ours.blob)].chunks[ours.chunk as usize];
                assert_eq!(ours.index, theirs.id());
                assert_eq!(ours.digest, theirs.chunk_id().data);
                assert_eq!(ours.compressed, theirs.is_compressed());
                assert_eq!(
                    (ours.compressed_offset, ours.compressed_size),
                    (theirs.compressed_offset(), theirs.compressed_size())
                );
                assert_eq!(
                    (ours.uncompressed_offset, ours.uncompressed_size),
                    (theirs.uncompressed_offset(), theirs.uncompressed_size())
                );
                seen += 1;
            }
            Ok(())
        })
        .unwrap();
        assert!(seen > 10);
    });
}

#[test]
fn large_directories_are_loaded_compactly() {
    for version in [RafsVersion::V5, RafsVersion::V6] {
        let case = case(version, 5000);
        let many = find(&case.tree, "many");
        assert_eq!(case.tree.entries(many).len(), 5000);
        assert!(case.tree.lookup(many, b"file-04999").is_some());
        let per_inode = case.tree.memory() / case.tree.inodes.len();
        assert!(per_inode <= 100, "{per_inode} bytes");
    }
}

#[test]
fn files_that_are_not_bootstraps_are_rejected() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    assert!(matches!(Tree::load(&file), Err(LoadError::Io(_))));
    assert!(matches!(Tree::load(dir.path()), Err(LoadError::Io(_))));
    for len in [0, 1, 4095, 4096, 100_000] {
        fs::write(&file, vec![7; len]).unwrap();
        assert!(matches!(Tree::load(&file), Err(LoadError::NotRafs)));
    }
}
