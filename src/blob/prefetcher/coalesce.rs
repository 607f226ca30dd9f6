//! Coalescing: a reader's request also fetches small units, or the rest of a file, that lie behind the wanted unit.
//!
//! Programs read nearby: the modules of one directory, the next part of a library. A longer request may save later
//! ones, each of which costs a round trip; bytes that are never read cost bandwidth. [`coalesce`] is the choice of the
//! units, a function of its arguments alone. [`Coalescer`] decides by the hit rate whether to coalesce at all.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use parking_lot::Mutex;

use super::{LIMITS, read_ahead::PrefetchBackoff};
use crate::blob::{
    atomic_bit_set::AtomicBitSet,
    chunk_order::ChunkOrder,
    fetcher::{ChunkFetcher, CoalescingPolicy},
    scheduler::MAX_PREFETCH_MEMORY,
    shared::FlightKey,
    span::{MAX_SHARED_BYTES, Span, SpanLimits},
    unit::{Unit, UnitId, UnitMap},
};

/// How many stored bytes behind the wanted unit a request may fetch: 80 ms of a link of 100 Mbit/s.
const MIN_EXTRA_BYTES: u64 = 1 << 20;
/// The same where the registry is fast and far.
const MAX_EXTRA_BYTES: u64 = 4 << 20;
/// In between, so many bandwidth-delay products.
const BANDWIDTH_DELAY_PRODUCTS: u64 = 2;
/// The longest unit, in stored bytes, that is fetched without continuing a file: on a link of 100 Mbit/s half a round
/// trip of 20 ms.
const MAX_SMALL_UNIT_BYTES: u32 = 128 << 10;
/// How many chunks behind the wanted unit are examined.
const MAX_EXAMINED_CHUNKS: usize = 1024;
/// Coalesced bytes after which the hit rate halves its history, in multiples of what a request may add.
const HISTORY_REQUESTS: u64 = 16;
/// Coalesced bytes before the hit rate counts, in the same unit.
const MIN_SAMPLE_REQUESTS: u64 = 4;
/// The lowest share of coalesced bytes that must be read: one in so many.
const MIN_HIT_RATE_INVERSE: u64 = 8;
/// At a low hit rate, one request in so many is coalesced, to notice a change.
const PROBE_INTERVAL: u32 = 16;

/// Decides which requests of one blob are coalesced, by the hit rate of earlier ones.
pub(in crate::blob) struct Coalescer {
    order: Arc<ChunkOrder>,
    backoff: Arc<PrefetchBackoff>,
    /// Chunks that were coalesced and not read yet.
    unread: AtomicBitSet,
    hit_rate: Mutex<HitRate>,
    /// Number of [`SuspendedCoalescing`] in existence.
    suspensions: Arc<AtomicUsize>,
}

/// How much of what was coalesced has been read, in uncompressed bytes of chunks.
#[derive(Debug, Default)]
struct HitRate {
    fetched: u64,
    read: u64,
    /// Requests since the last coalesced one, at a low hit rate.
    skipped: u32,
}

/// Suspends coalescing for one reader of a blob as long as it exists.
#[must_use]
pub struct SuspendedCoalescing(Option<Arc<AtomicUsize>>);

/// The span to fetch for `wanted`: that unit, and units behind it that `is_available` (missing and not in flight), up
/// to `max_extra` stored bytes. `None` if there is no other unit, or if `wanted` takes too much memory.
///
/// Fetches units without a gap in the order of the chunks: small ones, and long ones as far as all chunks before have
/// the greatest length in the blob, which suggests that they continue a file.
pub(super) fn coalesce(
    wanted: &Unit,
    map: &UnitMap,
    order: &ChunkOrder,
    max_extra: u64,
    is_available: impl Fn(usize, UnitId) -> bool,
) -> Option<Span> {
    let len = u64::from(wanted.extent.compressed_size);
    if len + u64::from(wanted.extent.uncompressed_size) > MAX_PREFETCH_MEMORY {
        return None;
    }
    let mut behind = units_behind(wanted, map, order, max_extra, is_available);
    // A unit before it would come first. There may be one among batches: a chunk that is stored by itself.
    let end = wanted.extent.compressed_end();
    behind.retain(|unit| unit.extent.compressed_offset.saturating_add(MAX_SHARED_BYTES) >= end);
    let limits = SpanLimits {
        len: len + max_extra,
        ..LIMITS
    };
    let spans = Span::group([wanted.clone()].into_iter().chain(behind).collect(), limits);
    // The other units are behind `wanted`, unless the image is malformed.
    let first = spans.into_iter().next()?;
    (first.units[0].id == wanted.id && first.units.len() > 1).then_some(first)
}

