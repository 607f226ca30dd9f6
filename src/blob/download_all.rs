//! Downloads all chunks of a blob that an image uses.
//!
//! A reader waits for few chunks. Here throughput counts, so that network, cores and disk work at the same time:
//! neighbouring units are fetched in one request, and decoded while the next requests run.

use std::sync::{Arc, atomic::Ordering};

use bytes::Bytes;
use tokio::task::JoinSet;

use super::{
    bulk::{self, BulkLimits, DownloadProgress},
    cache::CachedBlob,
    error::{ReadCause, ReadError},
    fetcher::ChunkFetcher,
    source::{Source, SourcedBytes, read_patiently},
    span::{Span, SpanLimits},
    unit::Unit,
    unit_map::LoadedUnitMap,
};
use crate::digest::Digest;

/// Limits of one request.
const LIMITS: SpanLimits = SpanLimits {
    len: 4 << 20,
    gap: 64 << 10,
    memory: 32 << 20,
};
/// How often a failed span is halved, for links too slow for the whole, before the failure is final. Failures of the
/// whole blob or of the disk are final at once.
const MAX_HALVINGS: u32 = 4;
/// How often the download is repeated after what was written failed to reach the disk.
const MAX_SYNC_ATTEMPTS: usize = 3;

/// Returns the source of the blob of that digest.
pub type Sources<'a> = dyn Fn(Digest) -> Arc<dyn Source> + Send + Sync + 'a;

/// Downloads all chunks that the image uses, with stored bytes from `sources`.
///
/// Chunks on disk that are not verified are hashed first; missing and corrupt ones are fetched. Returns after all of
/// them have reached the disk.
///
/// # Errors
/// The first chunk that cannot be fetched or not be written. What was written before stays.
pub async fn download_all(
    fetcher: &Arc<ChunkFetcher>,
    sources: &Sources<'_>,
    limits: &Arc<BulkLimits>,
    progress: &Arc<DownloadProgress>,
) -> Result<(), ReadError> {
    let _held = bulk::hold(fetcher).await?;
    for _ in 0..MAX_SYNC_ATTEMPTS {
        let losses = fetcher.cached().losses();
        let is_on_disk = |position: &usize| bulk::is_on_disk(fetcher, *position);
        let (present, mut missing): (Vec<_>, Vec<_>) = bulk::positions(fetcher).partition(is_on_disk);
        missing.extend(bulk::hash(fetcher, present, limits, Some(progress)).await?);
        if !missing.is_empty() {
            fetch_all(fetcher, missing, sources, limits, progress).await?;
        }
        bulk::on_disk(fetcher, 0, CachedBlob::sync_all).await?;
        // Another sync, in between, may have been told of a failure.
        if fetcher.cached().losses() == losses {
            return Ok(());
        }
    }
    let lost = std::io::Error::other("written chunks do not reach the disk");
    Err(fetcher.error(0, ReadCause::CacheWrite(Arc::new(lost))))
}

async fn fetch_all(
    fetcher: &Arc<ChunkFetcher>,
    mut missing: Vec<usize>,
    sources: &Sources<'_>,
    limits: &Arc<BulkLimits>,
    progress: &Arc<DownloadProgress>,
) -> Result<(), ReadError> {
    let first = missing.first().copied().unwrap_or(0);
    let digest = |id: &str| Digest::from_hex(id).map_err(|_| fetcher.error(first, ReadCause::Aborted));
    let (id, holder) = (&fetcher.layout().id, &fetcher.layout().meta_blob);
    let (blob, holder) = (digest(id)?, digest(holder.as_ref().unwrap_or(id))?);
    loop {
        let loaded = fetcher.unit_map().get_from(sources(holder)).await;
        let download = Arc::new(Download {
            fetcher: Arc::clone(fetcher),
            loaded: loaded.map_err(|cause| fetcher.error(first, cause))?,
            source: sources(blob),
            limits: Arc::clone(limits),
            progress: Arc::clone(progress),
        });
        match download.fetch(&missing).await {
            // Ends after one turn: a blob meta from the cache is not read again.
            Err(error) if error.cause.may_be_wrong_meta() && fetcher.unit_map().invalidate(&download.loaded) => {
                missing.retain(|position| !bulk::is_on_disk(fetcher, *position));
                if missing.is_empty() {
                    return Ok(());
                }
            }
            outcome => return outcome,
        }
    }
}

/// A download by one unit map.
struct Download {
    fetcher: Arc<ChunkFetcher>,
    loaded: Arc<LoadedUnitMap>,
    source: Arc<dyn Source>,
    limits: Arc<BulkLimits>,
    progress: Arc<DownloadProgress>,
}

