//! One request for a span: decodes each unit and completes its flight as soon as the bytes of that unit have come.

use std::{collections::HashMap, sync::Arc};

use bytes::{Bytes, BytesMut};
use tokio::sync::mpsc;

use super::{ChunkFetcher, UnitLeader};
use crate::blob::{
    error::ReadCause,
    link_estimator::Arrival,
    source::{Provenance, SourcedBytes},
    span::Span,
    unit::{PlannedUnit, UnitId},
    unit_map::{KnownUnitMap, blocking},
};

/// Bytes, stored or uncompressed, that are decoded in one batch, before the waiters of the next units are answered.
const BATCH_BYTES: u64 = 1 << 20;
/// Parts of a response that are buffered while a batch is decoded.
const MAX_BUFFERED_PARTS: usize = 16;

/// A request for a span, and the flights that it completes. Flights that it does not complete end as aborted when it
/// is dropped, so that their waiters fetch these units on their own.
pub(in crate::blob) struct SpanTransfer {
    fetcher: Arc<ChunkFetcher>,
    known: Arc<KnownUnitMap>,
    leaders: HashMap<UnitId, UnitLeader>,
    /// A reader waits for the first unit, which is decoded by itself and at once.
    urgent: bool,
}

impl SpanTransfer {
    pub(in crate::blob) fn new(
        fetcher: Arc<ChunkFetcher>,
        known: Arc<KnownUnitMap>,
        leaders: HashMap<UnitId, UnitLeader>,
        urgent: bool,
    ) -> Self {
        Self {
            fetcher,
            known,
            leaders,
            urgent,
        }
    }

    /// Fetches `span`. Corruption of a unit is no failure: it is returned with the endpoint that served the bytes,
    /// which has been reported to the source.
    pub(in crate::blob) async fn run(self, span: Span) -> Result<Option<(ReadCause, Provenance)>, ReadCause> {
        let (fetcher, known, urgent) = (Arc::clone(&self.fetcher), Arc::clone(&self.known), self.urgent);
        let (len, mut arrival) = (span.len(), Arrival::awaited());
        let (parts, received) = mpsc::channel(MAX_BUFFERED_PARTS);
        let reading = fetcher.source().read_parts(span.start, len, !urgent, parts);
        let decoding = self.receive(span, received, &mut arrival);
        let (read, decoded) = tokio::join!(reading, decoding);
        // Checked first: it is the reason if the bytes ended early.
        read.map_err(ReadCause::Fetch)?;
        let damage = decoded?;
        if urgent && fetcher.scheduler().is_calm() {
            fetcher.scheduler().pace.saw(&arrival, len as u64);
        }
        if let Some((_, origin)) = &damage {
            // Further requests are to use another endpoint, or another blob meta. A reader of the chunk finds out which
            // of the two is wrong.
            fetcher.source().distrust(origin);
            fetcher.unit_map().distrust(&known);
        }
        Ok(damage)
    }

    /// Decodes the units of `span` as their bytes come.
    async fn receive(
        mut self,
        span: Span,
        mut parts: mpsc::Receiver<SourcedBytes>,
        arrival: &mut Arrival,
    ) -> Result<Option<(ReadCause, Provenance)>, ReadCause> {
        let mut stored = BytesMut::with_capacity(span.len());
        let mut units = span.units.into_iter().peekable();
        let (mut damage, mut origin) = (None, Provenance::default());
        loop {
            let (mut batch, mut bytes) = (Vec::new(), 0);
            let has_come = |plan: &PlannedUnit, have: usize| plan.unit.compressed_end() - span.start <= have as u64;
            while bytes < BATCH_BYTES
                && !(self.urgent && bytes > 0)
                && let Some(plan) = units.next_if(|plan| has_come(plan, stored.len()))
            {
                bytes += u64::from(plan.unit.uncompressed_size.max(plan.unit.compressed_size));
                let from = (plan.unit.compressed_offset - span.start) as usize;
                let stored = Bytes::copy_from_slice(&stored[from..from + plan.unit.compressed_size as usize]);
                if let Some(leader) = self.leaders.remove(&plan.id) {
                    batch.push((plan, stored, leader));
                }
            }
            if !batch.is_empty() {
                damage = self.decode(batch).await?.or(damage);
                self.urgent = false;
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

    /// Decodes units, caches their chunks and completes their flights. Returns the corruption of one of them.
    ///
    /// # Errors
    /// If a chunk cannot be written to the cache: everything would be fetched a second time.
    async fn decode(&self, batch: Vec<(PlannedUnit, Bytes, UnitLeader)>) -> Result<Option<ReadCause>, ReadCause> {
        let core = match self.urgent {
            true => None,
            false => self.fetcher.scheduler().core().await,
        };
        let (fetcher, known) = (Arc::clone(&self.fetcher), Arc::clone(&self.known));
        blocking(move || {
            let _core = core;
            let mut damage = None;
            for (plan, stored, leader) in batch {
                let decoded = known.plan.decode(fetcher.layout(), fetcher.cached(), &plan, &stored);
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
                leader.land(decoded.map(Arc::new));
                if let Some(error) = cache_write_error {
                    return Err(ReadCause::Keep(error));
                }
            }
            Ok(damage)
        })
        .await
    }
}
