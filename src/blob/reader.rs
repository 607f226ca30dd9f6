//! Reads the chunks of one blob for one image: from the cache where they are, else fetched, once.

use std::{
    io,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU32, Ordering},
    },
};

use tokio::{runtime::Handle, task::JoinHandle};

use super::{
    atomic_bit_set::AtomicBitSet,
    cache::{CachedBlob, ChunkState},
    codec,
    error::{ReadCause, ReadError},
    layout::BlobLayout,
    prefetcher::{NOBODY, ReadAhead},
    scheduler::RegistryScheduler,
    shared::{SharedBlob, UnitFlights},
    source::{Provenance, Source, SourcedBytes},
    unit::{Decoded, PlannedUnit, UnitId},
    unit_map::{KnownUnitMap, UnitMapLoader, blocking},
};
pub use super::{coalesce::SuspendedCoalescing, unit_map::MetaSource};

type Outcome = Result<Arc<Decoded>, ReadCause>;
/// What became of a unit that has come, and where it came from.
pub(super) type Fetched = (Outcome, Provenance);

/// How often a unit is fetched before what comes is held to be what the registry has.
const ATTEMPTS: usize = 2;

/// One blob as one image reads it.
pub struct BlobReader {
    layout: Arc<BlobLayout>,
    shared: Arc<SharedBlob>,
    source: Arc<dyn Source>,
    lane: Arc<RegistryScheduler>,
    unit_map: Arc<UnitMapLoader>,
    /// By position in the layout: the epoch of the cache in which the chunk was on disk and verified, or 0. So no lock
    /// is needed to know.
    ready: Vec<AtomicU32>,
    /// The chunks that have been read at all.
    seen: AtomicBitSet,
    /// Positions in the layout by uncompressed offset, once they are needed.
    in_order: OnceLock<Vec<u32>>,
    ahead: Option<ReadAhead>,
}

/// How a chunk is come by.
#[derive(Clone)]
enum Way {
    /// From disk.
    Disk,
    /// With the unit in which it lies by that plan.
    Unit(Arc<KnownUnitMap>),
}

/// A chunk on its way.
pub struct Started(JoinHandle<Result<Arc<Decoded>, ReadError>>);

impl BlobReader {
    /// A reader of the blob that `layout` describes. Within a runtime, it fetches ahead of those who read the blob in
    /// order, if the lane does so.
    pub fn new(
        layout: Arc<BlobLayout>,
        shared: Arc<SharedBlob>,
        source: Arc<dyn Source>,
        lane: Arc<RegistryScheduler>,
        meta_source: MetaSource,
    ) -> Arc<Self> {
        let runtime = Handle::try_current().ok().filter(|_| lane.reads_ahead());
        let sizes = layout.chunks.iter().map(|chunk| chunk.uncompressed_size);
        let ahead = runtime.map(|runtime| ReadAhead::new(runtime, sizes));
        let unit_map = UnitMapLoader::new(
            Arc::clone(&layout),
            Arc::clone(shared.cached()),
            Arc::clone(&lane),
            meta_source,
        );
        let ready = layout.chunks.iter().map(|_| AtomicU32::new(0)).collect();
        let seen = AtomicBitSet::new(layout.chunks.len());
        Arc::new(Self {
            layout,
            shared,
            source,
            lane,
            unit_map,
            ready,
            seen,
            in_order: OnceLock::new(),
            ahead,
        })
    }

    /// What the image says of the blob.
    pub fn layout(&self) -> &BlobLayout {
        &self.layout
    }

    /// What the blob is called in the cache.
    pub fn cache_name(&self) -> &str {
        self.cached().name()
    }

    pub(super) fn source(&self) -> &dyn Source {
        self.source.as_ref()
    }

    pub(super) fn ahead(&self) -> Option<&ReadAhead> {
        self.ahead.as_ref()
    }

    /// Positions in the layout by uncompressed offset.
    pub(super) fn in_order(&self) -> &[u32] {
        self.in_order.get_or_init(|| {
            let chunks = &self.layout.chunks;
            // A blob has fewer than 2^24 chunks.
            let mut positions: Vec<_> = (0..chunks.len() as u32).collect();
            positions.sort_by_key(|position| chunks[*position as usize].uncompressed_offset);
            positions
        })
    }

    /// The chunk at `position` is wanted. Tells whether it is so for the first time.
    pub fn mark_seen(&self, position: usize) -> bool {
        self.seen.add(position)
    }

    pub(super) fn cached(&self) -> &Arc<CachedBlob> {
        self.shared.cached()
    }

    pub(super) fn flights(&self) -> &Arc<UnitFlights> {
        self.shared.flights()
    }

    pub(super) fn unit_map(&self) -> &Arc<UnitMapLoader> {
        &self.unit_map
    }

    pub(super) fn lane(&self) -> &RegistryScheduler {
        &self.lane
    }

