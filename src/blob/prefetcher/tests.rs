//! What is fetched before anybody asks, from a source that counts.

use std::{
    io,
    path::Path,
    sync::atomic::{AtomicUsize, Ordering},
    time::Duration,
};

use bytes::Bytes;
use parking_lot::Mutex;
use sha2::{Digest as _, Sha256};
use tokio::sync::{Semaphore, mpsc};

use super::{read_ahead::FIRST_PAUSE, *};
use crate::blob::{
    layout::{BlobLayout, Chunk},
    reader::{BlobReader, MetaSource},
    scheduler::FetchScheduler,
    shared::SharedBlobs,
    source::{Pending, Provenance, Source, SourceError, SourcedBytes},
};

const CHUNK: usize = 100_000;
const CHUNKS: usize = 200;
static NEVER: AtomicBool = AtomicBool::new(false);

/// The bytes of a blob.
struct Stored {
    bytes: Vec<u8>,
    requests: AtomicUsize,
    sent: AtomicUsize,
    /// Parts of 64 KiB that may be given of what is asked for in parts; then it breaks off.
    parts: Option<usize>,
    /// How often it does.
    times: AtomicUsize,
    /// Parts of an answer that wait for nothing.
    free: usize,
    /// Waited for before each of the others.
    leave: Semaphore,
    /// This byte is another where it comes in parts.
    flipped: Option<u64>,
    /// Number of the request that it came with.
    flipped_in: AtomicUsize,
    /// Numbers of the requests that have been blamed.
    blamed: Mutex<Vec<usize>>,
}

impl Stored {
    fn new() -> Self {
        Self {
            bytes: (0..CHUNKS).flat_map(content).collect(),
            requests: AtomicUsize::new(0),
            sent: AtomicUsize::new(0),
            parts: None,
            times: AtomicUsize::new(usize::MAX),
            free: 0,
            leave: Semaphore::new(Semaphore::MAX_PERMITS),
            flipped: None,
            flipped_in: AtomicUsize::new(usize::MAX),
            blamed: Mutex::default(),
        }
    }
}

/// Shares a [`Stored`] with the test.
#[derive(Clone)]
struct Shared(Arc<Stored>);

impl Source for Shared {
    fn read(&self, offset: u64, len: usize) -> Pending {
        self.0.requests.fetch_add(1, Ordering::SeqCst);
        self.0.sent.fetch_add(len, Ordering::SeqCst);
        let bytes = Bytes::copy_from_slice(&self.0.bytes[offset as usize..offset as usize + len]);
        Box::pin(std::future::ready(Ok(bytes.into())))
    }

    fn read_parts(&self, offset: u64, len: usize, _is_ahead: bool, parts: mpsc::Sender<SourcedBytes>) -> Pending<()> {
        let stored = Arc::clone(&self.0);
        let number = stored.requests.fetch_add(1, Ordering::SeqCst);
        let origin = Provenance::new(number);
        Box::pin(async move {
            let mut bytes = stored.bytes[offset as usize..offset as usize + len].to_vec();
            if let Some(at) = stored.flipped.and_then(|at| at.checked_sub(offset))
                && let Some(byte) = bytes.get_mut(at as usize)
            {
                *byte ^= 1;
                stored.flipped_in.store(number, Ordering::SeqCst);
            }
            for (number, part) in bytes.chunks(64 << 10).enumerate() {
                let once_less = |times: usize| times.checked_sub(1);
                if stored.parts.is_some_and(|parts| number >= parts)
                    && (stored.times)
                        .fetch_update(Ordering::SeqCst, Ordering::SeqCst, once_less)
                        .is_ok()
                {
                    return Err(SourceError::of_range(io::Error::other("broken off")));
                }
                if number >= stored.free {
                    stored.leave.acquire().await.unwrap().forget();
                }
                stored.sent.fetch_add(part.len(), Ordering::SeqCst);
                let (bytes, origin) = (Bytes::copy_from_slice(part), origin.clone());
                parts.send(SourcedBytes { bytes, origin }).await.ok();
            }
            Ok(())
        })
    }

