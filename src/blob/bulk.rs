//! Whole blobs at a time: filling the cache, and hashing all that is in it.
//!
//! A reader wants few chunks soon; here all are wanted, and what counts is that the network, the cores and the disk are
//! busy at the same time. Neighbouring units are fetched in one request, and decompressed while the next ones come.

use std::{
    collections::{HashMap, HashSet},
    num::NonZero,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use bytes::Bytes;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    task::JoinSet,
};

use super::{
    cache::{CachedBlob, ChunkState},
    codec,
    error::{ReadCause, ReadError},
    plans::KnownPlan,
    reader::BlobReader,
    source::Source,
    unit::UnitPlan,
};
use crate::digest::Digest;

/// Stored bytes that are asked for at a time, unless a single unit is longer.
const SPAN: u64 = 4 << 20;
/// Bytes between two units that are rather fetched for nothing than asked around.
const GAP: u64 = 64 << 10;
/// Bytes that may be in memory: stored ones, on their way or waiting for a core, and those of a unit decompressed.
const MEMORY: usize = 64 << 20;
/// What each request counts for at least, so that there are never many: readers use the same connections.
const LEAST: usize = MEMORY / 12;
/// How often a span is cut in two before its failure counts: one that is too long for a slow link comes in parts.
const CUTS: u32 = 4;
/// How often it is tried to have the disk take what was written.
const SYNCS: usize = 3;
/// What memory is counted in.
const PAGE: usize = 4096;
/// Uncompressed bytes that are hashed without looking up.
const SLICE: u64 = 8 << 20;

/// Gives the stored bytes of the blob of that digest.
pub type Sources<'a> = dyn Fn(Digest) -> Arc<dyn Source> + Send + Sync + 'a;

/// Does such work within bounds. Those who share one share the bounds.
pub struct Bulk {
    memory: Arc<Semaphore>,
    cores: Arc<Semaphore>,
}

/// How far such work has come, in bytes.
#[derive(Debug, Default)]
pub struct Progress {
    /// Bytes that there are to be in the end; 0 until that is known.
    pub total: AtomicU64,
    /// Uncompressed bytes of chunks that are in the cache and verified.
    pub there: AtomicU64,
    /// Stored bytes that were fetched.
    pub fetched: AtomicU64,
}

/// What is in the cache of one blob's chunks, as one image knows them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Tally {
    /// Chunks that are there and right.
    pub good: u64,
    /// Uncompressed bytes of these.
    pub good_bytes: u64,
    /// Chunks that are not there.
    pub missing: u64,
    /// Uncompressed bytes of these.
    pub missing_bytes: u64,
    /// Chunks that were said to be there and are not what they should be.
    pub corrupt: u64,
    /// Uncompressed bytes of these.
    pub corrupt_bytes: u64,
}

impl Default for Bulk {
    fn default() -> Self {
        let cores = std::thread::available_parallelism().map_or(1, NonZero::get);
        Self {
            memory: Arc::new(Semaphore::new(MEMORY / PAGE)),
            cores: Arc::new(Semaphore::new(cores)),
        }
    }
}

impl Bulk {
    /// `None` is never the case: the semaphores are not closed.
    async fn core(&self) -> Option<OwnedSemaphorePermit> {
        Arc::clone(&self.cores).acquire_owned().await.ok()
    }

    async fn room_for(&self, bytes: usize) -> Option<OwnedSemaphorePermit> {
        // At most MEMORY / PAGE, which fits.
        let pages = bytes.clamp(LEAST, MEMORY).div_ceil(PAGE) as u32;
        Arc::clone(&self.memory).acquire_many_owned(pages).await.ok()
    }
}

impl Progress {
    fn add_there(&self, bytes: u64) {
        self.there.fetch_add(bytes, Ordering::Relaxed);
    }
}

impl Tally {
    /// Both together.
    pub fn plus(self, other: Self) -> Self {
        Self {
            good: self.good + other.good,
            good_bytes: self.good_bytes + other.good_bytes,
            missing: self.missing + other.missing,
            missing_bytes: self.missing_bytes + other.missing_bytes,
            corrupt: self.corrupt + other.corrupt,
            corrupt_bytes: self.corrupt_bytes + other.corrupt_bytes,
        }
    }
}

