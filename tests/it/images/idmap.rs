//! Id-mapped mounts of a layer's directory, as Podman makes them for `--userns` and `--uidmap`.

use std::{
    fs::{self, File},
    io,
    os::{
        fd::{AsFd, AsRawFd as _, OwnedFd},
        unix::fs::MetadataExt as _,
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use nydus_store::fixtures::{BuildOptions, LayerSource, TreeSpec, make_tree};
use rustix::mount::{MoveMountFlags, OpenTreeFlags, UnmountFlags, move_mount, open_tree, unmount};

use super::{Shown, Site, overlay::Overlay};
use crate::common::{Guard, wait_until};

/// Ids 0 to `COUNT` - 1 show as those from `FIRST` on.
const FIRST: u32 = 100_000;
const COUNT: u32 = 65_536;
/// What ids show as that are not mapped.
const NOBODY: u32 = 65_534;

/// A user namespace with that mapping.
fn user_namespace() -> OwnedFd {
    let mut command = Command::new("unshare");
    command.args(["--user", "sleep", "1000"]).stdout(Stdio::null());
    let child = Guard(command.spawn().unwrap());
    let of = |name: &str| PathBuf::from(format!("/proc/{}/{name}", child.id()));
    let own = fs::read_link("/proc/self/ns/user").unwrap();
    wait_until("there is a user namespace", || {
        fs::read_link(of("ns/user")).ok().filter(|namespace| *namespace != own)
    });
    for map in ["uid_map", "gid_map"] {
        fs::write(of(map), format!("0 {FIRST} {COUNT}")).unwrap();
    }
    File::open(of("ns/user")).unwrap().into()
}

/// Mounts a copy of the mount at `source` on `target`, with the ids that show mapped by a user namespace.
fn mount_mapped(source: &Path, target: &Path, namespace: &impl AsFd) -> io::Result<()> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let tree = open_tree(rustix::fs::CWD, source, flags)?;
    let attr = libc::mount_attr {
        attr_set: libc::MOUNT_ATTR_IDMAP,
        attr_clr: 0,
        propagation: libc::MS_PRIVATE,
        userns_fd: namespace.as_fd().as_raw_fd() as u64,
    };
    // SAFETY: the path is a C string, the structure is as long as is said, and both descriptors are open.
    let done = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            &raw const attr,
            size_of_val(&attr),
        )
    };
    if done != 0 {
        return Err(io::Error::last_os_error());
    }
    let to = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    Ok(move_mount(tree.as_fd(), "", rustix::fs::CWD, target, to)?)
}

/// An id-mapped clone of the mount at `source`, put on `target`.
struct Mapped<'a>(&'a Path);

impl<'a> Mapped<'a> {
    fn mount(source: &Path, target: &'a Path) -> Self {
        fs::create_dir_all(target).unwrap();
        mount_mapped(source, target, &user_namespace()).unwrap();
        Self(target)
    }
}

impl Drop for Mapped<'_> {
    fn drop(&mut self) {
        unmount(self.0, UnmountFlags::DETACH).unwrap();
    }
}

fn mapped(id: u32) -> u32 {
    if id < COUNT { FIRST + id } else { NOBODY }
}

/// Every owner below `actual` is that below `expected`, mapped, and what may be read can be.
fn owners_are_mapped(expected: &Path, actual: &Path) {
    for entry in walkdir::WalkDir::new(expected) {
        let entry = entry.unwrap();
        let path = actual.join(entry.path().strip_prefix(expected).unwrap());
        let (one, other) = (entry.metadata().unwrap(), fs::symlink_metadata(&path).unwrap());
        assert_eq!(
            (other.uid(), other.gid()),
            (mapped(one.uid()), mapped(one.gid())),
            "{path:?}"
        );
        assert_eq!((other.mode(), other.ino() > 0), (one.mode(), true), "{path:?}");
        if one.is_file() && one.uid() < COUNT {
            assert!(fs::read(&path).unwrap() == fs::read(entry.path()).unwrap(), "{path:?}");
        }
    }
}

#[test]
fn owners_show_mapped() {
    let site = Site::new();
    assert!(
        site.serve.log().contains("id_mapped_mounts=true"),
        "the kernel offers them since 6.12"
    );
    let tree = site.path("tree");
    let spec = TreeSpec {
        chunk_size: 0x10000,
        ..TreeSpec::default()
    };
    make_tree(&tree, &spec).unwrap();
    let options = BuildOptions {
        chunk_size: 0x10000,
        ..BuildOptions::default()
    };
    let shown: Shown = site.show("mapped", &[LayerSource::Dir(tree.clone())], &options);
    let target = site.path("clone");
    let layer = shown.diff().parent().unwrap().to_owned();
    let clone = Mapped::mount(&layer, &target);
    owners_are_mapped(&tree, &target.join("diff"));
    {
        // A container's root on it.
        let overlay = Overlay::mount(&target.join("diff"), &site.path("overlay"));
        owners_are_mapped(&tree, overlay.merged());
        let file = overlay.merged().join("files/small");
        fs::write(&file, "copied up").unwrap();
        assert_eq!(fs::metadata(&file).unwrap().uid(), FIRST);
    }
    drop(clone);
    // The store itself is as it was.
    shown.is(&tree);
}
