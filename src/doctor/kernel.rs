//! Checks the kernel's version, its file systems and /dev/fuse.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::{FileTypeExt as _, MetadataExt as _},
    path::Path,
};

use super::Finding;

/// The oldest supported version (major, minor).
const MIN_VERSION: (u32, u32) = (5, 4);
/// The first version with id-mapped FUSE mounts.
const ID_MAPPED_FUSE_VERSION: (u32, u32) = (6, 12);

/// Major and minor device number of /dev/fuse.
const FUSE_DEVICE: (u32, u32) = (10, 229);

/// How the kernel supports a file system.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Support {
    /// Built in, or its module is loaded.
    Loaded,
    /// The kernel can load a module for it on demand.
    Module,
    /// No support was found.
    None,
}

/// All checks of the kernel.
pub fn check() -> Vec<Finding> {
    let uname = rustix::system::uname();
    let release = uname.release().to_string_lossy();
    let loaded = fs::read_to_string("/proc/filesystems").unwrap_or_default();
    let modules = Path::new("/lib/modules").join(&*release);
    let lists =
        ["modules.builtin", "modules.dep"].map(|list| fs::read_to_string(modules.join(list)).unwrap_or_default());
    let support = |name| support(name, &loaded, &lists);
    vec![
        version(&release),
        fuse(support("fuse")),
        device(Path::new("/dev/fuse")),
        overlay(support("overlay")),
        erofs(support("erofs")),
        id_mapped_mounts(&release),
    ]
}

/// Parses the major and minor version of a release such as `6.1.0-28-amd64`.
pub fn major_minor(version: &str) -> Option<(u32, u32)> {
    let mut parts = version.split(['.', '-', '+']);
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

/// How the kernel supports the file system `name`. `loaded` is /proc/filesystems; `lists` are modules.builtin and
/// modules.dep.
fn support(name: &str, loaded: &str, lists: &[String]) -> Support {
    let is_module = |line: &str| {
        let file = line
            .split(':')
            .next()
            .unwrap_or_default()
            .rsplit('/')
            .next()
            .unwrap_or_default();
        file.split(".ko").next() == Some(name) && file.contains(".ko")
    };
    if loaded.lines().any(|line| line.split_whitespace().last() == Some(name)) {
        Support::Loaded
    } else if lists.iter().flat_map(|list| list.lines()).any(is_module) {
        Support::Module
    } else {
        Support::None
    }
}

fn version(release: &str) -> Finding {
    let detail = format!("Linux {release}");
    match major_minor(release) {
        Some(version) if version < MIN_VERSION => Finding::fail("kernel", detail, "use Linux 5.4 or later"),
        Some(_) => Finding::ok("kernel", detail),
        None => Finding::warn("kernel", format!("{detail}: unknown version"), "use Linux 5.4 or later"),
    }
}

fn fuse(support: Support) -> Finding {
    match support {
        Support::Loaded => Finding::ok("fuse", "available"),
        Support::Module => Finding::ok("fuse", "available as a module"),
        Support::None => Finding::fail(
            "fuse",
            "the kernel lacks FUSE, and no module was found",
            "load the module (`modprobe fuse`), install the kernel's modules package, or boot the kernel that matches \
             the installed modules",
        ),
    }
}

fn overlay(support: Support) -> Finding {
    match support {
        Support::Loaded => Finding::ok("overlay", "available"),
        Support::Module => Finding::ok("overlay", "available as a module"),
        Support::None => Finding::fail(
            "overlay",
            "the kernel lacks overlayfs, and no module was found",
            "load the module (`modprobe overlay`) or boot a kernel with CONFIG_OVERLAY_FS: Podman needs it to stack \
             layers",
        ),
    }
}

fn erofs(support: Support) -> Finding {
    match support {
        Support::Loaded => Finding::ok("erofs", "available"),
        Support::Module => Finding::ok("erofs", "available as a module"),
        Support::None => Finding::warn(
            "erofs",
            "the kernel lacks EROFS, and no module was found",
            "FUSE serves all images meanwhile; load the module (`modprobe erofs`) to let the kernel mount images",
        ),
    }
}

fn device(path: &Path) -> Finding {
    let opened = path.metadata().and_then(|metadata| {
        if !metadata.file_type().is_char_device()
            || rustix::fs::makedev(FUSE_DEVICE.0, FUSE_DEVICE.1) != metadata.rdev()
        {
            return Err(io::Error::other("not the FUSE device"));
        }
        File::options().read(true).write(true).open(path)
    });
    let name = path.display();
    match opened {
        Ok(_) => Finding::ok("fuse-device", format!("{name} can be opened")),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Finding::fail(
            "fuse-device",
            format!("cannot open {name}: {error}"),
            "run as root; start a container with `--device /dev/fuse`",
        ),
        Err(error) => Finding::fail(
            "fuse-device",
            format!("cannot use {name}: {error}"),
            "run `modprobe fuse` to create it; start a container with `--device /dev/fuse`",
        ),
    }
}

fn id_mapped_mounts(release: &str) -> Finding {
    let name = "user-namespaces";
    if major_minor(release).is_some_and(|version| version >= ID_MAPPED_FUSE_VERSION) {
        Finding::ok(name, "the kernel supports id-mapped FUSE mounts")
    } else {
        Finding::warn(
            name,
            "the kernel lacks id-mapped FUSE mounts",
            "with `podman run --userns` or `--uidmap`, files belong to nobody and containers may not start; use Linux \
             6.12 or later, or set _CONTAINERS_OVERLAY_DISABLE_IDMAP=yes for Podman, which then copies the whole image",
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Status;

    #[test]
    fn versions() {
        assert_eq!(major_minor("6.1.0-28-amd64"), Some((6, 1)));
        assert_eq!(major_minor("6.18-rc1"), Some((6, 18)));
        assert_eq!(major_minor("5.4"), Some((5, 4)));
        assert_eq!(major_minor("linux"), None);
        for (release, expected) in [
            ("4.18.0-553.el8.x86_64", Status::Fail),
            ("5.4.0", Status::Ok),
            ("6.12.1", Status::Ok),
            ("?", Status::Warn),
        ] {
            assert_eq!(version(release).status, expected, "{release}");
        }
        assert_eq!(id_mapped_mounts("6.11.9").status, Status::Warn);
        assert_eq!(id_mapped_mounts("6.12.0").status, Status::Ok);
    }

    #[test]
    fn file_systems() {
        let loaded = "nodev\tproc\nnodev\tfuse\n\tfuseblk\n";
        let lists = [
            "kernel/fs/overlayfs/overlay.ko\n".to_owned(),
            "kernel/fs/erofs/erofs.ko.xz: kernel/lib/x.ko\nkernel/fs/fuse/virtiofs.ko: kernel/fs/fuse/fuse.ko\n"
                .to_owned(),
        ];
        assert_eq!(support("fuse", loaded, &lists), Support::Loaded);
        assert_eq!(support("overlay", loaded, &lists), Support::Module);
        assert_eq!(support("erofs", loaded, &lists), Support::Module);
        assert_eq!(support("fuse", "", &lists), Support::None);
        assert_eq!(fuse(Support::None).status, Status::Fail);
        assert_eq!(overlay(Support::None).status, Status::Fail);
        assert_eq!(erofs(Support::None).status, Status::Warn);
    }

    #[test]
    fn only_the_fuse_device_is_accepted() {
        assert_eq!(device(Path::new("/nonexistent")).status, Status::Fail);
        for other in ["/", "/dev/null"] {
            let finding = device(Path::new(other));
            assert!(finding.detail.contains("not the FUSE device"), "{finding:?}");
        }
    }
}
