//! Fetches what an image will need before it is asked for: what its last starts needed, then what its builder listed, and then,
//! if wanted, all the rest in the background.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Weak, atomic::AtomicBool},
    time::{Duration, Instant},
};

use tokio::{runtime::Handle, task::JoinSet};

use super::{
    contents::Contents,
    trace::{Part, Trace},
};
use crate::{
    blob::{error::ReadCause, reader::BlobReader, scheduler::Priority},
    rafs::{Ino, Kind, Tree},
};

/// Uncompressed bytes that are fetched at a time, in whatever order they are stored.
const BATCH: u64 = 4 << 20;
/// Batches on their way at a time, so that one is asked for while the other comes.
const BATCHES: usize = 2;
/// Batches that may fail before the others are left for later.
const MOST_FAILURES: u32 = 4;
/// How long to wait before the rest is asked for again after a failure: twice as long each time.
const FIRST_PAUSE: Duration = Duration::from_secs(30);
/// But not longer than that.
const LONGEST_PAUSE: Duration = Duration::from_secs(3600);

/// What is fetched beforehand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// What the image's builder has listed.
    pub listed: bool,
    /// What earlier starts have needed.
    pub learned: bool,
    /// Whether it is noted what this start needs.
    pub noted: bool,
    /// All of the image, in the background.
    pub all: bool,
    /// Most uncompressed bytes of it in a second; 0 for as fast as it goes.
    pub all_rate: u64,
}

/// A chunk: number of its blob, and position in the blob's layout.
type Place = (usize, usize);

/// Fetches on `runtime` what `options` say of an image, as long as somebody holds `contents`.
pub fn start(contents: &Arc<Contents>, trace: Option<Trace>, options: Options, runtime: &Handle) {
    let given_up = contents.given_up();
    let contents = Arc::downgrade(contents);
    let trace = trace.filter(|_| options.learned);
    runtime.spawn(async move {
        let soon = places(&contents, move |contents| {
            let mut soon = trace.as_ref().map_or_else(Vec::new, |trace| traced(contents, trace));
            let replay = trace.map(|_| contents.mark_prefetched(&soon));
            if options.listed {
                soon.extend(listed(contents));
            }
            (soon, replay)
        });
        let errand = Errand {
            urgency: Priority::Ahead,
            rate: 0,
            given_up: &given_up,
        };
        let (soon, replay) = soon.await;
        let has_come = errand.bring(&contents, &soon).await;
        if let Some(replay) = replay {
            replay.end(has_come);
        }
        let errand = Errand {
            urgency: Priority::Background,
            rate: options.all_rate,
            given_up: &given_up,
        };
        if !options.all {
            return;
        }
        let mut pause = FIRST_PAUSE;
        while !errand.bring(&contents, &places(&contents, everything).await).await {
            tokio::time::sleep(pause).await;
            pause = LONGEST_PAUSE.min(2 * pause);
        }
    });
}

/// What `find` finds, which may take a while.
async fn places<T: Default + Send + 'static>(
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

/// What the trace names and the image has.
fn traced(contents: &Contents, trace: &Trace) -> Vec<Place> {
    let readers = contents.blobs().iter().enumerate();
    let blobs: HashMap<_, _> = readers
        .map(|(blob, reader)| (&reader.layout().id, (blob, reader)))
        .collect();
    let of_part = |part: &Part| {
        let known = blobs.get(&part.blob);
        let place = |(blob, reader): &(usize, &Arc<BlobReader>)| {
            let chunks = &reader.layout().chunks;
            let position = |number: &u32| chunks.binary_search_by_key(number, |chunk| chunk.index).ok();
            let positions = part.chunks.iter().filter_map(position);
            positions.map(|chunk| (*blob, chunk)).collect::<Vec<_>>()
        };
        known.map(place).unwrap_or_default()
    };
    trace.parts.iter().flat_map(of_part).collect()
}

/// What the files of the builder's list consist of; a directory stands for all that is below it.
fn listed(contents: &Contents) -> Vec<Place> {
    let tree = &contents.tree;
    let mut places = Vec::new();
    // A file may have many names, and a directory may be listed beside one that is above it.
    let mut seen = HashSet::new();
    let mut left: Vec<Ino> = tree.summary().prefetch.iter().rev().copied().collect();
    while let Some(ino) = left.pop() {
        if !seen.insert(ino) {
            continue;
        }
        match tree.inode(ino).map(|inode| inode.kind()) {
            Some(Kind::Directory) => left.extend(tree.entries(ino).iter().rev().map(|entry| entry.ino)),
            Some(Kind::Regular) => places.extend(chunks_of(tree, ino)),
            _ => {}
        }
    }
    places
}

