//! Fetches the chunks of one blob for one image: from the cache file, or with the unit that they lie in.
//!
//! A *unit* is what one decompression needs: a chunk, a batch of small chunks, or a stretch of a gzip layer.
//! [`ChunkFetcher`] fetches each unit by a *flight* ([`super::singleflight`]): the first caller starts it, later
//! callers wait for its outcome. The bytes of the unit are decompressed, verified and written to the cache. Then the
//! waiters are answered from memory, also if the write failed.
//!
//! The fetcher does not decide what to fetch before a reader needs it. The prefetcher does, and hooks in through a
//! [`CoalescingPolicy`].

use std::{collections::HashMap, sync::Arc};

use super::{
    cache::{CachedBlob, ChunkState},
    codec,
    error::{ReadCause, ReadError},
    layout::BlobLayout,
    quarantine::Quarantine,
    scheduler::RegistryScheduler,
    shared::{FlightKey, SharedBlob, UnitFlights},
    singleflight::{Leader, Owner},
    source::{Provenance, Source, SourcedBytes, read_patiently},
    span::Span,
    unit::{DecodedUnit, Unit, UnitId, UnitMap},
    unit_map::{LoadedUnitMap, MetaSource, UnitMapLoader, run_blocking},
};
pub(super) use span_transfer::SpanTransfer;

mod span_transfer;

pub(super) type UnitLeader = Leader<FlightKey, Arc<DecodedUnit>>;
type Outcome = Result<Arc<DecodedUnit>, ReadCause>;
/// The outcome of decoding fetched bytes, and the endpoint that served them.
type Fetched = (Outcome, Provenance);

/// How many times a unit is fetched, for each unit map, before corruption becomes the reader's error. An endpoint may
/// have altered the bytes, and another one may serve good ones.
const MAX_ATTEMPTS: usize = 2;

/// Fetches, verifies and caches the chunks of one blob, as one image uses it.
pub struct ChunkFetcher {
    layout: Arc<BlobLayout>,
    blob: Arc<SharedBlob>,
    source: Arc<dyn Source>,
    scheduler: Arc<RegistryScheduler>,
    unit_map: Arc<UnitMapLoader>,
    coalescing: Option<Arc<dyn CoalescingPolicy>>,
    quarantine: Quarantine,
}

/// Decides what a request for one unit fetches besides that unit, and learns how such requests end.
pub(super) trait CoalescingPolicy: Send + Sync {
    /// The span to request for `unit`, which comes first in it; `None` to request the unit alone.
    fn span(&self, fetcher: &ChunkFetcher, map: &UnitMap, unit: &Unit) -> Option<Span>;

    /// A request is about to be sent that also fetches the missing chunks at `positions`.
    fn on_request(&self, fetcher: &ChunkFetcher, positions: &[usize]);

    /// A request of [`Self::span`] ended. `is_complete`: all of its bytes came in time.
    fn on_end(&self, is_complete: bool);
}

/// Where a flight gets a chunk from.
#[derive(Clone)]
enum FetchFrom {
    /// The cache file.
    Disk,
    /// The unit that holds the chunk according to this map.
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
            quarantine: Quarantine::default(),
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
    pub(super) fn is_any_missing(&self, unit: &Unit) -> bool {
        unit.members.iter().any(|(position, _)| self.is_missing(*position))
    }

    /// Starts a shared flight of `unit` without an owner. `None` if there is one, or if no chunk is missing.
    pub(super) fn lead_if_missing(&self, unit: &Unit) -> Option<UnitLeader> {
        let leader = self.flights().lead(FlightKey::shared(unit.id));
        // Checked after the flight has started: one that ended just before may have cached the unit.
        leader.filter(|_| self.is_any_missing(unit))
    }

    /// The error of reading the chunk at `position`.
    pub(super) fn error(&self, position: usize, cause: ReadCause) -> ReadError {
        ReadError {
            blob: self.layout.id.clone(),
            chunk: self.layout.chunks.get(position).map_or(0, |chunk| chunk.index),
            cause,
        }
    }

    /// The verified bytes of the chunk at `position`, and of what else the same unit holds. Chunks that this process
    /// has verified already are read by [`CachedBlob::read`] instead.
    pub(super) async fn chunk(self: &Arc<Self>, position: usize) -> Result<Arc<DecodedUnit>, ReadError> {
        let _wait = self
            .scheduler
            .begin_wait(&self.layout.id, self.layout.chunks[position].index);
        let outcome = match self.read_cached(position).await {
            Some(outcome) => outcome,
            None => self.fetch_unit_of(position).await,
        };
        outcome.map_err(|cause| self.error(position, cause))
    }

