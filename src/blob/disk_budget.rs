//! [`DiskBudget`]: how much disk space the cache uses and may use, and which of it was used last.
//!
//! Used space is counted in allocated blocks, since the files of blobs are sparse. It is computed from the files when
//! the cache is opened; then each writer adds the difference that its write made.

use std::sync::atomic::{AtomicU64, Ordering};

use super::size_limit::{DiskSpace, SizeLimit};

/// Eviction begins when all but this part of the limit is used.
const HIGH_RESERVE: u64 = 50;
/// Eviction ends when all but this part of the limit is used.
const LOW_RESERVE: u64 = 20;

/// Disk space of a cache, in bytes.
pub(super) struct DiskBudget {
    configured: SizeLimit,
    limit: AtomicU64,
    /// Space of blobs and other files.
    used: AtomicU64,
    /// Space of files other than blobs; part of `used`.
    other: AtomicU64,
    /// Space for writes in progress.
    reserved: AtomicU64,
    /// Time of last use of a piece of the cache, counted in writes to the cache. Unlike seconds, it orders pieces also
    /// where all of the cache is replaced within a second, and stands still where nothing has to be evicted.
    clock: AtomicU64,
}

/// What one blob uses of the budget. Outlives the open blob.
#[derive(Default)]
pub(super) struct BlobUsage {
    /// Space of the blob's files.
    allocated: AtomicU64,
    /// When the blob was last used, by [`DiskBudget::now`].
    last_use: AtomicU64,
}

/// Room for a write.
pub(super) struct Reservation<'a> {
    budget: &'a DiskBudget,
    bytes: u64,
}

impl DiskBudget {
    /// A budget of which nothing is used. The limit applies after [`Self::update_limit`].
    pub(super) fn new(configured: SizeLimit) -> Self {
        Self {
            configured,
            limit: AtomicU64::new(u64::MAX),
            used: AtomicU64::new(0),
            other: AtomicU64::new(0),
            reserved: AtomicU64::new(0),
            clock: AtomicU64::new(0),
        }
    }

    /// Computes the limit from the state of the file system.
    pub(super) fn update_limit(&self, disk: DiskSpace) {
        let limit = self.configured.effective(self.used(), disk);
        self.limit.store(limit, Ordering::Relaxed);
    }

    /// Bytes in use.
    pub(super) fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    /// Bytes that may be in use.
    pub(super) fn limit(&self) -> u64 {
        self.limit.load(Ordering::Relaxed)
    }

    /// Whether eviction is to begin.
    pub(super) fn exceeds_high_watermark(&self) -> bool {
        self.used() > self.limit() - self.limit() / HIGH_RESERVE
    }

    /// Use at which eviction ends.
    pub(super) fn low_watermark(&self) -> u64 {
        self.limit() - self.limit() / LOW_RESERVE
    }

    /// Whether more would soon have something evicted.
    pub(super) fn is_nearly_full(&self) -> bool {
        self.used() > self.low_watermark()
    }

    /// Reserves space for a write; `None` if the limit would be exceeded.
    pub(super) fn reserve(&self, bytes: u64) -> Option<Reservation<'_>> {
        let reserved = self.reserved.fetch_add(bytes, Ordering::Relaxed) + bytes;
        let reservation = Reservation { budget: self, bytes };
        (self.used().saturating_add(reserved) <= self.limit()).then_some(reservation)
    }

    /// Reserves space for a write that is to exceed the limit if necessary.
    pub(super) fn reserve_beyond_limit(&self, bytes: u64) -> Reservation<'_> {
        self.reserved.fetch_add(bytes, Ordering::Relaxed);
        Reservation { budget: self, bytes }
    }

    /// Sets the space of files other than blobs.
    pub(super) fn set_other(&self, bytes: u64) {
        let before = self.other.swap(bytes, Ordering::Relaxed);
        self.add(before, bytes);
    }

    /// Sets the space of a blob's files.
    pub(super) fn set_allocated(&self, blob: &BlobUsage, bytes: u64) {
        let before = blob.allocated.swap(bytes, Ordering::Relaxed);
        self.add(before, bytes);
    }

    /// Adds the difference. Differences of concurrent swaps of one value add up to the right sum in any order.
    fn add(&self, before: u64, after: u64) {
        self.used.fetch_add(after.wrapping_sub(before), Ordering::Relaxed);
    }

    /// The time.
    pub(super) fn now(&self) -> u64 {
        self.clock.load(Ordering::Relaxed)
    }

    /// Advances the time and returns it.
    pub(super) fn tick(&self) -> u64 {
        self.clock.fetch_add(1, Ordering::Relaxed) + 1
    }
}

impl BlobUsage {
    /// Space of the blob's files, in bytes.
    pub(super) fn allocated(&self) -> u64 {
        self.allocated.load(Ordering::Relaxed)
    }

    /// When the blob was last used.
    pub(super) fn last_use(&self) -> u64 {
        self.last_use.load(Ordering::Relaxed)
    }

    /// Records a use of the blob.
    pub(super) fn set_last_use(&self, at: u64) {
        self.last_use.fetch_max(at, Ordering::Relaxed);
    }
}

impl Drop for Reservation<'_> {
    fn drop(&mut self) {
        self.budget.reserved.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::blob::size_limit::DiskShare;

    fn budget(limit: u64) -> DiskBudget {
        let budget = DiskBudget::new(SizeLimit {
            limit: DiskShare::Bytes(limit),
            ..SizeLimit::NONE
        });
        budget.update_limit(DiskSpace {
            total: u64::MAX / 2,
            available: u64::MAX / 2,
        });
        budget
    }

    #[test]
    fn reservations_count_until_they_are_dropped() {
        let budget = budget(1000);
        let blob = BlobUsage::default();
        budget.set_allocated(&blob, 500);
        budget.set_other(100);
        let reserved = budget.reserve(300);
        assert!(reserved.is_some() && budget.reserve(101).is_none());
        drop(budget.reserve_beyond_limit(10_000));
        drop(reserved);
        assert!(budget.reserve(400).is_some());
        budget.set_allocated(&blob, 450);
        budget.set_other(0);
        assert_eq!((budget.used(), blob.allocated()), (450, 450));
    }

    #[test]
    fn watermarks_are_below_the_limit() {
        let budget = budget(1000);
        let marks = |used| {
            budget.set_other(used);
            (budget.is_nearly_full(), budget.exceeds_high_watermark())
        };
        assert_eq!(
            [950, 951, 980, 981].map(marks),
            [(false, false), (true, false), (true, false), (true, true)]
        );
        let unlimited = DiskBudget::new(SizeLimit::NONE);
        assert!(unlimited.reserve(u64::MAX / 2).is_some());
    }
}
