//! Translates requests of `fuser` to calls of a [`FileSystem`], and its results to replies.

use std::{
    cell::RefCell,
    ffi::OsStr,
    os::unix::ffi::OsStrExt as _,
    sync::Arc,
    time::{Duration, SystemTime},
};

use fuser::{
    FileAttr, FileHandle, FileType, Filesystem, Generation, INodeNo, LockOwner, OpenFlags, ReplyAttr, ReplyCreate,
    ReplyData, ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty, ReplyEntry, ReplyOpen, ReplyStatfs, ReplyWrite,
    ReplyXattr, Request,
};
use tokio::runtime::Handle;

use crate::vfs::{Answer, Attr, DirEntry, Entry, Errno, FileSystem, PendingResult, ReadAnswer};

/// Serves a [`FileSystem`] to the kernel.
pub struct Adapter<F> {
    fs: Arc<F>,
    /// Runtime that waits for pending results.
    runtime: Handle,
    /// Distinguishes nodes of this mount from those of an earlier mount with the same ids.
    generation: Generation,
}

impl<F: FileSystem> Adapter<F> {
    /// Serves `fs`; pending results are awaited on `runtime`.
    pub fn new(fs: Arc<F>, runtime: Handle) -> Self {
        let since_epoch = SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default();
        Self {
            fs,
            runtime,
            generation: Generation(since_epoch.as_micros() as u64),
        }
    }

    /// Replies now, or when the result is available.
    fn entry(&self, reply: ReplyEntry, answer: Answer<Entry>) {
        match answer {
            Answer::Ready(result) => reply_entry(reply, result, self.generation),
            Answer::Pending(pending) => {
                let generation = self.generation;
                self.runtime
                    .spawn(async move { reply_entry(reply, pending.await, generation) });
            }
        }
    }

    fn reply_data(&self, reply: ReplyData, pending: PendingResult<Vec<u8>>) {
        self.runtime.spawn(async move {
            match pending.await {
                Ok(data) => reply.data(&data),
                Err(error) => reply.error(errno(error)),
            }
        });
    }
}

fn reply_entry(reply: ReplyEntry, result: Result<Entry, Errno>, generation: Generation) {
    match result {
        Ok(Entry { attr: Some(attr), ttl }) => reply.entry(&ttl, &file_attr(&attr), generation),
        // Node 0 is a negative entry, which the kernel may cache.
        Ok(Entry { attr: None, ttl }) => reply.entry(&ttl, &file_attr(&NEGATIVE_ATTR), Generation(0)),
        Err(error) => reply.error(errno(error)),
    }
}

const NEGATIVE_ATTR: Attr = Attr {
    node: 0,
    mode: libc::S_IFREG,
    uid: 0,
    gid: 0,
    nlink: 0,
    size: 0,
    rdev: 0,
    mtime: 0,
    mtime_nsec: 0,
};

fn errno(error: Errno) -> fuser::Errno {
    fuser::Errno::from_i32(error.raw_os_error())
}

fn file_type(mode: u32) -> FileType {
    match mode & libc::S_IFMT {
        libc::S_IFDIR => FileType::Directory,
        libc::S_IFLNK => FileType::Symlink,
        libc::S_IFCHR => FileType::CharDevice,
        libc::S_IFBLK => FileType::BlockDevice,
        libc::S_IFIFO => FileType::NamedPipe,
        libc::S_IFSOCK => FileType::Socket,
        _ => FileType::RegularFile,
    }
}

