//! A writable overlay on an image, as a container's root, without Podman.

use std::{
    fs::{self, File},
    io::Write as _,
    os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _, symlink},
    path::{Path, PathBuf},
};

use nydus_rafs::metadata::RafsVersion;
use nydus_store::fixtures::{BuildOptions, CompareOptions, LayerSource, TreeSpec, make_tree};
use rustix::{
    fs::{CWD, FileType, Mode, XattrFlags},
    mount::{MountFlags, UnmountFlags, mount, unmount},
};

use super::{ImageSite, assert_same};
use crate::common::output;

/// A mounted overlay, unmounted on drop.
pub(super) struct Overlay {
    merged: PathBuf,
    pub(super) upper: PathBuf,
}

impl Overlay {
    /// Mounts an overlay on `lower`, with its other directories in `dir`.
    pub(super) fn mount(lower: &Path, dir: &Path) -> Self {
        let [merged, upper, work] = ["merged", "upper", "work"].map(|name| dir.join(name));
        for made in [&merged, &upper, &work] {
            fs::create_dir_all(made).unwrap();
        }
        let root = fs::metadata(lower).unwrap();
        std::os::unix::fs::chown(&upper, Some(root.uid()), Some(root.gid())).unwrap();
        fs::set_permissions(&upper, root.permissions()).unwrap();
        // By descriptor, because colons in the path would be separators.
        let opened = File::open(lower).unwrap();
        let options = format!(
            "lowerdir=/proc/self/fd/{},upperdir={},workdir={},redirect_dir=on",
            std::os::fd::AsRawFd::as_raw_fd(&opened),
            upper.display(),
            work.display()
        );
        let options = std::ffi::CString::new(options).unwrap();
        mount("overlay", &merged, "overlay", MountFlags::empty(), options.as_c_str()).unwrap();
        Self { merged, upper }
    }

    pub(super) fn merged(&self) -> &Path {
        &self.merged
    }
}

impl Drop for Overlay {
    fn drop(&mut self) {
        unmount(&self.merged, UnmountFlags::DETACH).unwrap();
    }
}

/// Changes a tree as a container might.
fn change(root: &Path) {
    let at = |name: &str| root.join(name);
    let append = |name: &str| {
        let mut file = File::options().append(true).open(at(name)).unwrap();
        file.write_all(b" and more").unwrap();
    };
    append("files/chunk-and-one");
    // Copied up with xattrs, ACLs and capabilities.
    append("xattrs/file");
    fs::set_permissions(at("xattrs/capable"), fs::Permissions::from_mode(0o750)).unwrap();
    rustix::fs::setxattr(at("xattrs/dir"), "user.new", b"1", XattrFlags::empty()).unwrap();
    rustix::fs::removexattr(at("xattrs/file"), "user.comment").unwrap();
    std::os::unix::fs::chown(at("modes/setuid"), Some(12), Some(34)).unwrap();
    std::os::unix::fs::lchown(at("links/dangling"), Some(56), Some(78)).unwrap();
    File::options()
        .write(true)
        .open(at("files/chunks-again"))
        .unwrap()
        .set_len(100)
        .unwrap();
    fs::remove_file(at("files/small")).unwrap();
    fs::remove_file(at("files/page")).unwrap();
    fs::write(at("files/page"), "made anew").unwrap();
    fs::remove_file(at("links/to-directory")).unwrap();
    fs::remove_dir_all(at("dirs/d")).unwrap();
    // The recreated directory must not show its old entries.
    fs::remove_dir_all(at("dirs/many")).unwrap();
    fs::create_dir(at("dirs/many")).unwrap();
    fs::write(at("dirs/many/new"), "alone").unwrap();
    fs::rename(at("files/tiny-00"), at("files/renamed")).unwrap();
    fs::rename(at("files/tiny-01"), at("files/tiny-02")).unwrap();
    fs::rename(at("modes"), at("moved")).unwrap();
    fs::rename(at("special/char"), at("special/moved-char")).unwrap();
    fs::hard_link(at("files/tiny-03"), at("files/linked")).unwrap();
    symlink("files", at("new-link")).unwrap();
    fs::create_dir_all(at("new/deep/er")).unwrap();
    fs::write(at("new/deep/er/file"), vec![7; 300_000]).unwrap();
    rustix::fs::mknodat(CWD, at("new/fifo"), FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
}

#[test]
fn writable_overlay_leaves_the_image_unchanged() {
    let site = ImageSite::new();
    let tree = site.path("tree");
    let spec = TreeSpec {
        chunk_size: 0x10000,
        ..TreeSpec::default()
    };
    assert_eq!(make_tree(&tree, &spec).unwrap(), [""; 0]);
    let copy = site.path("copy");
    output(std::process::Command::new("cp").arg("-a").arg(&tree).arg(&copy));
    change(&copy);
    // Changed entries have the time of the change.
    let changed = CompareOptions {
        mtime: false,
        // The kernel reports other link counts for hard links in an overlay.
        nlink: false,
        ..CompareOptions::default()
    };
    for version in [RafsVersion::V5, RafsVersion::V6] {
        let name = format!("{version:?}").to_lowercase();
        let options = BuildOptions {
            version,
            chunk_size: 0x10000,
            ..BuildOptions::default()
        };
        let served = site.serve_image(&name, &[LayerSource::Dir(tree.clone())], &options);
        let place = site.path(&format!("overlay-{name}"));
        let overlay = Overlay::mount(&served.diff(), &place);
        assert_same(
            "before",
            &tree,
            overlay.merged(),
            &CompareOptions {
                nlink: false,
                ..CompareOptions::default()
            },
        );
        change(overlay.merged());
        assert_same("after", &copy, overlay.merged(), &changed);
        let whiteout = fs::symlink_metadata(overlay.upper.join("files/small")).unwrap();
        assert!(whiteout.file_type().is_char_device() && whiteout.rdev() == 0);
        let mut opaque = [0; 1];
        rustix::fs::getxattr(
            overlay.upper.join("dirs/many"),
            "trusted.overlay.opaque",
            &mut opaque[..],
        )
        .unwrap();
        assert_eq!(&opaque, b"y");
        drop(overlay);
        let overlay = Overlay::mount(&served.diff(), &place);
        assert_same("mounted again", &copy, overlay.merged(), &changed);
        drop(overlay);
        served.assert_equals(&tree);
    }
}