/// Units that lie close together, and their stored bytes' place.
struct Span {
    start: u64,
    end: u64,
    units: Vec<UnitPlan>,
}

impl Span {
    /// What it takes to fetch it, and to decompress its longest unit.
    fn memory(&self) -> usize {
        let longest = self.units.iter().map(|plan| plan.unit.uncompressed_size).max();
        (self.end - self.start) as usize + longest.unwrap_or(0) as usize
    }

    /// Both halves of it, unless it is a single unit.
    fn cut(mut self) -> Result<[Self; 2], Self> {
        if self.units.len() < 2 {
            return Err(self);
        }
        let rest = self.units.split_off(self.units.len() / 2);
        Ok([self.units, rest].map(|units| Self {
            start: units[0].unit.compressed_offset,
            end: units.iter().map(|plan| plan.unit.compressed_end()).max().unwrap_or(0),
            units,
        }))
    }
}

impl BlobReader {
    /// Uncompressed bytes of the chunks that the image uses.
    pub fn chunk_bytes(&self) -> u64 {
        let sizes = self.layout().chunks.iter();
        sizes.map(|chunk| u64::from(chunk.uncompressed_size)).sum()
    }

    /// Sees to it that all chunks the image uses are on disk and verified, with stored bytes from `sources`.
    ///
    /// Chunks that an earlier process left are hashed, others fetched. Nothing is returned before the disk has them.
    ///
    /// # Errors
    /// Of the first chunk that cannot be had or not be kept. What was kept until then stays.
    pub async fn fill(
        self: &Arc<Self>,
        sources: &Sources<'_>,
        bulk: &Arc<Bulk>,
        progress: &Arc<Progress>,
    ) -> Result<(), ReadError> {
        for _ in 0..SYNCS {
            let losses = self.cached().losses();
            let (present, mut missing): (Vec<_>, Vec<_>) =
                self.positions().partition(|position| self.is_there(*position));
            missing.extend(self.hash(present, bulk, Some(progress)).await?);
            if !missing.is_empty() {
                self.fetch_all(missing, sources, bulk, progress).await?;
            }
            self.on_disk(0, |cached| cached.sync_all()).await?;
            // Somebody else may have been told that what was written got lost.
            if self.cached().losses() == losses {
                return Ok(());
            }
        }
        let lost = std::io::Error::other("what is written does not reach the disk");
        Err(self.error(0, ReadCause::Keep(Arc::new(lost))))
    }

    /// Hashes every chunk that is said to be on disk, but those of an index in `seen`, and adds theirs to it: whether they are
    /// right. What is wrong is not used any more; with `repair`, it is also forgotten on disk.
    ///
    /// # Errors
    /// If it cannot be forgotten.
    pub async fn verify(
        self: &Arc<Self>,
        bulk: &Arc<Bulk>,
        repair: bool,
        seen: &mut HashMap<u32, bool>,
    ) -> Result<Tally, ReadError> {
        let index = |position: &usize| self.layout().chunks[*position].index;
        let said = |position: &usize| seen.contains_key(&index(position)) || self.cached().is_claimed(index(position));
        let (present, missing): (Vec<_>, Vec<_>) = self.positions().partition(said);
        let unseen: Vec<_> = present
            .iter()
            .copied()
            .filter(|position| !seen.contains_key(&index(position)))
            .collect();
        self.cached().drop_pages();
        seen.extend(unseen.iter().map(|position| (index(position), true)));
        for wrong in self.hash(unseen, bulk, None).await? {
            seen.insert(index(&wrong), false);
        }
        let is_wrong = |position: &&usize| seen.get(&index(position)) == Some(&false);
        let wrong: Vec<_> = present.iter().filter(is_wrong).copied().collect();
        if let Some(first) = wrong.first().filter(|_| repair) {
            let indexes: Vec<_> = wrong.iter().map(index).collect();
            self.on_disk(*first, move |cached| cached.unclaim(&indexes)).await?;
        }
        let (missing_bytes, corrupt_bytes) = (self.bytes_of(&missing), self.bytes_of(&wrong));
        Ok(Tally {
            good: (present.len() - wrong.len()) as u64,
            good_bytes: self.chunk_bytes() - missing_bytes - corrupt_bytes,
            missing: missing.len() as u64,
            missing_bytes,
            corrupt: wrong.len() as u64,
            corrupt_bytes,
        })
    }

