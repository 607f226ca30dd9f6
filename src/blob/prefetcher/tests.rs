//! Tests of prefetching, with a source that counts requests.

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
    size_limit::SizeLimit,
    source::{Pending, Provenance, Source, SourceError, SourcedBytes},
};

const CHUNK: usize = 100_000;
const CHUNKS: usize = 200;
static NEVER: AtomicBool = AtomicBool::new(false);

/// The bytes of a blob, and how to deliver them.
struct TestBlob {
    bytes: Vec<u8>,
    requests: AtomicUsize,
    sent: AtomicUsize,
    /// Parts of 64 KiB that `read_parts` sends before it fails.
    max_parts: Option<usize>,
    /// How often it fails.
    failures: AtomicUsize,
    /// Parts of a response that need no permit.
    free_parts: usize,
    /// Each further part takes a permit.
    permits: Semaphore,
    /// Offset of a byte that `read_parts` corrupts.
    corrupted: Option<u64>,
    /// Number of the request that delivered that byte.
    corrupted_in: AtomicUsize,
    /// Numbers of the requests that were reported as corrupt.
    reported: Mutex<Vec<usize>>,
}

impl TestBlob {
    fn new() -> Self {
        Self {
            bytes: (0..CHUNKS).flat_map(content).collect(),
            requests: AtomicUsize::new(0),
            sent: AtomicUsize::new(0),
            max_parts: None,
            failures: AtomicUsize::new(usize::MAX),
            free_parts: 0,
            permits: Semaphore::new(Semaphore::MAX_PERMITS),
            corrupted: None,
            corrupted_in: AtomicUsize::new(usize::MAX),
            reported: Mutex::default(),
        }
    }
}

/// Shares a [`TestBlob`] with the test.
#[derive(Clone)]
struct TestSource(Arc<TestBlob>);

impl Source for TestSource {
    fn read(&self, offset: u64, len: usize) -> Pending {
        self.0.requests.fetch_add(1, Ordering::SeqCst);
        self.0.sent.fetch_add(len, Ordering::SeqCst);
        let bytes = Bytes::copy_from_slice(&self.0.bytes[offset as usize..offset as usize + len]);
        Box::pin(std::future::ready(Ok(bytes.into())))
    }

    fn read_parts(&self, offset: u64, len: usize, _is_ahead: bool, parts: mpsc::Sender<SourcedBytes>) -> Pending<()> {
        let stored = Arc::clone(&self.0);
        let number = stored.requests.fetch_add(1, Ordering::SeqCst);
        let provenance = Provenance::new(number);
        Box::pin(async move {
            let mut bytes = stored.bytes[offset as usize..offset as usize + len].to_vec();
            if let Some(at) = stored.corrupted.and_then(|at| at.checked_sub(offset))
                && let Some(byte) = bytes.get_mut(at as usize)
            {
                *byte ^= 1;
                stored.corrupted_in.store(number, Ordering::SeqCst);
            }
            for (number, part) in bytes.chunks(64 << 10).enumerate() {
                let once_less = |failures: usize| failures.checked_sub(1);
                if stored.max_parts.is_some_and(|max| number >= max)
                    && (stored.failures)
                        .fetch_update(Ordering::SeqCst, Ordering::SeqCst, once_less)
                        .is_ok()
                {
                    return Err(SourceError::range_failed(io::Error::other("interrupted")));
                }
                if number >= stored.free_parts {
                    stored.permits.acquire().await.unwrap().forget();
                }
                stored.sent.fetch_add(part.len(), Ordering::SeqCst);
                let (bytes, provenance) = (Bytes::copy_from_slice(part), provenance.clone());
                parts.send(SourcedBytes { bytes, provenance }).await.ok();
            }
            Ok(())
        })
    }

