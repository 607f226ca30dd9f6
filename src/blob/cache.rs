//! The blob cache on disk: the uncompressed bytes of each data blob, and which of its chunks are present.
//!
//! A blob `ID` is two files, or three. `ID.blob.data` is sparse and holds each chunk at its uncompressed offset: the
//! layout of nydus-storage's file cache, and what the kernel's EROFS takes as a device once it is complete.
//! `ID.blob.claims` is the journal of the chunks that were written. `ID.blob.meta` is the blob meta of a packed blob,
//! if it had to be fetched.
//!
//! The journal is no proof: the two files are not synced in order, and a cache may be copied from another host or lie
//! on a failing disk. So a journaled chunk is hashed before its first use in a process, and fetched again if it does
//! not match its digest.
//!
//! Images that share a blob share the files, unless their chunk tables contradict each other or the journal. Such an
//! image gets files `ID.IMAGE.…` of its own, from then on.
//!
//! Written chunks reach the disk later, or fail to. A blob is synced a few seconds after a write. If the sync fails,
//! the pages in memory are dropped and all chunks become unverified: a new *epoch* begins.

use std::{
    collections::{BTreeMap, HashMap},
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
    },
    time::Duration,
};

use parking_lot::Mutex;

use super::{
    cache_counters::CacheCounters,
    chunk_journal::ChunkJournal,
    layout::{BlobLayout, Chunk},
};
use crate::log_limit::LogLimit;

/// Interval in which write failures are logged.
const WRITE_LOG_INTERVAL: Duration = Duration::from_secs(60);
/// Interval in which damage to a blob is logged: a truncated file concerns every chunk in it.
const DAMAGE_LOG_INTERVAL: Duration = Duration::from_secs(10);
/// Time from the first write to the sync.
const SYNC_DELAY: Duration = Duration::from_secs(5);

/// All cached blobs of a root.
pub struct BlobCache {
    dir: PathBuf,
    /// For all blobs: they lie on the same disk, and on one that is nearly full some writes still succeed.
    write_log: Arc<LogLimit>,
    counters: Arc<CacheCounters>,
    blobs: Mutex<HashMap<String, Weak<CachedBlob>>>,
}

/// What this process knows of a chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChunkState {
    /// Not on disk, or corrupt there.
    Missing,
    /// In the journal, but not hashed since: must be hashed before use.
    Unverified,
    /// On disk and verified by this process.
    Ready,
}

/// One blob in the cache, shared by all images that use it.
pub struct CachedBlob {
    name: String,
    data: File,
    /// Locked before `chunks`.
    journal: Mutex<ChunkJournal>,
    /// Path of the blob meta.
    meta: PathBuf,
    chunks: Mutex<ChunkTable>,
    /// Number of invalidations; changes with `chunks` locked. Never 0.
    epoch: AtomicU32,
    /// Number of failed syncs.
    losses: AtomicU32,
    /// End of the last ready chunk: the data file is at least this long, unless it was truncated.
    end: AtomicU64,
    /// Whether a sync is scheduled.
    sync_pending: AtomicBool,
    /// Held during a sync and the reaction to its failure: the kernel reports a failed write only once.
    syncing: Mutex<()>,
    write_log: Arc<LogLimit>,
    counters: Arc<CacheCounters>,
    truncation_log: LogLimit,
    damage_log: LogLimit,
}

/// The chunks of the images that share the blob.
#[derive(Default)]
struct ChunkTable {
    by_index: HashMap<u32, (Chunk, ChunkState)>,
    /// Uncompressed ranges in use: start → end.
    ranges: BTreeMap<u64, u64>,
}

impl BlobCache {
    /// Opens the cache in `dir`, which is created if it is missing, with access for its owner only.
    pub fn open(dir: &Path) -> io::Result<Self> {
        crate::atomic_file::make_private_dir(dir)?;
        crate::atomic_file::remove_unfinished(dir)?;
        Ok(Self {
            dir: dir.to_owned(),
            write_log: Arc::new(LogLimit::new(WRITE_LOG_INTERVAL)),
            counters: Arc::default(),
            blobs: Mutex::default(),
        })
    }

