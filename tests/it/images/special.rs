//! Unusual trees and system calls.

use std::{
    collections::{HashMap, HashSet},
    ffi::{CStr, CString},
    fs::{self, File},
    io::{Read as _, Seek as _, SeekFrom},
    os::unix::{
        ffi::OsStrExt as _,
        fs::{DirEntryExt as _, FileExt as _, MetadataExt as _, OpenOptionsExt as _},
    },
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use nydus_rafs::metadata::RafsVersion;
use nydus_store::fixtures::{
    BuildOptions, LayerSource, TreeSpec,
    content::{Random, mixed},
    make_tree,
};
use rustix::fs::{AtFlags, CWD, Timespec, Timestamps, XattrFlags};

use super::{ImageSite, read_fully};
use crate::common::output;

const CHUNK: u32 = 0x10000;

fn options(version: RafsVersion) -> BuildOptions {
    BuildOptions {
        version,
        chunk_size: CHUNK,
        ..BuildOptions::default()
    }
}

#[test]
fn directory_of_100_000_files_is_read_in_bounded_time() {
    // nydus-builder takes quadratic time for version 6.
    for (version, count) in [(RafsVersion::V5, 100_000), (RafsVersion::V6, 10_000)] {
        let site = ImageSite::new();
        let tree = site.path("tree");
        fs::create_dir_all(tree.join("many")).unwrap();
        let name = |number: u64| format!("file-{number:06}");
        for number in 0..count {
            let content = if number % 1000 == 0 { "x" } else { "" };
            fs::write(tree.join("many").join(name(number)), content).unwrap();
        }
        let served = site.serve_image("many", &[LayerSource::Dir(tree)], &options(version));
        assert_many_files(&served.diff().join("many"), count, name);
    }
}

fn assert_many_files(many: &Path, count: u64, name: impl Fn(u64) -> String) {
    let start = Instant::now();
    // Look-ups before any listing.
    let mut random = Random::new(7);
    for _ in 0..500 {
        assert!(many.join(name(random.below(count))).exists());
        assert!(!many.join(name(count + random.below(count))).exists());
    }
    let listed: Vec<_> = (fs::read_dir(many).unwrap())
        .map(|entry| entry.unwrap().file_name())
        .collect();
    let distinct: HashSet<_> = listed.iter().collect();
    assert_eq!((listed.len() as u64, distinct.len() as u64), (count, count));
    assert!((0..count).all(|number| distinct.contains(&std::ffi::OsString::from(name(number)))));
    for _ in 0..100 {
        let number = random.below(count / 1000) * 1000;
        assert_eq!(fs::read_to_string(many.join(name(number))).unwrap(), "x");
    }
    // A linear search per request would take minutes.
    assert!(start.elapsed() < Duration::from_secs(30), "{:?}", start.elapsed());
}

#[test]
fn sparse_file_beyond_4_gib_reads_back() {
    const LENGTH: u64 = (5 << 30) + 12_345;
    let site = ImageSite::new();
    let tree = site.path("tree");
    fs::create_dir(&tree).unwrap();
    let source = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(tree.join("sparse"))
        .unwrap();
    source.set_len(LENGTH).unwrap();
    let mut random = Random::new(5);
    // The last extent ends with the file.
    let offsets = [0, 1 << 30, (2 << 30) - 5000, (4 << 30) - 100_000, LENGTH - 200_000];
    for offset in offsets {
        source.write_all_at(&mixed(200_000, &mut random), offset).unwrap();
    }
    let big = BuildOptions {
        chunk_size: 16 << 20,
        ..BuildOptions::default()
    };
    let served = site.serve_image("sparse", &[LayerSource::Dir(tree)], &big);
    let path = served.diff().join("sparse");
    assert_eq!(fs::metadata(&path).unwrap().len(), LENGTH);
    let file = File::open(&path).unwrap();
    let same = |at: u64, len: usize| {
        let (mut expected, mut actual) = (vec![0; len], vec![0; len]);
        let got = read_fully(&file, &mut actual, at);
        assert_eq!(got, read_fully(&source, &mut expected, at), "{at}");
        assert!(expected == actual, "{at}");
    };
    for offset in offsets {
        same(offset.saturating_sub(10_000), 250_000);
    }
    for _ in 0..50 {
        same(random.below(LENGTH), 100_000);
    }
    same((4 << 30) - 1, 2);
    same(LENGTH - 1, 100);
    same(LENGTH, 1);
}

/// Makes a tree with times, names and xattrs beyond those of [`make_tree`].
fn make_unusual_tree(tree: &Path) {
    fs::create_dir(tree).unwrap();
    let times = [
        ("before-1970", -12_346, 678_000_000),
        ("long-before-1970", -2_000_000_000, 0),
        ("just-before-1970", -1, 999_999_999),
        ("epoch", 0, 0),
        ("after-2038", 3_000_000_000, 1),
        ("after-2106", 5_000_000_000, 999_999_999),
    ];
    for (name, _, _) in times {
        fs::write(tree.join(name), name).unwrap();
    }
    let large = vec![b'z'; 3000];
    for (file, key, value) in [
        ("epoch", "user.large", large.as_slice()),
        ("epoch", "trusted.overlay.redirect", b"/somewhere"),
        ("after-2038", "security.other", b"label"),
        ("after-2038", "trusted.empty", b""),
        ("after-2106", "user.name with spaces \u{e9}", b"\0"),
    ] {
        rustix::fs::setxattr(tree.join(file), key, value, XattrFlags::empty()).unwrap();
    }
    for number in 0..40 {
        let key = format!("user.attribute-{number:02}");
        let value = key.repeat(1 + number % 3);
        rustix::fs::setxattr(tree.join("before-1970"), key, value.as_bytes(), XattrFlags::empty()).unwrap();
    }
    for (name, tv_sec, tv_nsec) in times {
        let time = Timespec { tv_sec, tv_nsec };
        let times = Timestamps {
            last_access: time,
            last_modification: time,
        };
        rustix::fs::utimensat(CWD, tree.join(name), &times, AtFlags::empty()).unwrap();
    }
}

#[test]
fn unusual_times_and_xattrs_read_back() {
    let site = ImageSite::new();
    let tree = site.path("tree");
    make_unusual_tree(&tree);
    for version in [RafsVersion::V5, RafsVersion::V6] {
        let name = format!("{version:?}").to_lowercase();
        site.serve_image(&name, &[LayerSource::Dir(tree.clone())], &options(version))
            .assert_equals(&tree);
    }
}

#[test]
fn system_calls_behave_as_on_a_read_only_file_system() {
    let site = ImageSite::new();
    let tree = site.path("tree");
    let spec = TreeSpec {
        chunk_size: CHUNK,
        ..TreeSpec::default()
    };
    make_tree(&tree, &spec).unwrap();
    let served = site.serve_image("files", &[LayerSource::Dir(tree.clone())], &options(RafsVersion::V6));
    let diff = served.diff();
    let path = diff.join("files/chunks");
    let expected = fs::read(tree.join("files/chunks")).unwrap();
    let length = expected.len() as u64;

    let direct = File::options()
        .read(true)
        .custom_flags(libc::O_DIRECT)
        .open(&path)
        .unwrap();
    assert!(read_aligned(&direct, length) == expected, "O_DIRECT");
    let mut file = File::open(&path).unwrap();
    // SAFETY: the file is on a read-only mount.
    let map = unsafe { memmap2::Mmap::map(&file) }.unwrap();
    assert!(map[..] == expected, "mmap");
    assert_eq!(
        (map[0], map[expected.len() - 1]),
        (expected[0], expected[expected.len() - 1])
    );

    let mut random = Random::new(3);
    for _ in 0..300 {
        let at = random.below(length + 1000);
        let mut bytes = vec![0; random.below(2 * u64::from(CHUNK)) as usize];
        let got = read_fully(if random.below(4) == 0 { &direct } else { &file }, &mut bytes, at);
        let start = expected.len().min(at as usize);
        assert!(
            bytes[..got] == expected[start..expected.len().min(start + bytes.len())],
            "{at}"
        );
    }
    for past in [length, length + 1, 1 << 40] {
        assert_eq!(file.read_at(&mut [0; 10], past).unwrap(), 0);
    }
    file.seek(SeekFrom::Start(length - 3)).unwrap();
    let mut rest = Vec::new();
    assert_eq!(file.read_to_end(&mut rest).unwrap(), 3);

    let fd = &file;
    assert_eq!(rustix::fs::seek(fd, rustix::fs::SeekFrom::Data(5)).unwrap(), 5);
    assert_eq!(rustix::fs::seek(fd, rustix::fs::SeekFrom::Hole(5)).unwrap(), length);
    assert_eq!(
        rustix::fs::seek(fd, rustix::fs::SeekFrom::Data(length)),
        Err(rustix::io::Errno::NXIO)
    );
    for (what, error) in [
        ("make", File::create(diff.join("new")).unwrap_err()),
        ("delete", fs::remove_file(&path).unwrap_err()),
        ("rename", fs::rename(&path, diff.join("other")).unwrap_err()),
        (
            "truncate",
            File::options().write(true).truncate(true).open(&path).unwrap_err(),
        ),
        (
            "chmod",
            fs::set_permissions(&path, path.metadata().unwrap().permissions()).unwrap_err(),
        ),
        ("mkdir", fs::create_dir(diff.join("new")).unwrap_err()),
        ("rmdir", fs::remove_dir(diff.join("dirs/empty")).unwrap_err()),
        ("link", fs::hard_link(&path, diff.join("new")).unwrap_err()),
        (
            "symlink",
            std::os::unix::fs::symlink("x", diff.join("new")).unwrap_err(),
        ),
    ] {
        assert_eq!(error.raw_os_error(), Some(libc::EROFS), "{what}: {error}");
    }
    let error = File::options().write(true).open(&path).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EROFS), "open to write: {error}");
    let stat = rustix::fs::statvfs(&path).unwrap();
    assert_eq!((stat.f_namemax, stat.f_bfree, stat.f_bavail), (255, 0, 0));
    assert_eq!(
        rustix::fs::getxattr(&path, "user.none", &mut [0; 9][..]),
        Err(rustix::io::Errno::NODATA)
    );
    let mut small = [0; 1];
    let file = diff.join("xattrs/file");
    assert_eq!(
        rustix::fs::getxattr(&file, "user.comment", &mut small[..]),
        Err(rustix::io::Errno::RANGE)
    );
    assert_eq!(
        rustix::fs::listxattr(&file, &mut small[..]),
        Err(rustix::io::Errno::RANGE)
    );
    assert_eq!(
        xattr::get(&file, "user.comment").unwrap().as_deref(),
        Some(&b"text"[..])
    );
    served.assert_equals(&tree);
}