fn file_attr(attr: &Attr) -> FileAttr {
    let seconds = Duration::from_secs(attr.mtime.unsigned_abs());
    let nanos = Duration::from_nanos(u64::from(attr.mtime_nsec));
    let epoch = SystemTime::UNIX_EPOCH;
    let whole = if attr.mtime < 0 {
        epoch.checked_sub(seconds)
    } else {
        epoch.checked_add(seconds)
    };
    let mtime = whole.and_then(|time| time.checked_add(nanos)).unwrap_or(epoch);
    FileAttr {
        ino: INodeNo(attr.node),
        size: attr.size,
        blocks: attr.size.div_ceil(512),
        atime: mtime,
        mtime,
        ctime: mtime,
        crtime: mtime,
        kind: file_type(attr.mode),
        perm: (attr.mode & 0o7777) as u16,
        nlink: attr.nlink,
        uid: attr.uid,
        gid: attr.gid,
        rdev: attr.rdev,
        blksize: 4096,
        flags: 0,
    }
}

fn reply_xattr(reply: ReplyXattr, size: u32, result: Result<Vec<u8>, Errno>) {
    match result {
        // The kernel limits values and lists to 64 KiB.
        Ok(data) if size == 0 => reply.size(data.len() as u32),
        Ok(data) if data.len() <= size as usize => reply.data(&data),
        Ok(_) => reply.error(fuser::Errno::ERANGE),
        Err(error) => reply.error(errno(error)),
    }
}

