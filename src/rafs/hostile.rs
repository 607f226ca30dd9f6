//! Images that no builder makes, passed to the walk directly.

use super::{
    blobs::{Blobs, RawChunk},
    error::FormatError,
    walk::{Attributes, EachChunk, EachEntry, EachXattr, Format, TreeInput, walk},
    *,
};

type Children = fn(u64) -> Vec<(&'static [u8], u64)>;

/// A format of which inodes below 1000 are regular files and all others are directories.
struct FakeFormat {
    children: Children,
    mode: u32,
    size: u64,
    target: &'static [u8],
    xattrs: Vec<(&'static [u8], Vec<u8>)>,
    chunks: Vec<RawChunk>,
}

const BASE: FakeFormat = FakeFormat {
    children: |_| Vec::new(),
    mode: 0o100_644,
    size: 0,
    target: b"",
    xattrs: Vec::new(),
    chunks: Vec::new(),
};

impl Format<'static> for FakeFormat {
    type RawInode = Attributes;

    fn root(&self) -> u64 {
        1000
    }

    fn node(&self, key: u64) -> Result<Attributes, FormatError> {
        let mode = if key < 1000 { self.mode } else { 0o40_755 };
        Ok(Attributes {
            key,
            mode,
            uid: 1,
            gid: 2,
            size: self.size,
            mtime: 3,
            mtime_nsec: u32::MAX,
            rdev: 5,
        })
    }

    fn attributes<'n>(&self, node: &'n Attributes) -> &'n Attributes {
        node
    }

    fn entries(&self, dir: &Attributes, each: EachEntry<'_, 'static>) -> Result<(), FormatError> {
        (self.children)(dir.key)
            .into_iter()
            .try_for_each(|(name, key)| each(name, key))
    }

    fn target(&self, _: &Attributes) -> Result<&'static [u8], FormatError> {
        Ok(self.target)
    }

    fn xattrs(&self, node: &Attributes, each: EachXattr<'_, 'static>) -> Result<(), FormatError> {
        let of_files = self.xattrs.iter().filter(|_| node.key < 1000);
        of_files
            .into_iter()
            .try_for_each(|(name, value)| each("user.", name, value.clone().leak()))
    }

    fn chunks(&self, _: &Attributes, _: u64, each: EachChunk<'_>) -> Result<(), FormatError> {
        self.chunks.iter().try_for_each(|chunk| each(*chunk))
    }
}

fn load(image: &FakeFormat) -> Result<Tree, LoadError> {
    let input = TreeInput {
        bootstrap_len: 1 << 20,
        chunk_size: 4096,
        explicit_owners: true,
        blobs: Blobs::default(),
        prefetch: Vec::new(),
        summary: BootstrapSummary::default(),
    };
    walk(image, input)
}

