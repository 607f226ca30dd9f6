//! Finds out by which ids a process is about to map a mount.
//!
//! containers/storage forks a process in a new user namespace, writes the ids to its maps, makes id-mapped mounts with
//! that namespace, mounts the container's root from them and ends the process. The forked process runs nothing else,
//! so that it has its parent's command line, which sets it apart from containers and their like. Of one storage,
//! containers/storage mounts one container's root at a time.

use std::{
    fs::{self, File},
    os::fd::OwnedFd,
    path::PathBuf,
};

use rustix::process::{Pid, PidfdFlags, pidfd_open};

/// A process that is there for its user namespace.
pub struct Donor {
    /// Its process id.
    pub pid: u32,
    /// Becomes readable when the process ends.
    pub process: OwnedFd,
    /// Its user namespace.
    pub namespace: OwnedFd,
}

/// The donor that the process of `thread` has forked, or its parent, which may have left the mounting to a child.
pub fn donor_of(thread: u32) -> Option<Donor> {
    let status = fs::read_to_string(of(thread, "status")).ok()?;
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name))?;
        line.trim().parse::<u32>().ok()
    };
    let processes = [field("Tgid:")?, field("PPid:")?];
    processes.into_iter().find_map(forked_by)
}

fn of(process: u32, name: &str) -> PathBuf {
    PathBuf::from(format!("/proc/{process}/{name}"))
}

fn forked_by(parent: u32) -> Option<Donor> {
    let command_line = fs::read(of(parent, "cmdline")).ok().filter(|text| !text.is_empty())?;
    let namespace = fs::read_link(of(parent, "ns/user")).ok()?;
    let gives = |child: &u32| {
        fs::read(of(*child, "cmdline")).is_ok_and(|text| text == command_line)
            && fs::read_link(of(*child, "ns/user")).is_ok_and(|own| own != namespace)
            && fs::read(of(*child, "gid_map")).is_ok_and(|map| !map.is_empty())
    };
    children(parent).into_iter().filter(gives).find_map(open)
}

fn open(pid: u32) -> Option<Donor> {
    let process = pidfd_open(Pid::from_raw(i32::try_from(pid).ok()?)?, PidfdFlags::empty()).ok()?;
    Some(Donor {
        pid,
        process,
        namespace: File::open(of(pid, "ns/user")).ok()?.into(),
    })
}

fn children(parent: u32) -> Vec<u32> {
    let threads = fs::read_dir(of(parent, "task")).into_iter().flatten().flatten();
    let lists = threads.filter_map(|thread| fs::read_to_string(thread.path().join("children")).ok());
    let numbers = |list: String| {
        list.split_whitespace()
            .filter_map(|word| word.parse().ok())
            .collect::<Vec<_>>()
    };
    lists.flat_map(numbers).collect()
}