    fn distrust(&self, origin: &Provenance) {
        self.0.blamed.lock().extend(origin.place::<usize>());
    }
}

fn content(index: usize) -> Vec<u8> {
    (0..CHUNK).map(|at| (at * 7 + index * 31 + at / 251) as u8).collect()
}

fn layout() -> BlobLayout {
    let chunk = |index: usize| Chunk {
        index: index as u32,
        digest: Sha256::digest(content(index)).into(),
        compressed_offset: (index * CHUNK) as u64,
        compressed_size: CHUNK as u32,
        uncompressed_offset: (index * CHUNK).next_multiple_of(4096) as u64 + (index * 4096) as u64,
        uncompressed_size: CHUNK as u32,
        compressed: false,
    };
    BlobLayout::of_plain((0..CHUNKS).map(chunk).collect())
}

fn reader(dir: &Path, stored: Stored) -> (Arc<BlobReader>, Arc<Stored>) {
    reader_of(dir, stored, layout())
}

fn reader_of(dir: &Path, stored: Stored, layout: BlobLayout) -> (Arc<BlobReader>, Arc<Stored>) {
    let stored = Arc::new(stored);
    let cached = SharedBlobs::open(dir).unwrap().blob(&layout, "cd").unwrap();
    let source: Arc<dyn Source> = Arc::new(Shared(Arc::clone(&stored)));
    let lane = FetchScheduler::new(Duration::from_secs(10), true, usize::MAX).lane("");
    let meta = MetaSource::Blob(Arc::clone(&source));
    (BlobReader::new(Arc::new(layout), cached, source, lane, meta), stored)
}

/// Reads a chunk as a file's reader does.
async fn read(reader: &Arc<BlobReader>, position: usize) {
    if reader.mark_seen(position) {
        reader.on_first_access(position, true);
    }
    read_alone(reader, position).await;
}

/// The same, with nothing ahead.
async fn read_alone(reader: &Arc<BlobReader>, position: usize) {
    let mut bytes = vec![0; CHUNK];
    reader.read(position, None, 0, &mut bytes).await.unwrap();
    assert!(bytes == content(position), "chunk {position} reads wrong");
}

async fn bring(reader: &Arc<BlobReader>, urgency: Priority) -> Result<(), ReadCause> {
    let all: Vec<_> = (0..CHUNKS).collect();
    reader.prefetch(&all, urgency, &NEVER).await
}

#[tokio::test(flavor = "multi_thread")]
async fn who_reads_in_order_needs_few_requests_and_each_byte_once() {
    let dir = tempfile::tempdir().unwrap();
    let (reader, stored) = reader(dir.path(), Stored::new());
    for position in 0..CHUNKS {
        read(&reader, position).await;
    }
    let (requests, sent) = (
        stored.requests.load(Ordering::SeqCst),
        stored.sent.load(Ordering::SeqCst),
    );
    assert!(requests < CHUNKS / 3, "{requests} requests");
    assert_eq!(sent, CHUNKS * CHUNK);
}