    /// Does something with the cached files where it holds nobody up; `position` is the chunk that an error names.
    async fn on_disk(
        self: &Arc<Self>,
        position: usize,
        work: impl FnOnce(&CachedBlob) -> std::io::Result<()> + Send + 'static,
    ) -> Result<(), ReadError> {
        let reader = Arc::clone(self);
        let done = tokio::task::spawn_blocking(move || work(reader.cached())).await;
        let done = done.unwrap_or_else(|error| Err(std::io::Error::other(error)));
        done.map_err(|error| self.error(position, ReadCause::Keep(Arc::new(error))))
    }

    fn positions(&self) -> std::ops::Range<usize> {
        0..self.layout().chunks.len()
    }

    fn bytes_of(&self, positions: &[usize]) -> u64 {
        let sizes = positions
            .iter()
            .map(|position| self.layout().chunks[*position].uncompressed_size);
        sizes.map(u64::from).sum()
    }

    /// Whether the chunk is on disk, for this process and for later ones, as far as is known.
    fn is_there(&self, position: usize) -> bool {
        self.state(position) != ChunkState::Missing && self.cached().is_claimed(self.layout().chunks[position].index)
    }

    fn state(&self, position: usize) -> ChunkState {
        self.cached().state(self.layout().chunks[position].index)
    }

    /// Hashes the chunks at `positions` as they are on disk; gives those that are not right, which count as missing from
    /// now on.
    async fn hash(
        self: &Arc<Self>,
        positions: Vec<usize>,
        bulk: &Bulk,
        progress: Option<&Arc<Progress>>,
    ) -> Result<Vec<usize>, ReadError> {
        let aborted = |_| self.error(0, ReadCause::Aborted);
        let (mut wrong, mut under_way) = (Vec::new(), JoinSet::new());
        for slice in self.slices(&positions) {
            let core = bulk.core().await;
            let (reader, progress) = (Arc::clone(self), progress.map(Arc::clone));
            under_way.spawn_blocking(move || {
                let _core = core;
                reader.hash_slice(slice, progress.as_deref())
            });
            while let Some(done) = under_way.try_join_next() {
                wrong.extend(done.map_err(aborted)?);
            }
        }
        while let Some(done) = under_way.join_next().await {
            wrong.extend(done.map_err(aborted)?);
        }
        wrong.sort_unstable();
        Ok(wrong)
    }

    /// Parts of `positions` whose chunks together are about as long as [`SLICE`].
    fn slices(&self, positions: &[usize]) -> Vec<Vec<usize>> {
        let (mut slices, mut bytes) = (Vec::new(), SLICE);
        for position in positions {
            if bytes >= SLICE {
                slices.push(Vec::new());
                bytes = 0;
            }
            if let Some(slice) = slices.last_mut() {
                slice.push(*position);
            }
            bytes += u64::from(self.layout().chunks[*position].uncompressed_size);
        }
        slices
    }

    fn hash_slice(&self, positions: Vec<usize>, progress: Option<&Progress>) -> Vec<usize> {
        let (layout, cached) = (self.layout(), self.cached());
        let mut plain = Vec::new();
        let mut is_wrong = |position: &usize| {
            let chunk = &layout.chunks[*position];
            let epoch = cached.epoch();
            plain.resize(chunk.uncompressed_size as usize, 0);
            let read = cached.read(chunk, 0, &mut plain);
            if read.is_ok() && codec::matches(layout.digester, &plain, &chunk.digest) {
                cached.confirm(chunk.index, epoch);
                if let Some(progress) = progress {
                    progress.add_there(u64::from(chunk.uncompressed_size));
                }
                return false;
            }
            cached.distrust(chunk.index);
            true
        };
        positions.into_iter().filter(|position| is_wrong(position)).collect()
    }

