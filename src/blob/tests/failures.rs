//! Failures: how often requests are retried, which readers they delay, and what is reported to the source.

use super::*;
use crate::blob::{bulk::DownloadProgress, download_all::download_all};

async fn download(
    reader: &Arc<BlobReader>,
    source: &Arc<FakeSource>,
    progress: &Arc<DownloadProgress>,
) -> Result<(), ReadError> {
    let sources = |_| Arc::clone(source) as Arc<dyn Source>;
    download_all(reader.fetcher(), &sources, &Arc::default(), progress).await
}

#[tokio::test]
async fn unavailable_blob_is_requested_once() {
    for packing in [Packing::PerChunk, Packing::Batch] {
        let dir = dir();
        let process = Process::start(dir.path(), layout(packing));
        let source = FakeSource::new(Some(blob()), 0);
        // Caches the blob meta, so that it cannot be the reason.
        read(&process.reader(&source), 0).await.unwrap();
        let gone = FakeSource::new(None, 0);
        let error = download(&process.reader(&gone), &gone, &Arc::default())
            .await
            .unwrap_err();
        assert!(matches!(error.cause, ReadCause::Fetch(_)), "{error}");
        assert_eq!(gone.requests(), 1);
        download(&process.reader(&source), &source, &Arc::default())
            .await
            .unwrap();
    }
}

#[tokio::test]
async fn chunks_that_cannot_be_cached_are_requested_once() {
    let dir = dir();
    let layout = layout(Packing::PerChunk);
    symlink("/dev/full", dir.path().join(format!("{}.blob.data", layout.id))).unwrap();
    let (process, source) = (Process::start(dir.path(), layout), FakeSource::new(Some(blob()), 0));
    let error = download(&process.reader(&source), &source, &Arc::default()).await;
    assert!(matches!(error.unwrap_err().cause, ReadCause::CacheWrite(_)));
    assert_eq!(source.requests(), 1);
}

#[tokio::test]
async fn failed_span_is_fetched_in_parts() {
    let dir = dir();
    let process = Process::start(dir.path(), layout(Packing::PerChunk));
    let last = (CHUNKS - 1) * CHUNK;
    let (source, progress) = (FakeSource::failing(Some(blob()), 0, last..last + CHUNK), Arc::default());
    let error = download(&process.reader(&source), &source, &progress)
        .await
        .unwrap_err();
    assert!(matches!(error.cause, ReadCause::Fetch(_)), "{error}");
    assert_eq!(
        progress.cached.load(Ordering::SeqCst),
        last as u64,
        "all others are cached"
    );
}

#[tokio::test]
async fn malformed_meta_is_reported_to_the_source() {
    let dir = dir();
    let mut bytes = blob();
    bytes[CHUNKS * CHUNK..].fill(0);
    let source = FakeSource::new(Some(bytes), 0);
    let reader = Process::start(dir.path(), layout(Packing::Batch)).reader(&source);
    read(&reader, 0).await.unwrap_err();
    assert_eq!(source.reported.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn failures_of_another_image_delay_a_reader_once() {
    for packing in [Packing::PerChunk, Packing::Batch] {
        let dir = dir();
        let process = Process::start(dir.path(), layout(packing));
        let (bad, good) = (
            FakeSource::failing(Some(blob()), 300, 0..CHUNKS * CHUNK),
            FakeSource::new(Some(blob()), 0),
        );
        // The readers of the other image retry for ever.
        let attack = (0..8).map(|_| {
            let reader = process.reader(&bad);
            tokio::spawn(async move { while read(&reader, 1).await.is_err() {} })
        });
        let attack: Vec<_> = attack.collect();
        while bad.requests() == 0 {
            tokio::task::yield_now().await;
        }
        tokio::time::sleep(Duration::from_millis(if packing == Packing::Batch { 400 } else { 0 })).await;
        let (reader, before) = (process.reader(&good), bad.requests());
        let tasks = (0..10).map(|_| {
            let reader = Arc::clone(&reader);
            tokio::spawn(async move { read(&reader, 1).await })
        });
        for task in tasks.collect::<Vec<_>>() {
            task.await.unwrap().unwrap();
        }
        let more = bad.requests() - before;
        // Each of the eight sends a new request after a failure.
        assert!(
            more <= 3 * 8,
            "the reader waited for {more} requests of the other image"
        );
        assert!(good.requests() <= 2, "one request for all readers: {}", good.requests());
        for task in attack {
            task.await.unwrap();
        }
    }
}

#[tokio::test]
async fn started_chunks_are_fetched_once_on_a_full_disk() {
    for packing in [Packing::PerChunk, Packing::Batch] {
        let dir = dir();
        let layout = layout(packing);
        symlink("/dev/full", dir.path().join(format!("{}.blob.data", layout.id))).unwrap();
        let process = Process::start(dir.path(), layout);
        let source = FakeSource::new(Some(blob()), 100);
        let reader = process.reader(&source);
        let started: Vec<_> = (0..CHUNKS).map(|position| reader.start(position)).collect();
        for (position, started) in started.into_iter().enumerate() {
            let mut bytes = vec![0; CHUNK];
            reader.read(position, started, 0, &mut bytes).await.unwrap();
            assert!(bytes == content(position));
        }
        let expected = if packing == Packing::Batch {
            1 + CHUNKS / BATCH
        } else {
            CHUNKS
        };
        assert_eq!(source.requests(), expected);
    }
}

/// On a full disk, only the flight has the good chunk.
#[tokio::test]
async fn corrupt_chunk_does_not_fail_another_of_its_unit() {
    let dir = dir();
    let mut layout = layout(Packing::Batch);
    layout.chunks[0].digest = [0; 32];
    symlink("/dev/full", dir.path().join(format!("{}.blob.data", layout.id))).unwrap();
    let process = Process::start(dir.path(), layout);
    let source = FakeSource::new(Some(blob()), 100);
    let reader = process.reader(&source);
    let started = [0, 1].map(|position| reader.start(position));
    let mut bytes = vec![0; CHUNK];
    for (position, started) in started.into_iter().enumerate() {
        let read = reader.read(position, started, 0, &mut bytes).await;
        match position {
            0 => assert!(matches!(read.unwrap_err().cause, ReadCause::Digest)),
            _ => read.unwrap(),
        }
    }
    assert!(bytes == content(1));
}
