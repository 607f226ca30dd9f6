//! Id-mapped mounts of a layer's directory, as made by Podman for `--userns` and `--uidmap`.

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

use super::{ImageSite, ServedImage, overlay::Overlay};
use crate::common::{Guard, wait_until};

/// Ids 0 to `ID_COUNT` - 1 map to `FIRST_HOST_ID` and following.
const FIRST_HOST_ID: u32 = 100_000;
const ID_COUNT: u32 = 65_536;
/// The overflow id, shown for unmapped ids.
const OVERFLOW_ID: u32 = 65_534;

/// Creates a user namespace with this mapping.
fn user_namespace() -> OwnedFd {
    let mut command = Command::new("unshare");
    command.args(["--user", "sleep", "1000"]).stdout(Stdio::null());
    let child = Guard(command.spawn().unwrap());
    let of = |name: &str| PathBuf::from(format!("/proc/{}/{name}", child.id()));
    let own = fs::read_link("/proc/self/ns/user").unwrap();
    wait_until("the user namespace exists", || {
        fs::read_link(of("ns/user")).ok().filter(|namespace| *namespace != own)
    });
    for map in ["uid_map", "gid_map"] {
        fs::write(of(map), format!("0 {FIRST_HOST_ID} {ID_COUNT}")).unwrap();
    }
    File::open(of("ns/user")).unwrap().into()
}

/// Mounts a clone of the mount at `source` on `target`, id-mapped by a user namespace (mount_setattr(2)).
fn mount_mapped(source: &Path, target: &Path, namespace: &impl AsFd) -> io::Result<()> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let tree = open_tree(rustix::fs::CWD, source, flags)?;
    let attr = libc::mount_attr {
        attr_set: libc::MOUNT_ATTR_IDMAP,
        attr_clr: 0,
        propagation: libc::MS_PRIVATE,
        userns_fd: namespace.as_fd().as_raw_fd() as u64,
    };
    // SAFETY: the path is a C string, the size is that of the structure, and both descriptors are open.
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

/// An id-mapped mount, unmounted on drop.
struct IdMappedMount<'a>(&'a Path);

impl<'a> IdMappedMount<'a> {
    fn mount(source: &Path, target: &'a Path) -> Self {
        fs::create_dir_all(target).unwrap();
        mount_mapped(source, target, &user_namespace()).unwrap();
        Self(target)
    }
}

impl Drop for IdMappedMount<'_> {
    fn drop(&mut self) {
        unmount(self.0, UnmountFlags::DETACH).unwrap();
    }
}

fn map_id(id: u32) -> u32 {
    if id < ID_COUNT { FIRST_HOST_ID + id } else { OVERFLOW_ID }
}

/// Panics unless owners below `actual` are the mapped owners below `expected`, and files of mapped owners are readable.
fn assert_owners_mapped(expected: &Path, actual: &Path) {
    for entry in walkdir::WalkDir::new(expected) {
        let entry = entry.unwrap();
        let path = actual.join(entry.path().strip_prefix(expected).unwrap());
        let (one, other) = (entry.metadata().unwrap(), fs::symlink_metadata(&path).unwrap());
        assert_eq!(
            (other.uid(), other.gid()),
            (map_id(one.uid()), map_id(one.gid())),
            "{path:?}"
        );
        assert_eq!((other.mode(), other.ino() > 0), (one.mode(), true), "{path:?}");
        if one.is_file() && one.uid() < ID_COUNT {
            assert!(fs::read(&path).unwrap() == fs::read(entry.path()).unwrap(), "{path:?}");
        }
    }
}

#[test]
fn id_mapped_mount_maps_owners() {
    let site = ImageSite::new();
    assert!(
        site.serve.log().contains("id_mapped_mounts=true"),
        "id-mapped FUSE mounts need Linux 6.12"
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
    let served: ServedImage = site.serve_image("mapped", &[LayerSource::Dir(tree.clone())], &options);
    let target = site.path("clone");
    let layer = served.diff().parent().unwrap().to_owned();
    let mount = IdMappedMount::mount(&layer, &target);
    assert_owners_mapped(&tree, &target.join("diff"));
    {
        // An overlay on the id-mapped mount, as a container's root.
        let overlay = Overlay::mount(&target.join("diff"), &site.path("overlay"));
        assert_owners_mapped(&tree, overlay.merged());
        let file = overlay.merged().join("files/small");
        fs::write(&file, "copied up").unwrap();
        assert_eq!(fs::metadata(&file).unwrap().uid(), FIRST_HOST_ID);
    }
    drop(mount);
    // The store itself is unchanged.
    served.assert_equals(&tree);
}
