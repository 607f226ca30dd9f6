//! Hosts that are away: readers wait for them without what other readers need.

use tokio::sync::watch;

use super::*;
use crate::blob::{
    bulk::DownloadProgress,
    download_all::download_all,
    source::{HostWait, SourcedBytes},
};

const LONG: Duration = Duration::from_secs(60);

/// A source whose host is away at first.
struct AwaySource {
    host: watch::Sender<Host>,
    waiting: Arc<AtomicUsize>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Host {
    Away,
    Back,
    Gone,
}

impl AwaySource {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            host: watch::Sender::new(Host::Away),
            waiting: Arc::default(),
        })
    }

    async fn until_waiting(&self, readers: usize) {
        let is_waiting = async {
            while self.waiting.load(Ordering::SeqCst) < readers {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        };
        tokio::time::timeout(LONG, is_waiting).await.unwrap();
    }
}

impl Source for AwaySource {
    fn read(&self, offset: u64, len: usize) -> Pending {
        let is_back = *self.host.borrow() == Host::Back;
        let bytes = Bytes::copy_from_slice(&blob()[offset as usize..offset as usize + len]);
        Box::pin(std::future::ready(match is_back {
            true => Ok(SourcedBytes::from(bytes)),
            false => Err(SourceError::HostAway(Arc::new(io::Error::other("away")))),
        }))
    }

    fn wait_for_host(&self, failure: SourceError, _: HostWait) -> Pending<()> {
        let (mut host, waiting) = (self.host.subscribe(), Arc::clone(&self.waiting));
        waiting.fetch_add(1, Ordering::SeqCst);
        Box::pin(async move {
            let host = *host.wait_for(|host| *host != Host::Away).await.unwrap();
            match host {
                Host::Back => Ok(()),
                _ => Err(failure.into_final()),
            }
        })
    }
}

fn reader(process: &Process, source: &Arc<AwaySource>) -> Arc<BlobReader> {
    let source: Arc<dyn Source> = Arc::clone(source) as _;
    let meta = MetaSource::Blob(Arc::clone(&source));
    let (layout, shared) = (Arc::clone(&process.layout), Arc::clone(&process.shared));
    BlobReader::new(layout, shared, source, process.scheduler.registry(""), meta)
}

#[tokio::test]
async fn readers_wait_for_the_host_without_reserved_memory() {
    for (packing, units) in [(Packing::PerChunk, CHUNKS), (Packing::Batch, 1)] {
        let dir = dir();
        let process = Process::start(dir.path(), layout(packing));
        let source = AwaySource::new();
        let reader = reader(&process, &source);
        let reads: Vec<_> = (0..CHUNKS)
            .map(|position| {
                let reader = Arc::clone(&reader);
                tokio::spawn(async move { read(&reader, position).await })
            })
            .collect();
        // Readers of a packed blob wait for its blob meta together.
        source.until_waiting(units).await;
        let scheduler = process.scheduler.registry("");
        // More than there would be if a reader held any.
        let all = async {
            (
                scheduler.reserve_memory(32 << 20).await,
                scheduler.reserve_memory(256 << 20).await,
            )
        };
        let all = tokio::time::timeout(LONG, all).await.unwrap();
        assert!(reads.iter().all(|read| !read.is_finished()));
        drop(all);
        source.host.send_replace(Host::Back);
        for read in reads {
            tokio::time::timeout(LONG, read).await.unwrap().unwrap().unwrap();
        }
    }
}

#[tokio::test]
async fn host_that_stays_away_fails_its_readers() {
    let dir = dir();
    let process = Process::start(dir.path(), layout(Packing::PerChunk));
    let source = AwaySource::new();
    source.host.send_replace(Host::Gone);
    let error = read(&reader(&process, &source), 0).await.unwrap_err();
    assert!(error.cause.is_blob_unavailable(), "{error}");
}

#[tokio::test]
async fn download_waits_for_the_host() {
    let dir = dir();
    let process = Process::start(dir.path(), layout(Packing::Batch));
    let source = AwaySource::new();
    let (reader, seeding) = (reader(&process, &source), Arc::clone(&source));
    let downloading = tokio::spawn(async move {
        let sources = |_| Arc::clone(&seeding) as Arc<dyn Source>;
        let progress = Arc::<DownloadProgress>::default();
        download_all(reader.fetcher(), &sources, &Arc::default(), &progress).await
    });
    source.until_waiting(1).await;
    source.host.send_replace(Host::Back);
    tokio::time::timeout(LONG, downloading).await.unwrap().unwrap().unwrap();
}
