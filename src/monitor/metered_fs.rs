//! [`MeteredFs`]: a file system that counts the requests to another one.
//!
//! It stands between the FUSE server and the file system, so that neither knows of metrics. The durations leave out
//! the way to and from the kernel. Requests that the server answers by itself, such as attempts to write, are not
//! counted.

use std::{sync::Arc, time::Duration};

use super::fuse_counters::{FuseCounters, Operation, RequestTimer};
use crate::vfs::{Answer, Attr, DirEntry, Entry, Errno, FileSystem, FsStat, NodeId, PendingResult, ReadAnswer};

/// Counts the requests to a file system.
pub struct MeteredFs<F> {
    fs: Arc<F>,
    counters: Arc<FuseCounters>,
}

impl<F> MeteredFs<F> {
    /// Counts the requests to `fs` in `counters`.
    pub fn new(fs: Arc<F>, counters: Arc<FuseCounters>) -> Self {
        Self { fs, counters }
    }

    fn count<T>(&self, operation: Operation, work: impl FnOnce(&F) -> Result<T, Errno>) -> Result<T, Errno> {
        let request = RequestTimer::start(operation);
        let result = work(&self.fs);
        self.counters.record(request, &result);
        result
    }

    /// Counts the request once its result is available, and the bytes that `len` finds in the result.
    fn count_later<T: Send + 'static>(
        &self,
        request: RequestTimer,
        pending: PendingResult<T>,
        len: fn(&T) -> usize,
    ) -> PendingResult<T> {
        let counters = Arc::clone(&self.counters);
        Box::pin(async move {
            let result = pending.await;
            counters.record_waited(request, &result);
            counters.record_bytes(result.as_ref().map_or(0, len));
            result
        })
    }
}

impl<F: FileSystem> FileSystem for MeteredFs<F> {
    fn lookup(&self, parent: NodeId, name: &[u8]) -> Answer<Entry> {
        let request = RequestTimer::start(Operation::Lookup);
        match self.fs.lookup(parent, name) {
            Answer::Ready(result) => {
                self.counters.record(request, &result);
                Answer::Ready(result)
            }
            Answer::Pending(pending) => Answer::Pending(self.count_later(request, pending, |_| 0)),
        }
    }

    fn prepare(&self, node: NodeId) -> Option<PendingResult<()>> {
        self.fs.prepare(node)
    }

    fn forget(&self, node: NodeId, count: u64) {
        self.fs.forget(node, count);
    }

    fn attr(&self, node: NodeId) -> Result<(Attr, Duration), Errno> {
        self.count(Operation::Getattr, |fs| fs.attr(node))
    }

    fn readlink(&self, node: NodeId) -> Result<Vec<u8>, Errno> {
        self.count(Operation::Readlink, |fs| fs.readlink(node))
    }

