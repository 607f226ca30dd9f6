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
//!
//! Chunks may be evicted at any time; [`super::eviction`] has the rules that readers and writers keep for that.
//! [`super::cache_dir`] has the directory with all blobs.

use std::{
    fs::{File, FileTimes},
    io,
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering, fence},
    },
    time::{Duration, SystemTime},
};

use parking_lot::{Mutex, RwLock};

use super::{
    cache_counters::CacheCounters,
    cache_dir::CacheDir,
    cache_file::open_or_read_only,
    chunk_journal::ChunkJournal,
    chunk_table::ChunkTable,
    disk_budget::BlobUsage,
    layout::{BlobLayout, Chunk},
    region_uses::RegionUses,
};
use crate::{disk_usage, log_limit::LogLimit};

/// Unit in which file systems allocate space, in bytes: an estimate.
const BLOCK: u64 = 4096;
/// Interval in which damage to a blob is logged: a truncated file concerns every chunk in it.
const DAMAGE_LOG_INTERVAL: Duration = Duration::from_secs(10);
/// Time from the first write to the sync.
const SYNC_DELAY: Duration = Duration::from_secs(5);

/// What this process knows of a chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChunkState {
    /// Not on disk, evicted, or corrupt there.
    Missing,
    /// In the journal, but not hashed since: must be hashed before use.
    Unverified,
    /// On disk and verified by this process.
    Ready,
}

/// One blob in the cache, shared by all images that use it.
pub struct CachedBlob {
    name: String,
    pub(super) dir: Arc<CacheDir>,
    pub(super) data: File,
    /// Held shared from before a chunk is written until it is journaled and ready; exclusively while chunks are
    /// evicted. Locked before `journal`.
    pub(super) write_gate: RwLock<()>,
    /// Locked before `chunks`.
    pub(super) journal: Mutex<ChunkJournal>,
    /// Path of the blob meta.
    meta: PathBuf,
    pub(super) chunks: Mutex<ChunkTable>,
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
    pub(super) usage: Arc<BlobUsage>,
    /// Disk space of the blob meta, in bytes.
    meta_bytes: AtomicU64,
    pub(super) uses: RegionUses,
    /// Held while chunks of the blob are evicted.
    pub(super) evicting: Mutex<()>,
    /// Number of [`Hold`]s.
    pub(super) holds: AtomicUsize,
    truncation_log: LogLimit,
    damage_log: LogLimit,
}

/// Prevents the eviction of a blob's chunks, and lets writes of the blob exceed the limit of the cache.
pub struct Hold(Arc<CachedBlob>);

impl CachedBlob {
    /// Opens the files of the blob `name` of so many uncompressed bytes.
    pub(super) fn open(
        dir: &Arc<CacheDir>,
        name: &str,
        uncompressed_size: u64,
        usage: Arc<BlobUsage>,
    ) -> io::Result<Self> {
        let path = |suffix: &str| dir.path().join(format!("{name}.{suffix}"));
        let data = open_or_read_only(&path("blob.data"))?;
        let journal = ChunkJournal::open(&path("blob.claims"))?;
        let cached = Self {
            name: name.to_owned(),
            dir: Arc::clone(dir),
            data,
            write_gate: RwLock::default(),
            chunks: Mutex::new(ChunkTable::new(&journal)),
            journal: Mutex::new(journal),
            meta: path("blob.meta"),
            epoch: AtomicU32::new(1),
            losses: AtomicU32::new(0),
            end: AtomicU64::new(0),
            sync_pending: AtomicBool::new(false),
            syncing: Mutex::default(),
            uses: RegionUses::new(uncompressed_size, usage.last_use()),
            usage,
            meta_bytes: AtomicU64::new(0),
            evicting: Mutex::default(),
            holds: AtomicUsize::new(0),
            truncation_log: LogLimit::new(DAMAGE_LOG_INTERVAL),
            damage_log: LogLimit::new(DAMAGE_LOG_INTERVAL),
        };
        cached.on_meta_cached();
        cached.save_last_use();
        Ok(cached)
    }

    /// Adds the chunks of `layout`. Returns false, and changes nothing, if they contradict those already known.
    pub(super) fn add_layout(&self, layout: &BlobLayout) -> bool {
        let journal = self.journal.lock();
        self.chunks.lock().add_layout(layout, &journal)
    }

