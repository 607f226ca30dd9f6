//! Answers the kernel's requests by a [`FileSystem`].
//!
//! A few threads read requests. What can be answered at once is answered there; all else is awaited on the async
//! runtime, so that slow requests do not delay fast ones. `fuser` is not used: it cannot serve a session that another
//! process has begun, honours no interrupts, and has its own buffers.

use std::{
    cell::RefCell,
    io,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
};

use tokio::runtime::Handle;

use super::{
    abi::{EntryOut, ForgetOne, GetattrOut, Listing, ReadIn, Request, StatfsOut, XattrIn, XattrOut, op},
    channel::{Channel, Reply},
    waiting::WaitingRequests,
};
use crate::vfs::{Answer, DirEntry, Entry, Errno, FileSystem, ReadAnswer};

/// Length of the buffer for requests (`FUSE_MIN_READ_BUFFER`). Names are the longest operands: nothing is written.
pub(super) const REQUEST_BYTES: usize = 8192;
/// Largest reply to a read or a listing, in bytes.
const MAX_REPLY_BYTES: usize = 1 << 20;

/// Serves a [`FileSystem`] to the kernel.
pub(super) struct Server<F> {
    pub fs: Arc<F>,
    /// Runtime that waits for pending results.
    pub runtime: Handle,
    /// Distinguishes nodes of this session from those of an earlier one with the same ids.
    pub generation: u64,
    pub waiting: Arc<WaitingRequests>,
}

impl<F: FileSystem> Server<F> {
    /// Answers requests of the channel until the file system is unmounted.
    pub fn run(self: &Arc<Self>, channel: &Arc<Channel>) -> io::Result<()> {
        let mut buffer = [0; REQUEST_BYTES];
        while let Some(len) = channel.receive(&mut buffer)? {
            match Request::parse(&buffer[..len]) {
                // A panic fails this request, and must not end the thread.
                Some(request) => {
                    let handle = || self.handle(&request, &buffer[..len], channel);
                    catch_unwind(AssertUnwindSafe(handle)).ok();
                }
                None => tracing::warn!(bytes = len, "ignoring malformed FUSE request"),
            }
        }
        Ok(())
    }

    fn handle(self: &Arc<Self>, request: &Request<'_>, bytes: &[u8], channel: &Arc<Channel>) {
        let header = &request.header;
        match header.opcode {
            // These have no reply.
            op::FORGET => {
                if let Some(lookups) = request.operands() {
                    self.fs.forget(header.node, lookups);
                }
                return;
            }
            op::BATCH_FORGET => {
                for ForgetOne { node, lookups } in request.forgotten() {
                    self.fs.forget(node, lookups);
                }
                return;
            }
            op::INTERRUPT => return self.interrupt(request, channel),
            _ => {}
        }
        let reply = Reply::new(channel, header.unique);
        let Some(prepared) = self.fs.prepare(header.node) else {
            return self.answer(request, reply);
        };
        let (server, bytes) = (Arc::clone(self), bytes.to_vec());
        let then = move |prepared, reply: Reply| match (prepared, Request::parse(&bytes)) {
            (Ok(()), Some(request)) => server.answer(&request, reply),
            (Err(error), _) => reply.error(error),
            (Ok(()), None) => reply.error(Errno::IO),
        };
        self.wait(request, reply, prepared, then);
    }

    fn interrupt(&self, request: &Request<'_>, channel: &Arc<Channel>) {
        let Some(unique) = request.operands() else { return };
        if !self.waiting.interrupt(&self.runtime, unique) {
            // The kernel asks again if the request is still unanswered, and ignores the reply otherwise.
            Reply::new(channel, request.header.unique).error(Errno::AGAIN);
        }
    }