    fn list(&self, dir: NodeId, offset: u64, add: &mut dyn FnMut(DirEntry<'_>) -> bool) -> Result<(), Errno> {
        self.count(Operation::Readdir, |fs| fs.list(dir, offset, add))
    }

    fn read(&self, file: NodeId, offset: u64, into: &mut [u8]) -> ReadAnswer {
        let request = RequestTimer::start(Operation::Read);
        match self.fs.read(file, offset, into) {
            ReadAnswer::Ready(result) => {
                self.counters.record(request, &result);
                self.counters.record_bytes(result.unwrap_or(0));
                ReadAnswer::Ready(result)
            }
            ReadAnswer::Pending(pending) => ReadAnswer::Pending(self.count_later(request, pending, Vec::len)),
        }
    }

    fn xattr(&self, node: NodeId, name: &[u8]) -> Result<Vec<u8>, Errno> {
        self.count(Operation::Getxattr, |fs| fs.xattr(node, name))
    }

    fn xattrs(&self, node: NodeId) -> Result<Vec<u8>, Errno> {
        self.count(Operation::Listxattr, |fs| fs.xattrs(node))
    }

    fn statfs(&self) -> FsStat {
        let request = RequestTimer::start(Operation::Statfs);
        let stat = self.fs.statfs();
        self.counters.record(request, &Ok(()));
        stat
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::monitor::fuse_counters::Outcome;

    /// Node 1 is ready, node 2 has to be awaited, node 3 cannot be read.
    struct Fake;

    impl FileSystem for Fake {
        fn lookup(&self, _: NodeId, name: &[u8]) -> Answer<Entry> {
            match name {
                b"absent" => Answer::Ready(Err(Errno::NOENT)),
                _ => Answer::Pending(Box::pin(async { Err(Errno::IO) })),
            }
        }

        fn attr(&self, _: NodeId) -> Result<(Attr, Duration), Errno> {
            Err(Errno::STALE)
        }

        fn readlink(&self, _: NodeId) -> Result<Vec<u8>, Errno> {
            Ok(Vec::new())
        }

        fn list(&self, _: NodeId, _: u64, _: &mut dyn FnMut(DirEntry<'_>) -> bool) -> Result<(), Errno> {
            Ok(())
        }

        fn read(&self, file: NodeId, _: u64, into: &mut [u8]) -> ReadAnswer {
            match file {
                1 => ReadAnswer::Ready(Ok(into.len())),
                2 => ReadAnswer::Pending(Box::pin(async { Ok(vec![0; 7]) })),
                _ => ReadAnswer::Pending(Box::pin(async { Err(Errno::IO) })),
            }
        }

        fn xattr(&self, _: NodeId, _: &[u8]) -> Result<Vec<u8>, Errno> {
            Err(Errno::NODATA)
        }

        fn xattrs(&self, _: NodeId) -> Result<Vec<u8>, Errno> {
            Ok(Vec::new())
        }

        fn statfs(&self) -> FsStat {
            FsStat::default()
        }
    }

    #[tokio::test]
    async fn requests_are_counted_by_operation_and_outcome() {
        let counters = Arc::<FuseCounters>::default();
        let fs = MeteredFs::new(Arc::new(Fake), Arc::clone(&counters));
        for file in [1, 2, 3] {
            if let ReadAnswer::Pending(pending) = fs.read(file, 0, &mut [0; 10]) {
                pending.await.ok();
            }
        }
        assert!(matches!(fs.lookup(1, b"absent"), Answer::Ready(Err(Errno::NOENT))));
        let Answer::Pending(pending) = fs.lookup(1, b"x") else {
            panic!("it is pending");
        };
        assert_eq!(
            counters.count(Operation::Lookup, Outcome::IoError),
            0,
            "not answered yet"
        );
        assert_eq!(pending.await.unwrap_err(), Errno::IO);
        fs.attr(1).unwrap_err();
        fs.xattr(1, b"x").unwrap_err();
        fs.readlink(1).unwrap();
        fs.xattrs(1).unwrap();
        fs.list(1, 0, &mut |_| true).unwrap();
        fs.statfs();
        for (operation, counts) in [
            (Operation::Lookup, [0, 1, 1, 0]),
            (Operation::Getattr, [0, 0, 0, 1]),
            (Operation::Readlink, [1, 0, 0, 0]),
            (Operation::Read, [2, 0, 1, 0]),
            (Operation::Readdir, [1, 0, 0, 0]),
            (Operation::Getxattr, [0, 1, 0, 0]),
            (Operation::Listxattr, [1, 0, 0, 0]),
            (Operation::Statfs, [1, 0, 0, 0]),
        ] {
            let counted = Outcome::ALL.map(|outcome| counters.count(operation, outcome));
            assert_eq!(counted, counts, "{}", operation.name());
            assert_eq!(counters.durations(operation).count(), counts.iter().sum::<u64>());
        }
        assert_eq!(counters.waits(Operation::Read).count(), 2);
        assert_eq!(counters.waits(Operation::Lookup).count(), 1);
        assert_eq!(counters.bytes_read(), 17);
    }
}
