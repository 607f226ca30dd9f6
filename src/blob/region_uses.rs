//! [`RegionUses`]: when the parts of a cached blob were last used.

use std::sync::atomic::{AtomicU64, Ordering};

/// Smallest length of a region, in uncompressed bytes: that of a usual chunk.
const MIN_REGION_SIZE: u64 = 1 << 20;
/// Maximum number of regions, which bounds memory: 32 KiB for a blob.
const MAX_REGIONS: u64 = 4096;

/// The time of the last use of each region: a part of the uncompressed blob, of fixed length. Regions are evicted one
/// by one. A chunk lies in the region where it starts.
pub(super) struct RegionUses {
    size: u64,
    last: Vec<AtomicU64>,
}

impl RegionUses {
    /// Regions of a blob of so many uncompressed bytes, all last used at that time.
    pub(super) fn new(uncompressed_size: u64, last_use: u64) -> Self {
        let size = uncompressed_size
            .div_ceil(MAX_REGIONS)
            .max(MIN_REGION_SIZE)
            .next_power_of_two();
        let count = uncompressed_size.div_ceil(size).max(1);
        Self {
            size,
            last: (0..count).map(|_| AtomicU64::new(last_use)).collect(),
        }
    }

    /// The region in which a chunk at that uncompressed offset lies.
    pub(super) fn region(&self, offset: u64) -> usize {
        // A hostile image may give a wrong length of the blob.
        usize::try_from(offset / self.size)
            .map_or(self.last.len(), |region| region)
            .min(self.last.len() - 1)
    }

    /// Records a use of the chunk at that offset.
    pub(super) fn touch(&self, offset: u64, now: u64) {
        let last = &self.last[self.region(offset)];
        // Most reads find the time set, and need not take the cache line from other cores.
        if last.load(Ordering::Relaxed) < now {
            last.store(now, Ordering::Relaxed);
        }
    }

    /// When the region was last used.
    pub(super) fn last_use(&self, region: usize) -> u64 {
        self.last[region].load(Ordering::Relaxed)
    }

    /// When any region was last used.
    pub(super) fn latest(&self) -> u64 {
        let times = self.last.iter().map(|last| last.load(Ordering::Relaxed));
        times.max().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn number_of_regions_is_bounded() {
        for (size, regions) in [(0, 1), (1, 1), (5 << 20, 5), ((5 << 20) + 1, 6), (4 << 30, 4096)] {
            assert_eq!(RegionUses::new(size, 0).last.len(), regions, "{size}");
        }
        for size in [(4 << 30) + 1, 100 << 30, i64::MAX as u64] {
            let uses = RegionUses::new(size, 0);
            assert!(
                uses.last.len() <= 4096 && uses.region(size - 1) == uses.last.len() - 1,
                "{size}"
            );
        }
    }

    #[test]
    fn chunk_beyond_the_blob_counts_for_the_last_region() {
        let uses = RegionUses::new(3 << 20, 7);
        uses.touch(u64::MAX, 9);
        uses.touch(0, 8);
        uses.touch(0, 5);
        assert_eq!([0, 1, 2].map(|region| uses.last_use(region)), [8, 7, 9]);
        assert_eq!(uses.latest(), 9);
    }
}