fn chunks_of(tree: &Tree, file: Ino) -> impl Iterator<Item = Place> {
    let chunks = tree.chunks(file).iter();
    chunks.map(|chunk| (usize::from(chunk.blob), chunk.chunk as usize))
}

fn everything(contents: &Contents) -> Vec<Place> {
    let blobs = contents.blobs().iter().enumerate();
    blobs
        .flat_map(|(blob, reader)| (0..reader.layout().chunks.len()).map(move |chunk| (blob, chunk)))
        .collect()
}

/// How chunks are to be fetched.
struct Errand<'a> {
    urgency: Priority,
    /// Uncompressed bytes in a second; 0 for as fast as it goes.
    rate: u64,
    given_up: &'a Arc<AtomicBool>,
}

impl Errand<'_> {
    /// Fetches those of the chunks that are missing, about in that order. Tells whether nothing is left to be done: all are
    /// there, or nobody wants them. What fails is passed over, unless it fails again and again or cannot be kept.
    async fn bring(&self, contents: &Weak<Contents>, places: &[Place]) -> bool {
        let mut under_way = JoinSet::new();
        let (started, mut bytes, mut at, mut failures) = (Instant::now(), 0, 0, 0);
        while at < places.len() && failures < MOST_FAILURES {
            let Some(contents) = contents.upgrade() else {
                return true;
            };
            let batch = batch(&contents, &places[at..]);
            at += batch.len();
            let missing: Vec<_> = batch
                .iter()
                .copied()
                .filter(|(blob, chunk)| contents.blobs()[*blob].is_missing(*chunk))
                .collect();
            bytes += size(&contents, &missing);
            for (blob, positions) in by_blob(&missing) {
                let (reader, given_up) = (Arc::clone(&contents.blobs()[blob]), Arc::clone(self.given_up));
                let urgency = self.urgency;
                under_way.spawn(async move { reader.prefetch(&positions, urgency, &given_up).await });
            }
            drop(contents);
            while under_way.len() >= BATCHES {
                failures += failed(under_way.join_next().await);
            }
            if self.rate > 0 {
                // At the rate, so much may be there by then.
                let due = started + Duration::from_secs_f64(bytes as f64 / self.rate as f64);
                tokio::time::sleep_until(due.into()).await;
            }
        }
        while !under_way.is_empty() {
            failures += failed(under_way.join_next().await);
        }
        failures == 0
    }
}

/// For how much that counts as a failure.
fn failed(done: Option<Result<Result<(), ReadCause>, tokio::task::JoinError>>) -> u32 {
    let cause = match done {
        Some(Ok(Err(cause))) => cause,
        Some(Err(_)) => ReadCause::Aborted,
        Some(Ok(Ok(()))) | None => return 0,
    };
    tracing::debug!(%cause, "what an image will need cannot be fetched beforehand");
    match cause {
        ReadCause::CacheWrite(_) | ReadCause::Aborted => MOST_FAILURES,
        _ => 1,
    }
}

/// The first of `places`, up to [`BATCH`]; one at least.
fn batch<'a>(contents: &Contents, places: &'a [Place]) -> &'a [Place] {
    let mut bytes = 0;
    let fits = |place: &&Place| {
        let is_first = bytes == 0;
        bytes += size(contents, std::slice::from_ref(*place));
        is_first || bytes <= BATCH
    };
    &places[..places.iter().take_while(fits).count()]
}

fn size(contents: &Contents, places: &[Place]) -> u64 {
    let size = |(blob, chunk): &Place| contents.blobs()[*blob].layout().chunks[*chunk].uncompressed_size;
    places.iter().map(size).map(u64::from).sum()
}

/// The batch's chunks of each blob.
fn by_blob(batch: &[Place]) -> Vec<(usize, Vec<usize>)> {
    let mut blobs: Vec<(usize, Vec<usize>)> = Vec::new();
    for (blob, chunk) in batch {
        match blobs.iter_mut().find(|(known, _)| known == blob) {
            Some((_, chunks)) => chunks.push(*chunk),
            None => blobs.push((*blob, vec![*chunk])),
        }
    }
    blobs
}
