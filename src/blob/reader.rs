//! Reads the chunks of one blob for one image: from the cache where they are, else fetched, once.

use std::{
    ops::Range,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use tokio::sync::{OnceCell, watch};

use super::{
    cache::{CachedBlob, ChunkState},
    codec,
    error::{ReadCause, ReadError},
    fetching::Lane,
    layout::{BlobLayout, Packing},
    meta::{BlobMeta, HEADER_SIZE},
    source::Source,
    unit::{Decoded, Outcome, Plan, UnitId, UnitPlan},
};

/// How often a unit is fetched before what comes is held to be what the registry has.
const ATTEMPTS: usize = 2;

/// Where the blob meta of a packed blob is.
pub enum MetaSource {
    /// In a file that came with the bootstrap.
    File(PathBuf),
    /// In a blob, at [`BlobLayout::meta`].
    Blob(Arc<dyn Source>),
}

/// One blob as one image reads it.
pub struct BlobReader {
    layout: Arc<BlobLayout>,
    cached: Arc<CachedBlob>,
    source: Arc<dyn Source>,
    lane: Arc<Lane>,
    meta_source: MetaSource,
    plan: OnceCell<Plan>,
    /// By position in the layout: whether the chunk is on disk and verified, so that no lock is needed to know.
    ready: Vec<AtomicBool>,
}

impl BlobReader {
    /// A reader of the blob that `layout` describes.
    pub fn new(
        layout: Arc<BlobLayout>,
        cached: Arc<CachedBlob>,
        source: Arc<dyn Source>,
        lane: Arc<Lane>,
        meta_source: MetaSource,
    ) -> Arc<Self> {
        let ready = layout.chunks.iter().map(|_| AtomicBool::new(false)).collect();
        let plan = if layout.packing == Packing::PerChunk {
            OnceCell::new_with(Some(Plan::PerChunk))
        } else {
            OnceCell::new()
        };
        Arc::new(Self {
            layout,
            cached,
            source,
            lane,
            meta_source,
            plan,
            ready,
        })
    }

    /// What the image says of the blob.
    pub fn layout(&self) -> &BlobLayout {
        &self.layout
    }

    /// Fills `into` from the chunk at `position` of the layout, if the chunk is on disk and verified. Does not wait.
    pub fn read_ready(&self, position: usize, offset: u32, into: &mut [u8]) -> bool {
        let chunk = &self.layout.chunks[position];
        if !self.ready[position].load(Ordering::Acquire) {
            if self.cached.state(chunk.index) != ChunkState::Ready {
                return false;
            }
            self.ready[position].store(true, Ordering::Release);
        }
        match self.cached.read(chunk, offset, into) {
            Ok(()) => true,
            Err(error) => {
                // Somebody truncated the file, or the disk fails: fetch the chunk again.
                tracing::warn!(blob = self.cached.name(), chunk = chunk.index, %error, "cannot read the blob cache");
                self.ready[position].store(false, Ordering::Release);
                self.cached.distrust(chunk.index);
                false
            }
        }
    }

    /// Fills `into` from the chunk at `position` of the layout, fetching it if need be.
    pub async fn read(self: &Arc<Self>, position: usize, offset: u32, into: &mut [u8]) -> Result<(), ReadError> {
        if self.read_ready(position, offset, into) {
            return Ok(());
        }
        let decoded = self.chunk(position).await?;
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

    /// Starts to fetch the chunks at `positions`, as far as they are missing, without waiting for them.
    pub fn start(self: &Arc<Self>, positions: Range<usize>) {
        for position in positions {
            if !self.ready[position].load(Ordering::Acquire) {
                let reader = Arc::clone(self);
                tokio::spawn(async move { reader.chunk(position).await.map(drop) });
            }
        }
    }

    /// The verified bytes of the chunk at `position` and of those in the same unit.
    async fn chunk(self: &Arc<Self>, position: usize) -> Result<Arc<Decoded>, ReadError> {
        let chunk = &self.layout.chunks[position];
        let unit = match self.plan().await {
            Ok(plan) => plan.unit_of(chunk).map_err(ReadCause::Meta),
            Err(cause) => Err(cause),
        };
        let unit = unit.map_err(|cause| self.error(position, cause))?;
        loop {
            let (mut flight, ours) = self.join_flight(unit, position);
            let outcome = wait(&mut flight.outcome).await;
            // Another image's flight may have failed for its own reasons, and one that only looked at the disk for
            // another chunk of the unit does not have this one. A failure with our own source is final, so that
            // waiters do not queue up to fail one after the other.
            match outcome {
                Ok(decoded) if ours || decoded.chunk(&self.layout.chunks[position]).is_some() => return Ok(decoded),
                Err(cause) if ours || flight.image == self.image() => return Err(self.error(position, cause)),
                _ => {}
            }
        }
    }

    /// Joins the flight that fetches `unit`, or starts one; tells whether it was started here.
    fn join_flight(self: &Arc<Self>, unit: UnitId, position: usize) -> (Flight, bool) {
        let mut flights = self.cached.flights.lock();
        if let Some(flight) = flights.get(&unit) {
            return (flight.clone(), false);
        }
        let (sender, outcome) = watch::channel(None);
        let flight = Flight {
            outcome,
            image: self.image(),
        };
        flights.insert(unit, flight.clone());
        let landing = Landing {
            cached: Arc::clone(&self.cached),
            unit,
        };
        let reader = Arc::clone(self);
        tokio::spawn(async move {
            let patience = reader.lane.patience();
            let outcome = tokio::time::timeout(patience, reader.load(position)).await;
            let outcome = outcome.unwrap_or(Err(ReadCause::TimedOut(patience.as_secs())));
            // Removed before the outcome is seen, so that whoever tries again after a failure starts anew.
            drop(landing);
            sender.send_replace(Some(outcome));
        });
        (flight, true)
    }

    /// Tells this image's flights from those of others that share the blob.
    fn image(self: &Arc<Self>) -> usize {
        Arc::as_ptr(self).addr()
    }

    /// Takes the chunk at `position` from disk if it is there and right, else fetches its unit.
    async fn load(self: &Arc<Self>, position: usize) -> Outcome {
        if self.cached.state(self.layout.chunks[position].index) != ChunkState::Missing
            && let Some(decoded) = self.blocking(move |reader| Ok(reader.check(position))).await?
        {
            return Ok(Arc::new(decoded));
        }
        let unit = Arc::new(self.plan().await?.unit(&self.layout, position)?);
        let mut attempt = 1;
        loop {
            match self.fetch(Arc::clone(&unit)).await {
                Ok(decoded) if decoded.chunk(&self.layout.chunks[position]).is_some() => return Ok(Arc::new(decoded)),
                Ok(_) if attempt == ATTEMPTS => return Err(ReadCause::Digest),
                Err(cause) if attempt == ATTEMPTS || !cause.is_damage() => return Err(cause),
                _ => attempt += 1,
            }
        }
    }

    /// Hashes a chunk that is said to be on disk.
    fn check(&self, position: usize) -> Option<Decoded> {
        let chunk = &self.layout.chunks[position];
        let mut plain = vec![0; chunk.uncompressed_size as usize];
        let read = self.cached.read(chunk, 0, &mut plain);
        if read.is_ok() && codec::matches(self.layout.digester, &plain, &chunk.digest) {
            self.cached.confirm(chunk.index);
            return Some(Decoded::single(chunk, plain));
        }
        tracing::warn!(
            blob = self.cached.name(),
            chunk = chunk.index,
            "a cached chunk is damaged; it is fetched again"
        );
        self.cached.distrust(chunk.index);
        None
    }

    async fn fetch(self: &Arc<Self>, plan: Arc<UnitPlan>) -> Result<Decoded, ReadCause> {
        let size = plan.unit.compressed_size as usize + plan.unit.uncompressed_size as usize;
        let room = self.lane.room_for(size).await;
        let (offset, len) = (plan.unit.compressed_offset, plan.unit.compressed_size as usize);
        let stored = self.source.read(offset, len).await.map_err(ReadCause::Fetch)?;
        self.lane.count(stored.len());
        let decoded = self
            .blocking(move |reader| match reader.plan.get() {
                Some(rules) => rules.decode(&reader.layout, &reader.cached, &plan, &stored),
                None => Err(ReadCause::Aborted),
            })
            .await;
        drop(room);
        decoded
    }

    /// The rules by which chunks lie in units; those of packed blobs need the blob meta, perhaps from the blob.
    async fn plan(&self) -> Result<&Plan, ReadCause> {
        self.plan
            .get_or_try_init(|| async {
                let meta = match &self.meta_source {
                    MetaSource::File(file) => {
                        let bytes = tokio::fs::read(file).await.map_err(|e| ReadCause::Cache(Arc::new(e)))?;
                        BlobMeta::from_file(&self.layout, bytes)?
                    }
                    MetaSource::Blob(source) => {
                        let location = self.layout.meta;
                        let len = location.compressed_size.saturating_add(HEADER_SIZE as u64);
                        let len = usize::try_from(len)
                            .ok()
                            .filter(|len| *len <= 1 << 30)
                            .unwrap_or(HEADER_SIZE);
                        let stored = source.read(location.offset, len).await.map_err(ReadCause::Fetch)?;
                        BlobMeta::from_blob(&self.layout, &stored)?
                    }
                };
                Ok(Plan::packed(meta, &self.layout)?)
            })
            .await
    }

    async fn blocking<T: Send + 'static>(
        self: &Arc<Self>,
        work: impl FnOnce(&Self) -> Result<T, ReadCause> + Send + 'static,
    ) -> Result<T, ReadCause> {
        let reader = Arc::clone(self);
        tokio::task::spawn_blocking(move || work(&reader))
            .await
            .unwrap_or(Err(ReadCause::Aborted))
    }

    fn error(&self, position: usize, cause: ReadCause) -> ReadError {
        ReadError {
            blob: self.layout.id.clone(),
            chunk: self.layout.chunks[position].index,
            cause,
        }
    }
}

/// A unit on its way.
#[derive(Clone)]
pub(super) struct Flight {
    outcome: watch::Receiver<Option<Outcome>>,
    image: usize,
}

/// Takes the flight off the list when it ends, however it ends.
struct Landing {
    cached: Arc<CachedBlob>,
    unit: UnitId,
}

impl Drop for Landing {
    fn drop(&mut self) {
        self.cached.flights.lock().remove(&self.unit);
    }
}

async fn wait(outcome: &mut watch::Receiver<Option<Outcome>>) -> Outcome {
    match outcome.wait_for(Option::is_some).await {
        Ok(outcome) => outcome.clone().unwrap_or(Err(ReadCause::Aborted)),
        Err(_) => Err(ReadCause::Aborted),
    }
}