    /// Whether the chunk at `position` is on disk and verified.
    fn is_ready(&self, position: usize) -> bool {
        let (epoch, ready) = (self.cached().epoch(), &self.ready[position]);
        if ready.load(Ordering::Acquire) == epoch {
            return true;
        }
        let is_ready = self.cached().state(self.layout.chunks[position].index) == ChunkState::Ready;
        if is_ready {
            ready.store(epoch, Ordering::Release);
        }
        is_ready
    }

    /// Fills `into` from the chunk at `position` of the layout, if the chunk is on disk and verified. Does not wait.
    pub fn read_ready(&self, position: usize, offset: u32, into: &mut [u8]) -> bool {
        let chunk = &self.layout.chunks[position];
        let within = u64::from(offset) + into.len() as u64 <= u64::from(chunk.uncompressed_size);
        if !within || !self.is_ready(position) {
            return false;
        }
        match self.cached().read(chunk, offset, into) {
            Ok(()) => true,
            Err(error) => {
                // Somebody truncated the file, or the disk fails: fetch the chunk again.
                tracing::warn!(blob = self.cached().name(), chunk = chunk.index, %error, "cannot read the blob cache");
                if error.kind() == io::ErrorKind::UnexpectedEof {
                    self.cached().was_cut();
                }
                self.ready[position].store(0, Ordering::Release);
                self.cached().distrust(chunk.index);
                false
            }
        }
    }

    /// Fills `into` from the chunk at `position` of the layout, fetching it if need be, or as it was `started`.
    pub async fn read(
        self: &Arc<Self>,
        position: usize,
        started: Option<Started>,
        offset: u32,
        into: &mut [u8],
    ) -> Result<(), ReadError> {
        let decoded = match started {
            Some(Started(task)) => {
                let ended = task.await;
                ended.unwrap_or_else(|_| Err(self.error(position, ReadCause::Aborted)))?
            }
            None if self.read_ready(position, offset, into) => return Ok(()),
            None => self.chunk(position).await?,
        };
        let range = offset as usize..offset as usize + into.len();
        match decoded
            .chunk(&self.layout.chunks[position])
            .and_then(|plain| plain.get(range))
        {
            Some(plain) => into.copy_from_slice(plain),
            None => return Err(self.error(position, ReadCause::Digest)),
        }
        Ok(())
    }

    /// Starts to fetch the chunk at `position`, if it is missing, without waiting for it.
    pub fn start(self: &Arc<Self>, position: usize) -> Option<Started> {
        if self.is_ready(position) {
            return None;
        }
        let reader = Arc::clone(self);
        Some(Started(tokio::spawn(async move { reader.chunk(position).await })))
    }

    /// The verified bytes of the chunk at `position` and of those in the same unit.
    async fn chunk(self: &Arc<Self>, position: usize) -> Result<Arc<Decoded>, ReadError> {
        let outcome = match self.from_disk(position).await {
            Some(outcome) => outcome,
            None => self.from_unit(position).await,
        };
        outcome.map_err(|cause| self.error(position, cause))
    }

    /// From disk, if the chunk is there and right. Needs no blob meta, and so no registry.
    async fn from_disk(self: &Arc<Self>, position: usize) -> Option<Outcome> {
        let index = self.layout.chunks[position].index;
        if self.cached().state(index) == ChunkState::Missing {
            return None;
        }
        match self.fly(UnitId::Disk(index), &Way::Disk, position).await {
            Err(ReadCause::Digest) => None,
            outcome => Some(outcome),
        }
    }

    async fn from_unit(self: &Arc<Self>, position: usize) -> Outcome {
        loop {
            let known = self.unit_map.get().await?;
            let outcome = match known.plan.unit_of(&self.layout.chunks[position]) {
                Ok(unit) => self.fly(unit, &Way::Unit(Arc::clone(&known)), position).await,
                Err(error) => Err(error.into()),
            };
            match outcome {
                // Not for long: a plan of that kind is not read again.
                Err(cause) if cause.may_be_misled() && self.unit_map.distrust(&known) => {}
                outcome => return outcome,
            }
        }
    }