    /// The cached blob that `layout` describes.
    ///
    /// Images whose chunk tables agree share one. An image whose table contradicts another image in use, or the
    /// journal, gets a blob of its own, named after `image` (the hexadecimal digest of its bootstrap layer). So a
    /// malicious image cannot harm another, and an original layer may be converted in two ways.
    ///
    /// # Errors
    /// If the files cannot be opened, or the chunk table contradicts itself.
    pub fn blob(&self, layout: &BlobLayout, image: &str) -> io::Result<Arc<CachedBlob>> {
        let own = format!("{}.{image}", layout.id);
        if !self.dir.join(format!("{own}.blob.data")).exists() {
            let shared = self.named(&layout.id)?;
            if shared.add_layout(layout) {
                return Ok(shared);
            }
            tracing::warn!(
                blob = %layout.id,
                bootstrap = %image,
                "caching blob separately: its chunk table contradicts another image"
            );
        }
        let own = self.named(&own)?;
        if own.add_layout(layout) {
            return Ok(own);
        }
        Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "the chunk table contradicts itself",
        ))
    }

    /// Names of all blobs on disk, and the bytes of disk space that their chunks take.
    pub fn sizes(&self) -> io::Result<Vec<(String, u64)>> {
        let mut sizes = Vec::new();
        for entry in fs::read_dir(&self.dir)? {
            let entry = entry?;
            let name = entry.file_name();
            if let Some(name) = name.to_str().and_then(|name| name.strip_suffix(".blob.data")) {
                // st_blocks counts 512 bytes on every file system (stat(2)).
                sizes.push((name.to_owned(), entry.metadata()?.blocks() * 512));
            }
        }
        Ok(sizes)
    }

    /// Counters of all its blobs.
    pub fn counters(&self) -> &Arc<CacheCounters> {
        &self.counters
    }

    fn named(&self, name: &str) -> io::Result<Arc<CachedBlob>> {
        let mut blobs = self.blobs.lock();
        if let Some(blob) = blobs.get(name).and_then(Weak::upgrade) {
            return Ok(blob);
        }
        blobs.retain(|_, blob| blob.strong_count() > 0);
        let blob = Arc::new(CachedBlob::open(self, name)?);
        blobs.insert(name.to_owned(), Arc::downgrade(&blob));
        Ok(blob)
    }
}

