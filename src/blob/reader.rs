//! Reads the chunks of one blob for one image: from the cache where they are, else fetched, once.

use std::{
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Instant,
};

use parking_lot::Mutex;
use tokio::{
    sync::{OnceCell, watch},
    task::JoinHandle,
};

use super::{
    cache::{CachedBlob, ChunkState},
    codec,
    error::{ReadCause, ReadError},
    fetching::Lane,
    layout::{BlobLayout, Packing},
    meta::BlobMeta,
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
    /// When, and why, the blob meta could not be had the last time.
    no_meta: Mutex<Option<(Instant, ReadCause)>>,
    /// By position in the layout: whether the chunk is on disk and verified, so that no lock is needed to know.
    ready: Vec<AtomicBool>,
}

/// A chunk that is being fetched.
pub struct Started(JoinHandle<Result<Arc<Decoded>, ReadError>>);

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
            no_meta: Mutex::default(),
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
        self.copy(&decoded, position, offset, into)
    }

    /// Starts to fetch the chunk at `position`, if it is missing. What is given is awaited with [`Self::finish`].
    pub fn start(self: &Arc<Self>, position: usize) -> Option<Started> {
        let ready = self.ready[position].load(Ordering::Acquire);
        let reader = Arc::clone(self);
        (!ready).then(|| Started(tokio::spawn(async move { reader.chunk(position).await })))
    }

    /// As [`Self::read`], for a chunk that was started.
    pub async fn finish(
        self: &Arc<Self>,
        started: Option<Started>,
        position: usize,
        offset: u32,
        into: &mut [u8],
    ) -> Result<(), ReadError> {
        let Some(Started(task)) = started else {
            return self.read(position, offset, into).await;
        };
        let decoded = task
            .await
            .unwrap_or_else(|_| Err(self.error(position, ReadCause::Aborted)))?;
        self.copy(&decoded, position, offset, into)
    }

    fn copy(&self, decoded: &Decoded, position: usize, offset: u32, into: &mut [u8]) -> Result<(), ReadError> {
        let range = offset as usize..offset as usize + into.len();
        let plain = decoded
            .chunk(&self.layout.chunks[position])
            .and_then(|plain| plain.get(range));
        into.copy_from_slice(plain.ok_or_else(|| self.error(position, ReadCause::Digest))?);
        Ok(())
    }

    /// The verified bytes of the chunk at `position` and of those in the same unit.
    async fn chunk(self: &Arc<Self>, position: usize) -> Result<Arc<Decoded>, ReadError> {
        let chunk = &self.layout.chunks[position];
        // What is on disk takes neither the blob meta nor a registry.
        if let Some(decoded) = self.check_on_disk(position).await {
            return Ok(decoded);
        }
        let unit = match self.plan().await {
            Ok(plan) => plan.unit_of(chunk).map_err(ReadCause::Meta),
            Err(cause) => Err(cause),
        };
        let unit = unit.map_err(|cause| self.error(position, cause))?;
        loop {
            let (mut flight, ours) = self.join_flight(unit, position);
            let outcome = wait(&mut flight.outcome).await;
            match outcome {
                Ok(decoded) if ours || decoded.chunk(&self.layout.chunks[position]).is_some() => return Ok(decoded),
                // It only looked at the disk, for another chunk of the unit.
                Ok(_) => {}
                // A failure with our own source is final, so that waiters do not queue up to fail one after the other.
                Err(cause) if ours || flight.image == self.image() => return Err(self.error(position, cause)),
                // Another image's flight may have failed for its own reasons. Its next one is not waited for.
                Err(_) => {
                    return self
                        .load_in_time(position)
                        .await
                        .map_err(|cause| self.error(position, cause));
                }
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
        // On a runtime that is being shut down, spawning drops the task, and with it the landing, which locks them.
        drop(flights);
        let landing = Landing {
            cached: Arc::clone(&self.cached),
            unit,
        };
        let reader = Arc::clone(self);
        tokio::spawn(async move {
            let outcome = reader.load_in_time(position).await;
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

    async fn load_in_time(self: &Arc<Self>, position: usize) -> Outcome {
        let patience = self.lane.patience();
        let outcome = tokio::time::timeout(patience, self.load(position)).await;
        outcome.unwrap_or(Err(ReadCause::TimedOut(patience.as_secs())))
    }

    /// The chunk at `position`, if it is on disk and right.
    async fn check_on_disk(self: &Arc<Self>, position: usize) -> Option<Arc<Decoded>> {
        if self.cached.state(self.layout.chunks[position].index) == ChunkState::Missing {
            return None;
        }
        let _turn = self.lane.turn_to_check().await;
        let checked = self.blocking(move |reader| Ok(reader.check(position))).await;
        checked.ok().flatten().map(Arc::new)
    }

    /// Fetches the unit that holds the chunk at `position`, unless the chunk has come to disk meanwhile.
    async fn load(self: &Arc<Self>, position: usize) -> Outcome {
        if let Some(decoded) = self.check_on_disk(position).await {
            return Ok(decoded);
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
        let asked = Instant::now();
        self.plan
            .get_or_try_init(|| async {
                // Those who have waited for it fail with the first, and not one after the other.
                if let Some((_, cause)) = self.no_meta.lock().as_ref().filter(|(when, _)| *when >= asked) {
                    return Err(cause.clone());
                }
                let loaded = self.load_plan().await;
                loaded.inspect_err(|cause| *self.no_meta.lock() = Some((Instant::now(), cause.clone())))
            })
            .await
    }

    async fn load_plan(&self) -> Result<Plan, ReadCause> {
        let layout = Arc::clone(&self.layout);
        let parse = match &self.meta_source {
            MetaSource::File(file) => {
                let file = file.clone();
                tokio::task::spawn_blocking(move || {
                    let bytes = std::fs::read(file).map_err(|error| ReadCause::Cache(Arc::new(error)))?;
                    Ok(Plan::packed(BlobMeta::from_file(&layout, bytes)?, &layout)?)
                })
            }
            MetaSource::Blob(source) => {
                let len = BlobMeta::stored_size(&layout)?;
                let _room = self.lane.room_for(len).await;
                let stored = source.read(layout.meta.offset, len).await.map_err(ReadCause::Fetch)?;
                tokio::task::spawn_blocking(move || Ok(Plan::packed(BlobMeta::from_blob(&layout, &stored)?, &layout)?))
            }
        };
        parse.await.unwrap_or(Err(ReadCause::Aborted))
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
