//! Prefetches chunks of an image: those of its trace, then those that its builder listed, then optionally the rest.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Weak, atomic::AtomicBool},
    time::{Duration, Instant},
};

use tokio::{runtime::Handle, task::JoinSet};

use super::{
    contents::Contents,
    trace::{Trace, TracePart},
};
use crate::{
    blob::{error::ReadCause, reader::BlobReader, scheduler::Priority},
    rafs::{FileKind, Ino, Inode, Tree},
};

/// Uncompressed bytes of a batch. Within a batch, chunks are fetched in the order in which they are stored.
const BATCH_BYTES: u64 = 4 << 20;
/// Maximum number of batches in flight. Two, so that the next request is sent while an answer arrives.
const MAX_BATCHES_IN_FLIGHT: usize = 2;
/// Number of failed batches after which a pass ends.
const MAX_FAILURES: u32 = 4;
/// Pause after the first failed batch, since the registry may be away; doubles each time.
const FIRST_BATCH_PAUSE: Duration = Duration::from_secs(1);
/// Pause before the background prefetch is retried after a failure; doubles each time.
const MIN_RETRY_PAUSE: Duration = Duration::from_secs(30);
/// Longest such pause.
const MAX_RETRY_PAUSE: Duration = Duration::from_secs(3600);

/// What is prefetched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PrefetchOptions {
    /// Files that the image's builder listed.
    pub builder_list: bool,
    /// Chunks in the image's trace, which earlier starts needed.
    pub replay_trace: bool,
    /// Whether to record the accesses of this start in the trace.
    pub record_accesses: bool,
    /// The whole image, in the background.
    pub whole_image: bool,
    /// Limit for the whole image, in uncompressed bytes a second; 0 for none.
    pub whole_image_rate: u64,
}

/// Index of a blob, and position of a chunk in the blob's layout.
type ChunkPosition = (usize, usize);

/// Prefetches on `runtime` what `options` selects, as long as `contents` is in use.
pub fn start(contents: &Arc<Contents>, trace: Option<Trace>, options: PrefetchOptions, runtime: &Handle) {
    let is_abandoned = contents.is_abandoned();
    let contents = Arc::downgrade(contents);
    let trace = trace.filter(|_| options.replay_trace);
    runtime.spawn(async move {
        let chunks = find_chunks(&contents, move |contents| {
            let mut chunks = trace.as_ref().map_or_else(Vec::new, |trace| traced(contents, trace));
            let replay = trace.map(|_| contents.mark_prefetched(&chunks));
            if options.builder_list {
                chunks.extend(listed(contents));
            }
            (chunks, replay)
        });
        let pass = PrefetchPass {
            priority: Priority::Ahead,
            rate: 0,
            is_abandoned: &is_abandoned,
        };
        let (chunks, replay) = chunks.await;
        let is_complete = pass.run(&contents, &chunks).await;
        if let Some(replay) = replay {
            replay.end(is_complete);
        }
        let pass = PrefetchPass {
            priority: Priority::Background,
            rate: options.whole_image_rate,
            is_abandoned: &is_abandoned,
        };
        if !options.whole_image {
            return;
        }
        let mut pause = MIN_RETRY_PAUSE;
        while !pass.run(&contents, &find_chunks(&contents, all_chunks).await).await {
            tokio::time::sleep(pause).await;
            pause = MAX_RETRY_PAUSE.min(2 * pause);
        }
    });
}

/// Runs `find` on a blocking thread, because it may take a while. Empty if `contents` is gone.
async fn find_chunks<T: Default + Send + 'static>(
    contents: &Weak<Contents>,
    find: impl FnOnce(&Contents) -> T + Send + 'static,
) -> T {
    let Some(contents) = contents.upgrade() else {
        return T::default();
    };
    tokio::task::spawn_blocking(move || find(&contents))
        .await
        .unwrap_or_default()
}

/// Chunks of the trace that exist in the image.
fn traced(contents: &Contents, trace: &Trace) -> Vec<ChunkPosition> {
    let readers = contents.blobs().iter().enumerate();
    let blobs: HashMap<_, _> = readers
        .map(|(blob, reader)| (&reader.layout().id, (blob, reader)))
        .collect();
    let of_part = |part: &TracePart| {
        let known = blobs.get(&part.blob);
        let position = |(blob, reader): &(usize, &Arc<BlobReader>)| {
            let chunks = &reader.layout().chunks;
            let position = |number: &u32| chunks.binary_search_by_key(number, |chunk| chunk.index).ok();
            let positions = part.chunks.iter().filter_map(position);
            positions.map(|chunk| (*blob, chunk)).collect::<Vec<_>>()
        };
        known.map(position).unwrap_or_default()
    };
    trace.parts.iter().flat_map(of_part).collect()
}

/// Chunks of the files in the builder's list; a directory stands for everything below it.
fn listed(contents: &Contents) -> Vec<ChunkPosition> {
    let tree = &contents.tree;
    let mut positions = Vec::new();
    // A file may have several names, and a directory may be listed beside one of its ancestors.
    let mut seen = HashSet::new();
    let mut left: Vec<Ino> = tree.summary().prefetch.iter().rev().copied().collect();
    while let Some(ino) = left.pop() {
        if !seen.insert(ino) {
            continue;
        }
        match tree.inode(ino).map(Inode::kind) {
            Some(FileKind::Directory) => left.extend(tree.entries(ino).iter().rev().map(|entry| entry.ino)),
            Some(FileKind::Regular) => positions.extend(chunks_of(tree, ino)),
            _ => {}
        }
    }
    positions
}

