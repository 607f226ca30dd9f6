//! Checks the daemon's mount and the free space for its cache.

use std::{
    io,
    path::{Path, PathBuf},
    sync::mpsc,
    time::Duration,
};

use rustix::fs::{StatVfs, StatVfsMountFlags};

use super::Finding;
use crate::fuse::mountpoint::{self, FS_TYPE};

/// Time limit for statfs on the daemon's mount.
const STATFS_TIMEOUT: Duration = Duration::from_secs(5);
/// With less free space, new images fail.
const MIN_FREE_BYTES: u64 = 64 << 20;
/// With less free space, the disk may soon be full.
const LOW_FREE_BYTES: u64 = 2 << 30;

/// Checks the daemon of `root`.
pub fn check(root: &Path) -> Vec<Finding> {
    let root = root.canonicalize().unwrap_or_else(|_| root.to_owned());
    vec![daemon(&root.join("store/overlay")), cache(&root)]
}

fn daemon(mount: &Path) -> Finding {
    let name = "daemon";
    let dir = mount.display();
    let start = "start it: `systemctl enable --now nydus-store`, or `nydus-store serve`";
    // `mounted_on` does not access the mount, which may hang.
    match mountpoint::mounted_on(mount) {
        Ok(Some(kind)) if kind == FS_TYPE => {}
        Ok(Some(kind)) => {
            let detail = format!("a file system of type {kind} is mounted on {dir}");
            return Finding::fail(name, detail, "unmount it and start the daemon");
        }
        Ok(None) => return Finding::fail(name, format!("not running: nothing is mounted on {dir}"), start),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Finding::fail(name, format!("not running: {dir} does not exist"), start);
        }
        Err(error) => {
            return Finding::fail(name, format!("cannot access {dir}: {error}"), "run doctor as root");
        }
    }
    match statfs_with_timeout(mount.to_owned()) {
        Some(Ok(())) => Finding::ok(name, format!("serving on {dir}")),
        Some(Err(error)) if error.kind() == io::ErrorKind::NotConnected => Finding::fail(
            name,
            format!("not running, but its mount is still on {dir}"),
            "start it again, then restart the containers that were running",
        ),
        Some(Err(error)) => Finding::fail(name, format!("cannot use {dir}: {error}"), "run doctor as root"),
        None => Finding::fail(
            name,
            format!("does not respond on {dir}"),
            "check its log (`journalctl -u nydus-store`) and restart it",
        ),
    }
}

/// Calls statfs on `dir`. Returns `None` after [`STATFS_TIMEOUT`], and leaves the calling thread behind.
fn statfs_with_timeout(dir: PathBuf) -> Option<io::Result<()>> {
    let (send, receive) = mpsc::channel();
    let ask = move || {
        // The receiver is gone after the time-out.
        send.send(rustix::fs::statvfs(&dir).map(drop).map_err(io::Error::from))
            .ok();
    };
    if let Err(error) = std::thread::Builder::new().spawn(ask) {
        return Some(Err(error));
    }
    receive.recv_timeout(STATFS_TIMEOUT).ok()
}

fn cache(root: &Path) -> Finding {
    // The daemon creates the root at its first start; until then, checks the parent directory.
    let there = root.ancestors().find(|dir| dir.exists()).unwrap_or(Path::new("/"));
    match rustix::fs::statvfs(there) {
        Ok(stat) => judge_free_space(root, &stat),
        Err(error) => Finding::warn(
            "cache",
            format!("cannot determine the free space below {}: {error}", root.display()),
            "run doctor as root",
        ),
    }
}

fn judge_free_space(root: &Path, stat: &StatVfs) -> Finding {
    let name = "cache";
    let (free, all) = (stat.f_bavail * stat.f_frsize, stat.f_blocks * stat.f_frsize);
    let size = |bytes| indicatif::BinaryBytes(bytes).to_string();
    let detail = format!("{} of {} are free below {}", size(free), size(all), root.display());
    let advice = "free space, or move the daemon to another directory (--root, for setup too); while the daemon is \
                  stopped, you may delete files in cache/";
    if stat.f_flag.contains(StatVfsMountFlags::RDONLY) {
        let detail = format!("{} is on a read-only file system", root.display());
        return Finding::fail(
            name,
            detail,
            "move the daemon to another directory (--root, for setup too)",
        );
    }
    match free {
        0..MIN_FREE_BYTES => Finding::fail(name, detail, advice),
        MIN_FREE_BYTES..LOW_FREE_BYTES => Finding::warn(name, detail, advice),
        _ => Finding::ok(name, detail),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Status;

    #[test]
    fn missing_daemon_is_reported() {
        let dir = tempfile::tempdir().unwrap();
        assert!(daemon(dir.path()).detail.contains("nothing is mounted"));
        assert!(daemon(&dir.path().join("a/b")).detail.contains("does not exist"));
        let other = daemon(Path::new("/proc"));
        assert!(
            other.status == Status::Fail && other.detail.contains("type proc"),
            "{other:?}"
        );
    }

    #[test]
    fn free_space_decides_the_status() {
        let stat = |free: u64, flag| StatVfs {
            f_bavail: free,
            f_flag: flag,
            f_frsize: 1,
            ..rustix::fs::statvfs("/").unwrap()
        };
        let judge = |free, flag| judge_free_space(Path::new("/root"), &stat(free, flag)).status;
        let none = StatVfsMountFlags::empty();
        assert_eq!(judge(10 << 30, none), Status::Ok);
        assert_eq!(judge(1 << 30, none), Status::Warn);
        assert_eq!(judge(1 << 20, none), Status::Fail);
        assert_eq!(judge(10 << 30, StatVfsMountFlags::RDONLY), Status::Fail);
    }
}
