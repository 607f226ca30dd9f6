//! [`Status`]: what `nydus-store status` shows.
//!
//! The daemon gathers it when asked, and sends it as JSON over the control socket.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use serde::{Deserialize, Serialize};

use super::{
    Sources,
    fuse_counters::{Operation, Outcome},
};
use crate::{
    digest::Digest,
    error_chain::ErrorChain,
    image::loaded::LoadedImage,
    registry::HostStatus,
    store::database::Published,
    waits::{Wait, WaitKind, Waits},
};

/// Most waits that are listed.
const MAX_LISTED_WAITS: usize = 10;

/// The state of a daemon, and totals since its start.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// Version of the daemon.
    pub version: String,
    /// Seconds since its start.
    pub uptime_seconds: f64,
    /// Number of times that a daemon has continued the sessions of an earlier one.
    pub takeovers: u64,
    /// The published images.
    pub images: Vec<ImageStatus>,
    /// Their layers.
    pub layers: LayerTotals,
    /// The blob cache.
    pub cache: CacheStatus,
    /// Bytes that went in and out.
    pub traffic: Traffic,
    /// What went wrong.
    pub errors: ErrorTotals,
    /// What is waited for at present.
    pub waits: WaitStatus,
    /// Registries, mirrors and the hosts that these led to.
    pub hosts: Vec<HostStatus>,
}

/// A published image.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ImageStatus {
    /// References under which it was published, by pulls and by name.
    pub names: BTreeSet<String>,
    /// Digest of its manifest.
    pub digest: Digest,
    /// What serves its files.
    pub engine: Engine,
    /// Its data; `None` unless the image is loaded, which it is while a container uses it.
    pub loaded: Option<CachedData>,
}

/// What serves the files of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Engine {
    /// This program, through FUSE.
    Fuse,
}

/// How much of an image's data is cached.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CachedData {
    /// Uncompressed bytes in the cache.
    pub cached_bytes: u64,
    /// Uncompressed bytes in all.
    pub total_bytes: u64,
}

/// Numbers of layers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerTotals {
    /// Published layers.
    pub published: usize,
    /// Those that images or containers in Podman's or CRI-O's storage need; `None` if that storage cannot be read.
    pub in_use: Option<usize>,
}

/// The blob cache.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CacheStatus {
    /// Disk space that cached chunks and metadata of images take, in bytes.
    pub bytes: u64,
    /// What that space is limited to at present, in bytes.
    pub limit_bytes: u64,
    /// Disk space that was freed to keep the limit, in bytes.
    pub evicted_bytes: u64,
    /// The last chunk that could not be written, if there is one.
    pub failed_write: Option<FailedWriteStatus>,
}

/// A chunk that could not be written.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct FailedWriteStatus {
    /// The cause.
    pub error: String,
    /// How long ago.
    pub seconds_ago: f64,
}

/// Bytes since the start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Traffic {
    /// Received from the network.
    pub fetched_bytes: u64,
    /// Returned to readers.
    pub served_bytes: u64,
}

/// Errors since the start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorTotals {
    /// Reads that ended with an input/output error.
    pub failed_reads: u64,
    /// Look-ups that did: images that could not be loaded.
    pub failed_lookups: u64,
    /// Announced images that could not be published.
    pub failed_announcements: u64,
    /// Answers of registries whose bytes did not match a digest.
    pub corrupt_answers: u64,
    /// Cached chunks that did not match a digest.
    pub corrupt_chunks: u64,
    /// Chunks that could not be cached.
    pub failed_cache_writes: u64,
}

/// Waits in progress.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct WaitStatus {
    /// Number of chunks that readers wait for.
    pub chunks: usize,
    /// Number of announced pulls.
    pub announcements: usize,
    /// Number of images that are being loaded.
    pub images: usize,
    /// The oldest of all, at most ten.
    pub oldest: Vec<LastingWait>,
}

/// A wait in progress.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LastingWait {
    /// What kind of work it is for.
    pub kind: WaitKind,
    /// What is waited for.
    pub what: String,
    /// How long.
    pub seconds: f64,
}

