//! One request for a span: decodes each unit and completes its flight as soon as the bytes of that unit have come.

use std::{collections::HashMap, sync::Arc};

use bytes::{Bytes, BytesMut};
use tokio::sync::mpsc;

use super::{ChunkFetcher, UnitLeader};
use crate::blob::{
    error::ReadCause,
    link_estimator::ResponseTiming,
    source::{Provenance, SourcedBytes},
    span::Span,
    unit::{Unit, UnitId},
    unit_map::{LoadedUnitMap, run_blocking},
};

/// Bytes, stored or uncompressed, that are decoded in one batch, before the waiters of the next units are answered.
const BATCH_BYTES: u64 = 1 << 20;
/// Parts of a response that are buffered while a batch is decoded.
const MAX_BUFFERED_PARTS: usize = 16;

/// A request for a span, and the flights that it completes. Flights that it does not complete end as aborted when it
/// is dropped, so that their waiters fetch these units on their own.
pub(in crate::blob) struct SpanTransfer {
    fetcher: Arc<ChunkFetcher>,
    loaded: Arc<LoadedUnitMap>,
    leaders: HashMap<UnitId, UnitLeader>,
    /// A reader waits for the first unit, which is decoded by itself and at once.
    urgent: bool,
}

impl SpanTransfer {
    pub(in crate::blob) fn new(
        fetcher: Arc<ChunkFetcher>,
        loaded: Arc<LoadedUnitMap>,
        leaders: HashMap<UnitId, UnitLeader>,
        urgent: bool,
    ) -> Self {
        Self {
            fetcher,
            loaded,
            leaders,
            urgent,
        }
    }

    /// Fetches `span`. Corruption of a unit is no failure: it is returned with the endpoint that served the bytes,
    /// which has been reported to the source.
    pub(in crate::blob) async fn run(self, span: Span) -> Result<Option<(ReadCause, Provenance)>, ReadCause> {
        let (fetcher, loaded, urgent) = (Arc::clone(&self.fetcher), Arc::clone(&self.loaded), self.urgent);
        let (len, mut timing) = (span.len(), ResponseTiming::start());
        let (parts, received) = mpsc::channel(MAX_BUFFERED_PARTS);
        let reading = fetcher.source().read_parts(span.start, len, !urgent, parts);
        let decoding = self.receive(span, received, &mut timing);
        let (read, decoded) = tokio::join!(reading, decoding);
        // Checked first: it is the reason if the bytes ended early.
        read.map_err(ReadCause::Fetch)?;
        let corruption = decoded?;
        if urgent && fetcher.scheduler().is_lightly_loaded() {
            fetcher.scheduler().link.record(&timing, len as u64);
        }
        if let Some((_, provenance)) = &corruption {
            // Further requests are to use another endpoint, or another blob meta. A reader of the chunk finds out which
            // of the two is wrong.
            fetcher.source().report_corrupt(provenance);
            fetcher.unit_map().invalidate(&loaded);
        }
        Ok(corruption)
    }

    /// Decodes the units of `span` as their bytes come.
    async fn receive(
        mut self,
        span: Span,
        mut parts: mpsc::Receiver<SourcedBytes>,
        timing: &mut ResponseTiming,
    ) -> Result<Option<(ReadCause, Provenance)>, ReadCause> {
        let mut stored = BytesMut::with_capacity(span.len());
        let mut units = span.units.into_iter().peekable();
        let (mut corruption, mut provenance) = (None, Provenance::default());
        loop {
            let (mut batch, mut bytes) = (Vec::new(), 0);
            let has_come = |unit: &Unit, have: usize| unit.extent.compressed_end() - span.start <= have as u64;
            while bytes < BATCH_BYTES
                && !(self.urgent && bytes > 0)
                && let Some(unit) = units.next_if(|unit| has_come(unit, stored.len()))
            {
                bytes += u64::from(unit.extent.uncompressed_size.max(unit.extent.compressed_size));
                let from = (unit.extent.compressed_offset - span.start) as usize;
                let stored = Bytes::copy_from_slice(&stored[from..from + unit.extent.compressed_size as usize]);
                if let Some(leader) = self.leaders.remove(&unit.id) {
                    batch.push((unit, stored, leader));
                }
            }
            if !batch.is_empty() {
                corruption = self.decode(batch).await?.or(corruption);
                self.urgent = false;
                continue;
            }
            match parts.recv().await {
                Some(part) => {
                    timing.on_part();
                    stored.extend_from_slice(&part.bytes);
                    provenance = part.provenance;
                }
                None => return Ok(corruption.map(|cause| (cause, provenance))),
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
    async fn decode(&self, batch: Vec<(Unit, Bytes, UnitLeader)>) -> Result<Option<ReadCause>, ReadCause> {
        let core = match self.urgent {
            true => None,
            false => self.fetcher.scheduler().acquire_core().await,
        };
        let (fetcher, loaded) = (Arc::clone(&self.fetcher), Arc::clone(&self.loaded));
        run_blocking(move || {
            let _core = core;
            let mut corruption = None;
            for (unit, stored, leader) in batch {
                let decoded = loaded.map.decode(fetcher.layout(), fetcher.cached(), &unit, &stored);
                let cache_write_error = match &decoded {
                    Ok(decoded) => {
                        match decoded.chunk_count() == unit.members.len() {
                            true => loaded.mark_validated(),
                            false => corruption = Some(ReadCause::Digest),
                        }
                        decoded.cache_write_error.clone()
                    }
                    Err(cause) => {
                        corruption = Some(cause.clone());
                        None
                    }
                };
                leader.complete(decoded.map(Arc::new));
                if let Some(error) = cache_write_error {
                    return Err(ReadCause::CacheWrite(error));
                }
            }
            Ok(corruption)
        })
        .await
    }
}
