//! Fetches the chunks of one blob for one image: from the cache file, or with the unit that they lie in.
//!
//! [`ChunkFetcher`] fetches each unit by a *flight* ([`super::singleflight`]): the first caller starts it, later
//! callers wait for its outcome. The bytes of a unit are decompressed, verified and written to the cache, and the
//! waiters are answered from memory.
//!
//! The fetcher does not decide what to fetch before a reader needs it. The layer above does, and hooks in by a
//! [`CoalescingPolicy`].

use std::{collections::HashMap, sync::Arc};

use super::{
    cache::{CachedBlob, ChunkState},
    codec,
    error::{ReadCause, ReadError},
    layout::BlobLayout,
    scheduler::RegistryScheduler,
    shared::{SharedBlob, UnitFlights},
    singleflight::Leader,
    source::{Provenance, Source, SourcedBytes},
    span::Span,
    unit::{DecodedUnit, Unit, UnitId, UnitMap},
    unit_map::{LoadedUnitMap, MetaSource, UnitMapLoader, run_blocking},
};
pub(super) use span_transfer::SpanTransfer;

mod span_transfer;

pub(super) type UnitLeader = Leader<(UnitId, Option<usize>), Arc<DecodedUnit>>;
type Outcome = Result<Arc<DecodedUnit>, ReadCause>;
/// The outcome of decoding fetched bytes, and the endpoint that served them.
type Fetched = (Outcome, Provenance);

/// How often a unit is fetched before its corruption is reported: an endpoint on the way may have altered the bytes.
const MAX_ATTEMPTS: usize = 2;
/// Owner of flights that no reader started. It is no address, so that no reader takes such a failure for its own.
const NO_READER: usize = 1;

/// Fetches, verifies and caches the chunks of one blob, as one image uses it.
pub struct ChunkFetcher {
    layout: Arc<BlobLayout>,
    blob: Arc<SharedBlob>,
    source: Arc<dyn Source>,
    scheduler: Arc<RegistryScheduler>,
    unit_map: Arc<UnitMapLoader>,
    coalescing: Option<Arc<dyn CoalescingPolicy>>,
}

/// Decides what a request for one unit fetches besides that unit, and learns how such requests end.
pub(super) trait CoalescingPolicy: Send + Sync {
    /// The span to request for `unit`, which comes first in it; `None` to request the unit alone.
    fn span(&self, fetcher: &ChunkFetcher, map: &UnitMap, unit: &Unit) -> Option<Span>;

    /// A request is about to be sent that also fetches the missing chunks at `positions`.
    fn on_request(&self, fetcher: &ChunkFetcher, positions: &[usize]);

    /// Such a request ended: all of its bytes came in time, or not.
    fn on_end(&self, is_complete: bool);
}

/// Where a flight gets a chunk from.
#[derive(Clone)]
enum FetchFrom {
    /// The cache file.
    Disk,
    /// The unit that the chunk lies in by that map.
    Unit(Arc<LoadedUnitMap>),
}

impl ChunkFetcher {
    /// A fetcher of the blob that `layout` describes. Without `coalescing`, each missing unit is a request of its own.
    pub(super) fn new(
        layout: Arc<BlobLayout>,
        blob: Arc<SharedBlob>,
        source: Arc<dyn Source>,
        scheduler: Arc<RegistryScheduler>,
        meta_source: MetaSource,
        coalescing: Option<Arc<dyn CoalescingPolicy>>,
    ) -> Arc<Self> {
        let unit_map = UnitMapLoader::new(
            Arc::clone(&layout),
            Arc::clone(blob.cached()),
            Arc::clone(&scheduler),
            meta_source,
        );
        Arc::new(Self {
            layout,
            blob,
            source,
            scheduler,
            unit_map,
            coalescing,
        })
    }

    pub(super) fn layout(&self) -> &BlobLayout {
        &self.layout
    }

    pub(super) fn cached(&self) -> &Arc<CachedBlob> {
        self.blob.cached()
    }

    pub(super) fn flights(&self) -> &Arc<UnitFlights> {
        self.blob.flights()
    }

