//! Tests of readers, with a source that fails as told.

use std::{
    fs, io,
    ops::Range,
    os::unix::fs::{FileExt as _, symlink},
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use nydus_utils::{compress, digest};
use sha2::{Digest as _, Sha256};
use tempfile::TempDir;

use super::{
    cache::{CachedBlob, ChunkState},
    error::{ReadCause, ReadError},
    layout::{BlobLayout, Chunk, MAX_CHUNK_SIZE, MetaLocation, Packing},
    meta::{BlobMeta, HEADER_SIZE, MetaError},
    reader::{BlobReader, MetaSource},
    scheduler::FetchScheduler,
    shared::{SharedBlob, SharedBlobs},
    singleflight::SingleFlight,
    size_limit::SizeLimit,
    source::{Pending, Provenance, Source, SourceError},
};

mod counters;
mod failures;
mod outages;

const CHUNK: usize = 5000;
const CHUNKS: usize = 6;
/// Chunks in each batch.
const BATCH: usize = 2;
const CONTEXTS_AT: usize = CHUNKS * 24;

/// Delivers the bytes of a blob, or fails, after a delay.
struct FakeSource {
    bytes: Option<Vec<u8>>,
    /// Requests that overlap this range fail.
    failing: Range<usize>,
    delay: Duration,
    requests: AtomicUsize,
    reported: AtomicUsize,
}

impl FakeSource {
    fn new(bytes: Option<Vec<u8>>, delay_ms: u64) -> Arc<Self> {
        Self::failing(bytes, delay_ms, 0..0)
    }

    fn failing(bytes: Option<Vec<u8>>, delay_ms: u64, failing: Range<usize>) -> Arc<Self> {
        let delay = Duration::from_millis(delay_ms);
        Arc::new(Self {
            bytes,
            failing,
            delay,
            requests: AtomicUsize::new(0),
            reported: AtomicUsize::new(0),
        })
    }

    fn requests(&self) -> usize {
        self.requests.load(Ordering::SeqCst)
    }
}

impl Source for FakeSource {
    fn read(&self, offset: u64, len: usize) -> Pending {
        self.requests.fetch_add(1, Ordering::SeqCst);
        let range = offset as usize..offset as usize + len;
        let refused = range.start < self.failing.end && self.failing.start < range.end;
        let part = self.bytes.as_ref().filter(|_| !refused);
        let part = part.and_then(|bytes| bytes.get(range)).map(Bytes::copy_from_slice);
        let (delay, of_all) = (self.delay, self.bytes.is_none());
        Box::pin(async move {
            tokio::time::sleep(delay).await;
            let error = io::Error::other("out of reach");
            match part {
                Some(bytes) => Ok(bytes.into()),
                None if of_all => Err(SourceError::blob_unavailable(error)),
                None => Err(SourceError::range_failed(error)),
            }
        })
    }

    fn report_corrupt(&self, _: &Provenance) {
        self.reported.fetch_add(1, Ordering::SeqCst);
    }
}

fn content(index: usize) -> Vec<u8> {
    (0..CHUNK).map(|at| (at * 7 + index * 31 + at / 251) as u8).collect()
}

/// The blob meta of an uncompressed blob of batches: table and header.
fn meta() -> Vec<u8> {
    let mut meta = vec![0; CONTEXTS_AT + CHUNKS / BATCH * 40 + HEADER_SIZE];
    let mut put = |at: usize, bytes: &[u8]| meta[at..at + bytes.len()].copy_from_slice(bytes);
    for index in 0..CHUNKS {
        let (unit, offset) = (index / BATCH, index % BATCH * CHUNK);
        put(index * 24, &(4u64 << 56).to_le_bytes());
        put(index * 24 + 8, &((unit * BATCH * CHUNK) as u64).to_le_bytes());
        put(index * 24 + 16, &((unit as u64) << 32 | offset as u64).to_le_bytes());
        let size = ((BATCH * CHUNK) as u32).to_le_bytes();
        put(CONTEXTS_AT + unit * 40, &size);
        put(CONTEXTS_AT + unit * 40 + 4, &size);
    }
    let header = CONTEXTS_AT + CHUNKS / BATCH * 40;
    for at in [0, HEADER_SIZE - 4] {
        put(header + at, &0xb10b_b10b_u32.to_le_bytes());
    }
    put(header + 12, &(CHUNKS as u32).to_le_bytes());
    put(header + 40, &(CONTEXTS_AT as u64).to_le_bytes());
    put(header + 56, &((CHUNKS / BATCH) as u32).to_le_bytes());
    meta
}

fn layout(packing: Packing) -> BlobLayout {
    let chunk = |index: usize| Chunk {
        index: index as u32,
        digest: Sha256::digest(content(index)).into(),
        compressed_offset: (index * CHUNK) as u64,
        // Meaningless in packed blobs.
        compressed_size: if packing == Packing::PerChunk { CHUNK as u32 } else { 0 },
        uncompressed_offset: (index * 8192) as u64,
        uncompressed_size: CHUNK as u32,
        compressed: false,
    };
    let table = meta().len() - HEADER_SIZE;
    BlobLayout {
        id: "ab".repeat(32),
        compressor: compress::Algorithm::None,
        digester: digest::Algorithm::Sha256,
        packing,
        meta_v2: true,
        meta: MetaLocation {
            offset: (CHUNKS * CHUNK) as u64,
            compressed_size: table as u64,
            uncompressed_size: table as u64,
            compressor: compress::Algorithm::None,
        },
        meta_blob: None,
        chunk_count: CHUNKS as u32,
        compressed_size: (CHUNKS * CHUNK) as u64,
        uncompressed_size: (CHUNKS * 8192) as u64,
        chunks: (0..CHUNKS).map(chunk).collect(),
    }
}

fn blob() -> Vec<u8> {
    (0..CHUNKS).flat_map(content).chain(meta()).collect()
}

/// The state of one process: a new one has to verify the cache again.
struct Process {
    shared: Arc<SharedBlob>,
    cached: Arc<CachedBlob>,
    layout: Arc<BlobLayout>,
    scheduler: FetchScheduler,
}

impl Process {
    fn start(dir: &Path, layout: BlobLayout) -> Self {
        let shared = SharedBlobs::open(dir, SizeLimit::NONE)
            .unwrap()
            .blob(&layout, "cd")
            .unwrap();
        Self {
            cached: Arc::clone(shared.cached()),
            shared,
            layout: Arc::new(layout),
            scheduler: FetchScheduler::new(Duration::from_secs(10), false, usize::MAX),
        }
    }

    fn reader(&self, source: &Arc<FakeSource>) -> Arc<BlobReader> {
        let source: Arc<dyn Source> = Arc::clone(source) as _;
        let meta = MetaSource::Blob(Arc::clone(&source));
        let (layout, shared) = (Arc::clone(&self.layout), Arc::clone(&self.shared));
        BlobReader::new(layout, shared, source, self.scheduler.registry(""), meta)
    }
}

async fn read(reader: &Arc<BlobReader>, position: usize) -> Result<(), ReadError> {
    let mut bytes = vec![0; CHUNK - 10];
    reader.read(position, None, 10, &mut bytes).await?;
    assert!(bytes == content(position)[10..], "chunk {position} reads wrong");
    Ok(())
}

async fn read_all(reader: &Arc<BlobReader>) {
    for position in 0..CHUNKS {
        read(reader, position).await.unwrap();
    }
}

fn dir() -> TempDir {
    tempfile::tempdir().unwrap()
}

#[tokio::test]
async fn failed_meta_fetch_fails_all_waiters_at_once() {
    let dir = dir();
    let process = Process::start(dir.path(), layout(Packing::Batch));
    let source = FakeSource::new(None, 200);
    let reader = process.reader(&source);
    let tasks = (0..20).map(|number| {
        let reader = Arc::clone(&reader);
        tokio::spawn(async move { read(&reader, number % CHUNKS).await })
    });
    for task in tasks.collect::<Vec<_>>() {
        assert!(matches!(task.await.unwrap().unwrap_err().cause, ReadCause::Fetch(_)));
    }
    assert_eq!(source.requests(), 1);
    // The failure is not cached.
    read(&reader, 0).await.unwrap_err();
    assert_eq!(source.requests(), 2);
}

#[tokio::test]
async fn cached_chunks_of_packed_blobs_need_no_registry() {
    let dir = dir();
    let source = FakeSource::new(Some(blob()), 0);
    let first = Process::start(dir.path(), layout(Packing::Batch));
    read(&first.reader(&source), 0).await.unwrap();
    assert_eq!(source.requests(), 2, "the meta and a unit");
    drop(first);

    let process = Process::start(dir.path(), layout(Packing::Batch));
    let unreachable = FakeSource::new(None, 0);
    let reader = process.reader(&unreachable);
    // Not even if waiting requests to it hold all memory.
    let scheduler = process.scheduler.registry("");
    let taken = scheduler.reserve_memory(usize::MAX).await;
    read(&reader, 0).await.unwrap();
    read(&reader, 1).await.unwrap();
    assert_eq!(unreachable.requests(), 0);
    drop(taken);
    read(&reader, 2).await.unwrap_err();

    // The meta is cached as well.
    let process = Process::start(dir.path(), layout(Packing::Batch));
    let data_only = FakeSource::failing(Some(blob()), 0, CHUNKS * CHUNK..usize::MAX);
    read_all(&process.reader(&data_only)).await;
    assert_eq!(data_only.requests(), 2);
}

#[tokio::test]
async fn damaged_cached_meta_is_fetched_again() {
    let whole = BlobMeta::from_blob(&layout(Packing::Batch), &meta()).unwrap();
    let with = |change: fn(&mut Vec<u8>)| {
        let mut file = whole.as_file().to_vec();
        change(&mut file);
        file
    };
    let damages = [
        with(|file| file.truncate(100)),
        with(Vec::clear),
        with(|file| file.fill(0)),
        with(|file| file.fill(0xff)),
        // Wrong locations, each well-formed: in the unit, in the blob, and beyond its end.
        with(|file| file[2 * 24 + 16] ^= 1),
        with(|file| file[2 * 24 + 8] ^= 1),
        with(|file| file[2 * 24 + 12] = 0xff),
        with(|file| file[2 * 24 + 7] = 0),
        with(|file| file[CONTEXTS_AT + 40] ^= 1),
        with(|file| file.resize(40 << 20, 0)),
    ];
    for (number, damaged) in damages.iter().enumerate() {
        let dir = dir();
        let process = Process::start(dir.path(), layout(Packing::Batch));
        fs::write(process.cached.meta_file(), damaged).unwrap();
        let reader = process.reader(&FakeSource::new(Some(blob()), 0));
        for position in [2, 0, 1, 3, 4, 5] {
            let outcome = read(&reader, position).await;
            outcome.unwrap_or_else(|error| panic!("damage {number}, {position}: {error}"));
        }
        let repaired = fs::read(process.cached.meta_file()).unwrap();
        assert!(repaired == whole.as_file(), "damage {number} is repaired");
    }
}

#[tokio::test]
async fn whole_units_are_coalesced() {
    for packing in [Packing::PerChunk, Packing::Batch] {
        let dir = dir();
        let mut process = Process::start(dir.path(), layout(packing));
        process.scheduler = FetchScheduler::new(Duration::from_secs(10), true, usize::MAX);
        let source = FakeSource::new(Some(blob()), 0);
        let reader = process.reader(&source);
        // Begins with the second chunk of a batch.
        for position in (1..CHUNKS).chain([0]) {
            read(&reader, position).await.unwrap();
        }
        // One request fetches all units behind; the other is for the chunk before, or for the blob meta.
        assert_eq!(source.requests(), 2, "{packing:?}");
    }
}

#[tokio::test]
async fn unbatched_chunk_with_an_implausible_extent_is_refused() {
    let mut bytes = blob();
    bytes[CHUNKS * CHUNK + 7] = 0;
    for (offset, size) in [
        (0, 0),
        (0, 3 * MAX_CHUNK_SIZE),
        (0, u32::MAX),
        (u64::MAX, 5),
        (i64::MAX as u64, 5),
    ] {
        let dir = dir();
        let mut layout = layout(Packing::Batch);
        layout.chunks[0].compressed_offset = offset;
        layout.chunks[0].compressed_size = size;
        let process = Process::start(dir.path(), layout);
        let source = FakeSource::new(Some(bytes.clone()), 0);
        let reader = process.reader(&source);
        let error = read(&reader, 0).await.unwrap_err();
        assert!(matches!(error.cause, ReadCause::Meta(_)), "{error}");
        assert_eq!(source.requests(), 1, "the meta alone");
        read(&reader, 2).await.unwrap();
    }
}

#[tokio::test]
async fn meta_too_large_for_its_blob_is_not_fetched() {
    let too_large: [fn(&mut MetaLocation); 5] = [
        |meta| meta.compressed_size = 1 << 29,
        |meta| meta.uncompressed_size = 1 << 29,
        |meta| meta.uncompressed_size = 20 << 20,
        |meta| meta.compressed_size = u64::MAX,
        |meta| meta.offset = u64::MAX,
    ];
    for change in too_large {
        let dir = dir();
        let mut layout = layout(Packing::Batch);
        change(&mut layout.meta);
        let source = FakeSource::new(Some(blob()), 0);
        let error = read(&Process::start(dir.path(), layout).reader(&source), 0).await;
        assert!(matches!(error.unwrap_err().cause, ReadCause::Meta(_)));
        assert_eq!(source.requests(), 0);
    }
    // The limit grows with the blob, but is bounded.
    let mut large = layout(Packing::Zran);
    large.uncompressed_size = 1 << 30;
    let limit = BlobMeta::max_size(&large);
    assert!((32 << 20..256 << 20).contains(&limit), "{limit}");
    (large.uncompressed_size, large.compressed_size, large.chunk_count) = (u64::MAX, u64::MAX, 0);
    assert!(BlobMeta::max_size(&large) < 400 << 20);
}

#[test]
fn overlapping_chunks_of_a_unit_are_refused() {
    let layout = layout(Packing::Batch);
    let members = |change: fn(&mut [u8])| {
        let mut meta = meta();
        change(&mut meta);
        BlobMeta::from_blob(&layout, &meta).and_then(|meta| meta.members(&layout))
    };
    let right = members(|_| ()).unwrap();
    assert_eq!(right[&1], [(2, 0), (3, CHUNK as u32)]);
    let wrong: [fn(&mut [u8]); 3] = [
        // One byte too early, at the same offset, and in the unit of other chunks.
        |meta| meta[24 + 16] -= 1,
        |meta| meta[24 + 16..24 + 20].fill(0),
        |meta| meta[24 + 20] = 1,
    ];
    for change in wrong {
        let outcome: Result<_, MetaError> = members(change);
        assert!(outcome.unwrap_err().to_string().contains("overlap"));
    }
}

#[test]
fn stopped_runtime_aborts_a_flight() {
    let runtime = tokio::runtime::Builder::new_multi_thread().build().unwrap();
    let handle = runtime.handle().clone();
    runtime.shutdown_background();
    let _context = handle.enter();
    let flights = Arc::new(SingleFlight::<u32, u32>::default());
    for _ in 0..2 {
        let (flight, ours) = flights.join_or_start(1, None, || async { Ok(1) });
        assert!(ours, "the flight before has ended");
        let waiting = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let outcome = std::thread::scope(|scope| scope.spawn(|| waiting.block_on(flight.wait())).join().unwrap());
        assert!(matches!(outcome, Err(ReadCause::Aborted)));
    }
}

#[tokio::test]
async fn chunks_lost_on_the_way_to_disk_are_fetched_again() {
    let dir = dir();
    let process = Process::start(dir.path(), layout(Packing::PerChunk));
    let source = FakeSource::new(Some(blob()), 0);
    let reader = process.reader(&source);
    read_all(&reader).await;
    let mut part = vec![0; 10];
    assert!(reader.read_ready(3, 0, &mut part));
    assert!(!reader.read_ready(3, CHUNK as u32 - 9, &mut part), "beyond the chunk");
    // The chunk is lost, and a sync reports it.
    let data = dir.path().join(format!("{}.blob.data", process.layout.id));
    let file = fs::File::options().write(true).open(data).unwrap();
    file.write_all_at(&[0; CHUNK], 3 * 8192).unwrap();
    process.cached.unverify_all();
    assert!(!reader.read_ready(3, 0, &mut part));
    read_all(&reader).await;
    assert_eq!(source.requests(), CHUNKS + 1);
    assert!(reader.read_ready(3, 0, &mut part));
}

/// A write after the truncation makes the file long again, with zeros where chunks were.
#[tokio::test]
async fn truncated_cache_file_is_reverified() {
    for last_is_new in [false, true] {
        let dir = dir();
        let process = Process::start(dir.path(), layout(Packing::PerChunk));
        let source = FakeSource::new(Some(blob()), 0);
        let reader = process.reader(&source);
        let known = if last_is_new { CHUNKS - 1 } else { CHUNKS };
        for position in 0..known {
            read(&reader, position).await.unwrap();
        }
        let data = dir.path().join(format!("{}.blob.data", process.layout.id));
        fs::File::options().write(true).open(data).unwrap().set_len(0).unwrap();
        read(&reader, CHUNKS - 1).await.unwrap();
        read_all(&reader).await;
        assert_eq!(source.requests(), known + CHUNKS);
    }
}

/// Several threads extend the file at once.
#[tokio::test]
async fn growing_cache_file_is_not_taken_for_truncated() {
    let dir = dir();
    let mut layout = layout(Packing::PerChunk);
    let first = layout.chunks[0];
    layout.chunks = (0..20_000)
        .map(|index| Chunk {
            index,
            uncompressed_offset: u64::from(index) * 8192,
            ..first
        })
        .collect();
    let process = Process::start(dir.path(), layout);
    let (epoch, runtime) = (process.cached.epoch(), tokio::runtime::Handle::current());
    std::thread::scope(|scope| {
        for worker in 0..4 {
            let (process, runtime) = (&process, &runtime);
            scope.spawn(move || {
                let _runtime = runtime.enter();
                for chunk in process.layout.chunks.iter().skip(worker).step_by(4) {
                    process.cached.write(chunk, &content(0)).unwrap();
                }
            });
        }
    });
    assert_eq!(process.cached.epoch(), epoch);
}

#[tokio::test]
async fn failed_sync_makes_chunks_unverified() {
    let dir = dir();
    let layout = layout(Packing::PerChunk);
    // Accepts writes, and fails to sync.
    symlink("/dev/null", dir.path().join(format!("{}.blob.data", layout.id))).unwrap();
    let process = Process::start(dir.path(), layout);
    let epoch = process.cached.epoch();
    process.cached.write(&process.layout.chunks[0], &content(0)).unwrap();
    assert_eq!(process.cached.state(0), ChunkState::Ready);
    let start = Instant::now();
    while process.cached.epoch() == epoch {
        assert!(start.elapsed() < Duration::from_secs(30), "never synced");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert_eq!(process.cached.state(0), ChunkState::Unverified);
    // A write of an earlier epoch is confirmed late.
    process.cached.mark_verified(0, epoch);
    assert_eq!(process.cached.state(0), ChunkState::Unverified);
    read(&process.reader(&FakeSource::new(Some(blob()), 0)), 0)
        .await
        .unwrap();
}