#[tokio::test(flavor = "multi_thread")]
async fn who_reads_here_and_there_gets_little_more_than_he_asks_for() {
    let dir = tempfile::tempdir().unwrap();
    let mut sparse = layout();
    // As if there were other chunks between, which the image does not use.
    for (number, chunk) in sparse.chunks.iter_mut().enumerate() {
        chunk.uncompressed_offset += (number as u64) << 24;
    }
    let (reader, stored) = reader_of(dir.path(), Stored::new(), sparse);
    for step in 0..CHUNKS {
        read(&reader, step * 77 % CHUNKS).await;
    }
    assert_eq!(stored.sent.load(Ordering::SeqCst), CHUNKS * CHUNK);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_waiting_reader_is_answered_before_the_rest_has_come() {
    let dir = tempfile::tempdir().unwrap();
    // The first two chunks are in the first four parts of the first request.
    let (free, leave) = (4, Semaphore::new(0));
    let (reader, stored) = reader(
        dir.path(),
        Stored {
            free,
            leave,
            ..Stored::new()
        },
    );
    let bringing = tokio::spawn({
        let reader = Arc::clone(&reader);
        async move { bring(&reader, Priority::Ahead).await }
    });
    let second = (UnitId::Chunk(1), None);
    while !reader.fetcher().flights().is_under_way(&second) && reader.is_missing(1) {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    read_alone(&reader, 1).await;
    assert!(stored.sent.load(Ordering::SeqCst) < CHUNKS * CHUNK / 2);
    stored.leave.add_permits(CHUNKS * CHUNK);
    bringing.await.unwrap().unwrap();
    assert_eq!(stored.sent.load(Ordering::SeqCst), CHUNKS * CHUNK);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_breaks_off_harms_no_reader() {
    let dir = tempfile::tempdir().unwrap();
    let parts = Some(5);
    let (reader, _) = reader(dir.path(), Stored { parts, ..Stored::new() });
    // Of one request, since the failure of another would break it off earlier.
    let one: Vec<_> = (0..10).collect();
    let brought = reader.prefetch(&one, Priority::Ahead, &NEVER).await;
    assert!(matches!(brought, Err(ReadCause::Fetch(_))));
    assert!(!reader.is_missing(2), "what had come is kept");
    for position in 0..CHUNKS {
        read(&reader, position).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_breaks_off_once_is_read_ahead_again_soon() {
    let dir = tempfile::tempdir().unwrap();
    let (parts, times) = (Some(1), AtomicUsize::new(1));
    let (reader, stored) = reader(
        dir.path(),
        Stored {
            parts,
            times,
            ..Stored::new()
        },
    );
    for position in 0..10 {
        read(&reader, position).await;
    }
    assert_eq!(stored.times.load(Ordering::SeqCst), 0, "it has broken off");
    tokio::time::sleep(FIRST_PAUSE + Duration::from_millis(50)).await;
    let before = stored.requests.load(Ordering::SeqCst);
    for position in 10..CHUNKS {
        read(&reader, position).await;
    }
    let requests = stored.requests.load(Ordering::SeqCst) - before;
    assert!(requests < CHUNKS / 4, "{requests}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_damaged_is_not_kept_and_harms_no_other_chunk() {
    let dir = tempfile::tempdir().unwrap();
    let flipped = Some(50 * CHUNK as u64 + 3);
    let (reader, stored) = reader(
        dir.path(),
        Stored {
            flipped,
            ..Stored::new()
        },
    );
    bring(&reader, Priority::Ahead).await.unwrap();
    let missing: Vec<_> = (0..CHUNKS).filter(|position| reader.is_missing(*position)).collect();
    assert_eq!(missing, [50]);
    assert_eq!(*stored.blamed.lock(), [stored.flipped_in.load(Ordering::SeqCst)]);
    let before = stored.requests.load(Ordering::SeqCst);
    // Nothing is missing ahead of it.
    for position in std::iter::once(50).chain(0..CHUNKS) {
        read(&reader, position).await;
    }
    assert_eq!(stored.requests.load(Ordering::SeqCst), before + 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_background_waits_for_demand() {
    let dir = tempfile::tempdir().unwrap();
    let (reader, stored) = reader(dir.path(), Stored::new());
    let (end_demand, ended) = tokio::sync::oneshot::channel::<()>();
    let (tell, begun) = tokio::sync::oneshot::channel();
    let demand = tokio::spawn({
        let reader = Arc::clone(&reader);
        let wait = async move {
            tell.send(()).unwrap();
            ended.await
        };
        async move { reader.fetcher().scheduler().on_demand(wait).await }
    });
    begun.await.unwrap();
    let background = tokio::spawn({
        let reader = Arc::clone(&reader);
        async move { bring(&reader, Priority::Background).await }
    });
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!(stored.requests.load(Ordering::SeqCst), 0);
    // But nobody else does.
    read(&reader, 7).await;
    end_demand.send(()).unwrap();
    demand.await.unwrap().unwrap();
    background.await.unwrap().unwrap();
    assert!((0..CHUNKS).all(|position| !reader.is_missing(position)));
}

/// A malformed image could make a small answer take any amount of memory.
#[tokio::test(flavor = "multi_thread")]
async fn chunks_that_share_stored_bytes_are_fetched_apart() {
    let dir = tempfile::tempdir().unwrap();
    let mut same = layout();
    same.chunks.iter_mut().for_each(|chunk| chunk.compressed_offset = 0);
    let (reader, stored) = reader_of(dir.path(), Stored::new(), same);
    bring(&reader, Priority::Ahead).await.unwrap();
    assert_eq!(stored.requests.load(Ordering::SeqCst), CHUNKS);
    let missing = (0..CHUNKS).filter(|position| reader.is_missing(*position)).count();
    assert_eq!(missing, CHUNKS - 1, "those bytes are one chunk's only");
}

#[tokio::test(flavor = "multi_thread")]
async fn who_waits_for_what_is_brought_counts_as_demand() {
    let dir = tempfile::tempdir().unwrap();
    let leave = Semaphore::new(0);
    let (reader, stored) = reader(dir.path(), Stored { leave, ..Stored::new() });
    let ahead = tokio::spawn({
        let reader = Arc::clone(&reader);
        async move { reader.prefetch(&[0, 1], Priority::Ahead, &NEVER).await }
    });
    while stored.requests.load(Ordering::SeqCst) == 0 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let waiting = tokio::spawn({
        let reader = Arc::clone(&reader);
        async move { read_alone(&reader, 1).await }
    });
    tokio::time::sleep(Duration::from_millis(50)).await;
    let background = tokio::spawn({
        let reader = Arc::clone(&reader);
        async move { reader.prefetch(&[150], Priority::Background, &NEVER).await }
    });
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(stored.requests.load(Ordering::SeqCst), 1);
    stored.leave.add_permits(CHUNKS * CHUNK);
    waiting.await.unwrap();
    ahead.await.unwrap().unwrap();
    background.await.unwrap().unwrap();
    assert!(!reader.is_missing(150));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_lies_behind_comes_along_and_nobody_waits_for_it() {
    let dir = tempfile::tempdir().unwrap();
    let leave = Semaphore::new(2);
    let (reader, stored) = reader(dir.path(), Stored { leave, ..Stored::new() });
    read(&reader, 0).await;
    assert!(reader.is_missing(1), "two parts are one chunk");
    stored.leave.add_permits(CHUNKS * CHUNK);
    for position in 1..=10 {
        read_alone(&reader, position).await;
    }
    assert_eq!(stored.requests.load(Ordering::SeqCst), 1);
    assert_eq!(stored.sent.load(Ordering::SeqCst), 11 * CHUNK);
}

#[tokio::test(flavor = "multi_thread")]
async fn from_afar_comes_more() {
    let dir = tempfile::tempdir().unwrap();
    let (reader, stored) = reader(dir.path(), Stored::new());
    reader.fetcher().scheduler().pace.saw_far();
    // 4 MiB.
    for position in 0..=41 {
        read_alone(&reader, position).await;
    }
    assert_eq!(stored.requests.load(Ordering::SeqCst), 1);
    assert_eq!(stored.sent.load(Ordering::SeqCst), 42 * CHUNK);
}

#[tokio::test(flavor = "multi_thread")]
async fn neighbours_that_are_there_or_long_are_left_out() {
    let dir = tempfile::tempdir().unwrap();
    let mut layout = layout();
    // Then the others end their files, as far as one can tell.
    layout.chunks.truncate(21);
    layout.chunks[20].uncompressed_size += 1;
    let (reader, stored) = reader_of(dir.path(), Stored::new(), layout);
    read_alone(&reader, 3).await;
    read_alone(&reader, 13).await;
    assert!(reader.is_missing(14) && stored.requests.load(Ordering::SeqCst) == 1);
    for position in 0..3 {
        read_alone(&reader, position).await;
    }
    assert_eq!(
        stored.sent.load(Ordering::SeqCst),
        14 * CHUNK,
        "what is there is not fetched again"
    );
    let _suspended = reader.suspend_coalescing();
    read_alone(&reader, 15).await;
    assert_eq!(stored.sent.load(Ordering::SeqCst), 15 * CHUNK);
}

#[tokio::test(flavor = "multi_thread")]
async fn coalescing_goes_on_after_all_that_suspended_it_even_after_a_panic() {
    let dir = tempfile::tempdir().unwrap();
    let (reader, stored) = reader(dir.path(), Stored::new());
    let (first, second) = (reader.suspend_coalescing(), reader.suspend_coalescing());
    let panicking = tokio::spawn(async move {
        let _first = first;
        panic!("a replay panics");
    });
    assert!(panicking.await.is_err());
    read_alone(&reader, 0).await;
    assert_eq!(stored.sent.load(Ordering::SeqCst), CHUNK, "it is still suspended");
    drop(second);
    read_alone(&reader, 1).await;
    assert!(stored.sent.load(Ordering::SeqCst) > 2 * CHUNK);
}

/// What comes along is chosen before there is room for it.
#[tokio::test(flavor = "multi_thread")]
async fn neighbours_that_come_in_the_meantime_are_left_out() {
    let dir = tempfile::tempdir().unwrap();
    let (reader, stored) = reader(dir.path(), Stored::new());
    let full = (
        reader.fetcher().scheduler().room_for(32 << 20).await,
        reader.fetcher().scheduler().room_for(256 << 20).await,
    );
    let waiting = tokio::spawn({
        let reader = Arc::clone(&reader);
        async move { read_alone(&reader, 0).await }
    });
    tokio::time::sleep(Duration::from_millis(50)).await;
    let meantime: Vec<_> = (1..CHUNKS).collect();
    reader.prefetch(&meantime, Priority::Ahead, &NEVER).await.unwrap();
    drop(full);
    waiting.await.unwrap();
    assert_eq!(stored.sent.load(Ordering::SeqCst), CHUNKS * CHUNK);
}

#[tokio::test(flavor = "multi_thread")]
async fn who_is_failed_among_neighbours_asks_alone() {
    for (parts, flipped) in [(Some(1), None), (None, Some(5))] {
        let dir = tempfile::tempdir().unwrap();
        let (reader, stored) = reader(
            dir.path(),
            Stored {
                parts,
                flipped,
                ..Stored::new()
            },
        );
        read_alone(&reader, 0).await;
        assert_eq!(stored.requests.load(Ordering::SeqCst), 2, "{parts:?} {flipped:?}");
        let blamed = stored.blamed.lock();
        assert!(
            blamed.iter().all(|number| flipped.is_some() && *number == 0),
            "{blamed:?}"
        );
        assert_eq!(blamed.is_empty(), flipped.is_none());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_waits_too_long_among_neighbours_asks_alone() {
    let dir = tempfile::tempdir().unwrap();
    let leave = Semaphore::new(0);
    let (reader, stored) = reader(dir.path(), Stored { leave, ..Stored::new() });
    reader.fetcher().scheduler().pace.saw_far();
    read_alone(&reader, 0).await;
    assert_eq!(
        reader.fetcher().scheduler().pace.bandwidth_delay_product(),
        0,
        "it is not what it was"
    );
    // Nor do others wait for what was to come along.
    read_alone(&reader, 1).await;
    assert_eq!(stored.requests.load(Ordering::SeqCst), 3);
}
