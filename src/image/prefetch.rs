//! Fetches what an image will need before it is asked for: what its last starts needed, then what its builder listed, and then,
//! if wanted, all the rest in the background.

use std::{
    sync::{Arc, Weak, atomic::AtomicBool},
    time::{Duration, Instant},
};

use tokio::{runtime::Handle, task::JoinSet};

use super::{contents::Contents, trace::Trace};
use crate::{
    blob::{error::ReadCause, fetching::Urgency},
    rafs::{Ino, Kind, Tree},
};

/// Uncompressed bytes that are fetched at a time, in whatever order they are stored.
const BATCH: u64 = 4 << 20;
/// Batches on their way at a time, so that one is asked for while the other comes.
const BATCHES: usize = 2;
/// How long to wait before the rest is asked for again after a failure.
const AGAIN_AFTER: Duration = Duration::from_secs(30);

/// What is fetched beforehand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// What the image's builder has listed.
    pub listed: bool,
    /// What earlier starts have needed; this one's needs are noted.
    pub learned: bool,
    /// All of the image, in the background.
    pub all: bool,
    /// Most uncompressed bytes of it in a second; 0 for as fast as it goes.
    pub all_rate: u64,
}

/// A chunk: number of its blob, and position in the blob's layout.
type Place = (usize, usize);

/// Fetches on `runtime` what `options` say of an image, as long as somebody holds `contents`.
pub fn start(contents: &Arc<Contents>, trace: Option<Trace>, options: Options, runtime: &Handle) {
    let mut soon = Vec::new();
    if let Some(trace) = trace.filter(|_| options.learned) {
        soon.extend(traced(contents, &trace));
    }
    if options.listed {
        soon.extend(listed(contents));
    }
    let contents = Arc::downgrade(contents);
    runtime.spawn(async move {
        if let Err(cause) = bring(&contents, &soon, Urgency::Ahead, 0).await {
            tracing::debug!(%cause, "what an image will need cannot be fetched beforehand");
        }
        while options.all
            && let Some(all) = contents.upgrade().map(|contents| everything(&contents))
        {
            match bring(&contents, &all, Urgency::Background, options.all_rate).await {
                Ok(()) => return,
                Err(cause) => tracing::debug!(%cause, "the rest of an image cannot be fetched now"),
            }
            tokio::time::sleep(AGAIN_AFTER).await;
        }
    });
}

/// What the trace names and the image has.
fn traced(contents: &Contents, trace: &Trace) -> Vec<Place> {
    let mut places = Vec::new();
    for part in &trace.parts {
        let blobs = contents.blobs();
        let Some(blob) = blobs.iter().position(|reader| reader.layout().id == part.blob) else {
            continue;
        };
        let chunks = &blobs[blob].layout().chunks;
        let position = |number: &u32| chunks.binary_search_by_key(number, |chunk| chunk.index).ok();
        places.extend(part.chunks.iter().filter_map(position).map(|chunk| (blob, chunk)));
    }
    places
}

/// What the files of the builder's list consist of; a directory stands for all that is below it.
fn listed(contents: &Contents) -> Vec<Place> {
    let tree = &contents.tree;
    let mut places = Vec::new();
    let mut left: Vec<Ino> = tree.summary().prefetch.iter().rev().copied().collect();
    while let Some(ino) = left.pop() {
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

/// Fetches the chunks, about in that order.
async fn bring(contents: &Weak<Contents>, places: &[Place], urgency: Urgency, rate: u64) -> Result<(), ReadCause> {
    let mut under_way = JoinSet::new();
    let (started, mut bytes, mut at) = (Instant::now(), 0, 0);
    while at < places.len() {
        let Some(contents) = contents.upgrade() else { break };
        let batch = batch(&contents, &places[at..]);
        at += batch.len();
        bytes += size(&contents, batch);
        for (blob, positions) in by_blob(batch) {
            let reader = Arc::clone(&contents.blobs()[blob]);
            under_way.spawn(async move { reader.bring(&positions, urgency, &AtomicBool::new(false)).await });
        }
        drop(contents);
        while under_way.len() >= BATCHES {
            joined(under_way.join_next().await)?;
        }
        if rate > 0 {
            // At the rate, so much may be there by then.
            let due = started + Duration::from_secs_f64(bytes as f64 / rate as f64);
            tokio::time::sleep_until(due.into()).await;
        }
    }
    while !under_way.is_empty() {
        joined(under_way.join_next().await)?;
    }
    Ok(())
}

fn joined(done: Option<Result<Result<(), ReadCause>, tokio::task::JoinError>>) -> Result<(), ReadCause> {
    done.map_or(Ok(()), |done| done.unwrap_or(Err(ReadCause::Aborted)))
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