    async fn fetch_all(
        self: &Arc<Self>,
        mut missing: Vec<usize>,
        sources: &Sources<'_>,
        bulk: &Arc<Bulk>,
        progress: &Arc<Progress>,
    ) -> Result<(), ReadError> {
        let failed = |cause| self.error(missing.first().copied().unwrap_or(0), cause);
        let (blob, holder) = (
            self.blob_digest().map_err(&failed)?,
            self.meta_digest().map_err(&failed)?,
        );
        let source = sources(blob);
        loop {
            let known = self.plans().get_with(sources(holder)).await;
            let known = known.map_err(|cause| self.error(missing[0], cause))?;
            match self.fetch_spans(&missing, &known, &source, bulk, progress).await {
                // Not for long: a plan of that kind is not read again.
                Err(error) if error.cause.may_be_misled() && self.plans().distrust(&known) => {
                    missing.retain(|position| !self.is_there(*position));
                    if missing.is_empty() {
                        return Ok(());
                    }
                }
                outcome => return outcome,
            }
        }
    }

    async fn fetch_spans(
        self: &Arc<Self>,
        missing: &[usize],
        known: &Arc<KnownPlan>,
        source: &Arc<dyn Source>,
        bulk: &Arc<Bulk>,
        progress: &Arc<Progress>,
    ) -> Result<(), ReadError> {
        let aborted = |_| self.error(missing[0], ReadCause::Aborted);
        let mut under_way = JoinSet::new();
        for span in self.spans(missing, known)? {
            let room = bulk.room_for(span.memory()).await;
            let (reader, known, source) = (Arc::clone(self), Arc::clone(known), Arc::clone(source));
            let (bulk, progress) = (Arc::clone(bulk), Arc::clone(progress));
            under_way.spawn(async move {
                let _room = room;
                reader.fetch_span(span, &known, &source, &bulk, &progress).await
            });
            while let Some(done) = under_way.try_join_next() {
                done.map_err(aborted)??;
            }
        }
        while let Some(done) = under_way.join_next().await {
            done.map_err(aborted)??;
        }
        Ok(())
    }

    /// The units of the chunks at `positions`, in the blob's order.
    fn spans(&self, positions: &[usize], known: &KnownPlan) -> Result<Vec<Span>, ReadError> {
        let (mut units, mut seen) = (Vec::new(), HashSet::new());
        for position in positions {
            let layout = self.layout();
            let failed = |error| self.error(*position, ReadCause::Meta(error));
            let id = known.plan.unit_of(&layout.chunks[*position]).map_err(failed)?;
            if seen.insert(id) {
                units.push(known.plan.unit(layout, *position).map_err(failed)?);
            }
        }
        units.sort_unstable_by_key(|plan| plan.unit.compressed_offset);
        let mut spans: Vec<Span> = Vec::new();
        for plan in units {
            let (start, end) = (plan.unit.compressed_offset, plan.unit.compressed_end());
            match spans.last_mut() {
                Some(last) if end.max(last.end) - last.start <= SPAN && start <= last.end.saturating_add(GAP) => {
                    last.end = last.end.max(end);
                    last.units.push(plan);
                }
                _ => spans.push(Span {
                    start,
                    end,
                    units: vec![plan],
                }),
            }
        }
        Ok(spans)
    }

    /// Fetches the span, in parts if it does not come as a whole.
    async fn fetch_span(
        self: &Arc<Self>,
        span: Span,
        known: &Arc<KnownPlan>,
        source: &Arc<dyn Source>,
        bulk: &Bulk,
        progress: &Arc<Progress>,
    ) -> Result<(), ReadError> {
        let mut left = vec![(span, CUTS)];
        while let Some((span, cuts)) = left.pop() {
            let first = span.units[0].members.first().map_or(0, |(position, _)| *position);
            match self.fetch_stored(source, span.start, span.end, progress).await {
                Ok(stored) => self.take_span(span, stored, known, source, bulk, progress).await?,
                Err(cause) if cuts == 0 => return Err(self.error(first, cause)),
                Err(cause) => {
                    let halves = span.cut().map_err(|_| self.error(first, cause))?;
                    left.extend(halves.into_iter().rev().map(|half| (half, cuts - 1)));
                }
            }
        }
        Ok(())
    }