    pub(super) fn source(&self) -> &dyn Source {
        self.source.as_ref()
    }

    pub(super) fn scheduler(&self) -> &RegistryScheduler {
        &self.scheduler
    }

    pub(super) fn unit_map(&self) -> &Arc<UnitMapLoader> {
        &self.unit_map
    }

    /// What is known of the chunk at `position`.
    pub(super) fn state(&self, position: usize) -> ChunkState {
        self.cached().state(self.layout.chunks[position].index)
    }

    /// Whether the chunk at `position` would have to be fetched from the source.
    pub(super) fn is_missing(&self, position: usize) -> bool {
        self.state(position) == ChunkState::Missing
    }

    /// Whether a chunk of `unit` is missing.
    pub(super) fn needs(&self, unit: &Unit) -> bool {
        unit.members.iter().any(|(position, _)| self.is_missing(*position))
    }

    /// Starts a flight of `unit` that no reader owns; `None` if the unit is in flight or not missing.
    pub(super) fn lead_if_missing(&self, unit: &Unit) -> Option<UnitLeader> {
        let leader = self.flights().lead((unit.id, None), NO_READER);
        // An earlier flight may have completed just before.
        leader.filter(|_| self.needs(unit))
    }

    /// The error of reading the chunk at `position`.
    pub(super) fn error(&self, position: usize, cause: ReadCause) -> ReadError {
        ReadError {
            blob: self.layout.id.clone(),
            chunk: self.layout.chunks.get(position).map_or(0, |chunk| chunk.index),
            cause,
        }
    }

    /// The verified bytes of the chunk at `position` and of others in the same unit.
    pub(super) async fn chunk(self: &Arc<Self>, position: usize) -> Result<Arc<DecodedUnit>, ReadError> {
        let outcome = match self.from_disk(position).await {
            Some(outcome) => outcome,
            None => self.from_unit(position).await,
        };
        outcome.map_err(|cause| self.error(position, cause))
    }

    /// Reads the chunk from the cache file; `None` if it is missing or corrupt there. Needs neither blob meta nor
    /// registry.
    async fn from_disk(self: &Arc<Self>, position: usize) -> Option<Outcome> {
        if self.is_missing(position) {
            return None;
        }
        let unit = UnitId::Disk(self.layout.chunks[position].index);
        match self.fetch_shared(unit, &FetchFrom::Disk, position).await {
            Err(ReadCause::Digest) => None,
            outcome => Some(outcome),
        }
    }

    /// Fetches the unit of the chunk. Fetches it a second time if the first failure may be due to a wrong cached blob
    /// meta.
    async fn from_unit(self: &Arc<Self>, position: usize) -> Outcome {
        loop {
            let loaded = self.unit_map.get().await?;
            let outcome = match loaded.map.unit_of(&self.layout.chunks[position]) {
                Ok(unit) => {
                    let from = FetchFrom::Unit(Arc::clone(&loaded));
                    self.fetch_shared(unit, &from, position).await
                }
                Err(error) => Err(error.into()),
            };
            match outcome {
                // Ends after one turn: a blob meta from the cache is not read again.
                Err(cause) if cause.may_be_wrong_meta() && self.unit_map.invalidate(&loaded) => {}
                outcome => return outcome,
            }
        }
    }