    /// Reads and hashes the chunk in the cache file, without blob meta and registry. `None` if it is missing, corrupt
    /// or unreadable there.
    async fn read_cached(self: &Arc<Self>, position: usize) -> Option<Outcome> {
        if self.is_missing(position) {
            return None;
        }
        let unit = UnitId::Cached(self.layout.chunks[position].index);
        match self.fetch_shared(unit, &FetchFrom::Disk, position).await {
            Err(ReadCause::Digest) => None,
            outcome => Some(outcome),
        }
    }

    /// Fetches the unit of the chunk. If the failure may be due to a wrong cached blob meta, fetches the blob meta and
    /// then the unit again.
    async fn fetch_unit_of(self: &Arc<Self>, position: usize) -> Outcome {
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
                // Repeats once at most: only a map read from the cache can be invalidated, and the next is fetched.
                Err(cause) if cause.may_be_wrong_meta() && self.unit_map.invalidate(&loaded) => {}
                outcome => return outcome,
            }
        }
    }

    /// Joins or starts the shared flight of `unit`, for the chunk at `position`. If it fails for another image, or
    /// lacks this chunk, does the same with a flight of this image's own.
    ///
    /// The owner is the unit map rather than the image: a flight with an earlier map is foreign, too.
    async fn fetch_shared(self: &Arc<Self>, unit: UnitId, from: &FetchFrom, position: usize) -> Outcome {
        let owner = match from {
            FetchFrom::Disk => Owner::of(self),
            FetchFrom::Unit(loaded) => Owner::of(loaded),
        };
        for key in [FlightKey::shared(unit), FlightKey::only_for(owner, unit)] {
            let (fetcher, from) = (Arc::clone(self), from.clone());
            let work = move || async move {
                fetcher
                    .scheduler
                    .with_timeout(fetcher.read_or_fetch(&from, position))
                    .await
            };
            let (flight, is_started_here) = self.flights().join_or_start(key, Some(owner), work);
            let is_same_owner = flight.owner == Some(owner);
            let outcome = match flight.owner {
                Some(_) => flight.wait().await,
                // Prefetches may take longer than a reader waits.
                None => {
                    let wait = self.scheduler.with_timeout(flight.wait());
                    self.scheduler.as_demand(wait).await
                }
            };
            match outcome {
                Ok(decoded) if self.holds(&decoded, position) => return Ok(decoded),
                Ok(_) if is_started_here => return Err(ReadCause::Digest),
                // The flight failed, but has cached this chunk: its work goes on after a time-out.
                Err(_) if is_same_owner && !self.is_missing(position) => break,
                // All waiters of the image fail together, instead of trying again one after the other.
                Err(cause) if is_same_owner => return Err(cause),
                _ => {}
            }
        }
        // The flights were for other chunks of the unit, or have cached this one.
        let decoded = self.scheduler.with_timeout(self.read_or_fetch(from, position)).await?;
        match self.holds(&decoded, position) {
            true => Ok(decoded),
            false => Err(ReadCause::Digest),
        }
    }

    /// Whether `decoded` has the chunk at `position`, verified.
    fn holds(&self, decoded: &DecodedUnit, position: usize) -> bool {
        decoded.chunk(&self.layout.chunks[position]).is_some()
    }

    /// The work of a flight. The outcome lacks the chunk at `position` if only that chunk is corrupt: callers that wait
    /// for other chunks of the unit are served.
    async fn read_or_fetch(self: &Arc<Self>, from: &FetchFrom, position: usize) -> Outcome {
        // Another flight may have cached the chunk after the caller looked.
        if !self.is_missing(position)
            && let Some(decoded) = self.verify_cached(position).await?
        {
            return Ok(Arc::new(decoded));
        }
        match from {
            FetchFrom::Disk => Err(ReadCause::Digest),
            FetchFrom::Unit(loaded) => self.fetch_unless_quarantined(loaded, position).await,
        }
    }

    /// [`Self::fetch_unit`], unless it has delivered a corrupt chunk again and again.
    async fn fetch_unless_quarantined(self: &Arc<Self>, loaded: &Arc<LoadedUnitMap>, position: usize) -> Outcome {
        if let Some(cause) = self.quarantine.refusal(position) {
            return Err(cause);
        }
        let outcome = self.fetch_unit(loaded, position).await;
        let failure = match &outcome {
            Ok(decoded) => (!self.holds(decoded, position)).then_some(&ReadCause::Digest),
            Err(cause) => Some(cause),
        };
        self.quarantine.record(position, failure);
        outcome
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
                    // The unit is fetched alone next, in what is left of the flight's time-out. That waits for a host
                    // that is away, without the memory of the span.
                    Err(cause) if !cause.is_blob_unavailable() => continue,
                    fetched => fetched?,
                },
                None => self.fetch_alone(loaded, Arc::clone(&unit)).await?,
            };
            match &decoded {
                Ok(decoded) if self.holds(decoded, position) => loaded.mark_validated(),
                Err(cause) if !cause.is_corruption() => {}
                _ => {
                    self.source.report_corrupt(&provenance);
                    if attempt < MAX_ATTEMPTS {
                        attempt += 1;
                        continue;
                    }
                }
            }
            return decoded;
        }
    }

    /// Reads and hashes a chunk in the cache file. `None` if it is corrupt or unreadable; a corrupt one counts as
    /// missing from now on.
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
            if let Err(error) = cached.read(&chunk, 0, &mut plain) {
                cached.on_unreadable(&chunk, &error);
                return Ok(None);
            }
            if codec::matches(fetcher.layout.digester, &plain, &chunk.digest) {
                cached.mark_verified(chunk.index, epoch);
                return Ok(Some(DecodedUnit::single(&chunk, plain)));
            }
            cached.on_corrupt(&chunk, epoch);
            Ok(None)
        })
        .await
    }

    /// Fetches a unit by a request of its own, and decodes it. An error of this function means that no bytes came; one
    /// of decoding is in [`Fetched`].
    async fn fetch_alone(self: &Arc<Self>, loaded: &Arc<LoadedUnitMap>, unit: Arc<Unit>) -> Result<Fetched, ReadCause> {
        let size = unit.extent.compressed_size as usize + unit.extent.uncompressed_size as usize;
        let range = (unit.extent.compressed_offset, unit.extent.compressed_size as usize);
        let reading = read_patiently(&*self.source, range, || self.scheduler.reserve_memory(size));
        let read = self.scheduler.as_demand(reading).await;
        let (SourcedBytes { bytes, provenance }, memory) = read.map_err(ReadCause::Fetch)?;
        let (fetcher, loaded) = (Arc::clone(self), Arc::clone(loaded));
        let decoded = run_blocking(move || {
            // The memory is reserved until the work is done, even if the flight was cancelled.
            let _memory = memory;
            loaded.map.decode(&fetcher.layout, fetcher.cached(), &unit, &bytes)
        });
        Ok((decoded.await.map(Arc::new), provenance))
    }

    /// Fetches `span`, whose first unit holds the wanted chunk at `position`. Returns as soon as that unit is decoded.
    /// A task decodes and caches the others if they come within [`RegistryScheduler::coalesced_timeout`].
    async fn fetch_coalesced(
        self: &Arc<Self>,
        policy: &Arc<dyn CoalescingPolicy>,
        loaded: &Arc<LoadedUnitMap>,
        mut span: Span,
        position: usize,
    ) -> Result<Fetched, ReadCause> {
        let memory = self.scheduler.reserve_memory(span.memory()).await;
        let wanted = span.units[0].id;
        // Not registered: the caller itself runs in the flight of this unit.
        let (leader, flight) = Leader::detached(FlightKey::shared(wanted));
        let mut leaders: HashMap<UnitId, UnitLeader> = HashMap::from([(wanted, leader)]);
        // The span ends before the first unit that another request fetches, that is cached, or that it names twice.
        for unit in span.units.iter().skip(1) {
            let leader = self.lead_if_missing(unit);
            let Some(leader) = leader.filter(|_| !leaders.contains_key(&unit.id)) else {
                break;
            };
            leaders.insert(unit.id, leader);
        }
        span.truncate(leaders.len());
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
        // The wanted unit failed; the outcome of the request has the cause.
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
        let result = tokio::time::timeout(timeout, transfer.run(span)).await;
        let result = result.unwrap_or(Err(ReadCause::TimedOut(timeout.as_secs())));
        policy.on_end(result.is_ok());
        if result.is_err() {
            // What was measured of the link no longer holds.
            self.scheduler.link.reset();
        }
        result
    }
}