fn units_behind(
    wanted: &Unit,
    map: &UnitMap,
    order: &ChunkOrder,
    max_extra: u64,
    is_available: impl Fn(usize, UnitId) -> bool,
) -> Vec<Unit> {
    let chunks = &order.layout().chunks;
    let starts = wanted.members.iter().map(|(at, _)| chunks[*at].uncompressed_offset);
    let last_start = starts.max().unwrap_or(u64::MAX);
    let is_full = |unit: &Unit| {
        let mut sizes = unit.members.iter().map(|(at, _)| chunks[*at].uncompressed_size);
        sizes.all(|size| size == order.longest())
    };
    let (mut units, mut continues_file, mut len): (Vec<Unit>, _, _) = (Vec::new(), is_full(wanted), 0);
    let following = order.starting_from(last_start.saturating_add(1));
    for position in following.take(MAX_EXAMINED_CHUNKS) {
        let Ok(id) = map.unit_of(&chunks[position]) else {
            break;
        };
        if id == units.last().map_or(wanted.id, |unit| unit.id) {
            continue;
        }
        // Checked before the unit is looked up, which may list many chunks.
        if !is_available(position, id) {
            break;
        }
        let Ok(unit) = map.unit(order.layout(), position) else {
            break;
        };
        len += u64::from(unit.extent.compressed_size);
        let is_small = unit.extent.compressed_size <= MAX_SMALL_UNIT_BYTES;
        if len > max_extra || !(continues_file || is_small) {
            break;
        }
        continues_file = continues_file && is_full(&unit);
        units.push(unit);
    }
    units
}

/// How many stored bytes a request may fetch behind the wanted unit, on a link of that bandwidth-delay product (0: not
/// known).
fn max_extra_bytes(bandwidth_delay_product: u64) -> u64 {
    let bytes = BANDWIDTH_DELAY_PRODUCTS.saturating_mul(bandwidth_delay_product);
    bytes.clamp(MIN_EXTRA_BYTES, MAX_EXTRA_BYTES)
}

impl Coalescer {
    /// For the chunks in `order`. Does not coalesce during a pause of `backoff`.
    pub(in crate::blob) fn new(order: Arc<ChunkOrder>, backoff: Arc<PrefetchBackoff>) -> Self {
        Self {
            unread: AtomicBitSet::new(order.layout().chunks.len()),
            order,
            backoff,
            hit_rate: Mutex::default(),
            suspensions: Arc::default(),
        }
    }

    /// Suspends coalescing until the returned value is dropped, and all others of its kind are.
    pub(in crate::blob) fn suspend(&self) -> SuspendedCoalescing {
        self.suspensions.fetch_add(1, Ordering::Relaxed);
        SuspendedCoalescing(Some(Arc::clone(&self.suspensions)))
    }

    /// The chunk at `position`, of `size` bytes, is read for the first time.
    pub(super) fn on_first_access(&self, position: usize, size: u32) {
        if self.unread.remove(position) {
            self.hit_rate.lock().read += u64::from(size);
        }
    }

    fn on_fetch(&self, position: usize, size: u32, max_extra: u64) {
        self.unread.insert(position);
        self.hit_rate.lock().on_fetch(u64::from(size), max_extra);
    }
}

impl CoalescingPolicy for Coalescer {
    fn span(&self, fetcher: &ChunkFetcher, map: &UnitMap, unit: &Unit) -> Option<Span> {
        let scheduler = fetcher.scheduler();
        if !self.backoff.is_over() || scheduler.has_few_requests() {
            return None;
        }
        let max_extra = max_extra_bytes(scheduler.link.bandwidth_delay_product());
        let is_suspended = self.suspensions.load(Ordering::Relaxed) > 0;
        if is_suspended || !fetcher.source().can_seek() || !self.hit_rate.lock().allows(max_extra) {
            return None;
        }
        let flights = fetcher.flights();
        coalesce(unit, map, &self.order, max_extra, |position, id| {
            fetcher.is_missing(position) && !flights.is_in_flight(&FlightKey::shared(id))
        })
    }

    fn on_request(&self, fetcher: &ChunkFetcher, positions: &[usize]) {
        let max_extra = max_extra_bytes(fetcher.scheduler().link.bandwidth_delay_product());
        for position in positions {
            let size = self.order.layout().chunks[*position].uncompressed_size;
            self.on_fetch(*position, size, max_extra);
        }
    }

    fn on_end(&self, is_complete: bool) {
        match is_complete {
            true => self.backoff.on_success(),
            false => self.backoff.on_failure(),
        }
    }
}

impl HitRate {
    fn on_fetch(&mut self, bytes: u64, max_extra: u64) {
        if self.fetched > HISTORY_REQUESTS * max_extra {
            self.fetched /= 2;
            self.read /= 2;
        }
        self.fetched += bytes;
    }

    /// Whether to coalesce a request that may fetch `max_extra` stored bytes more. Counts as a request.
    fn allows(&mut self, max_extra: u64) -> bool {
        if self.fetched < MIN_SAMPLE_REQUESTS * max_extra || self.read >= self.fetched / MIN_HIT_RATE_INVERSE {
            return true;
        }
        self.skipped = (self.skipped + 1) % PROBE_INTERVAL;
        self.skipped == 0
    }
}

