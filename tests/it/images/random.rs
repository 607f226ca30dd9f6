//! Random trees (property tests).

use std::{
    cell::Cell,
    ffi::OsStr,
    fs::{self, File},
    os::unix::{ffi::OsStrExt as _, fs::PermissionsExt as _},
    path::{Path, PathBuf},
};

use nydus_rafs::metadata::RafsVersion;
use nydus_store::fixtures::{
    BuildOptions, CompareOptions, LayerSource, compare_trees,
    content::{Random, mixed},
};
use nydus_utils::{compress::Algorithm as Compressor, digest::Algorithm as Digester};
use proptest::{
    collection::vec,
    prelude::*,
    sample::{Index, select},
    test_runner::{Config, TestRunner},
};
use rustix::fs::{AtFlags, CWD, FileType, Mode, Timespec, Timestamps, XattrFlags};

use super::{ImageSite, read_fully};

#[derive(Debug, Clone)]
enum EntryKind {
    Dir,
    /// Length: quarters of a chunk, and a difference in bytes.
    File(u64, i64),
    Symlink(Vec<u8>),
    HardLink(Index),
    Device(FileType, u32),
}

#[derive(Debug, Clone)]
struct Entry {
    parent: Index,
    name: Vec<u8>,
    kind: EntryKind,
    mode: u32,
    owner: (u32, u32),
    mtime: (i64, i64),
    xattrs: Vec<(String, Vec<u8>)>,
}

#[derive(Debug, Clone)]
struct TreeCase {
    entries: Vec<Entry>,
    version: RafsVersion,
    compressor: Compressor,
    digester: Digester,
    chunk_size: u32,
    batch: bool,
    keep_meta: bool,
    seed: u64,
}

/// Strings of bytes allowed in a name: all but `/` and NUL.
fn name_bytes(max: usize) -> impl Strategy<Value = Vec<u8>> {
    let byte = (1..=254u8).prop_map(|byte| if byte == b'/' { 255 } else { byte });
    prop_oneof![8 => vec(byte.clone(), 1..12), 1 => vec(byte, 1..=max)]
}

fn name() -> impl Strategy<Value = Vec<u8>> {
    // Names of whiteouts are reserved.
    let usable = |name: &Vec<u8>| name != b"." && name != b".." && !name.starts_with(b".wh.");
    name_bytes(255).prop_filter("a name", usable)
}

fn entry_kind() -> impl Strategy<Value = EntryKind> {
    let device = select(vec![
        FileType::CharacterDevice,
        FileType::BlockDevice,
        FileType::Fifo,
        FileType::Socket,
    ]);
    prop_oneof![
        4 => Just(EntryKind::Dir),
        8 => (0..14u64, -2..3i64).prop_map(|(quarters, more)| EntryKind::File(quarters, more)),
        2 => name_bytes(1000).prop_map(EntryKind::Symlink),
        2 => any::<Index>().prop_map(EntryKind::HardLink),
        // Device 0:0 would be a whiteout.
        1 => (device, 1..1000u32).prop_map(|(kind, number)| EntryKind::Device(kind, number)),
    ]
}

fn entry() -> impl Strategy<Value = Entry> {
    let key = ("(user|trusted|security)", "[a-z._ -]{1,40}").prop_map(|(space, key)| format!("{space}.{key}"));
    // The kernel validates values of reserved names.
    let key = key.prop_filter("a name that is not reserved", |key| {
        !key.contains("overlay") && !key.starts_with("security.c")
    });
    let id = || prop_oneof![0..3u32, Just(65_535), Just(65_536), Just(u32::MAX - 1)];
    (
        any::<Index>(),
        name(),
        entry_kind(),
        0..0o10000u32,
        (id(), id()),
        (-3_000_000_000..9_000_000_000i64, 0..1_000_000_000i64),
        prop_oneof![3 => Just(Vec::new()), 1 => vec((key, vec(any::<u8>(), 0..200)), 1..4)],
    )
        .prop_map(|(parent, name, kind, mode, owner, mtime, xattrs)| Entry {
            parent,
            name,
            kind,
            mode,
            owner,
            mtime,
            xattrs,
        })
}

fn case() -> impl Strategy<Value = TreeCase> {
    (
        vec(entry(), 1..80),
        select(vec![RafsVersion::V5, RafsVersion::V6]),
        select(vec![
            Compressor::None,
            Compressor::Lz4Block,
            Compressor::GZip,
            Compressor::Zstd,
        ]),
        select(vec![Digester::Blake3, Digester::Sha256]),
        select(vec![0x1000, 0x2000, 0x10000, 0x4_0000]),
        any::<bool>(),
        any::<bool>(),
        any::<u64>(),
    )
        .prop_map(
            |(entries, version, compressor, digester, chunk_size, batch, keep_meta, seed)| TreeCase {
                entries,
                version,
                compressor,
                digester,
                chunk_size,
                batch: batch && version.is_v6(),
                keep_meta,
                seed,
            },
        )
}