fn read_aligned(file: &File, length: u64) -> Vec<u8> {
    // O_DIRECT needs a page-aligned buffer.
    let layout = std::alloc::Layout::from_size_align(length.next_multiple_of(4096) as usize, 4096).unwrap();
    // SAFETY: the layout is not empty; the slice covers the allocation, which is freed with the same layout.
    unsafe {
        let start = std::alloc::alloc_zeroed(layout);
        let bytes = std::slice::from_raw_parts_mut(start, layout.size());
        let got = read_fully(file, bytes, 0);
        let copy = bytes[..got].to_vec();
        std::alloc::dealloc(start, layout);
        copy
    }
}

#[test]
fn inode_numbers_and_link_counts_are_consistent() {
    let site = ImageSite::new();
    let tree = site.path("tree");
    make_tree(
        &tree,
        &TreeSpec {
            chunk_size: CHUNK,
            ..TreeSpec::default()
        },
    )
    .unwrap();
    for version in [RafsVersion::V5, RafsVersion::V6] {
        let name = format!("{version:?}").to_lowercase();
        let served = site.serve_image(&name, &[LayerSource::Dir(tree.clone())], &options(version));
        let diff = served.diff();
        let mut seen: HashMap<u64, u64> = HashMap::new();
        for entry in walkdir::WalkDir::new(&diff).min_depth(1) {
            let entry = entry.unwrap();
            let metadata = fs::symlink_metadata(entry.path()).unwrap();
            assert_eq!(walkdir::DirEntryExt::ino(&entry), metadata.ino(), "{:?}", entry.path());
            *seen.entry(metadata.ino()).or_default() += u64::from(!metadata.is_dir());
            if metadata.is_dir() {
                let subdirectories = fs::read_dir(entry.path()).unwrap();
                let count = subdirectories
                    .filter(|child| child.as_ref().unwrap().file_type().unwrap().is_dir())
                    .count();
                assert_eq!(metadata.nlink(), 2 + count as u64, "{:?}", entry.path());
                let up = fs::metadata(entry.path().join("..")).unwrap().ino();
                assert_eq!(up, fs::metadata(entry.path().parent().unwrap()).unwrap().ino());
            } else {
                assert!(seen[&metadata.ino()] <= metadata.nlink(), "{:?}", entry.path());
            }
        }
        let ino = |name: &str| fs::metadata(diff.join(name)).unwrap().ino();
        assert_eq!(ino("links/hard"), ino("links/deep/hard-below"));
        assert_eq!(ino("links/big-hard"), ino("files/chunks"));
        let first = fs::read_dir(diff.join("links")).unwrap().map(|entry| entry.unwrap());
        let hard = first
            .filter(|entry| entry.file_name() == "hard-too")
            .map(|entry| entry.ino());
        assert_eq!(hard.collect::<Vec<_>>(), [ino("links/hard")]);
        assert_eq!(
            fs::canonicalize(diff.join("dirs/d/d/../../../files/empty")).unwrap(),
            diff.join("files/empty")
        );
        assert_listing_is_seekable(&diff.join("dirs/many"));
    }
}

