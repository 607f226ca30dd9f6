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
    fetching::Lane,
    flight::Flights,
    layout::{BlobLayout, Packing},
    meta::{BlobMeta, MetaError},
    source::{Given, Source},
    unit::Plan,
};

/// Where the blob meta of a packed blob is.
pub enum MetaSource {
    /// In a file that came with the bootstrap.
    File(PathBuf),
    /// In a blob, at [`BlobLayout::meta`].
    Blob(Arc<dyn Source>),
}

/// Gives the [`Plan`] of a blob, which needs the blob meta if the blob is packed.
pub(super) struct Plans {
    layout: Arc<BlobLayout>,
    cached: Arc<CachedBlob>,
    lane: Arc<Lane>,
    source: MetaSource,
    current: Mutex<Option<Arc<KnownPlan>>>,
    /// The blob meta beside the cached chunks was of no use.
    kept_is_wrong: AtomicBool,
    flights: Arc<Flights<(), Arc<KnownPlan>>>,
}

/// A plan, and how far it can be believed.
pub(super) struct KnownPlan {
    pub(super) plan: Plan,
    origin: Origin,
    /// Whether it has led to a chunk.
    proven: AtomicBool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Origin {
    /// It came with the bootstrap, or needs nothing else.
    Bootstrap,
    /// On disk beside the chunks, where anybody may have left or spoiled it: an image that shares the blob, too.
    Kept,
    /// From the image's registry, in this process.
    Fetched,
}

impl KnownPlan {
    fn new(plan: Plan, origin: Origin) -> Arc<Self> {
        let proven = AtomicBool::new(false);
        Arc::new(Self { plan, origin, proven })
    }

    /// The plan has led to a chunk.
    pub(super) fn prove(&self) {
        self.proven.store(true, Ordering::Relaxed);
    }
}

impl Plans {
    pub(super) fn new(
        layout: Arc<BlobLayout>,
        cached: Arc<CachedBlob>,
        lane: Arc<Lane>,
        source: MetaSource,
    ) -> Arc<Self> {
        let per_chunk = layout.packing == Packing::PerChunk;
        let current = per_chunk.then(|| KnownPlan::new(Plan::PerChunk, Origin::Bootstrap));
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
    pub(super) async fn get(self: &Arc<Self>) -> Result<Arc<KnownPlan>, ReadCause> {
        if let Some(known) = self.current() {
            return Ok(known);
        }
        let plans = Arc::clone(self);
        let work = move || async move { plans.lane.patiently(plans.load(None)).await };
        self.flights.join((), 0, work).0.wait().await
    }

    /// The plan, for who has the blobs from elsewhere: `source` gives the one that holds the blob meta.
    pub(super) async fn get_with(self: &Arc<Self>, source: Arc<dyn Source>) -> Result<Arc<KnownPlan>, ReadCause> {
        if let Some(known) = self.current() {
            return Ok(known);
        }
        self.load(Some(source)).await
    }

    /// The plan led nowhere; tells whether another one may do better.
    pub(super) fn distrust(&self, known: &Arc<KnownPlan>) -> bool {
        let forget = || {
            let mut current = self.current.lock();
            current.take_if(|current| Arc::ptr_eq(current, known));
        };
        match known.origin {
            Origin::Bootstrap => return false,
            Origin::Kept => {
                self.kept_is_wrong.store(true, Ordering::Release);
                forget();
            }
            // The next reader fetches it again, unless it is rather the chunk that is damaged.
            Origin::Fetched if !known.proven.load(Ordering::Relaxed) => forget(),
            Origin::Fetched => {}
        }
        known.origin == Origin::Kept
    }

    fn current(&self) -> Option<Arc<KnownPlan>> {
        self.current.lock().clone()
    }

    async fn load(self: &Arc<Self>, instead: Option<Arc<dyn Source>>) -> Result<Arc<KnownPlan>, ReadCause> {
        // Another flight may have landed since this one was asked for.
        if let Some(known) = self.current() {
            return Ok(known);
        }
        let (plan, origin) = match &self.source {
            MetaSource::File(file) => (self.read(file.clone()).await?, Origin::Bootstrap),
            MetaSource::Blob(source) => match self.kept().await {
                Some(plan) => (plan, Origin::Kept),
                None => {
                    let source = instead.as_ref().unwrap_or(source);
                    (self.fetch(source.as_ref()).await?, Origin::Fetched)
                }
            },
        };
        let known = KnownPlan::new(plan, origin);
        *self.current.lock() = Some(Arc::clone(&known));
        Ok(known)
    }

    /// From beside the cached chunks.
    async fn kept(self: &Arc<Self>) -> Option<Plan> {
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

    async fn read(self: &Arc<Self>, path: PathBuf) -> Result<Plan, ReadCause> {
        let opened = tokio::fs::File::open(path).await.map_err(cache_error)?;
        let len = opened.metadata().await.map_err(cache_error)?.len();
        let limit = BlobMeta::max_size(&self.layout);
        if len > limit {
            return Err(MetaError::too_large().into());
        }
        let room = self.lane.room_from_disk(len as usize).await;
        let (plans, file) = (Arc::clone(self), opened.into_std().await);
        blocking(move || {
            let _room = room;
            let mut bytes = Vec::with_capacity(len as usize);
            file.take(len).read_to_end(&mut bytes).map_err(cache_error)?;
            Ok(Plan::packed(BlobMeta::from_file(&plans.layout, bytes)?, &plans.layout)?)
        })
        .await
    }

    /// From the blob that holds it; kept on disk, for when the registry is out of reach.
    async fn fetch(self: &Arc<Self>, source: &dyn Source) -> Result<Plan, ReadCause> {
        let (offset, len, memory) = BlobMeta::location(&self.layout)?;
        let room = self.lane.room_for(memory).await;
        let given = source.read(offset, len).await.map_err(ReadCause::Fetch)?;
        let (plans, Given { bytes, origin }) = (Arc::clone(self), given);
        let taken = blocking(move || {
            let _room = room;
            let meta = BlobMeta::from_blob(&plans.layout, &bytes)?;
            drop(bytes);
            let plan = Plan::packed(meta, &plans.layout)?;
            if let Plan::Packed { meta, .. } = &plan
                && let Err(error) = crate::files::write_atomically(plans.cached.meta_file(), meta.as_file())
            {
                tracing::warn!(blob = plans.cached.name(), %error, "cannot keep the blob meta");
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