/// Makes the tree on disk; returns its regular files.
fn make(root: &Path, case: &TreeCase) -> Vec<PathBuf> {
    fs::create_dir(root).unwrap();
    let mut random = Random::new(case.seed);
    let (mut dirs, mut files, mut made) = (vec![root.to_owned()], Vec::new(), Vec::new());
    for entry in &case.entries {
        let path = entry.parent.get(&dirs).join(OsStr::from_bytes(&entry.name));
        if path.as_os_str().len() > 3000 || fs::symlink_metadata(&path).is_ok() {
            continue;
        }
        match &entry.kind {
            EntryKind::Dir => {
                fs::create_dir(&path).unwrap();
                dirs.push(path.clone());
            }
            EntryKind::File(quarters, more) => {
                let length = (quarters * u64::from(case.chunk_size) / 4).saturating_add_signed(*more);
                // Files with even differences have equal bytes, so that chunks repeat.
                let mut random = if more % 2 == 0 { Random::new(1) } else { random.clone() };
                fs::write(&path, mixed(length as usize, &mut random)).unwrap();
                files.push(path.clone());
            }
            EntryKind::Symlink(target) => std::os::unix::fs::symlink(OsStr::from_bytes(target), &path).unwrap(),
            EntryKind::HardLink(to) if !files.is_empty() => {
                fs::hard_link(to.get(&files), &path).unwrap();
                continue;
            }
            EntryKind::HardLink(_) => continue,
            EntryKind::Device(kind, number) => {
                let number = if matches!(kind, FileType::Fifo | FileType::Socket) {
                    0
                } else {
                    u64::from(*number)
                };
                rustix::fs::mknodat(CWD, &path, *kind, Mode::empty(), number).unwrap();
            }
        }
        random.number();
        made.push((path, entry));
    }
    // Children first: setting their metadata changes the times of their directory.
    for (path, entry) in made.iter().rev() {
        set_metadata(path, entry);
    }
    files
}

fn set_metadata(path: &Path, entry: &Entry) {
    std::os::unix::fs::lchown(path, Some(entry.owner.0), Some(entry.owner.1)).unwrap();
    let symlink = path.is_symlink();
    if !symlink {
        fs::set_permissions(path, fs::Permissions::from_mode(entry.mode)).unwrap();
    }
    for (key, value) in &entry.xattrs {
        // Only files and directories may have `user.` attributes (xattr(7)).
        let plain = path.is_file() || path.is_dir();
        if !symlink && (plain || !key.starts_with("user.")) {
            rustix::fs::setxattr(path, key.as_str(), value, XattrFlags::empty()).unwrap();
        }
    }
    let time = Timespec {
        tv_sec: entry.mtime.0,
        tv_nsec: entry.mtime.1,
    };
    let times = Timestamps {
        last_access: time,
        last_modification: time,
    };
    rustix::fs::utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW).unwrap();
}

#[test]
fn random_trees_read_back() {
    let site = ImageSite::new();
    let number = Cell::new(0);
    let config = Config {
        cases: 20,
        max_shrink_iters: 60,
        failure_persistence: None,
        ..Config::default()
    };
    let result = TestRunner::new(config).run(&case(), |case| {
        number.set(number.get() + 1);
        check_case(&site, &format!("case-{}", number.get()), &case)
    });
    if let Err(error) = result {
        panic!("{error}");
    }
}

fn check_case(site: &ImageSite, name: &str, case: &TreeCase) -> Result<(), TestCaseError> {
    let tree = site.path(name);
    let files = make(&tree, case);
    let options = BuildOptions {
        version: case.version,
        compressor: case.compressor,
        digester: case.digester,
        chunk_size: case.chunk_size,
        batch_size: if case.batch { case.chunk_size } else { 0 },
        keep_meta: case.keep_meta,
        ..BuildOptions::default()
    };
    let served = site.serve_image(name, &[LayerSource::Dir(tree.clone())], &options);
    // Random reads first, while nothing is cached.
    let mut random = Random::new(case.seed);
    for path in &files {
        let expected = fs::read(path).unwrap();
        let file = File::open(served.diff().join(path.strip_prefix(&tree).unwrap())).unwrap();
        for _ in 0..4 {
            let at = random.below(expected.len() as u64 + 2);
            let mut bytes = vec![0; random.below(2 * u64::from(case.chunk_size)) as usize];
            let got = read_fully(&file, &mut bytes, at);
            let start = expected.len().min(at as usize);
            let right = bytes[..got] == expected[start..expected.len().min(start + bytes.len())];
            prop_assert!(right, "{path:?} at {at}");
        }
    }
    let found = compare_trees(&tree, &served.diff(), &CompareOptions::default()).unwrap();
    let differences: Vec<_> = found.iter().take(10).map(ToString::to_string).collect();
    prop_assert!(found.is_empty(), "{}", differences.join("\n"));
    Ok(())
}
