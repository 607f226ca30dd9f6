//! What lies behind a unit that somebody waits for and comes with it in one request.
//!
//! A program reads here and there, but often near by: the modules of one directory, the next part of a library. A request that goes on
//! behind what was asked for may save others, each of which costs a round trip; what it brings in vain costs its time on the
//! link, and that of who comes after. So it goes on over what is small, or continues a file.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use parking_lot::Mutex;

use super::{
    atomic_bit_set::AtomicBitSet,
    error::ReadCause,
    prefetcher::{BOUNDS, UnitLeader},
    reader::{BlobReader, Fetched},
    scheduler::MOST_AHEAD,
    singleflight::Leader,
    source::Provenance,
    span::{Bounds, OVERLAP, Span},
    unit::{PlannedUnit, UnitId},
    unit_map::KnownUnitMap,
};

/// How many stored bytes behind the unit asked for a request may go on: 80 ms of a link of 100 Mbit/s.
const BEHIND: u64 = 1 << 20;
/// The same where the registry is fast and far.
const FAR_BEHIND: u64 = 4 << 20;
/// In between, what comes in the time that so many answers take to begin.
const ANSWERS: u64 = 2;
/// The longest unit, in stored bytes, that comes along without continuing a file: half a round trip of 20 ms on it.
const SMALL: u32 = 128 << 10;
/// Chunks that are looked at.
const LOOK: usize = 1024;
/// Bytes brought after which they count half, in what a request may bring.
const MEMORY: u64 = 16;
/// Bytes brought before anything is concluded, likewise.
const FIRST: u64 = 4;
/// What share of the bytes has to be used: one in so many.
const WORTH: u64 = 8;
/// Where it is not worth it, one request in so many finds out whether that has changed.
const PROBE: u32 = 16;

/// What has come along, and whether it was of use.
pub(super) struct Coalescer {
    /// The chunks that came along and were not read yet.
    brought: AtomicBitSet,
    /// Length of the longest chunk: whatever is as long does probably not end its file.
    longest: u32,
    worth: Mutex<HitRate>,
    /// How many [`SuspendedCoalescing`] there are.
    held: Arc<AtomicUsize>,
}

/// Uncompressed bytes of chunks.
#[derive(Debug, Default)]
struct HitRate {
    brought: u64,
    used: u64,
    /// Requests that went without, since the last one that did not.
    without: u32,
}

impl HitRate {
    fn bring(&mut self, bytes: u64, behind: u64) {
        if self.brought > MEMORY * behind {
            self.brought /= 2;
            self.used /= 2;
        }
        self.brought += bytes;
    }

    /// Whether it pays to bring so many stored bytes.
    fn is_good(&mut self, behind: u64) -> bool {
        if self.brought < FIRST * behind || self.used >= self.brought / WORTH {
            return true;
        }
        self.without = (self.without + 1) % PROBE;
        self.without == 0
    }
}

impl Coalescer {
    /// For chunks of these lengths.
    pub(super) fn new(sizes: impl ExactSizeIterator<Item = u32>) -> Self {
        Self {
            brought: AtomicBitSet::new(sizes.len()),
            longest: sizes.max().unwrap_or(0),
            worth: Mutex::default(),
            held: Arc::default(),
        }
    }

    /// The chunk at `position`, of that length, is read for the first time.
    pub(super) fn used(&self, position: usize, size: u32) {
        if self.brought.take(position) {
            self.worth.lock().used += u64::from(size);
        }
    }

    fn bring(&self, position: usize, size: u32, behind: u64) {
        self.brought.add(position);
        self.worth.lock().bring(u64::from(size), behind);
    }
}

/// Suspends coalescing for one reader of a blob as long as it exists.
#[must_use]
pub struct SuspendedCoalescing(Option<Arc<AtomicUsize>>);