impl CachedBlob {
    fn open(cache: &BlobCache, name: &str) -> io::Result<Self> {
        let dir = &cache.dir;
        let path = |suffix: &str| dir.join(format!("{name}.{suffix}"));
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false).mode(0o600);
        let is_new = !path("blob.data").exists();
        let data = options.open(path("blob.data"))?;
        let journal = ChunkJournal::open(&path("blob.claims"))?;
        if is_new {
            crate::atomic_file::sync_dir(dir)?;
        }
        let ranges = journal.ranges().collect();
        Ok(Self {
            name: name.to_owned(),
            data,
            journal: Mutex::new(journal),
            meta: path("blob.meta"),
            chunks: Mutex::new(ChunkTable {
                ranges,
                ..ChunkTable::default()
            }),
            epoch: AtomicU32::new(1),
            losses: AtomicU32::new(0),
            end: AtomicU64::new(0),
            sync_pending: AtomicBool::new(false),
            syncing: Mutex::default(),
            write_log: Arc::clone(&cache.write_log),
            counters: Arc::clone(&cache.counters),
            truncation_log: LogLimit::new(DAMAGE_LOG_INTERVAL),
            damage_log: LogLimit::new(DAMAGE_LOG_INTERVAL),
        })
    }

    /// Adds the chunks of `layout`. Returns false, and changes nothing, if they contradict those already known.
    fn add_layout(&self, layout: &BlobLayout) -> bool {
        let journal = self.journal.lock();
        self.chunks.lock().add_layout(layout, &journal)
    }

    /// The blob's id, followed by the image's where the blob is not shared.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The counters of the cache.
    pub fn counters(&self) -> &CacheCounters {
        &self.counters
    }

    /// What is known of the chunk of that index.
    pub fn state(&self, index: u32) -> ChunkState {
        self.chunks
            .lock()
            .by_index
            .get(&index)
            .map_or(ChunkState::Missing, |(_, state)| *state)
    }

    /// Whether the journal lists the chunk, even if it turned out to be corrupt.
    pub fn is_journaled(&self, index: u32) -> bool {
        self.journal.lock().contains(index)
    }

    /// Number of failed syncs: what was written before may be lost.
    pub fn losses(&self) -> u32 {
        self.losses.load(Ordering::Acquire)
    }

    /// A change invalidates what callers know of chunks. Never 0.
    pub fn epoch(&self) -> u32 {
        self.epoch.load(Ordering::Acquire)
    }

    /// Path of the blob meta, which exists if it had to be fetched.
    pub fn meta_file(&self) -> &Path {
        &self.meta
    }

    /// Reads part of a chunk from disk. The caller has seen that the chunk is [`ChunkState::Ready`], or verifies the
    /// bytes itself.
    pub fn read(&self, chunk: &Chunk, offset: u32, into: &mut [u8]) -> io::Result<()> {
        self.data
            .read_exact_at(into, chunk.uncompressed_offset + u64::from(offset))
    }

    /// Writes a chunk whose bytes were verified. Called within a runtime.
    ///
    /// # Errors
    /// If the disk is full, for example. The failure is logged; readers are served from memory, and the chunk is
    /// fetched again at its next use.
    pub fn write(self: &Arc<Self>, chunk: &Chunk, plain: &[u8]) -> io::Result<()> {
        let Err(error) = self.write_and_journal(chunk, plain) else {
            self.schedule_sync();
            return Ok(());
        };
        self.counters.record_failed_write(&error);
        if let Some(suppressed) = self.write_log.permit() {
            tracing::error!(
                blob = %self.name,
                suppressed,
                %error,
                "failed to write to blob cache; free disk space or check the disk"
            );
        }
        Err(error)
    }

    fn write_and_journal(&self, chunk: &Chunk, plain: &[u8]) -> io::Result<()> {
        // Checked before the write: it would make a truncated file long again, with zeros where chunks were. `end` is
        // read before the length, since other threads extend the file meanwhile.
        let end = self.end.load(Ordering::Acquire);
        if self.data.metadata()?.len() < end {
            self.on_truncation();
        }
        let epoch = self.epoch();
        self.data.write_all_at(plain, chunk.uncompressed_offset)?;
        // Under one lock, so that every ready chunk is journaled.
        let mut journal = self.journal.lock();
        journal.add(chunk)?;
        self.mark_verified(chunk.index, epoch);
        Ok(())
    }

    /// A chunk was written or hashed, and matches its digest. It becomes ready if `epoch`, the epoch before that, is
    /// still the current one.
    pub fn mark_verified(&self, index: u32, epoch: u32) {
        let mut chunks = self.chunks.lock();
        if let Some((chunk, state)) = chunks.by_index.get_mut(&index) {
            if epoch != self.epoch() {
                *state = ChunkState::Unverified;
                return;
            }
            *state = ChunkState::Ready;
            let end = chunk.uncompressed_offset + u64::from(chunk.uncompressed_size);
            self.end.fetch_max(end, Ordering::AcqRel);
        }
    }

    /// The data file was truncated externally: every chunk is hashed before its next use.
    pub fn on_truncation(&self) {
        // Concurrent readers notice it together.
        if let Some(suppressed) = self.truncation_log.permit() {
            tracing::error!(
                blob = %self.name,
                suppressed,
                "cache file: truncated externally; re-verifying all chunks"
            );
        }
        self.unverify_all();
    }

    /// [`Self::read`] failed. The chunk is hashed before its next use; in a truncated file, it is missing.
    pub fn on_unreadable(&self, chunk: &Chunk, error: &io::Error) {
        if error.kind() == io::ErrorKind::UnexpectedEof {
            self.on_truncation();
            self.invalidate(chunk.index);
            return;
        }
        if let Some(suppressed) = self.damage_log.permit() {
            tracing::warn!(
                blob = %self.name,
                chunk = chunk.index,
                suppressed,
                %error,
                "failed to read cached chunk; fetching it again"
            );
        }
        self.set_state(chunk.index, ChunkState::Unverified);
    }

    /// The chunk on disk does not match its digest: it is missing from now on.
    pub fn on_corrupt(&self, chunk: &Chunk) {
        self.counters.record_corrupt_chunk();
        if let Some(suppressed) = self.damage_log.permit() {
            tracing::warn!(
                blob = %self.name,
                chunk = chunk.index,
                suppressed,
                "dropped corrupt cached chunk; fetching it again"
            );
        }
        self.invalidate(chunk.index);
    }

    /// The chunk has to be fetched again.
    pub fn invalidate(&self, index: u32) {
        self.set_state(index, ChunkState::Missing);
    }

    /// Also begins a new epoch, so that readers that know the chunk as ready notice.
    fn set_state(&self, index: u32, new: ChunkState) {
        let mut chunks = self.chunks.lock();
        if let Some((_, state)) = chunks.by_index.get_mut(&index) {
            *state = new;
        }
        self.next_epoch();
    }

    /// Called with `chunks` locked.
    fn next_epoch(&self) {
        // Epochs last too long for numbers to recur. 0 is the initial value of readers.
        self.epoch.store(self.epoch().wrapping_add(1).max(1), Ordering::Release);
    }

    /// Removes those of the chunks from the journal that are still missing, so that no later process hashes them.
    pub fn remove_from_journal(&self, indexes: &[u32]) -> io::Result<()> {
        let mut journal = self.journal.lock();
        for index in indexes {
            if self.state(*index) == ChunkState::Missing {
                journal.remove(*index)?;
            }
        }
        journal.sync()
    }

    /// Waits until all that was written has reached the disk.
    pub fn sync_all(&self) -> io::Result<()> {
        self.sync()?;
        self.journal.lock().sync()
    }

    /// Drops clean pages, so that the next reads come from disk.
    pub fn drop_page_cache(&self) {
        rustix::fs::fadvise(&self.data, 0, None, rustix::fs::Advice::DontNeed).ok();
    }

    /// Syncs the data file after [`SYNC_DELAY`]. Called within a runtime.
    fn schedule_sync(self: &Arc<Self>) {
        if self.sync_pending.swap(true, Ordering::AcqRel) {
            return;
        }
        // A dropped blob needs no sync: once it is opened again, all chunks are hashed.
        let cached = Arc::downgrade(self);
        tokio::spawn(async move {
            tokio::time::sleep(SYNC_DELAY).await;
            if let Some(cached) = cached.upgrade() {
                tokio::task::spawn_blocking(move || cached.sync().ok());
            }
        });
    }

    fn sync(&self) -> io::Result<()> {
        let _syncing = self.syncing.lock();
        // Reset before the sync, so that what is written meanwhile schedules another one.
        self.sync_pending.store(false, Ordering::Release);
        self.data.sync_data().inspect_err(|error| {
            tracing::error!(blob = %self.name, %error, "failed to sync blob cache; re-verifying all chunks");
            self.unverify_all();
        })
    }

    /// Written chunks may be lost: every chunk is hashed before its next use.
    pub(super) fn unverify_all(&self) {
        self.losses.fetch_add(1, Ordering::AcqRel);
        // The kernel may still have the pages that it failed to write. Hashing these would say nothing of the disk.
        self.drop_page_cache();
        let mut chunks = self.chunks.lock();
        self.next_epoch();
        self.end.store(0, Ordering::Release);
        for (_, state) in chunks.by_index.values_mut() {
            if *state == ChunkState::Ready {
                *state = ChunkState::Unverified;
            }
        }
    }
}