    fn report_corrupt(&self, provenance: &Provenance) {
        self.0.reported.lock().extend(provenance.endpoint::<usize>());
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

fn reader(dir: &Path, stored: TestBlob) -> (Arc<BlobReader>, Arc<TestBlob>) {
    reader_of(dir, stored, layout())
}

fn reader_of(dir: &Path, stored: TestBlob, layout: BlobLayout) -> (Arc<BlobReader>, Arc<TestBlob>) {
    let stored = Arc::new(stored);
    let cached = SharedBlobs::open(dir, SizeLimit::NONE)
        .unwrap()
        .blob(&layout, "cd")
        .unwrap();
    let source: Arc<dyn Source> = Arc::new(TestSource(Arc::clone(&stored)));
    let lane = FetchScheduler::new(Duration::from_secs(10), true, usize::MAX).registry("");
    let meta = MetaSource::Blob(Arc::clone(&source));
    (BlobReader::new(Arc::new(layout), cached, source, lane, meta), stored)
}

/// Reads a chunk as an image does.
async fn read(reader: &Arc<BlobReader>, position: usize) {
    if reader.mark_seen(position) {
        reader.on_first_access(position, true);
    }
    read_alone(reader, position).await;
}

/// The same, without read-ahead.
async fn read_alone(reader: &Arc<BlobReader>, position: usize) {
    let mut bytes = vec![0; CHUNK];
    reader.read(position, None, 0, &mut bytes).await.unwrap();
    assert!(bytes == content(position), "chunk {position} reads wrong");
}

async fn prefetch_all(reader: &Arc<BlobReader>, priority: Priority) -> Result<(), ReadCause> {
    let all: Vec<_> = (0..CHUNKS).collect();
    reader.prefetch(&all, priority, &NEVER).await
}

#[tokio::test(flavor = "multi_thread")]
async fn sequential_reads_take_few_requests_and_each_byte_once() {
    let dir = tempfile::tempdir().unwrap();
    let (reader, stored) = reader(dir.path(), TestBlob::new());
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
async fn random_reads_fetch_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let mut sparse = layout();
    // As if there were chunks between that the image does not use.
    for (number, chunk) in sparse.chunks.iter_mut().enumerate() {
        chunk.uncompressed_offset += (number as u64) << 24;
    }
    let (reader, stored) = reader_of(dir.path(), TestBlob::new(), sparse);
    for step in 0..CHUNKS {
        read(&reader, step * 77 % CHUNKS).await;
    }
    assert_eq!(stored.sent.load(Ordering::SeqCst), CHUNKS * CHUNK);
}

#[tokio::test(flavor = "multi_thread")]
async fn waiter_is_answered_before_the_request_ends() {
    let dir = tempfile::tempdir().unwrap();
    // The first two chunks are in the first four parts of the first request.
    let (free_parts, permits) = (4, Semaphore::new(0));
    let (reader, stored) = reader(
        dir.path(),
        TestBlob {
            free_parts,
            permits,
            ..TestBlob::new()
        },
    );
    let prefetching = tokio::spawn({
        let reader = Arc::clone(&reader);
        async move { prefetch_all(&reader, Priority::Ahead).await }
    });
    let second = FlightKey::shared(UnitId::Chunk(1));
    while !reader.fetcher().flights().is_in_flight(&second) && reader.is_missing(1) {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    read_alone(&reader, 1).await;
    assert!(stored.sent.load(Ordering::SeqCst) < CHUNKS * CHUNK / 2);
    stored.permits.add_permits(CHUNKS * CHUNK);
    prefetching.await.unwrap().unwrap();
    assert_eq!(stored.sent.load(Ordering::SeqCst), CHUNKS * CHUNK);
}

#[tokio::test(flavor = "multi_thread")]
async fn readers_recover_from_an_interrupted_prefetch() {
    let dir = tempfile::tempdir().unwrap();
    let max_parts = Some(5);
    let (reader, _) = reader(
        dir.path(),
        TestBlob {
            max_parts,
            ..TestBlob::new()
        },
    );
    // A single request: the failure of another would end the prefetch earlier.
    let one: Vec<_> = (0..10).collect();
    let brought = reader.prefetch(&one, Priority::Ahead, &NEVER).await;
    assert!(matches!(brought, Err(ReadCause::Fetch(_))));
    assert!(!reader.is_missing(2), "units that came before the failure are cached");
    for position in 0..CHUNKS {
        read(&reader, position).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn read_ahead_resumes_soon_after_one_failure() {
    let dir = tempfile::tempdir().unwrap();
    let (max_parts, failures) = (Some(1), AtomicUsize::new(1));
    let (reader, stored) = reader(
        dir.path(),
        TestBlob {
            max_parts,
            failures,
            ..TestBlob::new()
        },
    );
    for position in 0..10 {
        read(&reader, position).await;
    }
    assert_eq!(stored.failures.load(Ordering::SeqCst), 0, "the request has failed");
    tokio::time::sleep(FIRST_PAUSE + Duration::from_millis(50)).await;
    let before = stored.requests.load(Ordering::SeqCst);
    for position in 10..CHUNKS {
        read(&reader, position).await;
    }
    let requests = stored.requests.load(Ordering::SeqCst) - before;
    assert!(requests < CHUNKS / 4, "{requests}");
}

#[tokio::test(flavor = "multi_thread")]
async fn corrupt_chunk_is_not_cached_and_spares_the_others() {
    let dir = tempfile::tempdir().unwrap();
    let corrupted = Some(50 * CHUNK as u64 + 3);
    let (reader, stored) = reader(
        dir.path(),
        TestBlob {
            corrupted,
            ..TestBlob::new()
        },
    );
    prefetch_all(&reader, Priority::Ahead).await.unwrap();
    let missing: Vec<_> = (0..CHUNKS).filter(|position| reader.is_missing(*position)).collect();
    assert_eq!(missing, [50]);
    assert_eq!(*stored.reported.lock(), [stored.corrupted_in.load(Ordering::SeqCst)]);
    let before = stored.requests.load(Ordering::SeqCst);
    // No chunk behind it is missing.
    for position in std::iter::once(50).chain(0..CHUNKS) {
        read(&reader, position).await;
    }
    assert_eq!(stored.requests.load(Ordering::SeqCst), before + 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn background_waits_for_demand() {
    let dir = tempfile::tempdir().unwrap();
    let (reader, stored) = reader(dir.path(), TestBlob::new());
    let (end_demand, ended) = tokio::sync::oneshot::channel::<()>();
    let (tell, begun) = tokio::sync::oneshot::channel();
    let demand = tokio::spawn({
        let reader = Arc::clone(&reader);
        let wait = async move {
            tell.send(()).unwrap();
            ended.await
        };
        async move { reader.fetcher().scheduler().as_demand(wait).await }
    });
    begun.await.unwrap();
    let background = tokio::spawn({
        let reader = Arc::clone(&reader);
        async move { prefetch_all(&reader, Priority::Background).await }
    });
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!(stored.requests.load(Ordering::SeqCst), 0);
    // Demand does not wait.
    read(&reader, 7).await;
    end_demand.send(()).unwrap();
    demand.await.unwrap().unwrap();
    background.await.unwrap().unwrap();
    assert!((0..CHUNKS).all(|position| !reader.is_missing(position)));
}

/// Otherwise a malformed image could make a small response take any amount of memory.
#[tokio::test(flavor = "multi_thread")]
async fn chunks_that_share_stored_bytes_are_fetched_apart() {
    let dir = tempfile::tempdir().unwrap();
    let mut same = layout();
    same.chunks.iter_mut().for_each(|chunk| chunk.compressed_offset = 0);
    let (reader, stored) = reader_of(dir.path(), TestBlob::new(), same);
    prefetch_all(&reader, Priority::Ahead).await.unwrap();
    assert_eq!(stored.requests.load(Ordering::SeqCst), CHUNKS);
    let missing = (0..CHUNKS).filter(|position| reader.is_missing(*position)).count();
    assert_eq!(missing, CHUNKS - 1, "the bytes match the digest of one chunk");
}

#[tokio::test(flavor = "multi_thread")]
async fn waiter_for_a_prefetched_unit_counts_as_demand() {
    let dir = tempfile::tempdir().unwrap();
    let permits = Semaphore::new(0);
    let (reader, stored) = reader(
        dir.path(),
        TestBlob {
            permits,
            ..TestBlob::new()
        },
    );
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
    stored.permits.add_permits(CHUNKS * CHUNK);
    waiting.await.unwrap();
    ahead.await.unwrap().unwrap();
    background.await.unwrap().unwrap();
    assert!(!reader.is_missing(150));
}

#[tokio::test(flavor = "multi_thread")]
async fn coalesced_units_do_not_delay_the_reader() {
    let dir = tempfile::tempdir().unwrap();
    let permits = Semaphore::new(2);
    let (reader, stored) = reader(
        dir.path(),
        TestBlob {
            permits,
            ..TestBlob::new()
        },
    );
    read(&reader, 0).await;
    assert!(reader.is_missing(1), "two parts hold one chunk");
    stored.permits.add_permits(CHUNKS * CHUNK);
    for position in 1..=10 {
        read_alone(&reader, position).await;
    }
    assert_eq!(stored.requests.load(Ordering::SeqCst), 1);
    assert_eq!(stored.sent.load(Ordering::SeqCst), 11 * CHUNK);
}

#[tokio::test(flavor = "multi_thread")]
async fn more_is_coalesced_on_a_long_link() {
    let dir = tempfile::tempdir().unwrap();
    let (reader, stored) = reader(dir.path(), TestBlob::new());
    reader.fetcher().scheduler().link.record_fast_and_far();
    // 4 MiB.
    for position in 0..=41 {
        read_alone(&reader, position).await;
    }
    assert_eq!(stored.requests.load(Ordering::SeqCst), 1);
    assert_eq!(stored.sent.load(Ordering::SeqCst), 42 * CHUNK);
}

#[tokio::test(flavor = "multi_thread")]
async fn present_and_long_units_are_not_coalesced() {
    let dir = tempfile::tempdir().unwrap();
    let mut layout = layout();
    // So that the other chunks seem to end their files.
    layout.chunks.truncate(21);
    layout.chunks[20].uncompressed_size += 1;
    let (reader, stored) = reader_of(dir.path(), TestBlob::new(), layout);
    read_alone(&reader, 3).await;
    read_alone(&reader, 13).await;
    assert!(reader.is_missing(14) && stored.requests.load(Ordering::SeqCst) == 1);
    for position in 0..3 {
        read_alone(&reader, position).await;
    }
    assert_eq!(
        stored.sent.load(Ordering::SeqCst),
        14 * CHUNK,
        "cached chunks are not fetched again"
    );
    let _suspended = reader.suspend_coalescing();
    read_alone(&reader, 15).await;
    assert_eq!(stored.sent.load(Ordering::SeqCst), 15 * CHUNK);
}

#[tokio::test(flavor = "multi_thread")]
async fn coalescing_resumes_after_the_last_suspension_even_after_a_panic() {
    let dir = tempfile::tempdir().unwrap();
    let (reader, stored) = reader(dir.path(), TestBlob::new());
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

/// The span is chosen before its memory is reserved.
#[tokio::test(flavor = "multi_thread")]
async fn units_fetched_meanwhile_are_not_coalesced() {
    let dir = tempfile::tempdir().unwrap();
    let (reader, stored) = reader(dir.path(), TestBlob::new());
    let full = (
        reader.fetcher().scheduler().reserve_memory(32 << 20).await,
        reader.fetcher().scheduler().reserve_memory(256 << 20).await,
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
async fn failed_coalesced_request_is_retried_alone() {
    for (max_parts, corrupted) in [(Some(1), None), (None, Some(5))] {
        let dir = tempfile::tempdir().unwrap();
        let (reader, stored) = reader(
            dir.path(),
            TestBlob {
                max_parts,
                corrupted,
                ..TestBlob::new()
            },
        );
        read_alone(&reader, 0).await;
        assert_eq!(stored.requests.load(Ordering::SeqCst), 2, "{max_parts:?} {corrupted:?}");
        let reported = stored.reported.lock();
        assert!(
            reported.iter().all(|number| corrupted.is_some() && *number == 0),
            "{reported:?}"
        );
        assert_eq!(reported.is_empty(), corrupted.is_none());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn slow_coalesced_request_is_retried_alone() {
    let dir = tempfile::tempdir().unwrap();
    let permits = Semaphore::new(0);
    let (reader, stored) = reader(
        dir.path(),
        TestBlob {
            permits,
            ..TestBlob::new()
        },
    );
    reader.fetcher().scheduler().link.record_fast_and_far();
    read_alone(&reader, 0).await;
    assert_eq!(
        reader.fetcher().scheduler().link.bandwidth_delay_product(),
        0,
        "the estimate is reset"
    );
    // The units that were to be coalesced are not in flight any more.
    read_alone(&reader, 1).await;
    assert_eq!(stored.requests.load(Ordering::SeqCst), 3);
}