impl Drop for SuspendedCoalescing {
    fn drop(&mut self) {
        if let Some(held) = &self.0 {
            held.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

impl BlobReader {
    /// Suspends coalescing, since it is known what will be read, until all that this has given are dropped.
    pub fn suspend_coalescing(&self) -> SuspendedCoalescing {
        let held = self.ahead().map(|ahead| Arc::clone(&ahead.neighbours.held));
        if let Some(held) = &held {
            held.fetch_add(1, Ordering::Relaxed);
        }
        SuspendedCoalescing(held)
    }

    /// The unit of the chunk at `position` and what is to come with it; `None` if it comes alone.
    pub(super) fn with_neighbours(&self, known: &KnownUnitMap, position: usize) -> Option<Span> {
        let ahead = self
            .ahead()
            .filter(|ahead| ahead.is_of_use() && !self.lane().is_narrow())?;
        let neighbours = &ahead.neighbours;
        let (most, is_suspended) = (self.most_behind(), neighbours.held.load(Ordering::Relaxed) > 0);
        if is_suspended || !self.source().can_seek() || !neighbours.worth.lock().is_good(most) {
            return None;
        }
        let own = known.plan.unit(self.layout(), position).ok()?;
        let len = u64::from(own.unit.compressed_size);
        if len + u64::from(own.unit.uncompressed_size) > MOST_AHEAD {
            return None;
        }
        let (id, end) = (own.id, own.unit.compressed_end());
        let mut behind = self.behind(known, &own, most);
        // Not before it either, as what is stored alone among batches may be: it comes first.
        behind.retain(|plan| plan.unit.compressed_offset.saturating_add(OVERLAP) >= end);
        let bounds = Bounds {
            len: len + most,
            ..BOUNDS
        };
        let spans = Span::gather([own].into_iter().chain(behind).collect(), bounds);
        // Others are behind it, if the image is not malformed.
        let first = spans.into_iter().next()?;
        (first.units[0].id == id && first.units.len() > 1).then_some(first)
    }

    /// Up to how many stored bytes behind what is asked for it pays to go on.
    fn most_behind(&self) -> u64 {
        let in_time = ANSWERS.saturating_mul(self.lane().pace.bandwidth_delay_product());
        in_time.clamp(BEHIND, FAR_BEHIND)
    }

    /// Missing units behind `own`, as far as it pays: `most` stored bytes.
    fn behind(&self, known: &KnownUnitMap, own: &PlannedUnit, most: u64) -> Vec<PlannedUnit> {
        let (chunks, flights) = (&self.layout().chunks, &self.flights());
        let longest = self.ahead().map_or(0, |ahead| ahead.neighbours.longest);
        let ends = own.members.iter().map(|(at, _)| chunks[*at].uncompressed_offset);
        let end = ends.max().unwrap_or(u64::MAX);
        let is_long = |plan: &PlannedUnit| {
            let mut sizes = plan.members.iter().map(|(at, _)| chunks[*at].uncompressed_size);
            sizes.all(|size| size == longest)
        };
        let (mut units, mut continues, mut len): (Vec<PlannedUnit>, _, _) = (Vec::new(), is_long(own), 0);
        for position in self.positions_from(end.saturating_add(1)).take(LOOK) {
            let Ok(id) = known.plan.unit_of(&chunks[position]) else {
                break;
            };
            if id == units.last().map_or(own.id, |plan| plan.id) {
                continue;
            }
            // Before the plan is made, which may list many chunks.
            if !self.is_missing(position) || flights.is_under_way(&(id, None)) {
                break;
            }
            let Ok(plan) = known.plan.unit(self.layout(), position) else {
                break;
            };
            len += u64::from(plan.unit.compressed_size);
            let fits = len <= most && (continues || plan.unit.compressed_size <= SMALL);
            if !fits {
                break;
            }
            continues = continues && is_long(&plan);
            units.push(plan);
        }
        units
    }

    /// Fetches `span`, of which somebody waits for the first unit, `own`, for the chunk at `position`. Returns as soon as that is
    /// there; the others follow, if they come in time ([`super::scheduler::RegistryScheduler::share`]).
    pub(super) async fn fetch_among(
        self: &Arc<Self>,
        known: &Arc<KnownUnitMap>,
        mut span: Span,
        own: UnitId,
        position: usize,
    ) -> Result<Fetched, ReadCause> {
        let room = self.lane().room_for(span.memory()).await;
        let (lead, flight) = Leader::alone((own, None));
        let mut leads: HashMap<UnitId, UnitLeader> = HashMap::from([(own, lead)]);
        let others = span.units.iter().skip(1);
        let led = others.take_while(|plan| {
            let lead = self.lead(plan);
            lead.is_some_and(|lead| leads.insert(plan.id, lead).is_none())
        });
        let count = 1 + led.count();
        span.keep(count);
        if let Some(ahead) = self.ahead() {
            let others = span.units.iter().skip(1).flat_map(|plan| &plan.members);
            let most = self.most_behind();
            for (at, _) in others.filter(|(at, _)| self.is_missing(*at)) {
                ahead
                    .neighbours
                    .bring(*at, self.layout().chunks[*at].uncompressed_size, most);
            }
        }
        let (reader, known) = (Arc::clone(self), Arc::clone(known));
        let fetching = tokio::spawn(async move {
            let _room = room;
            reader.take_in_time(&known, span, leads).await
        });
        let decoded = self.lane().on_demand(flight.wait()).await;
        if let Ok(decoded) = decoded
            && decoded.chunk(&self.layout().chunks[position]).is_some()
        {
            return Ok((Ok(decoded), Provenance::default()));
        }
        // Which tells why.
        match fetching.await.unwrap_or(Err(ReadCause::Aborted))? {
            Some((cause, origin)) => Ok((Err(cause), origin)),
            None => Err(ReadCause::Aborted),
        }
    }

    /// [`Self::take_span`] in the time that it may take, noted for those who come next.
    async fn take_in_time(
        self: Arc<Self>,
        known: &Arc<KnownUnitMap>,
        span: Span,
        leads: HashMap<UnitId, UnitLeader>,
    ) -> Result<Option<(ReadCause, Provenance)>, ReadCause> {
        let share = self.lane().share();
        let taken = tokio::time::timeout(share, self.take_span(known, span, leads, true)).await;
        let taken = taken.unwrap_or(Err(ReadCause::TimedOut(share.as_secs())));
        if let Some(ahead) = self.ahead() {
            match &taken {
                Ok(_) => ahead.came(),
                Err(_) => {
                    ahead.failed();
                    self.lane().pace.forget();
                }
            }
        }
        taken
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn what_is_of_no_use_is_left_out_and_tried_again() {
        let mut worth = HitRate::default();
        let tried = (0..100).filter(|_| {
            let is_good = worth.is_good(MIB);
            if is_good {
                worth.bring(MIB, MIB);
            }
            is_good
        });
        let tried = tried.count() as u64;
        assert!((FIRST..12).contains(&tried), "{tried}");
        worth.used += worth.brought;
        assert!((0..10).all(|_| worth.is_good(MIB)));
        // What was is forgotten in time.
        (0..200).for_each(|_| worth.bring(MIB, MIB));
        assert!(!worth.is_good(MIB));
    }

    #[test]
    fn a_chunk_is_used_once() {
        let neighbours = Coalescer::new([10; 100].into_iter());
        neighbours.used(70, 10);
        neighbours.bring(70, 10, MIB);
        (0..2).for_each(|_| neighbours.used(70, 10));
        let worth = neighbours.worth.lock();
        assert_eq!((worth.brought, worth.used), (10, 10));
    }
}