impl Download {
    /// Fetches the chunks at `positions`.
    async fn fetch(self: &Arc<Self>, positions: &[usize]) -> Result<(), ReadError> {
        let aborted = |_| self.fetcher.error(positions[0], ReadCause::Aborted);
        let mut requests = JoinSet::new();
        for span in self.spans(positions)? {
            let memory = self.limits.reserve_memory(span.memory()).await;
            let download = Arc::clone(self);
            requests.spawn(async move {
                let _memory = memory;
                download.fetch_span(span).await
            });
            while let Some(done) = requests.try_join_next() {
                done.map_err(aborted)??;
            }
        }
        while let Some(done) = requests.join_next().await {
            done.map_err(aborted)??;
        }
        Ok(())
    }

    /// The units of the chunks at `positions`, in the order in which they are stored.
    fn spans(&self, positions: &[usize]) -> Result<Vec<Span>, ReadError> {
        let units = self.loaded.map.units(self.fetcher.layout(), positions);
        let failed = |(position, error)| self.fetcher.error(position, ReadCause::Meta(error));
        Ok(Span::group(units.map_err(failed)?, LIMITS))
    }

    /// Fetches the span, in halves if the whole fails.
    async fn fetch_span(self: &Arc<Self>, span: Span) -> Result<(), ReadError> {
        let mut left = vec![(span, MAX_HALVINGS)];
        while let Some((span, halvings)) = left.pop() {
            match self.stored(&span).await {
                Ok(stored) => self.decode_span(span, stored).await?,
                Err(error) if halvings == 0 || error.cause.is_blob_unavailable() => return Err(error),
                Err(error) => {
                    let halves = span.halve().map_err(|_| error)?;
                    left.extend(halves.into_iter().rev().map(|half| (half, halvings - 1)));
                }
            }
        }
        Ok(())
    }

    /// Decodes the units of the span. Fetches a corrupt unit once more, by itself.
    async fn decode_span(self: &Arc<Self>, span: Span, stored: SourcedBytes) -> Result<(), ReadError> {
        for (unit, _) in self.decode(span, stored.bytes).await? {
            let span = Span::single(unit);
            self.source.report_corrupt(&stored.provenance);
            let again = self.stored(&span).await?;
            if let Some((_, error)) = self.decode(span, again.bytes).await?.into_iter().next() {
                self.source.report_corrupt(&again.provenance);
                return Err(error);
            }
        }
        Ok(())
    }

    async fn stored(&self, span: &Span) -> Result<SourcedBytes, ReadError> {
        let failed = |error| self.fetcher.error(first_of(&span.units[0]), ReadCause::Fetch(error));
        let read = read_patiently(&*self.source, (span.start, span.len()), || std::future::ready(()));
        let (stored, ()) = read.await.map_err(failed)?;
        let bytes = stored.bytes.len() as u64;
        self.progress.fetched.fetch_add(bytes, Ordering::Relaxed);
        Ok(stored)
    }

    /// Decompresses, verifies and caches the span's units. Returns those that are corrupt.
    async fn decode(self: &Arc<Self>, span: Span, stored: Bytes) -> Result<Vec<(Unit, ReadError)>, ReadError> {
        let core = self.limits.acquire_core().await;
        let download = Arc::clone(self);
        let decoded = tokio::task::spawn_blocking(move || {
            let _core = core;
            let mut corrupt = Vec::new();
            for unit in span.units {
                let from = (unit.extent.compressed_offset - span.start) as usize;
                let stored = &stored[from..from + unit.extent.compressed_size as usize];
                match download.decode_unit(&unit, stored) {
                    Err(error) if error.cause.is_corruption() => corrupt.push((unit, error)),
                    outcome => outcome?,
                }
            }
            Ok(corrupt)
        });
        let aborted = |_| Err(self.fetcher.error(0, ReadCause::Aborted));
        decoded.await.unwrap_or_else(aborted)
    }

    fn decode_unit(&self, unit: &Unit, stored: &[u8]) -> Result<(), ReadError> {
        let Self { fetcher, loaded, .. } = self;
        let members = unit.members.iter().map(|(position, _)| *position);
        let new: Vec<_> = members
            .clone()
            .filter(|position| fetcher.is_missing(*position))
            .collect();
        let decoded = loaded.map.decode(fetcher.layout(), fetcher.cached(), unit, stored);
        let decoded = decoded.map_err(|cause| fetcher.error(first_of(unit), cause))?;
        if let Some(error) = decoded.cache_write_error {
            return Err(fetcher.error(first_of(unit), ReadCause::CacheWrite(error)));
        }
        if let Some(position) = members.clone().find(|position| fetcher.is_missing(*position)) {
            return Err(fetcher.error(position, ReadCause::Digest));
        }
        loaded.mark_validated();
        let chunks = &fetcher.layout().chunks;
        let sizes = new.iter().map(|position| chunks[*position].uncompressed_size);
        self.progress.add_cached(sizes.map(u64::from).sum());
        Ok(())
    }
}

/// Position of the chunk that stands for the unit in errors.
fn first_of(unit: &Unit) -> usize {
    unit.members.first().map_or(0, |(position, _)| *position)
}