    fn wait<T: Send + 'static>(
        &self,
        request: &Request<'_>,
        reply: Reply,
        work: impl Future<Output = T> + Send + 'static,
        answer: impl FnOnce(T, Reply) + Send + 'static,
    ) {
        let header = &request.header;
        let requester = (header.unique, header.pid);
        self.waiting.spawn(&self.runtime, requester, reply, work, answer);
    }

    fn answer(&self, request: &Request<'_>, reply: Reply) {
        let node = request.header.node;
        match request.header.opcode {
            op::LOOKUP => self.lookup(request, reply),
            op::GETATTR => match self.fs.attr(node) {
                Ok((attr, ttl)) => reply.structure(&GetattrOut::new(&attr, ttl)),
                Err(error) => reply.error(error),
            },
            op::READLINK => match self.fs.readlink(node) {
                Ok(target) => reply.data(&target),
                Err(error) => reply.error(error),
            },
            op::READ => self.read(request, reply),
            op::READDIR => self.list(request, reply, None),
            op::READDIRPLUS => self.list(request, reply, Some(self.generation)),
            op::GETXATTR => match request.name(size_of::<XattrIn>()) {
                Some(name) => reply_xattr(request, reply, self.fs.xattr(node, name)),
                None => reply.error(Errno::INVAL),
            },
            op::LISTXATTR => reply_xattr(request, reply, self.fs.xattrs(node)),
            op::STATFS => reply.structure(&StatfsOut::from(self.fs.statfs())),
            op::DESTROY | op::RELEASE | op::RELEASEDIR | op::FSYNC | op::FSYNCDIR => reply.ok(),
            op::SETATTR
            | op::SYMLINK
            | op::MKNOD
            | op::MKDIR
            | op::UNLINK
            | op::RMDIR
            | op::RENAME
            | op::LINK
            | op::WRITE
            | op::SETXATTR
            | op::REMOVEXATTR
            | op::CREATE
            | op::RENAME2
            | op::TMPFILE => reply.error(Errno::ROFS),
            // For OPEN and OPENDIR, ENOSYS tells the kernel to open files without requests and to keep their pages.
            // Files never change, and this saves a round trip for each open.
            _ => reply.error(Errno::NOSYS),
        }
    }

    fn lookup(&self, request: &Request<'_>, reply: Reply) {
        let Some(name) = request.name(0) else {
            return reply.error(Errno::INVAL);
        };
        let generation = self.generation;
        match self.fs.lookup(request.header.node, name) {
            Answer::Ready(result) => reply_entry(reply, &result, generation),
            Answer::Pending(pending) => self.wait(request, reply, pending, move |result, reply| {
                reply_entry(reply, &result, generation);
            }),
        }
    }

    fn read(&self, request: &Request<'_>, reply: Reply) {
        let Some(ReadIn { offset, size, .. }) = request.operands() else {
            return reply.error(Errno::INVAL);
        };
        thread_local! {
            static BUFFER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
        }
        let size = (size as usize).min(MAX_REPLY_BYTES);
        BUFFER.with_borrow_mut(|buffer| {
            if buffer.len() < size {
                buffer.resize(size, 0);
            }
            match self.fs.read(request.header.node, offset, &mut buffer[..size]) {
                ReadAnswer::Ready(Ok(len)) => reply.data(&buffer[..len]),
                ReadAnswer::Ready(Err(error)) => reply.error(error),
                ReadAnswer::Pending(pending) => self.wait(request, reply, pending, |result, reply| match result {
                    Ok(data) => reply.data(&data),
                    Err(error) => reply.error(error),
                }),
            }
        });
    }

    fn list(&self, request: &Request<'_>, reply: Reply, generation: Option<u64>) {
        let Some(ReadIn { offset, size, .. }) = request.operands() else {
            return reply.error(Errno::INVAL);
        };
        let mut listing = Listing::new((size as usize).min(MAX_REPLY_BYTES), generation);
        let mut add = |entry: DirEntry<'_>| listing.add(entry.name, &entry.attr, entry.next, entry.ttl);
        match self.fs.list(request.header.node, offset, &mut add) {
            Ok(()) => reply.data(listing.bytes()),
            Err(error) => reply.error(error),
        }
    }
}

fn reply_entry(reply: Reply, result: &Result<Entry, Errno>, generation: u64) {
    match result {
        Ok(entry) => reply.structure(&EntryOut::new(entry, generation)),
        Err(error) => reply.error(*error),
    }
}

/// Answers GETXATTR or LISTXATTR: with the length if no length is allowed, else with the value.
fn reply_xattr(request: &Request<'_>, reply: Reply, result: Result<Vec<u8>, Errno>) {
    let size = request.operands::<XattrIn>().map_or(0, |operands| operands.size);
    match result {
        // The kernel limits values and lists to 64 KiB.
        Ok(data) if size == 0 => reply.structure(&XattrOut {
            size: data.len() as u32,
            padding: 0,
        }),
        Ok(data) if data.len() <= size as usize => reply.data(&data),
        Ok(_) => reply.error(Errno::RANGE),
        Err(error) => reply.error(error),
    }
}