#[track_caller]
fn malformed(image: &FakeFormat, place: &str, words: &str) {
    match load(image) {
        Err(LoadError::Malformed { location, what }) => {
            assert!(location == place && what.contains(words), "{location}: {what}");
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn valid_image_is_accepted() {
    let tree = load(&FakeFormat {
        children: |key| {
            if key == 1000 {
                vec![(b".", 1000), (b"..", 7), (b"f", 1), (b"d", 1001)]
            } else {
                Vec::new()
            }
        },
        ..BASE
    })
    .unwrap();
    assert_eq!(tree.len(), 3);
    let file = tree.inode(tree.lookup(ROOT, b"f").unwrap()).unwrap();
    assert_eq!(
        (file.uid, file.gid, file.mtime, file.mtime_nsec, file.rdev),
        (1, 2, 3, 999_999_999, 0)
    );
    assert_eq!(tree.inode(ROOT).map(|root| (root.nlink, root.size)), Some((3, 4096)));
}

#[test]
fn inconsistent_directories_are_rejected() {
    malformed(
        &FakeFormat {
            children: |_| vec![(b"loop", 1000)],
            ..BASE
        },
        "/loop",
        "two parents",
    );
    malformed(
        &FakeFormat {
            children: |_| vec![(b"a", 1001), (b"b", 1001)],
            ..BASE
        },
        "/b",
        "two parents",
    );
    let nested: Children = |key| {
        if key == 1000 {
            vec![(b"a", 1001)]
        } else {
            vec![(b"back", 1000)]
        }
    };
    malformed(
        &FakeFormat {
            children: nested,
            ..BASE
        },
        "/a/back",
        "two parents",
    );
    let endless = load(&FakeFormat {
        children: |key| vec![(b"deeper", key + 1)],
        ..BASE
    });
    assert!(matches!(endless, Err(LoadError::TooLarge { .. })), "{endless:?}");
    // The same entries everywhere, but always new directories: more than the bootstrap has room for.
    let wide: Children = |key| {
        if key < 1 << 40 {
            vec![(b"left", 2 * key), (b"right", 2 * key + 1)]
        } else {
            Vec::new()
        }
    };
    match load(&FakeFormat { children: wide, ..BASE }) {
        Err(LoadError::Malformed { what, .. }) => assert!(what.contains("overlap")),
        other => panic!("{other:?}"),
    }
}

#[test]
fn invalid_names_are_rejected() {
    malformed(
        &FakeFormat {
            children: |_| vec![(b"x", 1), (b"y", 2), (b"x", 3)],
            ..BASE
        },
        "",
        "two entries",
    );
    for (children, word) in [
        ((|_| vec![(b"", 1)]) as Children, "file name"),
        (|_| vec![(b"a/b", 1)], "file name"),
        (|_| vec![(b"a\0", 1)], "file name"),
        (|_| vec![(&[b'x'; 256], 1)], "file name"),
    ] {
        malformed(&FakeFormat { children, ..BASE }, "", word);
    }
}

#[test]
fn inconsistent_files_are_rejected() {
    let children: Children = |_| vec![(b"f", 1)];
    for mode in [0, 0o644, 0o150_000, 0o170_000] {
        malformed(&FakeFormat { children, mode, ..BASE }, "/f", "mode");
    }
    malformed(
        &FakeFormat {
            children,
            size: 1 << 63,
            ..BASE
        },
        "/f",
        "2^63",
    );
    malformed(
        &FakeFormat {
            children,
            size: 1 << 62,
            ..BASE
        },
        "/f",
        "overlap",
    );
    malformed(
        &FakeFormat {
            children,
            size: 5000,
            ..BASE
        },
        "/f",
        "do not make up",
    );
    let chunk = RawChunk {
        blob: 0,
        flags: 0,
        digest: [0; 32],
        index: 0,
        compressed_offset: 0,
        compressed_size: 4096,
        uncompressed_offset: 0,
        uncompressed_size: 4096,
        file_offset: None,
    };
    malformed(
        &FakeFormat {
            children,
            size: 4095,
            chunks: vec![chunk],
            ..BASE
        },
        "/f",
        "4096 bytes instead of 4095",
    );
    malformed(
        &FakeFormat {
            children,
            size: 4096,
            chunks: vec![chunk],
            ..BASE
        },
        "/f",
        "blob table",
    );
    let late = RawChunk {
        file_offset: Some(4096),
        ..chunk
    };
    malformed(
        &FakeFormat {
            children,
            size: 4096,
            chunks: vec![late],
            ..BASE
        },
        "/f",
        "order",
    );
}

#[test]
fn invalid_links_and_attributes_are_rejected() {
    let children: Children = |_| vec![(b"f", 1)];
    for target in [&b""[..], b"a\0b", &[b'x'; 4096]] {
        let mode = 0o120_777;
        malformed(
            &FakeFormat {
                children,
                mode,
                target,
                ..BASE
            },
            "/f",
            "link target",
        );
    }
    malformed(
        &FakeFormat {
            children,
            xattrs: vec![(b"a", vec![]), (b"a", vec![1])],
            ..BASE
        },
        "/f",
        "same name",
    );
    malformed(
        &FakeFormat {
            children,
            xattrs: vec![(b"a\0", vec![])],
            ..BASE
        },
        "/f",
        "out of range",
    );
    malformed(
        &FakeFormat {
            children,
            xattrs: vec![(&[b'a'; 251], vec![])],
            ..BASE
        },
        "/f",
        "out of range",
    );
    malformed(
        &FakeFormat {
            children,
            xattrs: vec![(b"a", vec![0; (64 << 10) + 1])],
            ..BASE
        },
        "/f",
        "out of range",
    );
    let tree = load(&FakeFormat {
        children,
        xattrs: vec![(b"b", vec![2; 64 << 10]), (b"a", vec![])],
        ..BASE
    })
    .unwrap();
    let file = tree.lookup(ROOT, b"f").unwrap();
    assert_eq!(tree.xattr(file, b"user.b").map(<[u8]>::len), Some(64 << 10));
    assert_eq!(
        tree.xattrs(file).map(|(name, _)| name).collect::<Vec<_>>(),
        [b"user.a", b"user.b"]
    );
}
