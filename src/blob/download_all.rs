//! Fills the cache with all that an image uses of a blob.
//!
//! A reader wants few chunks soon; here all are wanted, and what counts is that the network, the cores and the disk are
//! busy at the same time. Neighbouring units are fetched in one request, and decompressed while the next ones come.

use std::sync::{Arc, atomic::Ordering};

use bytes::Bytes;
use tokio::task::JoinSet;

use super::{
    cache::ChunkState,
    error::{ReadCause, ReadError},
    reader::BlobReader,
    source::{Source, SourcedBytes},
    span::{Bounds, Span},
    unit::PlannedUnit,
    unit_map::KnownUnitMap,
    verify::{Bulk, Progress},
};
use crate::digest::Digest;

/// What is asked for at a time.
const BOUNDS: Bounds = Bounds {
    len: 4 << 20,
    gap: 64 << 10,
    memory: 32 << 20,
};
/// How often a span is cut in two before its failure counts: one that is too long for a slow link comes in parts. What
/// concerns the whole blob, or the disk, counts at once.
const CUTS: u32 = 4;
/// How often it is tried to have the disk take what was written.
const SYNCS: usize = 3;

/// Gives the stored bytes of the blob of that digest.
pub type Sources<'a> = dyn Fn(Digest) -> Arc<dyn Source> + Send + Sync + 'a;

impl BlobReader {
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

    async fn fetch_all(
        self: &Arc<Self>,
        mut missing: Vec<usize>,
        sources: &Sources<'_>,
        bulk: &Arc<Bulk>,
        progress: &Arc<Progress>,
    ) -> Result<(), ReadError> {
        let first = missing.first().copied().unwrap_or(0);
        let digest = |id: &str| Digest::from_hex(id).map_err(|_| self.error(first, ReadCause::Aborted));
        let (id, holder) = (&self.layout().id, &self.layout().meta_blob);
        let (blob, holder) = (digest(id)?, digest(holder.as_ref().unwrap_or(id))?);
        loop {
            let known = self.unit_map().get_with(sources(holder)).await;
            let filling = Arc::new(Filling {
                reader: Arc::clone(self),
                known: known.map_err(|cause| self.error(first, cause))?,
                source: sources(blob),
                bulk: Arc::clone(bulk),
                progress: Arc::clone(progress),
            });
            match filling.fetch(&missing).await {
                // Not for long: a plan of that kind is not read again.
                Err(error) if error.cause.may_be_misled() && self.unit_map().distrust(&filling.known) => {
                    missing.retain(|position| !self.is_there(*position));
                    if missing.is_empty() {
                        return Ok(());
                    }
                }
                outcome => return outcome,
            }
        }
    }
}

/// One attempt, and what it takes.
struct Filling {
    reader: Arc<BlobReader>,
    known: Arc<KnownUnitMap>,
    source: Arc<dyn Source>,
    bulk: Arc<Bulk>,
    progress: Arc<Progress>,
}

impl Filling {
    /// Fetches the chunks at `positions`.
    async fn fetch(self: &Arc<Self>, positions: &[usize]) -> Result<(), ReadError> {
        let aborted = |_| self.reader.error(positions[0], ReadCause::Aborted);
        let mut under_way = JoinSet::new();
        for span in self.spans(positions)? {
            let room = self.bulk.room_for(span.memory()).await;
            let filling = Arc::clone(self);
            under_way.spawn(async move {
                let _room = room;
                filling.fetch_span(span).await
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
    fn spans(&self, positions: &[usize]) -> Result<Vec<Span>, ReadError> {
        let units = self.known.plan.units(self.reader.layout(), positions);
        let failed = |(position, error)| self.reader.error(position, ReadCause::Meta(error));
        Ok(Span::gather(units.map_err(failed)?, BOUNDS))
    }

    /// Fetches the span, in parts if it does not come as a whole.
    async fn fetch_span(self: &Arc<Self>, span: Span) -> Result<(), ReadError> {
        let mut left = vec![(span, CUTS)];
        while let Some((span, cuts)) = left.pop() {
            match self.stored(&span).await {
                Ok(stored) => self.take(span, stored).await?,
                Err(error) if cuts == 0 || error.cause.is_of_all() => return Err(error),
                Err(error) => {
                    let halves = span.cut().map_err(|_| error)?;
                    left.extend(halves.into_iter().rev().map(|half| (half, cuts - 1)));
                }
            }
        }
        Ok(())
    }

    /// Takes what is in the span's stored bytes; what is damaged is fetched once more, by itself.
    async fn take(self: &Arc<Self>, span: Span, stored: SourcedBytes) -> Result<(), ReadError> {
        for (plan, _) in self.decode(span, stored.bytes).await? {
            let span = Span::single(plan);
            self.source.distrust(&stored.origin);
            let again = self.stored(&span).await?;
            if let Some((_, error)) = self.decode(span, again.bytes).await?.into_iter().next() {
                self.source.distrust(&again.origin);
                return Err(error);
            }
        }
        Ok(())
    }

    async fn stored(&self, span: &Span) -> Result<SourcedBytes, ReadError> {
        let stored = self.source.read(span.start, span.len()).await;
        let stored = stored.map_err(|error| self.reader.error(first_of(&span.units[0]), ReadCause::Fetch(error)))?;
        self.progress
            .fetched
            .fetch_add(stored.bytes.len() as u64, Ordering::Relaxed);
        Ok(stored)
    }

    /// Decompresses, verifies and keeps the span's units; gives those that are damaged.
    async fn decode(self: &Arc<Self>, span: Span, stored: Bytes) -> Result<Vec<(PlannedUnit, ReadError)>, ReadError> {
        let core = self.bulk.core().await;
        let filling = Arc::clone(self);
        let decoded = tokio::task::spawn_blocking(move || {
            let _core = core;
            let mut damaged = Vec::new();
            for plan in span.units {
                let from = (plan.unit.compressed_offset - span.start) as usize;
                let stored = &stored[from..from + plan.unit.compressed_size as usize];
                match filling.decode_unit(&plan, stored) {
                    Err(error) if error.cause.is_damage() => damaged.push((plan, error)),
                    outcome => outcome?,
                }
            }
            Ok(damaged)
        });
        decoded
            .await
            .unwrap_or_else(|_| Err(self.reader.error(0, ReadCause::Aborted)))
    }

    fn decode_unit(&self, plan: &PlannedUnit, stored: &[u8]) -> Result<(), ReadError> {
        let Self { reader, known, .. } = self;
        let was_missing = |position: usize| reader.state(position) == ChunkState::Missing;
        let members = plan.members.iter().map(|(position, _)| *position);
        let new: Vec<_> = members.clone().filter(|position| was_missing(*position)).collect();
        let decoded = known.plan.decode(reader.layout(), reader.cached(), plan, stored);
        let decoded = decoded.map_err(|cause| reader.error(first_of(plan), cause))?;
        if let Some(error) = decoded.cache_write_error {
            return Err(reader.error(first_of(plan), ReadCause::Keep(error)));
        }
        if let Some(position) = members.clone().find(|position| was_missing(*position)) {
            return Err(reader.error(position, ReadCause::Digest));
        }
        known.mark_validated();
        let sizes = new
            .iter()
            .map(|position| reader.layout().chunks[*position].uncompressed_size);
        self.progress.add_there(sizes.map(u64::from).sum());
        Ok(())
    }
}

/// The chunk that stands for the unit in errors.
fn first_of(plan: &PlannedUnit) -> usize {
    plan.members.first().map_or(0, |(position, _)| *position)
}