impl<F: FileSystem> Filesystem for Adapter<F> {
    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        self.entry(reply, self.fs.lookup(parent.0, name.as_bytes()));
    }

    fn forget(&self, _: &Request, node: INodeNo, count: u64) {
        self.fs.forget(node.0, count);
    }

    fn getattr(&self, _: &Request, node: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        match self.fs.attr(node.0) {
            Ok((attr, ttl)) => reply.attr(&ttl, &file_attr(&attr)),
            Err(error) => reply.error(errno(error)),
        }
    }

    fn readlink(&self, _: &Request, node: INodeNo, reply: ReplyData) {
        match self.fs.readlink(node.0) {
            Ok(target) => reply.data(&target),
            Err(error) => reply.error(errno(error)),
        }
    }

    // ENOSYS tells the kernel to open files without requests and to keep their pages. Files never change, and this
    // saves a round trip for each open.
    fn open(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        reply.error(fuser::Errno::ENOSYS);
    }

    fn opendir(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        reply.error(fuser::Errno::ENOSYS);
    }

    fn read(
        &self,
        _: &Request,
        node: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        thread_local! {
            static BUFFER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
        }
        BUFFER.with_borrow_mut(|buffer| {
            if buffer.len() < size as usize {
                buffer.resize(size as usize, 0);
            }
            match self.fs.read(node.0, offset, &mut buffer[..size as usize]) {
                ReadAnswer::Ready(Ok(len)) => reply.data(&buffer[..len]),
                ReadAnswer::Ready(Err(error)) => reply.error(errno(error)),
                ReadAnswer::Pending(pending) => self.reply_data(reply, pending),
            }
        });
    }

    fn readdir(&self, _: &Request, dir: INodeNo, _: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        let mut add = |entry: DirEntry<'_>| {
            let name = OsStr::from_bytes(entry.name);
            !reply.add(INodeNo(entry.attr.node), entry.next, file_type(entry.attr.mode), name)
        };
        match self.fs.list(dir.0, offset, &mut add) {
            Ok(()) => reply.ok(),
            Err(error) => reply.error(errno(error)),
        }
    }

    fn readdirplus(&self, _: &Request, dir: INodeNo, _: FileHandle, offset: u64, mut reply: ReplyDirectoryPlus) {
        let mut add = |entry: DirEntry<'_>| {
            let (node, name) = (entry.attr.node, OsStr::from_bytes(entry.name));
            // For each entry except `.` and `..`, the kernel counts a look-up.
            let counts = entry.name != b"." && entry.name != b"..";
            if counts {
                self.fs.add_lookup(node);
            }
            let full = reply.add(
                INodeNo(node),
                entry.next,
                name,
                &entry.ttl,
                &file_attr(&entry.attr),
                self.generation,
            );
            if full && counts {
                self.fs.forget(node, 1);
            }
            !full
        };
        match self.fs.list(dir.0, offset, &mut add) {
            Ok(()) => reply.ok(),
            Err(error) => reply.error(errno(error)),
        }
    }

    fn statfs(&self, _: &Request, _: INodeNo, reply: ReplyStatfs) {
        let stat = self.fs.statfs();
        reply.statfs(stat.bytes.div_ceil(4096), 0, 0, stat.files, 0, 4096, 255, 4096);
    }

    fn getxattr(&self, _: &Request, node: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        reply_xattr(reply, size, self.fs.xattr(node.0, name.as_bytes()));
    }

    fn listxattr(&self, _: &Request, node: INodeNo, size: u32, reply: ReplyXattr) {
        reply_xattr(reply, size, self.fs.xattrs(node.0));
    }

    fn create(&self, _: &Request, _: INodeNo, _: &OsStr, _: u32, _: u32, _: i32, reply: ReplyCreate) {
        reply.error(fuser::Errno::EROFS);
    }

    fn mknod(&self, _: &Request, _: INodeNo, _: &OsStr, _: u32, _: u32, _: u32, reply: ReplyEntry) {
        reply.error(fuser::Errno::EROFS);
    }

    fn rmdir(&self, _: &Request, _: INodeNo, _: &OsStr, reply: ReplyEmpty) {
        reply.error(fuser::Errno::EROFS);
    }

    fn mkdir(&self, _: &Request, _: INodeNo, _: &OsStr, _: u32, _: u32, reply: ReplyEntry) {
        reply.error(fuser::Errno::EROFS);
    }

    fn unlink(&self, _: &Request, _: INodeNo, _: &OsStr, reply: ReplyEmpty) {
        reply.error(fuser::Errno::EROFS);
    }

    fn symlink(&self, _: &Request, _: INodeNo, _: &OsStr, _: &std::path::Path, reply: ReplyEntry) {
        reply.error(fuser::Errno::EROFS);
    }

    fn rename(
        &self,
        _: &Request,
        _: INodeNo,
        _: &OsStr,
        _: INodeNo,
        _: &OsStr,
        _: fuser::RenameFlags,
        reply: ReplyEmpty,
    ) {
        reply.error(fuser::Errno::EROFS);
    }

    fn link(&self, _: &Request, _: INodeNo, _: INodeNo, _: &OsStr, reply: ReplyEntry) {
        reply.error(fuser::Errno::EROFS);
    }

    fn setattr(
        &self,
        _: &Request,
        _: INodeNo,
        _: Option<u32>,
        _: Option<u32>,
        _: Option<u32>,
        _: Option<u64>,
        _: Option<fuser::TimeOrNow>,
        _: Option<fuser::TimeOrNow>,
        _: Option<SystemTime>,
        _: Option<FileHandle>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<fuser::BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        reply.error(fuser::Errno::EROFS);
    }

    fn setxattr(&self, _: &Request, _: INodeNo, _: &OsStr, _: &[u8], _: i32, _: u32, reply: ReplyEmpty) {
        reply.error(fuser::Errno::EROFS);
    }

    fn removexattr(&self, _: &Request, _: INodeNo, _: &OsStr, reply: ReplyEmpty) {
        reply.error(fuser::Errno::EROFS);
    }

    fn write(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        _: u64,
        _: &[u8],
        _: fuser::WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        reply.error(fuser::Errno::EROFS);
    }

    fn fsync(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        reply.ok();
    }

    fn fsyncdir(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        reply.ok();
    }

    // Replies explicitly, because `fuser` logs a warning for each request without a handler.
    fn lseek(&self, _: &Request, _: INodeNo, _: FileHandle, _: i64, _: i32, reply: fuser::ReplyLseek) {
        reply.error(fuser::Errno::ENOSYS);
    }

    fn access(&self, _: &Request, _: INodeNo, _: fuser::AccessFlags, reply: ReplyEmpty) {
        reply.error(fuser::Errno::ENOSYS);
    }
}
