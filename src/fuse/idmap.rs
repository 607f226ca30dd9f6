//! Id-mapped copies of the store's mount, for containers in user namespaces.
//!
//! For `podman run --userns` containers/storage makes an id-mapped copy of the mount of its own directory, and mounts
//! the container's root from what is below that. A layer of a store is a symbolic link there, and leads out of the copy:
//! its files would be nobody's. But the link ends in the store, which can see who follows it and by which ids he is
//! about to map ([`super::donor`]). So a second copy is made here, by the same ids, and the way goes on in that.

use std::{
    collections::HashMap,
    fs, io,
    os::fd::{AsFd, AsRawFd as _},
    path::{Path, PathBuf},
    sync::Arc,
    thread,
    time::Duration,
};

use parking_lot::Mutex;
use rustix::{
    event::{PollFd, PollFlags, poll},
    mount::{MoveMountFlags, OpenTreeFlags, UnmountFlags, move_mount, open_tree, unmount},
};
use tokio::runtime::Handle;

use super::{
    donor::{Donor, donor_of},
    mountpoint,
};
use crate::{
    files,
    store::redirect::IdMaps,
    vfs::{Errno, Later},
};

/// How long it may take to find out who asks, and to make a copy for him.
const PATIENCE: Duration = Duration::from_secs(10);

/// The copies. Each lasts as long as the process whose user namespace it was made with.
pub struct MappedCopies {
    inner: Arc<Inner>,
    runtime: Handle,
}

struct Inner {
    store: PathBuf,
    dir: PathBuf,
    made: Mutex<Made>,
}

#[derive(Default)]
struct Made {
    last: u32,
    /// A donor's user namespace → the copy's number.
    numbers: HashMap<(u64, u64), u32>,
    /// No more are made.
    closed: bool,
}

impl MappedCopies {
    /// Makes copies of the mount on `store` in `dir`, from which those of an earlier process are taken away.
    pub fn new(store: &Path, dir: &Path, runtime: &Handle) -> io::Result<Self> {
        files::make_private_dir(dir)?;
        clear(dir)?;
        Ok(Self {
            inner: Arc::new(Inner {
                store: store.to_owned(),
                dir: dir.to_owned(),
                made: Mutex::default(),
            }),
            runtime: runtime.clone(),
        })
    }
}

impl IdMaps for MappedCopies {
    fn copy_for(&self, caller: u32) -> Later<Option<u32>> {
        let inner = Arc::clone(&self.inner);
        // No thread that serves the store may wait for either. To look at a process may take until it has started another
        // program, for which it may have to close files of the store; and mounting may ask the store something.
        let made = self.runtime.spawn_blocking(move || {
            let donor = donor_of(caller);
            donor.map(|donor| inner.copy_for(donor)).transpose()
        });
        Box::pin(async move {
            // Nobody who maps ids is that slow; others are not to wait for a process that hangs.
            let Ok(made) = tokio::time::timeout(PATIENCE, made).await else {
                tracing::warn!(
                    caller,
                    "cannot tell whether a process maps ids: taking it for one that does not"
                );
                return Ok(None);
            };
            made.unwrap_or_else(|error| Err(error.into())).map_err(|error| {
                tracing::warn!(%error, "cannot map the store to a user namespace's ids: its files will be nobody's there");
                Errno::IO
            })
        })
    }

    fn path(&self, copy: u32) -> PathBuf {
        self.inner.path(copy)
    }

    fn close(&self) {
        self.inner.made.lock().closed = true;
        if let Err(error) = clear(&self.inner.dir) {
            tracing::debug!(%error, "cannot remove the id-mapped copies");
        }
    }
}

impl Inner {
    fn path(&self, copy: u32) -> PathBuf {
        self.dir.join(copy.to_string())
    }

    fn copy_for(self: Arc<Self>, donor: Donor) -> io::Result<u32> {
        let mut made = self.made.lock();
        if let Some(number) = made.numbers.get(&donor.id) {
            return Ok(*number);
        }
        if made.closed {
            return Err(io::Error::other("the store is stopping"));
        }
        let (number, pid, id) = (made.last + 1, donor.pid, donor.id);
        let place = self.path(number);
        files::make_private_dir(&place)?;
        let mounted = mount_mapped(&self.store, &place, &donor.namespace);
        let inner = Arc::clone(&self);
        let end_with = move || inner.end_with(&donor, &inner.path(number));
        let watched = mounted.and_then(|()| thread::Builder::new().name("id-map".to_owned()).spawn(end_with));
        watched.inspect_err(|_| take_away(&place))?;
        made.last = number;
        made.numbers.insert(id, number);
        tracing::debug!(
            copy = number,
            process = pid,
            "the store is mapped to a user namespace's ids"
        );
        Ok(number)
    }

    /// Takes the copy away when the donor has ended. By then the container's root is mounted, or never will be, and that
    /// mount holds what it needs.
    fn end_with(&self, donor: &Donor, place: &Path) {
        while poll(&mut [PollFd::new(&donor.process, PollFlags::IN)], None) == Err(rustix::io::Errno::INTR) {}
        self.made.lock().numbers.remove(&donor.id);
        take_away(place);
    }
}

fn take_away(place: &Path) {
    let unmounted = unmount(place, UnmountFlags::DETACH);
    if let Err(error) = fs::remove_dir(place) {
        tracing::debug!(place = %place.display(), ?unmounted, %error, "cannot remove an id-mapped copy");
    }
}

fn clear(dir: &Path) -> io::Result<()> {
    // The innermost first; what is gone with what it was in is no error.
    for place in mountpoint::mounted_below(dir)?.into_iter().rev() {
        match unmount(&place, UnmountFlags::DETACH) {
            Ok(()) | Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOENT) => {}
            Err(error) => return Err(error.into()),
        }
    }
    for entry in fs::read_dir(dir)? {
        fs::remove_dir(entry?.path())?;
    }
    Ok(())
}

/// Mounts a copy of the mount at `source` on `target`, with the ids that show mapped by a user namespace.
pub fn mount_mapped(source: &Path, target: &Path, namespace: &impl AsFd) -> io::Result<()> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let tree = open_tree(rustix::fs::CWD, source, flags)?;
    let attr = libc::mount_attr {
        attr_set: libc::MOUNT_ATTR_IDMAP,
        attr_clr: 0,
        // Nothing that is mounted in the store is to show up in the copy.
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