    /// Takes what is in the span's stored bytes; what is damaged is fetched once more, by itself.
    async fn take_span(
        self: &Arc<Self>,
        span: Span,
        stored: Bytes,
        known: &Arc<KnownPlan>,
        source: &Arc<dyn Source>,
        bulk: &Bulk,
        progress: &Arc<Progress>,
    ) -> Result<(), ReadError> {
        let failed = self
            .decode_all(span.start, span.units, stored, known, bulk, progress)
            .await?;
        for (plan, _) in failed {
            let first = plan.members.first().map_or(0, |(position, _)| *position);
            let (start, end) = (plan.unit.compressed_offset, plan.unit.compressed_end());
            let stored = self.fetch_stored(source, start, end, progress).await;
            let stored = stored.map_err(|cause| self.error(first, cause))?;
            let failed = self
                .decode_all(start, vec![plan], stored, known, bulk, progress)
                .await?;
            if let Some((_, error)) = failed.into_iter().next() {
                return Err(error);
            }
        }
        Ok(())
    }

    async fn fetch_stored(
        &self,
        source: &Arc<dyn Source>,
        start: u64,
        end: u64,
        progress: &Progress,
    ) -> Result<Bytes, ReadCause> {
        let stored = source
            .read(start, (end - start) as usize)
            .await
            .map_err(ReadCause::Fetch)?;
        progress.fetched.fetch_add(stored.len() as u64, Ordering::Relaxed);
        self.lane().count(stored.len());
        Ok(stored)
    }

    /// Decompresses, verifies and keeps the units in `stored`, which starts at `start`; gives those that are damaged.
    async fn decode_all(
        self: &Arc<Self>,
        start: u64,
        units: Vec<UnitPlan>,
        stored: Bytes,
        known: &Arc<KnownPlan>,
        bulk: &Bulk,
        progress: &Arc<Progress>,
    ) -> Result<Vec<(UnitPlan, ReadError)>, ReadError> {
        let core = bulk.core().await;
        let (reader, known, progress) = (Arc::clone(self), Arc::clone(known), Arc::clone(progress));
        let decoded = tokio::task::spawn_blocking(move || {
            let _core = core;
            let mut damaged = Vec::new();
            for plan in units {
                let from = (plan.unit.compressed_offset - start) as usize;
                let stored = &stored[from..from + plan.unit.compressed_size as usize];
                match reader.decode_unit(&plan, stored, &known, &progress) {
                    Err(error) if error.cause.is_damage() => damaged.push((plan, error)),
                    outcome => outcome?,
                }
            }
            Ok(damaged)
        });
        decoded.await.unwrap_or_else(|_| Err(self.error(0, ReadCause::Aborted)))
    }

    fn decode_unit(
        &self,
        plan: &UnitPlan,
        stored: &[u8],
        known: &KnownPlan,
        progress: &Progress,
    ) -> Result<(), ReadError> {
        let (layout, cached) = (self.layout(), self.cached());
        let first = plan.members.first().map_or(0, |(position, _)| *position);
        let was_missing = |position: usize| self.state(position) == ChunkState::Missing;
        let members = plan.members.iter().map(|(position, _)| *position);
        let new: Vec<_> = members.clone().filter(|position| was_missing(*position)).collect();
        let decoded = known.plan.decode(layout, cached, plan, stored);
        let decoded = decoded.map_err(|cause| self.error(first, cause))?;
        if let Some(error) = decoded.unkept {
            return Err(self.error(first, ReadCause::Keep(error)));
        }
        if let Some(position) = members.clone().find(|position| was_missing(*position)) {
            return Err(self.error(position, ReadCause::Digest));
        }
        known.prove();
        let sizes = new.iter().map(|position| layout.chunks[*position].uncompressed_size);
        progress.add_there(sizes.map(u64::from).sum());
        Ok(())
    }

    fn blob_digest(&self) -> Result<Digest, ReadCause> {
        Digest::from_hex(&self.layout().id).map_err(|_| ReadCause::Aborted)
    }

    /// The blob that holds the blob meta.
    fn meta_digest(&self) -> Result<Digest, ReadCause> {
        let holder = self.layout().meta_blob.as_ref().unwrap_or(&self.layout().id);
        Digest::from_hex(holder).map_err(|_| ReadCause::Aborted)
    }
}
