//! Fetches chunks before anybody waits for them: ahead of a reader, from a list, or all in the background.
//!
//! Units that lie together come in one request, and each is decompressed, verified and kept as soon as its bytes are
//! there. Meanwhile each is a flight like any other: whoever wants one that is on its way waits for it and for no more. What only
//! waits for its turn is no flight yet, so that nobody waits with it.

use std::{
    collections::HashMap,
    iter::Peekable,
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::{Bytes, BytesMut};
use parking_lot::Mutex;
use tokio::{runtime::Handle, sync::mpsc, task::JoinSet};

use super::{
    cache::ChunkState,
    coalesce::Coalescer,
    error::ReadCause,
    link_estimator::Arrival,
    reader::BlobReader,
    scheduler::{MOST_AHEAD, Priority, Turn},
    sequential_detector::{SequentialDetector, Wanted},
    singleflight::Leader,
    source::{Provenance, SourcedBytes},
    span::{Bounds, Span},
    unit::{Decoded, PlannedUnit, UnitId},
    unit_map::{KnownUnitMap, blocking},
};

/// What is asked for at a time.
pub(super) const BOUNDS: Bounds = Bounds {
    len: 2 << 20,
    gap: 32 << 10,
    memory: MOST_AHEAD,
};
/// Bytes, stored or uncompressed, that are decompressed before those who wait for them are told.
const BATCH: u64 = 1 << 20;
/// Parts of an answer that may wait to be decompressed.
const PARTS: usize = 16;
/// For how long nothing is read ahead after that has failed, because what comes cannot be kept or does not come. Each further
/// time in a row it is twice as long.
const FIRST_PAUSE: Duration = Duration::from_millis(500);
/// The longest such time.
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
/// Owner of the flights here. No address, so that readers whom one fails have one of their own.
pub(super) const NOBODY: usize = 1;

pub(super) type UnitLeader = Leader<(UnitId, Option<usize>), Arc<Decoded>>;

/// What is needed to read ahead.
pub(super) struct ReadAhead {
    streams: Mutex<SequentialDetector>,
    /// What comes with what is waited for.
    pub(super) neighbours: Coalescer,
    pause: Mutex<Pause>,
    runtime: Handle,
}

/// Whether reading ahead is of any use.
#[derive(Default)]
struct Pause {
    /// Until when nothing is read ahead.
    until: Option<Instant>,
    /// The last one, if nothing has been read ahead since.
    last: Duration,
}

impl Pause {
    fn is_over(&mut self) -> bool {
        self.until.take_if(|until| *until <= Instant::now());
        self.until.is_none()
    }

    /// Of those that fail together one is enough.
    fn failed(&mut self) {
        if self.is_over() {
            self.last = (self.last * 2).clamp(FIRST_PAUSE, LONGEST_PAUSE);
            self.until = Some(Instant::now() + self.last);
        }
    }
}

impl ReadAhead {
    /// Reads ahead on `runtime`, in a blob whose chunks have these lengths.
    pub(super) fn new(runtime: Handle, sizes: impl ExactSizeIterator<Item = u32>) -> Self {
        Self {
            streams: Mutex::default(),
            neighbours: Coalescer::new(sizes),
            pause: Mutex::default(),
            runtime,
        }
    }

    fn touched(&self, range: Range<u64>, is_step: bool) -> Option<Wanted> {
        let touched = || self.streams.lock().touched(range, is_step);
        self.is_of_use().then(touched).flatten()
    }

    /// Whether what is fetched ahead comes, and can be kept.
    pub(super) fn is_of_use(&self) -> bool {
        self.pause.lock().is_over()
    }

    /// It came.
    pub(super) fn came(&self) {
        self.pause.lock().last = Duration::ZERO;
    }

    /// It did not, or could not be kept.
    pub(super) fn failed(&self) {
        self.pause.lock().failed();
    }
}

impl BlobReader {
    /// The chunk at `position` is read for the first time: by a request of its own (`is_step`), or one that was told before.
    /// Fetches ahead of who goes on so.
    pub fn read_ahead(self: &Arc<Self>, position: usize, is_step: bool) {
        let Some(ahead) = self.ahead() else { return };
        let chunk = &self.layout().chunks[position];
        let end = chunk.uncompressed_offset + u64::from(chunk.uncompressed_size);
        ahead.neighbours.used(position, chunk.uncompressed_size);
        let Some(wanted) = ahead.touched(chunk.uncompressed_offset..end, is_step) else {
            return;
        };
        let reader = Arc::clone(self);
        ahead.runtime.spawn(async move {
            let positions = reader.positions_in(wanted.range);
            let brought = reader.bring(&positions, Priority::Ahead, &wanted.given_up).await;
            let Some(ahead) = reader.ahead() else { return };
            match brought {
                Ok(()) if wanted.given_up.load(Ordering::Relaxed) => {}
                Ok(()) => ahead.came(),
                Err(cause) => {
                    tracing::debug!(blob = reader.cache_name(), %cause, "cannot read ahead");
                    ahead.failed();
                    // What they count as asked for will not come.
                    reader.give_up();
                }
            }
        });
    }

    /// The chunks that end in that range of uncompressed offsets.
    fn positions_in(&self, range: Range<u64>) -> Vec<usize> {
        let (chunks, in_order) = (&self.layout().chunks, self.in_order());
        let end = |position: &u32| {
            let chunk = &chunks[*position as usize];
            chunk.uncompressed_offset + u64::from(chunk.uncompressed_size)
        };
        // Chunks of a blob do not overlap, so that their ends are in order too.
        let start = in_order.partition_point(|position| end(position) <= range.start);
        let rest = in_order[start..].iter();
        rest.take_while(|position| end(position) <= range.end)
            .map(|position| *position as usize)
            .collect()
    }

    /// The chunks that start at that uncompressed offset or behind it, in order.
    pub(super) fn positions_from(&self, offset: u64) -> impl Iterator<Item = usize> {
        let (chunks, in_order) = (&self.layout().chunks, self.in_order());
        let start = in_order.partition_point(|position| chunks[*position as usize].uncompressed_offset < offset);
        in_order[start..].iter().map(|position| *position as usize)
    }

    /// Fetches those of the chunks at `positions` that are missing, together where they lie together. Chunks that take much
    /// memory are left to who wants them.
    ///
    /// # Errors
    /// The first failure ends it, except for damage, which may concern one chunk alone.
    pub async fn bring(
        self: &Arc<Self>,
        positions: &[usize],
        urgency: Priority,
        given_up: &AtomicBool,
    ) -> Result<(), ReadCause> {
        let missing: Vec<_> = positions.iter().copied().filter(|at| self.is_missing(*at)).collect();
        if missing.is_empty() {
            return Ok(());
        }
        let known = self.unit_map().get().await?;
        let units = known.plan.units(self.layout(), &missing).map_err(|(_, error)| error)?;
        let mut under_way = JoinSet::new();
        for span in Span::gather(units, BOUNDS) {
            if span.memory() as u64 > MOST_AHEAD {
                continue;
            }
            let turn = self.lane().turn(urgency).await;
            if given_up.load(Ordering::Relaxed) {
                break;
            }
            let (reader, known) = (Arc::clone(self), Arc::clone(&known));
            under_way.spawn(async move { reader.bring_units(&known, span.units, urgency, turn).await });
            while let Some(done) = under_way.try_join_next() {
                done.map_err(|_| ReadCause::Aborted)??;
            }
        }
        while let Some(done) = under_way.join_next().await {
            done.map_err(|_| ReadCause::Aborted)??;
        }
        Ok(())
    }

    /// Whether the chunk at `position` would have to be fetched.
    pub fn is_missing(&self, position: usize) -> bool {
        self.state(position) == ChunkState::Missing
    }

    /// Nothing is read ahead any more of what was not asked for yet.
    pub fn give_up(&self) {
        if let Some(ahead) = self.ahead() {
            ahead.streams.lock().give_up();
        }
    }

    async fn bring_units(
        self: Arc<Self>,
        known: &Arc<KnownUnitMap>,
        mut units: Vec<PlannedUnit>,
        urgency: Priority,
        _turn: Turn,
    ) -> Result<(), ReadCause> {
        // What has waited for its turn may have been fetched by a reader meanwhile, or be on its way to one.
        let flights = &self.flights();
        units.retain(|plan| self.is_wanted(plan) && !flights.is_under_way(&(plan.id, None)));
        let mut damage = None;
        for span in Span::gather(units, BOUNDS) {
            let mut rest = span.units.into_iter().peekable();
            // Only now, so that nobody waits for more than this request.
            while let Some((span, leads)) = self.lead_some(&mut rest) {
                let taken = self.lane().patiently(self.take_span(known, span, leads, false)).await?;
                damage = taken.map(|(cause, _)| cause).or(damage);
            }
        }
        match damage.filter(|_| urgency == Priority::Background) {
            Some(cause) => Err(cause),
            None => Ok(()),
        }
    }

    fn is_wanted(&self, plan: &PlannedUnit) -> bool {
        plan.members.iter().any(|(position, _)| self.is_missing(*position))
    }

    /// The duty to fetch a unit, if it is still missing and on nobody's way.
    pub(super) fn lead(&self, plan: &PlannedUnit) -> Option<UnitLeader> {
        let lead = self.flights().lead((plan.id, None), NOBODY);
        // Others may have landed before.
        lead.filter(|_| self.is_wanted(plan))
    }

    /// The next of the `units` of a span that others have not taken up since it was made, as long as they lie close together, and
    /// the duty to fetch them.
    fn lead_some(
        &self,
        units: &mut Peekable<impl Iterator<Item = PlannedUnit>>,
    ) -> Option<(Span, HashMap<UnitId, UnitLeader>)> {
        let (mut led, mut leads) = (Vec::<PlannedUnit>::new(), HashMap::new());
        let is_near = |plan: &PlannedUnit, led: &[PlannedUnit]| {
            let start = plan.unit.compressed_offset;
            led.last()
                .is_none_or(|last| BOUNDS.bridge(last.unit.compressed_end(), start))
        };
        while let Some(plan) = units.next_if(|plan| is_near(plan, &led)) {
            if let Some(lead) = self.lead(&plan) {
                leads.insert(plan.id, lead);
                led.push(plan);
            }
        }
        // Of a span, those that lie as close are one again.
        let span = Span::gather(led, BOUNDS).into_iter().next()?;
        Some((span, leads))
    }

    /// Fetches `span` and takes its units as their bytes come, the first one by itself and at once if somebody waits for it
    /// (`urgent`). Gives what is wrong with one of them, if anything is, and whom has been blamed.
    pub(super) async fn take_span(
        self: &Arc<Self>,
        known: &Arc<KnownUnitMap>,
        span: Span,
        leads: HashMap<UnitId, UnitLeader>,
        urgent: bool,
    ) -> Result<Option<(ReadCause, Provenance)>, ReadCause> {
        let (len, mut arrival) = (span.len(), Arrival::awaited());
        let (parts, received) = mpsc::channel(PARTS);
        let reading = self.source().read_parts(span.start, len, !urgent, parts);
        let taking = self.take_parts(known, span, leads, urgent, received, &mut arrival);
        let (read, taken) = tokio::join!(reading, taking);
        // The former is why the latter ended too early.
        read.map_err(ReadCause::Fetch)?;
        let damage = taken?;
        if urgent && self.lane().is_calm() {
            self.lane().pace.saw(&arrival, len as u64);
        }
        if let Some((_, origin)) = &damage {
            // A reader who wants the chunk finds out more. Others are to come from elsewhere, or by another blob meta.
            self.source().distrust(origin);
            self.unit_map().distrust(known);
        }
        Ok(damage)
    }

    async fn take_parts(
        self: &Arc<Self>,
        known: &Arc<KnownUnitMap>,
        span: Span,
        mut leads: HashMap<UnitId, UnitLeader>,
        mut urgent: bool,
        mut parts: mpsc::Receiver<SourcedBytes>,
        arrival: &mut Arrival,
    ) -> Result<Option<(ReadCause, Provenance)>, ReadCause> {
        let mut stored = BytesMut::with_capacity(span.len());
        let mut units = span.units.into_iter().peekable();
        let (mut damage, mut origin) = (None, Provenance::default());
        loop {
            let (mut batch, mut bytes) = (Vec::new(), 0);
            let is_there = |plan: &PlannedUnit, have: usize| plan.unit.compressed_end() - span.start <= have as u64;
            while bytes < BATCH
                && !(urgent && bytes > 0)
                && let Some(plan) = units.next_if(|plan| is_there(plan, stored.len()))
            {
                bytes += u64::from(plan.unit.uncompressed_size.max(plan.unit.compressed_size));
                let from = (plan.unit.compressed_offset - span.start) as usize;
                let stored = Bytes::copy_from_slice(&stored[from..from + plan.unit.compressed_size as usize]);
                if let Some(lead) = leads.remove(&plan.id) {
                    batch.push((plan, stored, lead));
                }
            }
            if !batch.is_empty() {
                damage = self.decode(known, batch, urgent).await?.or(damage);
                urgent = false;
                continue;
            }
            match parts.recv().await {
                Some(part) => {
                    arrival.part();
                    stored.extend_from_slice(&part.bytes);
                    origin = part.origin;
                }
                None => return Ok(damage.map(|cause| (cause, origin))),
            }
            while let Ok(part) = parts.try_recv() {
                stored.extend_from_slice(&part.bytes);
            }
        }
    }

    /// Decompresses, verifies and keeps units, and tells those who wait for them. Gives what is wrong with one of them.
    async fn decode(
        self: &Arc<Self>,
        known: &Arc<KnownUnitMap>,
        batch: Vec<(PlannedUnit, Bytes, UnitLeader)>,
        urgent: bool,
    ) -> Result<Option<ReadCause>, ReadCause> {
        let core = if urgent { None } else { self.lane().core().await };
        let (reader, known) = (Arc::clone(self), Arc::clone(known));
        blocking(move || {
            let _core = core;
            let mut damage = None;
            for (plan, stored, lead) in batch {
                let decoded = known.plan.decode(reader.layout(), reader.cached(), &plan, &stored);
                let cache_write_error = match &decoded {
                    Ok(decoded) => {
                        match decoded.chunks() == plan.members.len() {
                            true => known.mark_validated(),
                            false => damage = Some(ReadCause::Digest),
                        }
                        decoded.cache_write_error.clone()
                    }
                    Err(cause) => {
                        damage = Some(cause.clone());
                        None
                    }
                };
                lead.land(decoded.map(Arc::new));
                // It would all be fetched a second time.
                if let Some(error) = cache_write_error {
                    return Err(ReadCause::Keep(error));
                }
            }
            Ok(damage)
        })
        .await
    }
}

#[cfg(test)]
mod tests;
