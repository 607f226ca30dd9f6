//! Tests of eviction, also against readers and writers at the same time.

use std::{
    fs,
    path::Path,
    sync::atomic::{AtomicBool, AtomicUsize},
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use nydus_utils::digest;
use sha2::{Digest as _, Sha256};
use tempfile::TempDir;

use super::*;
use crate::blob::{
    cache_dir::BlobCache,
    chunk_journal::ChunkJournal,
    layout::{BlobLayout, Chunk},
    reader::{BlobReader, MetaSource},
    scheduler::FetchScheduler,
    shared::SharedBlobs,
    size_limit::{DiskShare, SizeLimit},
    source::{Pending, Source},
};

/// Not a multiple of a block.
const CHUNK: usize = (128 << 10) - 100;
/// Distance between the starts of two chunks.
const STRIDE: usize = 128 << 10;
const MIB: u64 = 1 << 20;
/// Chunks in a region.
const PER_REGION: usize = MIB as usize / STRIDE;

/// Bytes of a chunk; none is zero.
fn content(blob: u8, index: usize) -> Vec<u8> {
    let byte = |at: usize| ((at * 7 + index * 31 + usize::from(blob) * 101 + at / 255) % 255) as u8 + 1;
    (0..CHUNK).map(byte).collect()
}

/// A blob of so many chunks.
fn layout(blob: u8, chunks: usize) -> BlobLayout {
    let chunk = |index: usize| Chunk {
        index: index as u32,
        digest: Sha256::digest(content(blob, index)).into(),
        compressed_offset: (index * CHUNK) as u64,
        compressed_size: CHUNK as u32,
        uncompressed_offset: (index * STRIDE) as u64,
        uncompressed_size: CHUNK as u32,
        compressed: false,
    };
    BlobLayout {
        id: hex::encode([blob; 32]),
        digester: digest::Algorithm::Sha256,
        ..BlobLayout::of_plain((0..chunks).map(chunk).collect())
    }
}

/// Delivers a blob, and counts requests.
struct TestSource {
    blob: u8,
    requests: AtomicUsize,
}

impl Source for TestSource {
    fn read(&self, offset: u64, len: usize) -> Pending {
        self.requests.fetch_add(1, Ordering::SeqCst);
        let (offset, blob) = (offset as usize, self.blob);
        let chunks = offset / CHUNK..(offset + len).div_ceil(CHUNK);
        let bytes: Vec<_> = chunks.clone().flat_map(|index| content(blob, index)).collect();
        let from = offset - chunks.start * CHUNK;
        let part = Bytes::copy_from_slice(&bytes[from..from + len]);
        Box::pin(async move { Ok(part.into()) })
    }
}

fn mebibytes(limit: u64) -> SizeLimit {
    SizeLimit {
        limit: DiskShare::Bytes(limit * MIB),
        ..SizeLimit::NONE
    }
}

/// An image's view of a blob.
struct Opened {
    reader: Arc<BlobReader>,
    cached: Arc<CachedBlob>,
    source: Arc<TestSource>,
    blob: u8,
    chunks: usize,
}

impl Opened {
    fn new(blobs: &SharedBlobs, blob: u8, chunks: usize) -> Self {
        let layout = Arc::new(layout(blob, chunks));
        let shared = blobs.blob(&layout, "cd").unwrap();
        let requests = AtomicUsize::new(0);
        let source = Arc::new(TestSource { blob, requests });
        let cached = Arc::clone(shared.cached());
        let scheduler = FetchScheduler::new(Duration::from_secs(60), false, usize::MAX).registry("");
        let meta = MetaSource::Blob(Arc::clone(&source) as _);
        let reader = BlobReader::new(layout, shared, Arc::clone(&source) as _, scheduler, meta);
        Self {
            reader,
            cached,
            source,
            blob,
            chunks,
        }
    }

    async fn read(&self, position: usize) {
        let mut bytes = vec![0; CHUNK - 10];
        self.reader.read(position, None, 10, &mut bytes).await.unwrap();
        assert!(
            bytes == content(self.blob, position)[10..],
            "chunk {position} reads wrong"
        );
    }

    async fn read_all(&self) {
        for position in 0..self.chunks {
            self.read(position).await;
        }
    }

    fn is_cached(&self, position: usize) -> bool {
        self.cached.is_journaled(position as u32)
    }

    fn requests(&self) -> usize {
        self.source.requests.load(Ordering::SeqCst)
    }
}

fn dir() -> TempDir {
    tempfile::tempdir().unwrap()
}

/// What a later process finds in the journal.
fn journaled(dir: &Path, blob: u8) -> usize {
    let path = dir.join(format!("{}.blob.claims", hex::encode([blob; 32])));
    ChunkJournal::open(&path).unwrap().chunks().count()
}

fn data_bytes(dir: &Path, blob: u8) -> u64 {
    let path = dir.join(format!("{}.blob.data", hex::encode([blob; 32])));
    crate::disk_usage::of_file(&fs::metadata(path).unwrap())
}

fn evict_all(cached: &CachedBlob) {
    cached.evict(|_| true).unwrap();
}

#[test]
fn punched_ranges_are_whole_blocks_without_what_is_kept() {
    let punched = |victims: &[(u64, u64)], kept: &[(u64, u64)]| ranges_to_punch(victims.iter().copied(), kept, 10);
    assert_eq!(punched(&[(10, 20)], &[]), [(10, 20)]);
    assert_eq!(punched(&[(12, 18), (20, 33)], &[]), [(10, 40)]);
    assert_eq!(punched(&[(12, 18)], &[(0, 11), (19, 30)]), [(11, 19)]);
    assert_eq!(
        punched(&[(10, 50)], &[(20, 30), (35, 36)]),
        [(10, 20), (30, 35), (36, 50)]
    );
    assert_eq!(punched(&[(10, 20), (40, 50)], &[(0, 100), (12, 13)]), []);
    assert_eq!(
        punched(&[(15, 20), (41, 45)], &[(0, 12), (43, 44)]),
        [(12, 20), (40, 43), (44, 50)]
    );
    assert_eq!(
        punched(&[(u64::MAX - 3, u64::MAX)], &[]),
        [(u64::MAX / 10 * 10, u64::MAX)]
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn evicted_chunks_free_their_space_and_are_fetched_again() {
    let dir = dir();
    let blobs = SharedBlobs::open(dir.path(), SizeLimit::NONE).unwrap();
    let opened = Opened::new(&blobs, 1, 16);
    opened.read_all().await;
    assert!(data_bytes(dir.path(), 1) >= 16 * CHUNK as u64 && journaled(dir.path(), 1) == 16);
    let requests = opened.requests();
    opened.cached.evict(|chunk| chunk.index < 8).unwrap();
    assert_eq!(journaled(dir.path(), 1), 8);
    assert!(data_bytes(dir.path(), 1) <= 8 * STRIDE as u64);
    opened.read(12).await;
    assert_eq!(opened.requests(), requests);
    opened.read_all().await;
    assert!(opened.requests() > requests);
    evict_all(&opened.cached);
    assert_eq!((data_bytes(dir.path(), 1), journaled(dir.path(), 1)), (0, 0));
    assert_eq!(blobs.cache().usage().0, 0);
    opened.read_all().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn chunk_written_again_before_the_punch_is_kept() {
    let dir = dir();
    let blobs = SharedBlobs::open(dir.path(), SizeLimit::NONE).unwrap();
    let opened = Opened::new(&blobs, 1, 16);
    opened.read_all().await;
    let mut victims: Vec<_> = opened.cached.journal.lock().chunks().collect();
    victims.sort_unstable_by_key(|chunk| chunk.start);
    opened.cached.forget(&victims).unwrap();
    // From here on, a crash leaves no entry.
    assert_eq!(journaled(dir.path(), 1), 0);
    opened.cached.sync_journal().unwrap();
    for position in [0, 5, 6, 15] {
        opened.read(position).await;
    }
    let requests = opened.requests();
    opened.cached.punch(&victims).unwrap();
    for position in [0, 5, 6, 15] {
        opened.read(position).await;
    }
    assert_eq!((opened.requests(), journaled(dir.path(), 1)), (requests, 4));
    assert!(data_bytes(dir.path(), 1) <= 5 * STRIDE as u64);
    opened.read_all().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn chunk_hashed_before_it_was_punched_does_not_become_ready() {
    let dir = dir();
    let opened = Opened::new(&SharedBlobs::open(dir.path(), SizeLimit::NONE).unwrap(), 1, 2);
    opened.read_all().await;
    opened.cached.unverify_all();
    for late_epoch in [false, true] {
        let before = opened.cached.epoch();
        evict_all(&opened.cached);
        let epoch = if late_epoch { opened.cached.epoch() } else { before };
        opened.cached.mark_verified(0, epoch);
        opened
            .cached
            .on_unreadable(&opened.reader.layout().chunks[1], &io::Error::other("unreadable"));
        assert_eq!([0, 1].map(|index| opened.cached.state(index)), [ChunkState::Missing; 2]);
        opened.read_all().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn evicted_range_is_free_for_another_chunk_table() {
    let dir = dir();
    let blobs = SharedBlobs::open(dir.path(), SizeLimit::NONE).unwrap();
    Opened::new(&blobs, 1, 4).read_all().await;
    let first_only = Opened::new(&blobs, 1, 1);
    first_only.read(0).await;
    evict_all(&first_only.cached);
    let all = Opened::new(&blobs, 1, 4);
    assert!(Arc::ptr_eq(&all.cached, &first_only.cached));
    all.read_all().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn least_recently_used_regions_are_evicted_first() {
    let dir = dir();
    let blobs = SharedBlobs::open(dir.path(), mebibytes(8)).unwrap();
    let [old, new] = [1, 2].map(|blob| Opened::new(&blobs, blob, 4 * PER_REGION));
    old.read_all().await;
    // Used again, and therefore kept.
    old.read(PER_REGION).await;
    new.read_all().await;
    old.read(PER_REGION).await;
    let more = Opened::new(&blobs, 3, 2 * PER_REGION);
    more.read_all().await;
    blobs.cache().maintain().unwrap();
    assert!(old.is_cached(PER_REGION) && !old.is_cached(0));
    assert!((0..more.chunks).all(|position| more.is_cached(position)));
    assert!((PER_REGION..new.chunks).all(|position| new.is_cached(position)));
}

#[tokio::test(flavor = "multi_thread")]
async fn closed_blobs_are_removed_in_the_order_of_their_last_use_also_after_a_restart() {
    let dir = dir();
    {
        let blobs = SharedBlobs::open(dir.path(), SizeLimit::NONE).unwrap();
        for blob in [1, 2, 3] {
            Opened::new(&blobs, blob, 2 * PER_REGION).read_all().await;
        }
        Opened::new(&blobs, 1, 2 * PER_REGION).read(0).await;
    }
    // A coarse clock of the file system must not matter.
    for (blob, age) in [(1, 10), (2, 30), (3, 20)] {
        let path = dir.path().join(format!("{}.blob.claims", hex::encode([blob; 32])));
        let journal = File::options().append(true).open(path).unwrap();
        journal
            .set_modified(SystemTime::now() - Duration::from_secs(age))
            .unwrap();
    }
    let blobs = SharedBlobs::open(dir.path(), mebibytes(6)).unwrap();
    blobs.cache().maintain().unwrap();
    let names = |blobs: &SharedBlobs| {
        let mut sizes = blobs.cache().sizes();
        sizes.sort();
        sizes
            .into_iter()
            .map(|(name, _)| name[..2].to_owned())
            .collect::<Vec<_>>()
    };
    assert_eq!(names(&blobs), ["01", "03"]);
    assert!(!dir.path().join(format!("{}.blob.data", hex::encode([2; 32]))).exists());
    let open = Opened::new(&blobs, 3, 2 * PER_REGION);
    open.read(0).await;
    Opened::new(&blobs, 4, 2 * PER_REGION).read_all().await;
    blobs.cache().maintain().unwrap();
    // The region of 3 that was not read is as old as before.
    assert!(open.is_cached(0) && !open.is_cached(PER_REGION));
}

#[tokio::test(flavor = "multi_thread")]
async fn pinned_and_held_blobs_are_not_evicted_and_may_exceed_the_limit() {
    let dir = dir();
    let blobs = SharedBlobs::open(dir.path(), mebibytes(4)).unwrap();
    let [pinned, held, other] = [1, 2, 3].map(|blob| Opened::new(&blobs, blob, 3 * PER_REGION));
    blobs.cache().set_pinned([pinned.reader.layout().id.clone()].into());
    let hold = held.cached.hold();
    for opened in [&pinned, &held, &other] {
        opened.read_all().await;
    }
    blobs.cache().maintain().unwrap();
    for kept in [&pinned, &held] {
        assert!((0..kept.chunks).all(|position| kept.is_cached(position)));
    }
    let (used, limit) = blobs.cache().usage();
    assert!(used > limit && !(0..other.chunks).any(|position| other.is_cached(position)));
    // Served without the cache.
    other.read_all().await;
    drop(hold);
    blobs.cache().maintain().unwrap();
    assert!(blobs.cache().usage().0 <= limit && pinned.is_cached(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn blob_larger_than_the_limit_is_read_within_the_limit() {
    let dir = dir();
    let blobs = SharedBlobs::open(dir.path(), mebibytes(6)).unwrap();
    let opened = Opened::new(&blobs, 1, 24 * PER_REGION);
    for _ in 0..2 {
        for position in 0..opened.chunks {
            opened.read(position).await;
            let used = data_bytes(dir.path(), 1);
            assert!(used <= 6 * MIB, "{used} bytes after chunk {position}");
        }
        // What was read last is still there.
        let requests = opened.requests();
        for position in opened.chunks - 3 * PER_REGION..opened.chunks {
            opened.read(position).await;
        }
        assert_eq!(opened.requests(), requests);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn usage_counts_what_is_on_disk_also_after_a_restart() {
    let dir = dir();
    let on_disk = || crate::disk_usage::of_dir(dir.path()).unwrap();
    {
        let blobs = SharedBlobs::open(dir.path(), SizeLimit::NONE).unwrap();
        let opened = Opened::new(&blobs, 1, 20);
        opened.read_all().await;
        assert_eq!(blobs.cache().usage().0, on_disk());
        opened.cached.evict(|chunk| chunk.index % 3 == 0).unwrap();
        assert_eq!(blobs.cache().usage().0, on_disk());
        fs::write(opened.cached.meta_file(), vec![1; 10_000]).unwrap();
        opened.cached.on_meta_cached();
        assert_eq!(blobs.cache().usage().0, on_disk());
        drop(opened);
        Opened::new(&blobs, 1, 20).read_all().await;
        assert_eq!(blobs.cache().usage().0, on_disk());
    }
    let cache = BlobCache::open(dir.path(), SizeLimit::NONE).unwrap();
    assert_eq!(cache.usage().0, on_disk());
    cache.set_other_usage(1000);
    cache.set_other_usage(500);
    assert_eq!(cache.usage().0, on_disk() + 500);
}

/// Readers of random chunks never get anything else than the chunk, while all chunks are evicted again and again.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn readers_race_with_eviction() {
    let dir = dir();
    let blobs = SharedBlobs::open(dir.path(), SizeLimit::NONE).unwrap();
    let opened = Arc::new(Opened::new(&blobs, 1, 24));
    opened.read_all().await;
    let is_over = Arc::new(AtomicBool::new(false));
    let evictor = {
        let (opened, is_over) = (Arc::clone(&opened), Arc::clone(&is_over));
        tokio::task::spawn_blocking(move || {
            let mut rounds = 0;
            while !is_over.load(Ordering::Relaxed) {
                let part = fastrand::u32(..4);
                opened.cached.evict(|chunk| chunk.index % 4 == part).unwrap();
                rounds += 1;
            }
            rounds
        })
    };
    let copiers: Vec<_> = (0..2)
        .map(|_| {
            let (opened, is_over) = (Arc::clone(&opened), Arc::clone(&is_over));
            tokio::task::spawn_blocking(move || {
                let (mut bytes, mut ready) = (vec![0; CHUNK], 0);
                while !is_over.load(Ordering::Relaxed) {
                    let position = fastrand::usize(..opened.chunks);
                    if opened.reader.read_ready(position, 0, &mut bytes) {
                        ready += 1;
                        assert!(bytes == content(1, position), "chunk {position} was copied wrong");
                    }
                }
                ready
            })
        })
        .collect();
    let readers: Vec<_> = (0..3)
        .map(|_| {
            let opened = Arc::clone(&opened);
            tokio::spawn(async move {
                for _ in 0..100 {
                    opened.read(fastrand::usize(..opened.chunks)).await;
                    if fastrand::u8(..10) == 0 {
                        opened.cached.unverify_all();
                    }
                }
            })
        })
        .collect();
    for reader in readers {
        reader.await.unwrap();
    }
    is_over.store(true, Ordering::Relaxed);
    assert!(evictor.await.unwrap() > 10);
    for copier in copiers {
        assert!(copier.await.unwrap() > 0);
    }
    // What the journal lists is right for a later process, too.
    drop(opened);
    let blobs = SharedBlobs::open(dir.path(), SizeLimit::NONE).unwrap();
    let later = Opened::new(&blobs, 1, 24);
    let listed: Vec<_> = (0..24).filter(|position| later.is_cached(*position)).collect();
    for position in &listed {
        later.read(*position).await;
    }
    assert_eq!(later.requests(), 0);
}