    /// Joins the flight of that unit, or starts it, for the chunk at `position`.
    async fn fetch_shared(self: &Arc<Self>, unit: UnitId, from: &FetchFrom, position: usize) -> Outcome {
        let owner = match from {
            FetchFrom::Disk => Arc::as_ptr(self).addr(),
            FetchFrom::Unit(loaded) => Arc::as_ptr(loaded).addr(),
        };
        // A flight of another image may fail for reasons of that image: a second flight is for this image alone. A
        // failure of an own flight is final, so that its waiters do not fail one after the other.
        for apart in [None, Some(owner)] {
            let (fetcher, from) = (Arc::clone(self), from.clone());
            let work = move || async move {
                fetcher
                    .scheduler
                    .with_timeout(fetcher.fetch_once(&from, position))
                    .await
            };
            let (flight, ours) = self.flights().join((unit, apart), owner, work);
            let is_final = flight.owner == owner;
            let wait = async {
                match flight.owner {
                    // The request has a time-out of its own, but a reader does not rely on it.
                    NO_READER => {
                        self.scheduler
                            .as_demand(self.scheduler.with_timeout(flight.wait()))
                            .await
                    }
                    _ => flight.wait().await,
                }
            };
            match wait.await {
                Ok(decoded) if ours || decoded.chunk(&self.layout.chunks[position]).is_some() => return Ok(decoded),
                // The flight failed for another chunk of the unit, but has cached this one.
                Err(_) if is_final && !self.is_missing(position) => break,
                Err(cause) if is_final => return Err(cause),
                _ => {}
            }
        }
        // The flights were for other chunks of the unit.
        self.scheduler.with_timeout(self.fetch_once(from, position)).await
    }

    async fn fetch_once(self: &Arc<Self>, from: &FetchFrom, position: usize) -> Outcome {
        // Another flight may have completed since this one was requested.
        if !self.is_missing(position)
            && let Some(decoded) = self.verify_cached(position).await?
        {
            return Ok(Arc::new(decoded));
        }
        match from {
            FetchFrom::Disk => Err(ReadCause::Digest),
            FetchFrom::Unit(loaded) => self.fetch_unit(loaded, position).await,
        }
    }

    /// Fetches the unit of the chunk at `position`, with the span that the coalescing policy chooses, else alone.
    async fn fetch_unit(self: &Arc<Self>, loaded: &Arc<LoadedUnitMap>, position: usize) -> Outcome {
        let unit = Arc::new(loaded.map.unit(&self.layout, position)?);
        let policy = self.coalescing.as_ref();
        let mut coalesced = policy.and_then(|policy| Some((policy, policy.span(self, &loaded.map, &unit)?)));
        let mut attempt = 1;
        loop {
            let (decoded, provenance) = match coalesced.take() {
                Some((policy, span)) => match self.fetch_coalesced(policy, loaded, span, position).await {
                    // The unit is fetched alone next, with a longer time-out.
                    Err(cause) if !cause.is_blob_unavailable() => continue,
                    fetched => fetched?,
                },
                None => self.fetch_alone(loaded, Arc::clone(&unit)).await?,
            };
            let cause = match decoded {
                Ok(decoded) if decoded.chunk(&self.layout.chunks[position]).is_some() => {
                    loaded.mark_validated();
                    return Ok(decoded);
                }
                Ok(_) => ReadCause::Digest,
                Err(cause) => cause,
            };
            if !cause.is_corruption() {
                return Err(cause);
            }
            self.source.report_corrupt(&provenance);
            if attempt == MAX_ATTEMPTS {
                return Err(cause);
            }
            attempt += 1;
        }
    }

    /// Hashes a chunk in the cache file; `None` if it is corrupt, which also invalidates it.
    async fn verify_cached(self: &Arc<Self>, position: usize) -> Result<Option<DecodedUnit>, ReadCause> {
        let chunk = self.layout.chunks[position];
        let memory = self
            .scheduler
            .reserve_disk_memory(chunk.uncompressed_size as usize)
            .await;
        let fetcher = Arc::clone(self);
        run_blocking(move || {
            let _memory = memory;
            let cached = fetcher.cached();
            let epoch = cached.epoch();
            let mut plain = vec![0; chunk.uncompressed_size as usize];
            let read = cached.read(&chunk, 0, &mut plain);
            if read.is_ok() && codec::matches(fetcher.layout.digester, &plain, &chunk.digest) {
                cached.mark_verified(chunk.index, epoch);
                return Ok(Some(DecodedUnit::single(&chunk, plain)));
            }
            tracing::warn!(
                blob = cached.name(),
                chunk = chunk.index,
                "failed to verify cached chunk; fetching it again"
            );
            cached.invalidate(chunk.index);
            Ok(None)
        })
        .await
    }