fn chunks_of(tree: &Tree, file: Ino) -> impl Iterator<Item = ChunkPosition> {
    let chunks = tree.chunks(file).iter();
    chunks.map(|chunk| (usize::from(chunk.blob), chunk.chunk as usize))
}

fn all_chunks(contents: &Contents) -> Vec<ChunkPosition> {
    let blobs = contents.blobs().iter().enumerate();
    blobs
        .flat_map(|(blob, reader)| (0..reader.layout().chunks.len()).map(move |chunk| (blob, chunk)))
        .collect()
}

/// How chunks are fetched.
struct PrefetchPass<'a> {
    priority: Priority,
    /// Limit in uncompressed bytes a second; 0 for none.
    rate: u64,
    is_abandoned: &'a Arc<AtomicBool>,
}

impl PrefetchPass<'_> {
    /// Fetches the missing ones of the chunks, approximately in order. Returns whether nothing is left to do: all
    /// chunks are cached, or the image is not in use any more. Skips failed batches, up to [`MAX_FAILURES`]; ends at
    /// once if chunks cannot be written to the cache. In the background, ends before it would have chunks evicted.
    async fn run(&self, contents: &Weak<Contents>, positions: &[ChunkPosition]) -> bool {
        let mut in_flight = JoinSet::new();
        let (started, mut bytes, mut at, mut failures) = (Instant::now(), 0, 0, 0);
        while at < positions.len() && failures < MAX_FAILURES {
            let Some(contents) = contents.upgrade() else {
                return true;
            };
            if self.priority == Priority::Background && contents.blobs().iter().any(|blob| blob.is_cache_nearly_full())
            {
                failures = MAX_FAILURES;
                break;
            }
            let batch = batch(&contents, &positions[at..]);
            at += batch.len();
            let missing: Vec<_> = batch
                .iter()
                .copied()
                .filter(|(blob, chunk)| contents.blobs()[*blob].is_missing(*chunk))
                .collect();
            bytes += uncompressed_size(&contents, &missing);
            for (blob, positions) in by_blob(&missing) {
                let (reader, is_abandoned) = (Arc::clone(&contents.blobs()[blob]), Arc::clone(self.is_abandoned));
                let priority = self.priority;
                in_flight.spawn(async move { reader.prefetch(&positions, priority, &is_abandoned).await });
            }
            drop(contents);
            while in_flight.len() >= MAX_BATCHES_IN_FLIGHT {
                let new_failures = failures_of(in_flight.join_next().await);
                failures += new_failures;
                if new_failures > 0 && failures < MAX_FAILURES {
                    tokio::time::sleep(FIRST_BATCH_PAUSE * (1 << (failures - 1))).await;
                }
            }
            if self.rate > 0 {
                // The time at which this many bytes may have been fetched at the given rate.
                let due = started + Duration::from_secs_f64(bytes as f64 / self.rate as f64);
                tokio::time::sleep_until(due.into()).await;
            }
        }
        while !in_flight.is_empty() {
            failures += failures_of(in_flight.join_next().await);
        }
        failures == 0
    }
}

/// The number of failures that the outcome counts for.
fn failures_of(done: Option<Result<Result<(), ReadCause>, tokio::task::JoinError>>) -> u32 {
    let cause = match done {
        Some(Ok(Err(cause))) => cause,
        Some(Err(_)) => ReadCause::Aborted,
        Some(Ok(Ok(()))) | None => return 0,
    };
    tracing::debug!(error = %cause, "failed to prefetch chunks");
    match cause {
        ReadCause::CacheWrite(_) | ReadCause::Aborted => MAX_FAILURES,
        _ => 1,
    }
}

/// The first chunks, up to [`BATCH_BYTES`]; at least one.
fn batch<'a>(contents: &Contents, positions: &'a [ChunkPosition]) -> &'a [ChunkPosition] {
    let mut bytes = 0;
    let fits = |position: &&ChunkPosition| {
        let is_first = bytes == 0;
        bytes += uncompressed_size(contents, std::slice::from_ref(*position));
        is_first || bytes <= BATCH_BYTES
    };
    &positions[..positions.iter().take_while(fits).count()]
}

fn uncompressed_size(contents: &Contents, positions: &[ChunkPosition]) -> u64 {
    let uncompressed_size =
        |(blob, chunk): &ChunkPosition| contents.blobs()[*blob].layout().chunks[*chunk].uncompressed_size;
    positions.iter().map(uncompressed_size).map(u64::from).sum()
}

/// The chunks of each blob.
fn by_blob(batch: &[ChunkPosition]) -> Vec<(usize, Vec<usize>)> {
    let mut blobs: Vec<(usize, Vec<usize>)> = Vec::new();
    for (blob, chunk) in batch {
        match blobs.iter_mut().find(|(known, _)| known == blob) {
            Some((_, chunks)) => chunks.push(*chunk),
            None => blobs.push((*blob, vec![*chunk])),
        }
    }
    blobs
}
