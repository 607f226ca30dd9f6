//! Translates the requests that `fuser` reads into calls of a [`FileSystem`], and its answers back. Nothing else.

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

use crate::vfs::{Answer, Attr, DirEntry, Entry, Errno, FileSystem, Later, ReadAnswer};

/// Serves a [`FileSystem`] to the kernel.
pub struct Adapter<F> {
    fs: Arc<F>,
    /// Where answers that take long are waited for.
    runtime: Handle,
    /// Sets nodes of this mount apart from those of an earlier one with the same numbers.
    generation: Generation,
}

impl<F: FileSystem> Adapter<F> {
    /// Serves `fs`; slow answers are waited for on `runtime`.
    pub fn new(fs: Arc<F>, runtime: Handle) -> Self {
        let since_epoch = SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default();
        Self {
            fs,
            runtime,
            generation: Generation(since_epoch.as_micros() as u64),
        }
    }

    /// Answers now, or when the answer is there.
    fn entry(&self, reply: ReplyEntry, answer: Answer<Entry>) {
        match answer {
            Answer::Ready(result) => reply_entry(reply, result, self.generation),
            Answer::Pending(later) => {
                let generation = self.generation;
                self.runtime
                    .spawn(async move { reply_entry(reply, later.await, generation) });
            }
        }
    }

    fn data_later(&self, reply: ReplyData, later: Later<Vec<u8>>) {
        self.runtime.spawn(async move {
            match later.await {
                Ok(data) => reply.data(&data),
                Err(error) => reply.error(errno(error)),
            }
        });
    }
}

fn reply_entry(reply: ReplyEntry, result: Result<Entry, Errno>, generation: Generation) {
    match result {
        Ok(Entry { attr: Some(attr), ttl }) => reply.entry(&ttl, &file_attr(&attr), generation),
        // Node 0 tells the kernel that there is nothing, and to remember it.
        Ok(Entry { attr: None, ttl }) => reply.entry(&ttl, &file_attr(&NOTHING), Generation(0)),
        Err(error) => reply.error(errno(error)),
    }
}

const NOTHING: Attr = Attr {
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

fn kind(mode: u32) -> FileType {
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
        kind: kind(attr.mode),
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
        // The kernel's own limit on a value or a list is 64 KiB.
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

    // That "open" is not implemented tells the kernel to open files by itself and to keep their pages: nothing here
    // changes, and each request saved is a round trip saved.
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
                ReadAnswer::Pending(later) => self.data_later(reply, later),
            }
        });
    }

    fn readdir(&self, _: &Request, dir: INodeNo, _: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        let mut add = |entry: DirEntry<'_>| {
            let name = OsStr::from_bytes(entry.name);
            !reply.add(INodeNo(entry.attr.node), entry.next, kind(entry.attr.mode), name)
        };
        match self.fs.list(dir.0, offset, &mut add) {
            Ok(()) => reply.ok(),
            Err(error) => reply.error(errno(error)),
        }
    }

    fn readdirplus(&self, _: &Request, dir: INodeNo, _: FileHandle, offset: u64, mut reply: ReplyDirectoryPlus) {
        let mut add = |entry: DirEntry<'_>| {
            let (node, name) = (entry.attr.node, OsStr::from_bytes(entry.name));
            // The kernel looks up every entry but these two by being given it.
            let counts = entry.name != b"." && entry.name != b"..";
            if counts {
                self.fs.retain(node);
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

    // What is not implemented is answered at once, without the warning that `fuser` would log each time.
    fn lseek(&self, _: &Request, _: INodeNo, _: FileHandle, _: i64, _: i32, reply: fuser::ReplyLseek) {
        reply.error(fuser::Errno::ENOSYS);
    }

    fn access(&self, _: &Request, _: INodeNo, _: fuser::AccessFlags, reply: ReplyEmpty) {
        reply.error(fuser::Errno::ENOSYS);
    }
}
