//! Loads the [`UnitMap`] of a blob: from the blob meta that came with the bootstrap, is cached, or has to be fetched.

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
    source::{Source, SourcedBytes, read_patiently},
    unit::UnitMap,
};

/// Where the blob meta of a packed blob is.
pub enum MetaSource {
    /// In a file that came with the bootstrap.
    File(PathBuf),
    /// In a blob, at [`BlobLayout::meta`].
    Blob(Arc<dyn Source>),
}

/// Loads and holds the [`UnitMap`] of a blob. A packed blob needs the blob meta for it.
pub(super) struct UnitMapLoader {
    layout: Arc<BlobLayout>,
    cached: Arc<CachedBlob>,
    scheduler: Arc<RegistryScheduler>,
    source: MetaSource,
    current: Mutex<Option<Arc<LoadedUnitMap>>>,
    /// The cached blob meta led to an error, and is not read again.
    is_cached_wrong: AtomicBool,
    flights: Arc<SingleFlight<(), Arc<LoadedUnitMap>>>,
}

/// A unit map, and how far it is trusted.
pub(super) struct LoadedUnitMap {
    pub(super) map: UnitMap,
    origin: MapOrigin,
    /// Whether a chunk was found by it.
    validated: AtomicBool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum MapOrigin {
    /// From the bootstrap layer, or made without a blob meta.
    Bootstrap,
    /// From the cache directory, where it may be damaged, or wrong because another image that shares the blob wrote it.
    Cached,
    /// From the image's registry, in this process.
    Fetched,
}

impl LoadedUnitMap {
    fn new(map: UnitMap, origin: MapOrigin) -> Arc<Self> {
        let validated = AtomicBool::new(false);
        Arc::new(Self { map, origin, validated })
    }

    /// A chunk was found by the map, and matches its digest.
    pub(super) fn mark_validated(&self) {
        self.validated.store(true, Ordering::Relaxed);
    }
}

impl UnitMapLoader {
    pub(super) fn new(
        layout: Arc<BlobLayout>,
        cached: Arc<CachedBlob>,
        scheduler: Arc<RegistryScheduler>,
        source: MetaSource,
    ) -> Arc<Self> {
        let per_chunk = layout.packing == Packing::PerChunk;
        let current = per_chunk.then(|| LoadedUnitMap::new(UnitMap::PerChunk, MapOrigin::Bootstrap));
        Arc::new(Self {
            layout,
            cached,
            scheduler,
            source,
            current: Mutex::new(current),
            is_cached_wrong: AtomicBool::new(false),
            flights: Arc::default(),
        })
    }

    /// The map, loaded if it is not yet. Concurrent callers share one load and its failure.
    pub(super) async fn get(self: &Arc<Self>) -> Result<Arc<LoadedUnitMap>, ReadCause> {
        if let Some(loaded) = self.current() {
            return Ok(loaded);
        }
        let loader = Arc::clone(self);
        let work = move || async move { loader.scheduler.with_timeout(loader.load(None)).await };
        self.flights.join_or_start((), None, work).0.wait().await
    }

    /// The map, with the blob meta fetched from `source` if it has to be fetched.
    pub(super) async fn get_from(self: &Arc<Self>, source: Arc<dyn Source>) -> Result<Arc<LoadedUnitMap>, ReadCause> {
        if let Some(loaded) = self.current() {
            return Ok(loaded);
        }
        self.load(Some(source)).await
    }

    /// Drops a map that led to an error, if it may be wrong. Returns whether the next one may be another: the blob meta
    /// came from the cache, and is fetched next.
    pub(super) fn invalidate(&self, loaded: &Arc<LoadedUnitMap>) -> bool {
        let drop_current = || {
            let mut current = self.current.lock();
            current.take_if(|current| Arc::ptr_eq(current, loaded));
        };
        match loaded.origin {
            MapOrigin::Bootstrap => return false,
            MapOrigin::Cached => {
                self.is_cached_wrong.store(true, Ordering::Release);
                drop_current();
            }
            // If it has found chunks, it is rather the chunk that is corrupt.
            MapOrigin::Fetched if !loaded.validated.load(Ordering::Relaxed) => drop_current(),
            MapOrigin::Fetched => {}
        }
        loaded.origin == MapOrigin::Cached
    }

