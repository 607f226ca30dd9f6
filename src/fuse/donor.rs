//! Finds out by which ids a process is about to map a mount.
//!
//! containers/storage forks a process in a new user namespace, writes the ids to its maps, makes id-mapped mounts with
//! that namespace, mounts the container's root from them and ends the process. The forked process runs nothing else,
//! so that it is of its parent's program, which sets it apart from containers and their like. Of one storage,
//! containers/storage mounts one container's root at a time.
//!
//! Anybody can make processes and user namespaces. So a namespace counts only if it was made by who runs the daemon, in the
//! daemon's own; and nothing is read here that another process could make to wait, as its memory.

use std::{
    fs::{self, File},
    io,
    os::{
        fd::{AsFd, AsRawFd as _, FromRawFd as _, OwnedFd},
        unix::fs::MetadataExt as _,
    },
    path::PathBuf,
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    process::{Pid, PidfdFlags, geteuid, pidfd_open},
};

/// `NS_GET_PARENT` and `NS_GET_OWNER_UID` of ioctl_nsfs(2).
const PARENT: libc::c_ulong = 0xb702;
const OWNER: libc::c_ulong = 0xb704;

/// A process that is there for its user namespace.
pub struct Donor {
    /// Its process id.
    pub pid: u32,
    /// Becomes readable when the process ends.
    pub process: OwnedFd,
    /// Its user namespace.
    pub namespace: OwnedFd,
    /// Names the namespace, as long as it is open.
    pub id: (u64, u64),
}

/// The donor that the process of `thread` has forked, or its parent, which may have left the mounting to a child.
pub fn donor_of(thread: u32) -> Option<Donor> {
    let status = fs::read_to_string(of(thread, "status")).ok()?;
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name))?;
        line.trim().parse::<u32>().ok()
    };
    let (caller, parent) = (field("Tgid:")?, field("PPid:")?);
    let program = program(caller)?;
    forked_by(caller, &program).or_else(|| (self::program(parent)? == program).then(|| forked_by(parent, &program))?)
}

fn of(process: u32, name: &str) -> PathBuf {
    PathBuf::from(format!("/proc/{process}/{name}"))
}

/// The file that the process runs.
fn program(process: u32) -> Option<PathBuf> {
    fs::read_link(of(process, "exe")).ok()
}

fn forked_by(parent: u32, program: &PathBuf) -> Option<Donor> {
    children(parent).into_iter().find_map(|child| donor(child, program))
}

/// The process, if it runs that program and is a donor.
fn donor(pid: u32, program: &PathBuf) -> Option<Donor> {
    // First, so that all that follows is of one process, if that still runs in the end.
    let process = pidfd_open(Pid::from_raw(i32::try_from(pid).ok()?)?, PidfdFlags::empty()).ok()?;
    if self::program(pid)? != *program {
        return None;
    }
    let namespace = File::open(of(pid, "ns/user")).ok()?;
    let own = File::open("/proc/self/ns/user").ok()?;
    let (id, own) = (id_of(&namespace).ok()?, id_of(&own).ok()?);
    let is_made_here = id != own
        && owner_of(&namespace).ok()? == geteuid().as_raw()
        && id_of(&parent_of(&namespace).ok()?).ok()? == own;
    let is_mapped = || fs::read(of(pid, "gid_map")).is_ok_and(|map| !map.is_empty());
    (is_made_here && is_mapped() && runs(&process)).then(|| Donor {
        pid,
        process,
        namespace: namespace.into(),
        id,
    })
}

fn runs(process: &OwnedFd) -> bool {
    let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut [PollFd::new(process, PollFlags::IN)], Some(&at_once)) == Ok(0)
}

fn id_of(namespace: &File) -> io::Result<(u64, u64)> {
    let metadata = namespace.metadata()?;
    Ok((metadata.dev(), metadata.ino()))
}

/// The user who made the namespace.
fn owner_of(namespace: &impl AsFd) -> io::Result<u32> {
    let mut uid: libc::uid_t = 0;
    // SAFETY: the descriptor is open, and this request writes a `uid_t` to where the pointer leads.
    match unsafe { libc::ioctl(namespace.as_fd().as_raw_fd(), OWNER, &raw mut uid) } {
        0 => Ok(uid),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The namespace in which it was made.
fn parent_of(namespace: &impl AsFd) -> io::Result<File> {
    // SAFETY: the descriptor is open, and this request takes no argument.
    let parent = unsafe { libc::ioctl(namespace.as_fd().as_raw_fd(), PARENT) };
    if parent < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the request gave a new descriptor, which nobody else has.
    Ok(unsafe { OwnedFd::from_raw_fd(parent) }.into())
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
