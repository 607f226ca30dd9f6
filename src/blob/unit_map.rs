//! Where the rules come from by which one image's chunks of a blob lie in units.

use std::{
    io::{self, Read as _},
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use parking_lot::Mutex;

use super::{
    cache::CachedBlob,
    error::ReadCause,
    layout::{BlobLayout, Packing},
    meta::{BlobMeta, MetaError},
    scheduler::RegistryScheduler,
    singleflight::SingleFlight,
    source::{Source, SourcedBytes},
    unit::UnitMap,
};

/// Where the blob meta of a packed blob is.
pub enum MetaSource {
    /// In a file that came with the bootstrap.
    File(PathBuf),
    /// In a blob, at [`BlobLayout::meta`].
    Blob(Arc<dyn Source>),
}

/// Gives the [`UnitMap`] of a blob, which needs the blob meta if the blob is packed.
pub(super) struct UnitMapLoader {
    layout: Arc<BlobLayout>,
    cached: Arc<CachedBlob>,
    lane: Arc<RegistryScheduler>,
    source: MetaSource,
    current: Mutex<Option<Arc<KnownUnitMap>>>,
    /// The blob meta beside the cached chunks was of no use.
    kept_is_wrong: AtomicBool,
    flights: Arc<SingleFlight<(), Arc<KnownUnitMap>>>,
}

/// A plan, and how far it can be believed.
pub(super) struct KnownUnitMap {
    pub(super) plan: UnitMap,
    origin: MapOrigin,
    /// Whether it has led to a chunk.
    proven: AtomicBool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum MapOrigin {
    /// It came with the bootstrap, or needs nothing else.
    Bootstrap,
    /// On disk beside the chunks, where anybody may have left or spoiled it: an image that shares the blob, too.
    Kept,
    /// From the image's registry, in this process.
    Fetched,
}

impl KnownUnitMap {
    fn new(plan: UnitMap, origin: MapOrigin) -> Arc<Self> {
        let proven = AtomicBool::new(false);
        Arc::new(Self { plan, origin, proven })
    }

    /// The plan has led to a chunk.
    pub(super) fn mark_validated(&self) {
        self.proven.store(true, Ordering::Relaxed);
    }
}

impl UnitMapLoader {
    pub(super) fn new(
        layout: Arc<BlobLayout>,
        cached: Arc<CachedBlob>,
        lane: Arc<RegistryScheduler>,
        source: MetaSource,
    ) -> Arc<Self> {
        let per_chunk = layout.packing == Packing::PerChunk;
        let current = per_chunk.then(|| KnownUnitMap::new(UnitMap::PerChunk, MapOrigin::Bootstrap));
        Arc::new(Self {
            layout,
            cached,
            lane,
            source,
            current: Mutex::new(current),
            kept_is_wrong: AtomicBool::new(false),
            flights: Arc::default(),
        })
    }

    /// The plan. If it fails, it fails at once for all who wait for it.
    pub(super) async fn get(self: &Arc<Self>) -> Result<Arc<KnownUnitMap>, ReadCause> {
        if let Some(known) = self.current() {
            return Ok(known);
        }
        let unit_map = Arc::clone(self);
        let work = move || async move { unit_map.lane.patiently(unit_map.load(None)).await };
        self.flights.join((), 0, work).0.wait().await
    }

    /// The plan, for who has the blobs from elsewhere: `source` gives the one that holds the blob meta.
    pub(super) async fn get_with(self: &Arc<Self>, source: Arc<dyn Source>) -> Result<Arc<KnownUnitMap>, ReadCause> {
        if let Some(known) = self.current() {
            return Ok(known);
        }
        self.load(Some(source)).await
    }

    /// The plan led nowhere; tells whether another one may do better.
    pub(super) fn distrust(&self, known: &Arc<KnownUnitMap>) -> bool {
        let forget = || {
            let mut current = self.current.lock();
            current.take_if(|current| Arc::ptr_eq(current, known));
        };
        match known.origin {
            MapOrigin::Bootstrap => return false,
            MapOrigin::Kept => {
                self.kept_is_wrong.store(true, Ordering::Release);
                forget();
            }
            // The next reader fetches it again, unless it is rather the chunk that is damaged.
            MapOrigin::Fetched if !known.proven.load(Ordering::Relaxed) => forget(),
            MapOrigin::Fetched => {}
        }
        known.origin == MapOrigin::Kept
    }

    fn current(&self) -> Option<Arc<KnownUnitMap>> {
        self.current.lock().clone()
    }

    async fn load(self: &Arc<Self>, instead: Option<Arc<dyn Source>>) -> Result<Arc<KnownUnitMap>, ReadCause> {
        // Another flight may have landed since this one was asked for.
        if let Some(known) = self.current() {
            return Ok(known);
        }
        let (plan, origin) = match &self.source {
            MetaSource::File(file) => (self.read(file.clone()).await?, MapOrigin::Bootstrap),
            MetaSource::Blob(source) => match self.kept().await {
                Some(plan) => (plan, MapOrigin::Kept),
                None => {
                    let source = instead.as_ref().unwrap_or(source);
                    (self.fetch(source.as_ref()).await?, MapOrigin::Fetched)
                }
            },
        };
        let known = KnownUnitMap::new(plan, origin);
        *self.current.lock() = Some(Arc::clone(&known));
        Ok(known)
    }

    /// From beside the cached chunks.
    async fn kept(self: &Arc<Self>) -> Option<UnitMap> {
        if self.kept_is_wrong.load(Ordering::Acquire) {
            return None;
        }
        match self.read(self.cached.meta_file().to_owned()).await {
            Ok(plan) => Some(plan),
            Err(ReadCause::Cache(error)) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => {
                let blob = self.cached.name();
                tracing::warn!(blob, %error, "the cached blob meta is damaged; it is fetched again");
                None
            }
        }
    }

    async fn read(self: &Arc<Self>, path: PathBuf) -> Result<UnitMap, ReadCause> {
        let opened = tokio::fs::File::open(path).await.map_err(cache_error)?;
        let len = opened.metadata().await.map_err(cache_error)?.len();
        let limit = BlobMeta::max_size(&self.layout);
        if len > limit {
            return Err(MetaError::too_large().into());
        }
        let room = self.lane.room_from_disk(len as usize).await;
        let (unit_map, file) = (Arc::clone(self), opened.into_std().await);
        blocking(move || {
            let _room = room;
            let mut bytes = Vec::with_capacity(len as usize);
            file.take(len).read_to_end(&mut bytes).map_err(cache_error)?;
            Ok(UnitMap::packed(
                BlobMeta::from_file(&unit_map.layout, bytes)?,
                &unit_map.layout,
            )?)
        })
        .await
    }

    /// From the blob that holds it; kept on disk, for when the registry is out of reach.
    async fn fetch(self: &Arc<Self>, source: &dyn Source) -> Result<UnitMap, ReadCause> {
        let (offset, len, memory) = BlobMeta::location(&self.layout)?;
        let room = self.lane.room_for(memory).await;
        let given = source.read(offset, len).await.map_err(ReadCause::Fetch)?;
        let (unit_map, SourcedBytes { bytes, origin }) = (Arc::clone(self), given);
        let taken = blocking(move || {
            let _room = room;
            let meta = BlobMeta::from_blob(&unit_map.layout, &bytes)?;
            drop(bytes);
            let plan = UnitMap::packed(meta, &unit_map.layout)?;
            if let UnitMap::Packed { meta, .. } = &plan
                && let Err(error) = crate::atomic_file::write_atomically(unit_map.cached.meta_file(), meta.as_file())
            {
                tracing::warn!(blob = unit_map.cached.name(), %error, "cannot keep the blob meta");
            }
            Ok(plan)
        })
        .await;
        if matches!(taken, Err(ReadCause::Meta(_))) {
            // The next reader gets it from elsewhere, if it is to be had there.
            source.distrust(&origin);
        }
        taken
    }
}

fn cache_error(error: io::Error) -> ReadCause {
    ReadCause::Cache(Arc::new(error))
}

/// Does what takes long where it holds nobody up.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ReadCause> + Send + 'static,
) -> Result<T, ReadCause> {
    tokio::task::spawn_blocking(work)
        .await
        .unwrap_or(Err(ReadCause::Aborted))
}
