//! The daemon: its mount, its mirror, room for its cache.

use std::{
    io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::mpsc,
    time::Duration,
};

use rustix::fs::{StatVfs, StatVfsMountFlags};

use super::Finding;
use crate::{
    config::MirrorConfig,
    fuse::mountpoint::{self, FS_TYPE},
    mirror::{
        peer,
        probe::{ProbeError, probe},
    },
    report::Report,
};

/// Longer than anything here takes that works.
const PATIENCE: Duration = Duration::from_secs(5);
const MIRROR: &str = "mirror";
/// With less room, new images fail.
const LEAST_ROOM: u64 = 64 << 20;
/// With less room, the cache may soon be full.
const ENOUGH_ROOM: u64 = 2 << 30;

/// About the daemon of `root`. `needed`: whether Podman needs the mirror, if that can be told.
pub fn look(root: &Path, config: &MirrorConfig, needed: Option<bool>) -> Vec<Finding> {
    let root = root.canonicalize().unwrap_or_else(|_| root.to_owned());
    vec![daemon(&root.join("store")), mirror(&root, config, needed), cache(&root)]
}

fn daemon(store: &Path) -> Finding {
    let name = "daemon";
    let place = store.display();
    let start = "start it: `systemctl enable --now nydus-store`, or `nydus-store serve`";
    // This does not touch the mount, which may be dead.
    match mountpoint::mounted_on(store) {
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
    match answer(store.to_owned()) {
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

fn mirror(root: &Path, config: &MirrorConfig, needed: Option<bool>) -> Finding {
    if !config.enabled || config.listen.port() == 0 || config.listen.is_ipv6() {
        return unreachable_mirror(config, needed);
    }
    // The daemon makes the root, for itself alone.
    let daemon = root.metadata().ok().map(|root| root.uid());
    if let Some(finding) = foreign_mirror(config, peer::listener_uid(config.listen), daemon) {
        return finding;
    }
    let probed = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime.block_on(probe(config.listen, PATIENCE)),
        Err(error) => return Finding::fail(MIRROR, format!("it cannot be asked: {error}"), "try again"),
    };
    judge_mirror(config, probed, needed)
}

/// While the daemon is not there, any user can listen in its place, and Podman would believe what it is told: that fails
/// whether or not Podman needs the mirror. `daemon`: the daemon's user.
fn foreign_mirror(config: &MirrorConfig, listener: Option<u32>, daemon: Option<u32>) -> Option<Finding> {
    let uid = listener.filter(|uid| *uid != 0 && Some(*uid) != daemon)?;
    let detail = format!(
        "user {uid} listens on the mirror's address, which is not the daemon: what Podman asks for on {} can be answered \
         with anything",
        config.listen
    );
    let advice = "stop that process (`ss -ltnp` names it) and start the daemon; the unit nydus-store.socket holds the port while \
                  the daemon is down";
    Some(Finding::fail(MIRROR, detail, advice))
}

/// A mirror that is not to be asked.
fn unreachable_mirror(config: &MirrorConfig, needed: Option<bool>) -> Finding {
    if config.enabled {
        let detail = format!(
            "it listens on {}, and Podman takes neither port 0, which means any, nor an IPv6 address",
            config.listen
        );
        let advice = "choose an address as 127.0.0.1:5055 with `listen` in the table [mirror] of the configuration, and run \
                      setup again";
        return problem(needed, detail, advice);
    }
    match needed {
        Some(false) => Finding::ok(MIRROR, "the configuration turns it off, and this Podman needs none"),
        _ => problem(
            needed,
            "the configuration turns it off",
            "Podman 5.1 and later need it: set `enabled = true` in the table [mirror], or take that line out",
        ),
    }
}

fn judge_mirror(config: &MirrorConfig, probed: Result<(), ProbeError>, needed: Option<bool>) -> Finding {
    let Err(error) = probed else {
        return Finding::ok(MIRROR, format!("it answers on {}", config.listen));
    };
    let advice = match error {
        ProbeError::Silent { .. } => {
            "start the daemon; if it runs, its configuration is another: name that file with --config"
        }
        ProbeError::Other { .. } => {
            "stop that program, or choose another address with `listen` in the table [mirror] of the configuration, restart \
             the daemon and run setup again"
        }
        ProbeError::Refused { .. } => {
            "run doctor as root, or list the user who runs Podman as `allow_uids` in the table [mirror] of the configuration"
        }
        ProbeError::Status { .. } => "look at the daemon's log (`journalctl -u nydus-store`)",
    };
    problem(needed, Report(&error).to_string(), advice)
}

/// What is wrong with the mirror stops lazy images, unless Podman can do without.
fn problem(needed: Option<bool>, detail: impl Into<String>, advice: &str) -> Finding {
    match needed {
        Some(true) => Finding::fail(MIRROR, detail, advice),
        _ => Finding::warn(MIRROR, detail, advice),
    }
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
    fn mirrors() {
        let listen = MirrorConfig::default().listen;
        let config = |enabled, port| MirrorConfig {
            enabled,
            listen: (listen.ip(), port).into(),
            ..MirrorConfig::default()
        };
        for (enabled, port, needed, expected) in [
            (true, 0, Some(true), Status::Fail),
            (true, 0, Some(false), Status::Warn),
            (false, 5055, Some(true), Status::Fail),
            (false, 5055, None, Status::Warn),
            (false, 5055, Some(false), Status::Ok),
        ] {
            assert_eq!(
                mirror(Path::new("/"), &config(enabled, port), needed).status,
                expected,
                "{enabled} {port} {needed:?}"
            );
        }
        for (listener, daemon) in [(None, None), (Some(0), None), (Some(0), Some(7)), (Some(7), Some(7))] {
            assert_eq!(foreign_mirror(&config(true, 5055), listener, daemon), None);
        }
        for daemon in [None, Some(0), Some(8)] {
            let foreign = foreign_mirror(&config(true, 5055), Some(7), daemon).unwrap();
            assert!(
                foreign.status == Status::Fail && foreign.detail.contains("user 7 listens on the mirror's address"),
                "{foreign:?}"
            );
        }
        let judge = |probed, needed| judge_mirror(&config(true, 5055), probed, needed);
        assert_eq!(judge(Ok(()), Some(true)).status, Status::Ok);
        let refused = judge(Err(ProbeError::Refused { listen }), Some(true));
        assert!(refused.status == Status::Fail && refused.advice.unwrap().contains("allow_uids"));
        let other = judge(Err(ProbeError::Other { listen }), Some(false));
        assert!(
            other.status == Status::Warn && other.detail.contains("127.0.0.1:5055 is not"),
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