impl SuspendedCoalescing {
    /// Suspends nothing, for a blob whose requests are not coalesced anyway.
    pub(in crate::blob) fn none() -> Self {
        Self(None)
    }
}

impl Drop for SuspendedCoalescing {
    fn drop(&mut self) {
        if let Some(suspensions) = &self.0 {
            suspensions.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::blob::layout::{BlobLayout, Chunk};

    const MIB: u64 = 1 << 20;
    const FULL: u32 = 1 << 20;
    const SMALL: u32 = 1000;

    /// The chunks that a request for the chunk at `position` fetches, of chunks of these sizes, if those in
    /// `unavailable` are present or in flight.
    fn coalesced(sizes: &[u32], position: usize, max_extra: u64, unavailable: &[usize]) -> Vec<usize> {
        let mut offset = 0;
        let chunks = sizes.iter().enumerate().map(|(index, size)| {
            let at = offset;
            offset += u64::from(*size);
            Chunk {
                index: index as u32,
                digest: [0; 32],
                compressed_offset: at,
                compressed_size: *size,
                uncompressed_offset: at,
                uncompressed_size: *size,
                compressed: false,
            }
        });
        let layout = BlobLayout::of_plain(chunks.collect());
        let map = UnitMap::PerChunk;
        let wanted = map.unit(&layout, position).unwrap();
        let order = ChunkOrder::new(Arc::new(layout));
        let is_available = |position: usize, _| !unavailable.contains(&position);
        let span = coalesce(&wanted, &map, &order, max_extra, is_available);
        let units = span.map_or_else(Vec::new, |span| span.units);
        units.iter().map(|unit| unit.members[0].0).collect()
    }

    #[test]
    fn small_units_behind_are_coalesced_up_to_an_unavailable_one() {
        assert_eq!(coalesced(&[SMALL; 6], 1, MIB, &[]), [1, 2, 3, 4, 5]);
        assert_eq!(coalesced(&[SMALL; 6], 1, MIB, &[0, 4]), [1, 2, 3]);
        assert!(coalesced(&[SMALL; 6], 1, MIB, &[2]).is_empty());
        assert!(coalesced(&[SMALL; 6], 5, MIB, &[]).is_empty());
        assert_eq!(coalesced(&[SMALL; 6], 1, 2 * u64::from(SMALL), &[]), [1, 2, 3]);
    }

    #[test]
    fn long_units_are_coalesced_if_they_continue_a_file() {
        let sizes = [SMALL, FULL, FULL, FULL / 2, FULL / 2, SMALL];
        assert!(coalesced(&sizes, 0, 4 * MIB, &[]).is_empty());
        assert_eq!(coalesced(&sizes, 1, 4 * MIB, &[]), [1, 2, 3]);
        assert_eq!(coalesced(&sizes, 4, 4 * MIB, &[]), [4, 5]);
    }

    #[test]
    fn a_long_round_trip_allows_more_bytes() {
        assert_eq!(max_extra_bytes(0), MIB);
        assert_eq!(max_extra_bytes(MIB), 2 * MIB);
        assert_eq!(max_extra_bytes(u64::MAX), 4 * MIB);
    }

    #[test]
    fn a_low_hit_rate_suspends_coalescing_except_for_probes() {
        let mut hit_rate = HitRate::default();
        let tried = (0..100).filter(|_| {
            let allows = hit_rate.allows(MIB);
            if allows {
                hit_rate.on_fetch(MIB, MIB);
            }
            allows
        });
        let tried = tried.count() as u64;
        assert!((MIN_SAMPLE_REQUESTS..12).contains(&tried), "{tried}");
        hit_rate.read += hit_rate.fetched;
        assert!((0..10).all(|_| hit_rate.allows(MIB)));
        // Old hits lose their weight.
        (0..200).for_each(|_| hit_rate.on_fetch(MIB, MIB));
        assert!(!hit_rate.allows(MIB));
    }

    #[test]
    fn a_coalesced_chunk_counts_as_read_once() {
        let chunk = |index: u32| Chunk {
            index,
            digest: [0; 32],
            compressed_offset: 0,
            compressed_size: 10,
            uncompressed_offset: u64::from(index) * 10,
            uncompressed_size: 10,
            compressed: false,
        };
        let layout = BlobLayout::of_plain((0..100).map(chunk).collect());
        let coalescer = Coalescer::new(Arc::new(ChunkOrder::new(Arc::new(layout))), Arc::default());
        coalescer.on_first_access(70, 10);
        coalescer.on_fetch(70, 10, MIB);
        (0..2).for_each(|_| coalescer.on_first_access(70, 10));
        let hit_rate = coalescer.hit_rate.lock();
        assert_eq!((hit_rate.fetched, hit_rate.read), (10, 10));
    }
}