    fn current(&self) -> Option<Arc<LoadedUnitMap>> {
        self.current.lock().clone()
    }

    async fn load(self: &Arc<Self>, other_source: Option<Arc<dyn Source>>) -> Result<Arc<LoadedUnitMap>, ReadCause> {
        // Another flight may have completed since this one was requested.
        if let Some(loaded) = self.current() {
            return Ok(loaded);
        }
        let (map, origin) = match &self.source {
            MetaSource::File(file) => (self.read(file.clone()).await?, MapOrigin::Bootstrap),
            MetaSource::Blob(source) => match self.read_cached().await {
                Some(map) => (map, MapOrigin::Cached),
                None => {
                    let source = other_source.as_ref().unwrap_or(source);
                    (self.fetch(source.as_ref()).await?, MapOrigin::Fetched)
                }
            },
        };
        let loaded = LoadedUnitMap::new(map, origin);
        *self.current.lock() = Some(Arc::clone(&loaded));
        Ok(loaded)
    }

    /// The map by the cached blob meta; `None` if there is none, or it is damaged.
    async fn read_cached(self: &Arc<Self>) -> Option<UnitMap> {
        if self.is_cached_wrong.load(Ordering::Acquire) {
            return None;
        }
        match self.read(self.cached.meta_file().to_owned()).await {
            Ok(map) => Some(map),
            Err(ReadCause::CacheRead(error)) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => {
                let blob = self.cached.name();
                tracing::warn!(blob, %error, "failed to read cached blob meta; fetching it again");
                None
            }
        }
    }

    async fn read(self: &Arc<Self>, path: PathBuf) -> Result<UnitMap, ReadCause> {
        let opened = tokio::fs::File::open(path).await.map_err(read_error)?;
        let len = opened.metadata().await.map_err(read_error)?.len();
        let limit = BlobMeta::max_size(&self.layout);
        if len > limit {
            return Err(MetaError::too_large().into());
        }
        let memory = self.scheduler.reserve_disk_memory(len as usize).await;
        let (loader, file) = (Arc::clone(self), opened.into_std().await);
        run_blocking(move || {
            let _memory = memory;
            let mut bytes = Vec::with_capacity(len as usize);
            file.take(len).read_to_end(&mut bytes).map_err(read_error)?;
            let meta = BlobMeta::from_file(&loader.layout, bytes)?;
            Ok(UnitMap::packed(meta, &loader.layout)?)
        })
        .await
    }

    /// Fetches the blob meta, and caches it for when the registry cannot be reached.
    async fn fetch(self: &Arc<Self>, source: &dyn Source) -> Result<UnitMap, ReadCause> {
        let (offset, len, memory) = BlobMeta::location(&self.layout)?;
        let read = read_patiently(source, (offset, len), || self.scheduler.reserve_memory(memory)).await;
        let (SourcedBytes { bytes, provenance }, memory) = read.map_err(ReadCause::Fetch)?;
        let loader = Arc::clone(self);
        let decoded = run_blocking(move || {
            let _memory = memory;
            let meta = BlobMeta::from_blob(&loader.layout, &bytes)?;
            drop(bytes);
            let map = UnitMap::packed(meta, &loader.layout)?;
            if let UnitMap::Packed { meta, .. } = &map {
                match crate::atomic_file::write_atomically(loader.cached.meta_file(), meta.as_file()) {
                    Ok(()) => loader.cached.on_meta_cached(),
                    Err(error) => {
                        tracing::warn!(blob = %loader.cached.name(), %error, "failed to cache blob meta");
                    }
                }
            }
            Ok(map)
        })
        .await;
        if matches!(decoded, Err(ReadCause::Meta(_))) {
            source.report_corrupt(&provenance);
        }
        decoded
    }
}

fn read_error(error: io::Error) -> ReadCause {
    ReadCause::CacheRead(Arc::new(error))
}

/// Runs `work`, which takes long, on a blocking thread.
pub(super) async fn run_blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ReadCause> + Send + 'static,
) -> Result<T, ReadCause> {
    tokio::task::spawn_blocking(work)
        .await
        .unwrap_or(Err(ReadCause::Aborted))
}