impl Status {
    /// Gathers the status. What cannot be read is left out, since this is for when something is wrong. Blocks.
    pub(super) fn gather(sources: &Sources) -> Self {
        let published = sources.store.published();
        let client = sources.images.client();
        Self {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            uptime_seconds: sources.uptime().as_secs_f64(),
            takeovers: sources.takeovers,
            images: images(&published, &sources.images.loaded()),
            layers: LayerTotals {
                published: published.layers.len(),
                in_use: layers_in_use(sources, &published),
            },
            cache: CacheStatus::of(sources),
            traffic: Traffic {
                fetched_bytes: client.stats().bytes_received,
                served_bytes: sources.fuse.bytes_read(),
            },
            errors: ErrorTotals::of(sources),
            waits: WaitStatus::of(sources.images.waits()),
            hosts: client.hosts(),
        }
    }
}

/// The published images, by their digests.
fn images(published: &Published, loaded: &[Arc<LoadedImage>]) -> Vec<ImageStatus> {
    let mut names: BTreeMap<Digest, BTreeSet<String>> = BTreeMap::new();
    for tree in published.layers.values().filter_map(|layer| layer.tree.as_ref()) {
        names
            .entry(tree.manifest)
            .or_default()
            .extend(tree.sources.iter().cloned());
    }
    for image in published.images.values() {
        names
            .entry(image.manifest)
            .or_default()
            .extend(image.names.iter().cloned());
    }
    let loaded = |digest: &Digest| loaded.iter().find(|image| image.digest == *digest);
    let status = |(digest, names): (Digest, _)| ImageStatus {
        names,
        engine: Engine::Fuse,
        loaded: loaded(&digest).map(|image| CachedData::of(image)),
        digest,
    };
    names.into_iter().map(status).collect()
}

fn layers_in_use(sources: &Sources, published: &Published) -> Option<usize> {
    match sources.store.required_layers() {
        Ok(required) => Some(
            published
                .layers
                .keys()
                .filter(|id| required.layers.contains(*id))
                .count(),
        ),
        Err(error) => {
            tracing::debug!(error = %ErrorChain(&error), "failed to determine which layers are in use");
            None
        }
    }
}

impl CachedData {
    fn of(image: &LoadedImage) -> Self {
        let blobs = image.contents.blobs();
        Self {
            cached_bytes: blobs.iter().map(|blob| blob.cached_bytes()).sum(),
            total_bytes: blobs.iter().map(|blob| blob.chunk_bytes()).sum(),
        }
    }

    /// How much of it is cached, in percent. Rounds down, so that 100 means complete.
    pub fn percent(self) -> u64 {
        let percent = u128::from(self.cached_bytes) * 100 / u128::from(self.total_bytes).max(1);
        if self.total_bytes == 0 { 100 } else { percent as u64 }
    }
}

impl CacheStatus {
    fn of(sources: &Sources) -> Self {
        let cache = sources.images.cache();
        let (counters, (bytes, limit_bytes)) = (cache.counters(), cache.usage());
        let failed = counters.last_failed_write();
        Self {
            bytes,
            limit_bytes,
            evicted_bytes: counters.stats().evicted_bytes,
            failed_write: failed.map(|failed| FailedWriteStatus {
                error: failed.error,
                seconds_ago: failed.at.elapsed().as_secs_f64(),
            }),
        }
    }
}

impl ErrorTotals {
    fn of(sources: &Sources) -> Self {
        let cache = sources.images.cache().counters().stats();
        let failed = |operation| sources.fuse.count(operation, Outcome::IoError);
        Self {
            failed_reads: failed(Operation::Read),
            failed_lookups: failed(Operation::Lookup),
            failed_announcements: sources.announcer.counters().failed(),
            corrupt_answers: sources.images.client().stats().corrupt_answers,
            corrupt_chunks: cache.corrupt_chunks,
            failed_cache_writes: cache.failed_writes,
        }
    }
}

impl WaitStatus {
    fn of(waits: &Waits) -> Self {
        let count = |kind| waits.summary(kind).0;
        let lasting = |wait: Wait| LastingWait {
            kind: wait.kind,
            seconds: wait.since.elapsed().as_secs_f64(),
            what: wait.what,
        };
        Self {
            chunks: count(WaitKind::Chunk),
            announcements: count(WaitKind::Announcement),
            images: count(WaitKind::Image),
            oldest: waits.oldest(MAX_LISTED_WAITS).into_iter().map(lasting).collect(),
        }
    }
}
