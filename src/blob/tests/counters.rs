//! What the cache counts, and the list of waits.

use super::*;
use crate::{
    blob::cache_counters::{CacheStats, ReadTotals},
    waits::WaitKind,
};

/// Totals of so many reads by [`read`].
fn totals(chunks: u64) -> ReadTotals {
    ReadTotals {
        chunks,
        bytes: chunks * (CHUNK as u64 - 10),
    }
}

#[tokio::test]
async fn hits_misses_and_corrupt_chunks_are_counted() {
    let dir = dir();
    let source = FakeSource::new(Some(blob()), 0);
    let first = Process::start(dir.path(), layout(Packing::PerChunk));
    let reader = first.reader(&source);
    read_all(&reader).await;
    read(&reader, 0).await.unwrap();
    let counted = first.cached.counters().stats();
    assert_eq!((counted.misses, counted.hits), (totals(CHUNKS as u64), totals(1)));
    drop((reader, first));

    // A chunk on disk is a hit too, although it is hashed first.
    let process = Process::start(dir.path(), layout(Packing::PerChunk));
    let damaged = process.layout.chunks[1].uncompressed_offset;
    let file = fs::OpenOptions::new()
        .write(true)
        .open(dir.path().join(format!("{}.blob.data", process.cached.name())));
    std::os::unix::fs::FileExt::write_all_at(&file.unwrap(), &[0xee; 20], damaged).unwrap();
    let reader = process.reader(&source);
    read(&reader, 0).await.unwrap();
    read(&reader, 1).await.unwrap();
    let expected = CacheStats {
        hits: totals(1),
        misses: totals(1),
        corrupt_chunks: 1,
        failed_writes: 0,
        evicted_bytes: 0,
    };
    assert_eq!(process.cached.counters().stats(), expected);
    // A read that fails is neither.
    let unreachable = process.reader(&FakeSource::new(None, 0));
    process.cached.invalidate(2);
    read(&unreachable, 2).await.unwrap_err();
    assert_eq!(process.cached.counters().stats(), expected);
}

#[tokio::test]
async fn reader_that_waits_for_a_chunk_is_listed() {
    let dir = dir();
    let process = Process::start(dir.path(), layout(Packing::PerChunk));
    let reader = process.reader(&FakeSource::new(Some(blob()), 300));
    let waits = Arc::clone(process.scheduler.waits());
    let task = tokio::spawn(async move { read(&reader, 3).await });
    while waits.summary(WaitKind::Chunk).0 == 0 {
        tokio::task::yield_now().await;
    }
    let what = &waits.oldest(1)[0].what;
    assert_eq!(*what, format!("chunk 3 of blob {} from ", process.layout.id));
    task.await.unwrap().unwrap();
    assert!(waits.oldest(1).is_empty());
}
