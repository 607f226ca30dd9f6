//! How often what fails is tried, whom it holds up, and who is blamed.

use super::*;
use crate::blob::{bulk::DownloadProgress, download_all::download_all};

async fn download(
    reader: &Arc<BlobReader>,
    source: &Arc<Fake>,
    progress: &Arc<DownloadProgress>,
) -> Result<(), ReadError> {
    let sources = |_| Arc::clone(source) as Arc<dyn Source>;
    download_all(reader.fetcher(), &sources, &Arc::default(), progress).await
}

#[tokio::test]
async fn what_no_range_can_be_had_of_is_asked_for_once() {
    for packing in [Packing::PerChunk, Packing::Batch] {
        let dir = dir();
        let process = Process::start(dir.path(), layout(packing));
        let source = Fake::new(Some(blob()), 0);
        // The blob meta is there then, and is not to blame.
        read(&process.reader(&source), 0).await.unwrap();
        let gone = Fake::new(None, 0);
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
async fn what_cannot_be_kept_is_asked_for_once() {
    let dir = dir();
    let layout = layout(Packing::PerChunk);
    symlink("/dev/full", dir.path().join(format!("{}.blob.data", layout.id))).unwrap();
    let (process, source) = (Process::start(dir.path(), layout), Fake::new(Some(blob()), 0));
    let error = download(&process.reader(&source), &source, &Arc::default()).await;
    assert!(matches!(error.unwrap_err().cause, ReadCause::Keep(_)));
    assert_eq!(source.requests(), 1);
}

#[tokio::test]
async fn what_does_not_come_as_a_whole_comes_in_parts() {
    let dir = dir();
    let process = Process::start(dir.path(), layout(Packing::PerChunk));
    let last = (CHUNKS - 1) * CHUNK;
    let (source, progress) = (Fake::without(Some(blob()), 0, last..last + CHUNK), Arc::default());
    let error = download(&process.reader(&source), &source, &progress)
        .await
        .unwrap_err();
    assert!(matches!(error.cause, ReadCause::Fetch(_)), "{error}");
    assert_eq!(
        progress.cached.load(Ordering::SeqCst),
        last as u64,
        "all others are there"
    );
}

#[tokio::test]
async fn who_gave_a_malformed_meta_is_blamed() {
    let dir = dir();
    let mut bytes = blob();
    bytes[CHUNKS * CHUNK..].fill(0);
    let source = Fake::new(Some(bytes), 0);
    let reader = Process::start(dir.path(), layout(Packing::Batch)).reader(&source);
    read(&reader, 0).await.unwrap_err();
    assert_eq!(source.blamed.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn failures_of_other_images_delay_but_once() {
    for packing in [Packing::PerChunk, Packing::Batch] {
        let dir = dir();
        let process = Process::start(dir.path(), layout(packing));
        let (bad, good) = (
            Fake::without(Some(blob()), 300, 0..CHUNKS * CHUNK),
            Fake::new(Some(blob()), 0),
        );
        // Its readers never give up.
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
        // Each of the eight asks anew when it is refused.
        assert!(more <= 3 * 8, "they waited for {more} of the others' requests");
        assert!(good.requests() <= 2, "once for all: {}", good.requests());
        for task in attack {
            task.await.unwrap();
        }
    }
}

#[tokio::test]
async fn on_a_full_disk_what_was_started_is_not_fetched_again() {
    for packing in [Packing::PerChunk, Packing::Batch] {
        let dir = dir();
        let layout = layout(packing);
        symlink("/dev/full", dir.path().join(format!("{}.blob.data", layout.id))).unwrap();
        let process = Process::start(dir.path(), layout);
        let source = Fake::new(Some(blob()), 100);
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
