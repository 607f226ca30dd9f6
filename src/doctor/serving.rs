//! The daemon: its mount, and room for its cache.

use std::{
    io,
    path::{Path, PathBuf},
    sync::mpsc,
    time::Duration,
};

use rustix::fs::{StatVfs, StatVfsMountFlags};

use super::Finding;
use crate::fuse::mountpoint::{self, FS_TYPE};

/// Longer than anything here takes that works.
const PATIENCE: Duration = Duration::from_secs(5);
/// With less room, new images fail.
const LEAST_ROOM: u64 = 64 << 20;
/// With less room, the cache may soon be full.
const ENOUGH_ROOM: u64 = 2 << 30;

/// About the daemon of `root`.
pub fn look(root: &Path) -> Vec<Finding> {
    let root = root.canonicalize().unwrap_or_else(|_| root.to_owned());
    vec![daemon(&root.join("store/overlay")), cache(&root)]
}

fn daemon(mount: &Path) -> Finding {
    let name = "daemon";
    let place = mount.display();
    let start = "start it: `systemctl enable --now nydus-store`, or `nydus-store serve`";
    // This does not touch the mount, which may be dead.
    match mountpoint::mounted_on(mount) {
        Ok(Some(kind)) if kind == FS_TYPE => {}
        Ok(Some(kind)) => {
            let detail = format!("a file system of type {kind} is mounted on {place}");
            return Finding::fail(name, detail, "unmount it and start the daemon");
        }
        Ok(None) => return Finding::fail(name, format!("nothing is served on {place}"), start),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Finding::fail(name, format!("there is no {place}"), start);
        }
        Err(error) => {
            return Finding::fail(
                name,
                format!("{place} cannot be looked at: {error}"),
                "run doctor as root",
            );
        }
    }
    match answer(mount.to_owned()) {
        Some(Ok(())) => Finding::ok(name, format!("it serves on {place}")),
        Some(Err(error)) if error.kind() == io::ErrorKind::NotConnected => Finding::fail(
            name,
            format!("it has ended, and left its mount on {place}"),
            "start it again, and then the containers that were running",
        ),
        Some(Err(error)) => Finding::fail(name, format!("{place} cannot be used: {error}"), "run doctor as root"),
        None => Finding::fail(
            name,
            format!("it does not answer on {place}"),
            "look at its log (`journalctl -u nydus-store`) and restart it",
        ),
    }
}

/// Asks the file system itself for something; nothing if there is no answer in time. The thread is left behind then.
fn answer(dir: PathBuf) -> Option<io::Result<()>> {
    let (send, receive) = mpsc::channel();
    let ask = move || {
        // Nobody may be listening any more.
        send.send(rustix::fs::statvfs(&dir).map(drop).map_err(io::Error::from))
            .ok();
    };
    if let Err(error) = std::thread::Builder::new().spawn(ask) {
        return Some(Err(error));
    }
    receive.recv_timeout(PATIENCE).ok()
}

fn cache(root: &Path) -> Finding {
    // The root is made by the daemon; until then its place counts.
    let there = root.ancestors().find(|dir| dir.exists()).unwrap_or(Path::new("/"));
    match rustix::fs::statvfs(there) {
        Ok(stat) => judge_room(root, &stat),
        Err(error) => Finding::warn(
            "cache",
            format!("the room below {} cannot be told: {error}", root.display()),
            "run doctor as root",
        ),
    }
}

fn judge_room(root: &Path, stat: &StatVfs) -> Finding {
    let name = "cache";
    let (free, all) = (stat.f_bavail * stat.f_frsize, stat.f_blocks * stat.f_frsize);
    let size = |bytes| indicatif::BinaryBytes(bytes).to_string();
    let detail = format!("{} of {} are free below {}", size(free), size(all), root.display());
    let advice = "make room, or let the daemon keep its files elsewhere (--root, for setup too). With the daemon stopped, files \
                  in cache/ may be deleted";
    if stat.f_flag.contains(StatVfsMountFlags::RDONLY) {
        let detail = format!("{} is on a file system that is read-only", root.display());
        return Finding::fail(
            name,
            detail,
            "let the daemon keep its files elsewhere (--root, for setup too)",
        );
    }
    match free {
        0..LEAST_ROOM => Finding::fail(name, detail, advice),
        LEAST_ROOM..ENOUGH_ROOM => Finding::warn(name, detail, advice),
        _ => Finding::ok(name, detail),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Status;

    #[test]
    fn no_daemon() {
        let dir = tempfile::tempdir().unwrap();
        assert!(daemon(dir.path()).detail.contains("nothing is served"));
        assert!(daemon(&dir.path().join("a/b")).detail.contains("there is no"));
        let other = daemon(Path::new("/proc"));
        assert!(
            other.status == Status::Fail && other.detail.contains("type proc"),
            "{other:?}"
        );
    }

    #[test]
    fn room() {
        let stat = |free: u64, flag| StatVfs {
            f_bavail: free,
            f_flag: flag,
            f_frsize: 1,
            ..rustix::fs::statvfs("/").unwrap()
        };
        let judge = |free, flag| judge_room(Path::new("/root"), &stat(free, flag)).status;
        let none = StatVfsMountFlags::empty();
        assert_eq!(judge(10 << 30, none), Status::Ok);
        assert_eq!(judge(1 << 30, none), Status::Warn);
        assert_eq!(judge(1 << 20, none), Status::Fail);
        assert_eq!(judge(10 << 30, StatVfsMountFlags::RDONLY), Status::Fail);
    }
}
