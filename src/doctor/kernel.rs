//! The kernel: its version, its file systems, the device of FUSE.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::{FileTypeExt as _, MetadataExt as _},
    path::Path,
};

use super::Finding;

/// The oldest that is supported.
const OLDEST: (u32, u32) = (5, 4);
/// The first that can map the ids of a mount of FUSE.
const ID_MAPPED_FUSE: (u32, u32) = (6, 12);

/// Major and minor number of FUSE's device.
const DEVICE: (u32, u32) = (10, 229);

/// How the kernel has a file system.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Support {
    /// It is there.
    Loaded,
    /// There is a module for it, which is loaded when it is needed.
    Module,
    /// It is not there, as far as can be seen.
    None,
}

/// All about the kernel.
pub fn look() -> Vec<Finding> {
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

/// Major and minor version, as in `6.1.0-28-amd64`.
pub fn number(version: &str) -> Option<(u32, u32)> {
    let mut parts = version.split(['.', '-', '+']);
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

/// Whether the kernel has a file system: `loaded` is /proc/filesystems, `lists` are lists of modules.
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
    match number(release) {
        Some(version) if version < OLDEST => Finding::fail("kernel", detail, "Linux 5.4 or later is needed"),
        Some(_) => Finding::ok("kernel", detail),
        None => Finding::warn(
            "kernel",
            format!("{detail}, which is no version"),
            "Linux 5.4 or later is needed",
        ),
    }
}

fn fuse(support: Support) -> Finding {
    match support {
        Support::Loaded => Finding::ok("fuse", "the kernel has it"),
        Support::Module => Finding::ok("fuse", "there is a module for it"),
        Support::None => Finding::fail(
            "fuse",
            "the kernel has no FUSE, and no module for it is found",
            "load the module (`modprobe fuse`), install the kernel's package of modules, or boot the kernel that the \
             modules are for",
        ),
    }
}

fn overlay(support: Support) -> Finding {
    match support {
        Support::Loaded => Finding::ok("overlay", "the kernel has it"),
        Support::Module => Finding::ok("overlay", "there is a module for it"),
        Support::None => Finding::fail(
            "overlay",
            "the kernel has no overlayfs, and no module for it is found",
            "load the module (`modprobe overlay`) or boot a kernel with CONFIG_OVERLAY_FS: Podman stacks the layers with it",
        ),
    }
}

fn erofs(support: Support) -> Finding {
    match support {
        Support::Loaded => Finding::ok("erofs", "the kernel has it"),
        Support::Module => Finding::ok("erofs", "there is a module for it"),
        Support::None => Finding::warn(
            "erofs",
            "the kernel has no EROFS, and no module for it is found",
            "images are served through FUSE alone; for the kernel to mount them itself, load the module (`modprobe erofs`)",
        ),
    }
}

fn device(path: &Path) -> Finding {
    let opened = path.metadata().and_then(|metadata| {
        if !metadata.file_type().is_char_device() || rustix::fs::makedev(DEVICE.0, DEVICE.1) != metadata.rdev() {
            return Err(io::Error::other("it is not FUSE's device"));
        }
        File::options().read(true).write(true).open(path)
    });
    let place = path.display();
    match opened {
        Ok(_) => Finding::ok("fuse-device", format!("{place} can be opened")),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Finding::fail(
            "fuse-device",
            format!("{place} cannot be opened: {error}"),
            "run as root; in a container, let it use the device (`--device /dev/fuse`)",
        ),
        Err(error) => Finding::fail(
            "fuse-device",
            format!("{place} cannot be used: {error}"),
            "`modprobe fuse` makes it; in a container, give it the device (`--device /dev/fuse`)",
        ),
    }
}

fn id_mapped_mounts(release: &str) -> Finding {
    let name = "user-namespaces";
    if number(release).is_some_and(|version| version >= ID_MAPPED_FUSE) {
        Finding::ok(name, "the kernel can map the ids of a mount of FUSE")
    } else {
        Finding::warn(
            name,
            "the kernel cannot map the ids of a mount of FUSE",
            "with `podman run --userns` or `--uidmap`, files belong to nobody, and containers may not start: use Linux 6.12 or \
             later, or set _CONTAINERS_OVERLAY_DISABLE_IDMAP=yes for Podman, which then copies the whole image",
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Status;

    #[test]
    fn versions() {
        assert_eq!(number("6.1.0-28-amd64"), Some((6, 1)));
        assert_eq!(number("6.18-rc1"), Some((6, 18)));
        assert_eq!(number("5.4"), Some((5, 4)));
        assert_eq!(number("linux"), None);
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
    fn the_device() {
        assert_eq!(device(Path::new("/nonexistent")).status, Status::Fail);
        for other in ["/", "/dev/null"] {
            let finding = device(Path::new(other));
            assert!(finding.detail.contains("not FUSE's device"), "{finding:?}");
        }
    }
}
