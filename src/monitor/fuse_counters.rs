//! Counters of the requests that the kernel sends to a mount.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::Instant,
};

use crate::{histogram::DurationHistogram, vfs::Errno};

/// What the kernel requests of a file system. The names are those of FUSE.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// Look-up of a name.
    Lookup,
    /// Attributes of a node.
    Getattr,
    /// Target of a symbolic link.
    Readlink,
    /// Part of a file.
    Read,
    /// Part of a directory.
    Readdir,
    /// Value of an extended attribute.
    Getxattr,
    /// Names of extended attributes.
    Listxattr,
    /// Statistics of the file system.
    Statfs,
}

/// How a request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// With a result.
    Ok,
    /// There is no such name or attribute.
    Absent,
    /// With an input/output error: content could not be read.
    IoError,
    /// With another error, such as that of a node which is gone.
    OtherError,
}

/// A request that is not answered yet.
#[derive(Debug, Clone, Copy)]
pub struct RequestTimer {
    operation: Operation,
    started: Instant,
}

/// Counters of a mount.
#[derive(Debug, Default)]
pub struct FuseCounters {
    operations: [OperationCounters; Operation::ALL.len()],
    bytes_read: AtomicU64,
}

/// Aligned, so that threads with different operations do not contend for a cache line.
#[derive(Debug, Default)]
#[repr(align(64))]
struct OperationCounters {
    outcomes: [AtomicU64; Outcome::ALL.len()],
    duration: DurationHistogram,
    waited: DurationHistogram,
}

impl Operation {
    /// All operations.
    pub const ALL: [Self; 8] = [
        Self::Lookup,
        Self::Getattr,
        Self::Readlink,
        Self::Read,
        Self::Readdir,
        Self::Getxattr,
        Self::Listxattr,
        Self::Statfs,
    ];
    /// The operations that may wait for a registry or a disk.
    pub const WAITING: [Self; 2] = [Self::Lookup, Self::Read];

    /// The name in metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Lookup => "lookup",
            Self::Getattr => "getattr",
            Self::Readlink => "readlink",
            Self::Read => "read",
            Self::Readdir => "readdir",
            Self::Getxattr => "getxattr",
            Self::Listxattr => "listxattr",
            Self::Statfs => "statfs",
        }
    }
}

impl Outcome {
    /// All outcomes.
    pub const ALL: [Self; 4] = [Self::Ok, Self::Absent, Self::IoError, Self::OtherError];

    /// The name in metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Absent => "absent",
            Self::IoError => "io_error",
            Self::OtherError => "other_error",
        }
    }

    fn of<T>(result: &Result<T, Errno>) -> Self {
        match result {
            Ok(_) => Self::Ok,
            Err(Errno::NOENT | Errno::NODATA) => Self::Absent,
            Err(Errno::IO) => Self::IoError,
            Err(_) => Self::OtherError,
        }
    }
}

impl RequestTimer {
    /// A request that has just arrived.
    pub fn start(operation: Operation) -> Self {
        let started = Instant::now();
        Self { operation, started }
    }
}

impl FuseCounters {
    /// Counts a request that was answered at once.
    pub fn record<T>(&self, request: RequestTimer, result: &Result<T, Errno>) {
        let counters = self.of(request.operation);
        counters.outcomes[Outcome::of(result) as usize].fetch_add(1, Ordering::Relaxed);
        counters.duration.observe(request.started.elapsed());
    }

    /// Counts a request whose answer had to wait for a registry or a disk.
    pub fn record_waited<T>(&self, request: RequestTimer, result: &Result<T, Errno>) {
        self.record(request, result);
        self.of(request.operation).waited.observe(request.started.elapsed());
    }

    /// Counts bytes that a read has returned.
    pub fn record_bytes(&self, bytes: usize) {
        self.bytes_read.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// Bytes that reads have returned.
    pub fn bytes_read(&self) -> u64 {
        self.bytes_read.load(Ordering::Relaxed)
    }

    /// Number of requests with that outcome.
    pub fn count(&self, operation: Operation, outcome: Outcome) -> u64 {
        self.of(operation).outcomes[outcome as usize].load(Ordering::Relaxed)
    }

    /// Times from request to answer.
    pub fn durations(&self, operation: Operation) -> &DurationHistogram {
        &self.of(operation).duration
    }

    /// The same of those requests that had to wait for a registry or a disk.
    pub fn waits(&self, operation: Operation) -> &DurationHistogram {
        &self.of(operation).waited
    }

    fn of(&self, operation: Operation) -> &OperationCounters {
        &self.operations[operation as usize]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn indexes_are_those_of_the_lists() {
        let is_in_place = |(index, place): (usize, usize)| index == place;
        let operations = Operation::ALL.iter().map(|operation| *operation as usize);
        assert!(operations.enumerate().all(is_in_place));
        let outcomes = Outcome::ALL.iter().map(|outcome| *outcome as usize);
        assert!(outcomes.enumerate().all(is_in_place));
    }
}