impl ChunkTable {
    /// Adds the chunks of `layout`. Returns false, and changes nothing, if they contradict those already known.
    fn add_layout(&mut self, layout: &BlobLayout, journal: &ChunkJournal) -> bool {
        let mut new: Vec<&Chunk> = Vec::new();
        for chunk in &layout.chunks {
            match self.by_index.get(&chunk.index) {
                Some((known, _)) if known == chunk => {}
                Some(_) => return false,
                None => new.push(chunk),
            }
        }
        let mut reserved = Vec::with_capacity(new.len());
        let fits = new.iter().all(|chunk| match journal.matches(chunk) {
            // The range of a journaled chunk has been reserved since the file was opened.
            Some(is_same) => is_same,
            None => self
                .reserve_range(chunk)
                .inspect(|start| reserved.push(*start))
                .is_some(),
        });
        if !fits {
            for start in reserved {
                self.ranges.remove(&start);
            }
            return false;
        }
        for chunk in new {
            let state = if journal.contains(chunk.index) {
                ChunkState::Unverified
            } else {
                ChunkState::Missing
            };
            self.by_index.insert(chunk.index, (*chunk, state));
        }
        true
    }

    /// Reserves the chunk's uncompressed range and returns its start; `None` if it overlaps another chunk.
    fn reserve_range(&mut self, chunk: &Chunk) -> Option<u64> {
        let start = chunk.uncompressed_offset;
        let end = start.checked_add(u64::from(chunk.uncompressed_size))?;
        let overlaps = self
            .ranges
            .range(..end)
            .next_back()
            .is_some_and(|(_, known_end)| *known_end > start);
        (!overlaps).then(|| {
            self.ranges.insert(start, end);
            start
        })
    }
}