    /// The blob's id, followed by the image's where the blob is not shared.
    pub fn name(&self) -> &str {
        &self.name
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

    /// Whether no chunk has been evicted or invalidated since the epoch was `epoch`. If so, what was read from the file
    /// since then, of a chunk that was ready then, are the chunk's bytes.
    pub fn is_epoch(&self, epoch: u32) -> bool {
        // The read before this, a system call, is not to be delayed beyond the load.
        fence(Ordering::SeqCst);
        self.epoch() == epoch
    }

    /// Records a use of the chunk, so that it is evicted later than others.
    pub fn touch(&self, chunk: &Chunk) {
        self.uses.touch(chunk.uncompressed_offset, self.dir.budget().now());
    }

    /// Prevents the eviction of chunks as long as the result exists. Blocks while chunks are being evicted.
    pub fn hold(self: &Arc<Self>) -> Hold {
        self.holds.fetch_add(1, Ordering::SeqCst);
        drop(self.evicting.lock());
        Hold(Arc::clone(self))
    }

    /// Counters of all blobs of the cache.
    pub fn counters(&self) -> &CacheCounters {
        self.dir.counters()
    }

    /// Path of the blob meta, which exists if it had to be fetched.
    pub fn meta_file(&self) -> &Path {
        &self.meta
    }

    /// The blob meta was written to its file.
    pub fn on_meta_cached(&self) {
        let bytes = self.meta.metadata().map_or(0, |meta| disk_usage::of_file(&meta));
        self.meta_bytes.store(bytes, Ordering::Relaxed);
        self.update_usage(&self.journal.lock());
    }

    /// Reads part of a chunk from disk. The caller has seen that the chunk is [`ChunkState::Ready`], or verifies the
    /// bytes itself.
    pub fn read(&self, chunk: &Chunk, offset: u32, into: &mut [u8]) -> io::Result<()> {
        self.data
            .read_exact_at(into, chunk.uncompressed_offset + u64::from(offset))
    }

    /// Writes a chunk whose bytes were verified. Called within a runtime, on a blocking thread.
    ///
    /// # Errors
    /// If the disk is full, for example, or the limit of the cache is reached and nothing can be evicted. The failure
    /// is logged; readers are served from memory, and the chunk is fetched again at its next use.
    pub fn write(self: &Arc<Self>, chunk: &Chunk, plain: &[u8]) -> io::Result<()> {
        let space = self
            .dir
            .reserve(plain.len() as u64 + BLOCK, || self.may_exceed_limit())?;
        let outcome = self.write_and_journal(chunk, plain);
        drop(space);
        match &outcome {
            Ok(()) => {
                self.dir.on_write();
                self.schedule_sync();
            }
            Err(error) => {
                self.update_usage(&self.journal.lock());
                self.dir.on_failed_write(&self.name, error);
            }
        }
        self.dir.evict_in_background();
        outcome
    }

    fn write_and_journal(&self, chunk: &Chunk, plain: &[u8]) -> io::Result<()> {
        // Checked before the write: it would make a truncated file long again, with zeros where chunks were. `end` is
        // read before the length, since other threads extend the file meanwhile.
        let end = self.end.load(Ordering::Acquire);
        if self.data.metadata()?.len() < end {
            self.on_truncation();
        }
        let losses = self.losses();
        let _not_evicting = self.write_gate.read();
        self.data.write_all_at(plain, chunk.uncompressed_offset)?;
        self.uses.touch(chunk.uncompressed_offset, self.dir.budget().tick());
        // Under one lock, so that every ready chunk is journaled.
        let mut journal = self.journal.lock();
        journal.add(chunk)?;
        self.mark_written(chunk.index, losses);
        self.update_usage(&journal);
        Ok(())
    }

    /// A chunk was written. It becomes ready if `losses`, their number before that, is unchanged.
    fn mark_written(&self, index: u32, losses: u32) {
        let mut chunks = self.chunks.lock();
        if let Some((chunk, state)) = chunks.by_index.get_mut(&index) {
            if losses != self.losses() {
                *state = ChunkState::Unverified;
                return;
            }
            *state = ChunkState::Ready;
            self.on_ready(chunk);
        }
    }

    /// A chunk was hashed and matches its digest. It becomes ready if `epoch`, the epoch before that, is still the
    /// current one. A missing chunk stays missing: it may have been evicted after it was read.
    pub fn mark_verified(&self, index: u32, epoch: u32) {
        let mut chunks = self.chunks.lock();
        if let Some((chunk, state)) = chunks.by_index.get_mut(&index)
            && *state != ChunkState::Missing
        {
            if epoch != self.epoch() {
                *state = ChunkState::Unverified;
                return;
            }
            *state = ChunkState::Ready;
            self.on_ready(chunk);
        }
    }

    fn on_ready(&self, chunk: &Chunk) {
        let end = chunk.uncompressed_offset + u64::from(chunk.uncompressed_size);
        self.end.fetch_max(end, Ordering::AcqRel);
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

    /// The chunk as read in that epoch does not match its digest: it is missing from now on.
    pub fn on_corrupt(&self, chunk: &Chunk, epoch: u32) {
        if !self.is_epoch(epoch) {
            // It may have been evicted while it was read.
            self.set_state(chunk.index, ChunkState::Unverified);
            return;
        }
        // It was evicted, or another reader was here before.
        if self.state(chunk.index) == ChunkState::Missing {
            return;
        }
        self.counters().record_corrupt_chunk();
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

    /// Also begins a new epoch, so that readers that know the chunk as ready notice. A missing chunk stays missing:
    /// only a write ends that.
    fn set_state(&self, index: u32, new: ChunkState) {
        let mut chunks = self.chunks.lock();
        if let Some((_, state)) = chunks.by_index.get_mut(&index)
            && *state != ChunkState::Missing
        {
            *state = new;
        }
        self.next_epoch();
    }

    /// Called with `chunks` locked.
    pub(super) fn next_epoch(&self) {
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
        drop(journal);
        self.sync_journal()
    }

    /// Waits until all that was written has reached the disk.
    pub fn sync_all(&self) -> io::Result<()> {
        self.sync()?;
        self.sync_journal()?;
        // Nothing else needs the files' names to be on disk: without its files, a blob is not cached.
        crate::atomic_file::sync_dir(self.dir.path())
    }

    /// Waits until the journal has reached the disk. It is not locked meanwhile.
    pub(super) fn sync_journal(&self) -> io::Result<()> {
        let file = self.journal.lock().file();
        file.sync_data().inspect_err(|_| self.journal.lock().on_failed_sync())
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
        let synced = self.data.sync_data().inspect_err(|error| {
            if self.dir.write_log.begins_with_failed_sync() {
                tracing::error!(blob = %self.name, %error, "failed to sync blob cache; re-verifying all chunks");
            }
            self.unverify_all();
        });
        if synced.is_ok() {
            self.dir.write_log.on_sync();
        }
        synced
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

impl CachedBlob {
    /// Whether the limit of the cache does not apply: an administrator wants all of the blob to be cached.
    fn may_exceed_limit(&self) -> bool {
        self.holds.load(Ordering::SeqCst) > 0 || self.dir.is_pinned(&self.name)
    }

    /// Whether more chunks in the cache would have others evicted.
    pub(super) fn is_cache_nearly_full(&self) -> bool {
        self.dir.budget().is_nearly_full()
    }

    /// Counts the space that the files take now. Called with the journal locked, so that a later count comes later.
    pub(super) fn update_usage(&self, journal: &ChunkJournal) {
        // Without the metadata, the count is corrected later.
        if let Ok(data) = self.data.metadata() {
            let meta = self.meta_bytes.load(Ordering::Relaxed);
            let bytes = disk_usage::of_file(&data) + journal.len().next_multiple_of(BLOCK) + meta;
            self.dir.budget().set_allocated(&self.usage, bytes);
        }
    }

    /// Notes the time of the last use where a later process finds it: it is the time of the journal's last change.
    pub(super) fn save_last_use(&self) {
        self.usage.set_last_use(self.uses.latest());
        let times = FileTimes::new().set_modified(SystemTime::now());
        // Without it, the blob is evicted too early.
        self.journal.lock().file().set_times(times).ok();
    }
}

impl Drop for CachedBlob {
    fn drop(&mut self) {
        // Not saved: blobs are dropped in no particular order when the program stops.
        self.usage.set_last_use(self.uses.latest());
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.0.holds.fetch_sub(1, Ordering::SeqCst);
    }
}