/// Panics unless `seekdir` to any `telldir` position continues the listing there.
fn assert_listing_is_seekable(dir: &Path) {
    let path = CString::new(dir.as_os_str().as_bytes()).unwrap();
    // SAFETY: only this thread uses the stream, and closes it once; entries are copied before the next call.
    unsafe {
        let stream = libc::opendir(path.as_ptr());
        assert!(!stream.is_null());
        let next = || {
            let position = libc::telldir(stream);
            let entry = libc::readdir(stream);
            (!entry.is_null()).then(|| (position, CStr::from_ptr((*entry).d_name.as_ptr()).to_owned()))
        };
        let all: Vec<_> = std::iter::from_fn(next).collect();
        assert_eq!(all.len(), 602);
        let mut random = Random::new(9);
        for _ in 0..50 {
            let at = random.below(all.len() as u64) as usize;
            libc::seekdir(stream, all[at].0);
            let again: Vec<_> = std::iter::from_fn(next).take(5).collect();
            assert_eq!(again, all[at..all.len().min(at + 5)]);
        }
        libc::rewinddir(stream);
        assert_eq!(std::iter::from_fn(next).count(), all.len());
        libc::closedir(stream);
    }
}

/// Node numbers are below 2^32, as 32-bit `stat` requires.
#[test]
fn programs_without_large_file_support_see_all_files() {
    let site = ImageSite::new();
    let program = site.path("fs32");
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/images/fs32.c");
    let mut compiler = Command::new("gcc");
    compiler
        .args(["-m32", "-nostdlib", "-static", "-o"])
        .arg(&program)
        .arg(source);
    output(&mut compiler);
    let tree = site.path("tree");
    let spec = TreeSpec {
        chunk_size: CHUNK,
        ..TreeSpec::default()
    };
    make_tree(&tree, &spec).unwrap();
    for number in 0..3 {
        let name = format!("image-{number}");
        fs::write(tree.join("name"), &name).unwrap();
        let served = site.serve_image(&name, &[LayerSource::Dir(tree.clone())], &options(RafsVersion::V6));
        let diff = served.diff();
        let paths = walkdir::WalkDir::new(&diff)
            .into_iter()
            .map(|entry| entry.unwrap().into_path());
        let paths: Vec<_> = paths.filter(|path| !path.is_symlink()).take(500).collect();
        assert_eq!(output(Command::new(&program).args(&paths)), "");
    }
}