    /// Joins the flight of that unit, or starts it, for the chunk at `position`.
    async fn fly(self: &Arc<Self>, unit: UnitId, way: &Way, position: usize) -> Outcome {
        let owner = match way {
            Way::Disk => Arc::as_ptr(self).addr(),
            Way::Unit(known) => Arc::as_ptr(known).addr(),
        };
        // Another image's flight may have failed for its own reasons, so after that this image's readers have one of
        // their own. Their own failure is final, so that waiters do not queue up to fail one after the other.
        for apart in [None, Some(owner)] {
            let (reader, way) = (Arc::clone(self), way.clone());
            let work = move || async move { reader.lane.patiently(reader.go(&way, position)).await };
            let (flight, ours) = self.flights().join((unit, apart), owner, work);
            let is_final = flight.owner == owner;
            let wait = async {
                match flight.owner {
                    // It has a bound of its own, but nobody depends on that.
                    NOBODY => self.lane.on_demand(self.lane.patiently(flight.wait())).await,
                    _ => flight.wait().await,
                }
            };
            match wait.await {
                Ok(decoded) if ours || decoded.chunk(&self.layout.chunks[position]).is_some() => return Ok(decoded),
                // The unit may have given this chunk, if not the one that its flight was for.
                Err(_)
                    if is_final && self.cached().state(self.layout.chunks[position].index) != ChunkState::Missing =>
                {
                    break;
                }
                Err(cause) if is_final => return Err(cause),
                _ => {}
            }
        }
        // Those had other chunks of the unit in mind.
        self.lane.patiently(self.go(way, position)).await
    }

    async fn go(self: &Arc<Self>, way: &Way, position: usize) -> Outcome {
        // Another flight may have landed since this one was asked for.
        if self.cached().state(self.layout.chunks[position].index) != ChunkState::Missing
            && let Some(decoded) = self.check(position).await?
        {
            return Ok(Arc::new(decoded));
        }
        match way {
            Way::Disk => Err(ReadCause::Digest),
            Way::Unit(known) => self.load(known, position).await,
        }
    }

    /// Fetches the unit of the chunk at `position`.
    async fn load(self: &Arc<Self>, known: &Arc<KnownUnitMap>, position: usize) -> Outcome {
        let unit = Arc::new(known.plan.unit(&self.layout, position)?);
        let mut attempt = 1;
        let mut among = self.with_neighbours(known, position);
        loop {
            let (decoded, origin) = match among.take() {
                Some(span) => match self.fetch_among(known, span, unit.id, position).await {
                    // It is asked for alone now, and more patiently.
                    Err(cause) if !cause.is_of_all() => continue,
                    fetched => fetched?,
                },
                None => self.fetch(known, Arc::clone(&unit)).await?,
            };
            let cause = match decoded {
                Ok(decoded) if decoded.chunk(&self.layout.chunks[position]).is_some() => {
                    known.mark_validated();
                    return Ok(decoded);
                }
                Ok(_) => ReadCause::Digest,
                Err(cause) => cause,
            };
            if !cause.is_damage() {
                return Err(cause);
            }
            self.source.distrust(&origin);
            if attempt == ATTEMPTS {
                return Err(cause);
            }
            attempt += 1;
        }
    }

    /// Hashes a chunk that is said to be on disk.
    async fn check(self: &Arc<Self>, position: usize) -> Result<Option<Decoded>, ReadCause> {
        let chunk = self.layout.chunks[position];
        let room = self.lane.room_from_disk(chunk.uncompressed_size as usize).await;
        let reader = Arc::clone(self);
        blocking(move || {
            let _room = room;
            let epoch = reader.cached().epoch();
            let mut plain = vec![0; chunk.uncompressed_size as usize];
            let read = reader.cached().read(&chunk, 0, &mut plain);
            if read.is_ok() && codec::matches(reader.layout.digester, &plain, &chunk.digest) {
                reader.cached().confirm(chunk.index, epoch);
                return Ok(Some(Decoded::single(&chunk, plain)));
            }
            tracing::warn!(
                blob = reader.cached().name(),
                chunk = chunk.index,
                "a cached chunk is damaged; it is fetched again"
            );
            reader.cached().distrust(chunk.index);
            Ok(None)
        })
        .await
    }

    /// Fetches a unit and decompresses it. Tells where it came from, whatever became of it.
    async fn fetch(self: &Arc<Self>, known: &Arc<KnownUnitMap>, plan: Arc<PlannedUnit>) -> Result<Fetched, ReadCause> {
        let size = plan.unit.compressed_size as usize + plan.unit.uncompressed_size as usize;
        let room = self.lane.room_for(size).await;
        let (offset, len) = (plan.unit.compressed_offset, plan.unit.compressed_size as usize);
        let stored = self.lane.on_demand(self.source.read(offset, len)).await;
        let SourcedBytes { bytes, origin } = stored.map_err(ReadCause::Fetch)?;
        let (reader, known) = (Arc::clone(self), Arc::clone(known));
        let decoded = blocking(move || {
            // Held until it is done, even if nobody waits any more.
            let _room = room;
            known.plan.decode(&reader.layout, reader.cached(), &plan, &bytes)
        });
        Ok((decoded.await.map(Arc::new), origin))
    }

    pub(super) fn error(&self, position: usize, cause: ReadCause) -> ReadError {
        ReadError {
            blob: self.layout.id.clone(),
            chunk: self.layout.chunks.get(position).map_or(0, |chunk| chunk.index),
            cause,
        }
    }
}