    /// Fetches a unit by a request of its own, and decodes it. An error means that its bytes did not come.
    async fn fetch_alone(self: &Arc<Self>, loaded: &Arc<LoadedUnitMap>, unit: Arc<Unit>) -> Result<Fetched, ReadCause> {
        let size = unit.extent.compressed_size as usize + unit.extent.uncompressed_size as usize;
        let memory = self.scheduler.reserve_memory(size).await;
        let (offset, len) = (unit.extent.compressed_offset, unit.extent.compressed_size as usize);
        let stored = self.scheduler.as_demand(self.source.read(offset, len)).await;
        let SourcedBytes { bytes, provenance } = stored.map_err(ReadCause::Fetch)?;
        let (fetcher, loaded) = (Arc::clone(self), Arc::clone(loaded));
        let decoded = run_blocking(move || {
            // Held until the work is done, even if the flight was cancelled.
            let _memory = memory;
            loaded.map.decode(&fetcher.layout, fetcher.cached(), &unit, &bytes)
        });
        Ok((decoded.await.map(Arc::new), provenance))
    }

    /// Fetches `span`, whose first unit holds the wanted chunk at `position`. Returns as soon as that unit is decoded.
    /// The others follow, if they come within [`RegistryScheduler::coalesced_timeout`].
    async fn fetch_coalesced(
        self: &Arc<Self>,
        policy: &Arc<dyn CoalescingPolicy>,
        loaded: &Arc<LoadedUnitMap>,
        mut span: Span,
        position: usize,
    ) -> Result<Fetched, ReadCause> {
        let memory = self.scheduler.reserve_memory(span.memory()).await;
        let wanted = span.units[0].id;
        // The flight of the wanted unit is registered already: the caller runs in it.
        let (leader, flight) = Leader::detached((wanted, None));
        let mut leaders: HashMap<UnitId, UnitLeader> = HashMap::from([(wanted, leader)]);
        let others = span.units.iter().skip(1);
        let led = others.take_while(|unit| {
            let leader = self.lead_if_missing(unit);
            leader.is_some_and(|leader| leaders.insert(unit.id, leader).is_none())
        });
        let count = 1 + led.count();
        span.truncate(count);
        let others = span.units.iter().skip(1).flat_map(|unit| &unit.members);
        let missing: Vec<_> = others.map(|(at, _)| *at).filter(|at| self.is_missing(*at)).collect();
        policy.on_request(self, &missing);
        let (fetcher, policy) = (Arc::clone(self), Arc::clone(policy));
        let transfer = SpanTransfer::new(Arc::clone(self), Arc::clone(loaded), leaders, true);
        let fetching = tokio::spawn(async move {
            let _memory = memory;
            fetcher.transfer_in_time(policy.as_ref(), transfer, span).await
        });
        let decoded = self.scheduler.as_demand(flight.wait()).await;
        if let Ok(decoded) = decoded
            && decoded.chunk(&self.layout.chunks[position]).is_some()
        {
            return Ok((Ok(decoded), Provenance::default()));
        }
        // The outcome of the request tells why.
        match fetching.await.unwrap_or(Err(ReadCause::Aborted))? {
            Some((cause, provenance)) => Ok((Err(cause), provenance)),
            None => Err(ReadCause::Aborted),
        }
    }

    /// Runs `transfer` within [`RegistryScheduler::coalesced_timeout`], and reports the outcome to the policy.
    async fn transfer_in_time(
        &self,
        policy: &dyn CoalescingPolicy,
        transfer: SpanTransfer,
        span: Span,
    ) -> Result<Option<(ReadCause, Provenance)>, ReadCause> {
        let timeout = self.scheduler.coalesced_timeout();
        let taken = tokio::time::timeout(timeout, transfer.run(span)).await;
        let taken = taken.unwrap_or(Err(ReadCause::TimedOut(timeout.as_secs())));
        policy.on_end(taken.is_ok());
        if taken.is_err() {
            self.scheduler.link.reset();
        }
        taken
    }
}
