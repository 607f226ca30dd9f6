//! The directory of the blob cache: all cached blobs of a root, open or not, and the disk space that they use.

use std::{
    collections::{HashMap, HashSet},
    fs, io,
    path::{Path, PathBuf},
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, SystemTime},
};

use parking_lot::{Mutex, RwLock};

use super::{
    cache::CachedBlob,
    cache_counters::CacheCounters,
    disk_budget::{BlobUsage, DiskBudget, Reservation},
    layout::BlobLayout,
    size_limit::{DiskSpace, SizeLimit},
    write_log::WriteLog,
};
use crate::{atomic_file, disk_usage, log_limit::LogLimit};

/// Interval in which failures to write and to evict are logged.
const LOG_INTERVAL: Duration = Duration::from_secs(60);
/// Endings of the names of a blob's files. The journal comes first: it is removed first.
const ENDINGS: [&str; 3] = [".blob.claims", ".blob.data", ".blob.meta"];

/// All cached blobs of a root.
pub struct BlobCache {
    dir: Arc<CacheDir>,
}

/// What all blobs of a cache share.
pub(super) struct CacheDir {
    path: PathBuf,
    budget: DiskBudget,
    blobs: Mutex<HashMap<String, KnownBlob>>,
    /// Ids of blobs that are never evicted.
    pinned: RwLock<HashSet<String>>,
    /// Held while blobs are chosen and evicted.
    pub(super) pass: Mutex<()>,
    /// Whether a pass in the background was started and has not ended.
    pub(super) is_evicting: AtomicBool,
    /// Whether the file system can release parts of files.
    pub(super) can_punch: AtomicBool,
    /// For all blobs: they lie on the same disk, and on one that is nearly full some writes still succeed.
    pub(super) write_log: WriteLog,
    full_log: LogLimit,
    counters: Arc<CacheCounters>,
    pub(super) eviction_log: LogLimit,
}

/// A blob on disk.
struct KnownBlob {
    usage: Arc<BlobUsage>,
    /// Dead if no image uses the blob.
    open: Weak<CachedBlob>,
}

/// The limit of the cache is reached, and nothing can be evicted.
#[derive(Debug, thiserror::Error)]
#[error("the cache is at its limit of {0} bytes, and all that is cached is pinned")]
struct CacheFull(u64);

impl BlobCache {
    /// Opens the cache in `dir`, which is created if it is missing, with access for its owner only. Its blobs and what
    /// [`Self::set_other_usage`] tells use at most `limit`.
    pub fn open(dir: &Path, limit: SizeLimit) -> io::Result<Self> {
        atomic_file::make_private_dir(dir)?;
        atomic_file::remove_unfinished(dir)?;
        let budget = DiskBudget::new(limit);
        let blobs = find_blobs(dir, &budget)?;
        let dir = CacheDir {
            path: dir.to_owned(),
            budget,
            blobs: Mutex::new(blobs),
            pinned: RwLock::default(),
            pass: Mutex::default(),
            is_evicting: AtomicBool::new(false),
            can_punch: AtomicBool::new(true),
            write_log: WriteLog::default(),
            full_log: LogLimit::new(LOG_INTERVAL),
            counters: Arc::default(),
            eviction_log: LogLimit::new(LOG_INTERVAL),
        };
        dir.update_limit()?;
        Ok(Self { dir: Arc::new(dir) })
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
        if !self.dir.path.join(format!("{own}.blob.data")).exists() {
            let shared = self.dir.open_blob(&layout.id, layout.uncompressed_size)?;
            if shared.add_layout(layout) {
                return Ok(shared);
            }
            tracing::warn!(
                blob = %layout.id,
                bootstrap = %image,
                "caching blob separately: its chunk table contradicts another image"
            );
        }
        let own = self.dir.open_blob(&own, layout.uncompressed_size)?;
        if own.add_layout(layout) {
            return Ok(own);
        }
        Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "the chunk table contradicts itself",
        ))
    }

    /// Names of all blobs on disk, and the bytes of disk space that each takes.
    pub fn sizes(&self) -> Vec<(String, u64)> {
        let blobs = self.dir.blobs.lock();
        let sizes = blobs.iter().map(|(name, blob)| (name.clone(), blob.usage.allocated()));
        sizes.collect()
    }

    /// Bytes of disk space in use, and their limit.
    pub fn usage(&self) -> (u64, u64) {
        (self.dir.budget.used(), self.dir.budget.limit())
    }

    /// Bytes of disk space that pinned blobs take.
    pub fn pinned_usage(&self) -> u64 {
        let sizes = self.sizes().into_iter();
        let pinned = sizes.filter(|(name, _)| self.dir.is_pinned(name));
        pinned.map(|(_, bytes)| bytes).sum()
    }

    /// Counters of all its blobs.
    pub fn counters(&self) -> &Arc<CacheCounters> {
        &self.dir.counters
    }

    /// Sets the disk space of files outside of the cache that count for the limit, in bytes.
    pub fn set_other_usage(&self, bytes: u64) {
        self.dir.budget.set_other(bytes);
    }

    /// Sets the ids of the blobs that are never evicted, and whose writes may exceed the limit.
    pub fn set_pinned(&self, ids: HashSet<String>) {
        *self.dir.pinned.write() = ids;
    }

    /// Whether the blob of that name is pinned.
    pub fn is_pinned(&self, name: &str) -> bool {
        self.dir.is_pinned(name)
    }

    /// Removes a blob. If an image in use has it, all of its chunks are evicted instead, unless it is held. Blocks.
    pub fn clear(&self, name: &str) -> io::Result<()> {
        if self.dir.remove_closed(name)? {
            return Ok(());
        }
        let blobs = self.dir.open_blobs();
        let blob = blobs.iter().find(|blob| blob.name() == name);
        blob.map_or(Ok(()), |blob| blob.evict(|_| true))
    }

    /// Whether so much is cached that more would evict something.
    pub fn is_nearly_full(&self) -> bool {
        self.dir.budget.is_nearly_full()
    }

    /// Adapts to the free space of the disk, and evicts what exceeds the limit then. Saves when blobs in use were last
    /// used. To be called regularly. Blocks.
    pub fn maintain(&self) -> io::Result<()> {
        let mut used = self.dir.open_blobs();
        used.retain(|blob| blob.uses.latest() > blob.usage.last_use());
        used.sort_by_key(|blob| blob.uses.latest());
        used.iter().for_each(|blob| blob.save_last_use());
        self.dir.update_limit()?;
        if self.dir.budget.exceeds_high_watermark() {
            self.dir.evict_to_low_watermark();
        }
        Ok(())
    }
}

impl CacheDir {
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn budget(&self) -> &DiskBudget {
        &self.budget
    }

    pub(super) fn counters(&self) -> &CacheCounters {
        &self.counters
    }

    /// Whether the blob of that name is pinned.
    pub(super) fn is_pinned(&self, name: &str) -> bool {
        let id = name.split('.').next().unwrap_or(name);
        self.pinned.read().contains(id)
    }

    /// Reserves space for a write. Evicts colder chunks if the limit would be exceeded. `may_exceed` tells whether the
    /// write is to succeed even so.
    pub(super) fn reserve(&self, bytes: u64, may_exceed: impl FnOnce() -> bool) -> io::Result<Reservation<'_>> {
        if let Some(space) = self.budget.reserve(bytes) {
            return Ok(space);
        }
        if may_exceed() {
            return Ok(self.budget.reserve_beyond_limit(bytes));
        }
        self.evict_to_low_watermark();
        self.budget.reserve(bytes).ok_or_else(|| {
            let error = CacheFull(self.budget.limit());
            if let Some(suppressed) = self.full_log.permit() {
                tracing::warn!(suppressed, %error, "failed to make room in blob cache; unpin images or raise its limit");
            }
            io::Error::new(io::ErrorKind::QuotaExceeded, error)
        })
    }

    /// Records that a chunk was written.
    pub(super) fn on_write(&self) {
        self.write_log.on_write();
    }

    /// Records that a chunk could not be written.
    pub(super) fn on_failed_write(&self, blob: &str, error: &io::Error) {
        self.counters.record_failed_write(error);
        if self.write_log.begins_with_failed_write() {
            tracing::error!(%blob, %error, "failed to write to blob cache; free disk space or check the disk");
        }
    }

    /// The open blob of that name, opened if it is not yet.
    fn open_blob(self: &Arc<Self>, name: &str, uncompressed_size: u64) -> io::Result<Arc<CachedBlob>> {
        let mut blobs = self.blobs.lock();
        if let Some(blob) = blobs.get(name).and_then(|known| known.open.upgrade()) {
            return Ok(blob);
        }
        let usage = blobs.get(name).map(|known| Arc::clone(&known.usage));
        let usage = usage.unwrap_or_else(|| {
            let usage = BlobUsage::default();
            usage.set_last_use(self.budget.now());
            Arc::new(usage)
        });
        let blob = CachedBlob::open(self, name, uncompressed_size, Arc::clone(&usage))?;
        let blob = Arc::new(blob);
        let open = Arc::downgrade(&blob);
        blobs.insert(name.to_owned(), KnownBlob { usage, open });
        Ok(blob)
    }

    /// The blobs in use.
    pub(super) fn open_blobs(&self) -> Vec<Arc<CachedBlob>> {
        let blobs = self.blobs.lock();
        blobs.values().filter_map(|known| known.open.upgrade()).collect()
    }

    /// Names, disk space and last use of the blobs that are not in use and not pinned.
    pub(super) fn closed_blobs(&self) -> Vec<(String, u64, u64)> {
        let blobs = self.blobs.lock();
        let closed = blobs.iter().filter(|(_, known)| known.open.strong_count() == 0);
        closed
            .map(|(name, known)| (name.clone(), known.usage.allocated(), known.usage.last_use()))
            .filter(|(name, ..)| !self.is_pinned(name))
            .collect()
    }

    /// Removes the files of a blob, unless it is in use. Returns whether they are gone.
    ///
    /// The journal goes first, durably: it never lists chunks of a data file that is gone.
    pub(super) fn remove_closed(&self, name: &str) -> io::Result<bool> {
        // Locked throughout, so that the blob is not opened meanwhile.
        let mut blobs = self.blobs.lock();
        let Some(known) = blobs.get(name).filter(|known| known.open.strong_count() == 0) else {
            return Ok(false);
        };
        for ending in ENDINGS {
            match fs::remove_file(self.path.join(format!("{name}{ending}"))) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ if ending == ENDINGS[0] => atomic_file::sync_dir(&self.path)?,
                _ => {}
            }
        }
        self.budget.set_allocated(&known.usage, 0);
        blobs.remove(name);
        Ok(true)
    }

    fn update_limit(&self) -> io::Result<()> {
        let state = rustix::fs::statvfs(&self.path)?;
        self.budget.update_limit(DiskSpace {
            total: state.f_blocks.saturating_mul(state.f_frsize),
            available: state.f_bavail.saturating_mul(state.f_frsize),
        });
        Ok(())
    }

    /// Starts eviction in the background if the high watermark is exceeded. Called within a runtime.
    pub(super) fn evict_in_background(self: &Arc<Self>) {
        if !self.budget.exceeds_high_watermark() || self.is_evicting.swap(true, Ordering::AcqRel) {
            return;
        }
        let dir = Arc::clone(self);
        tokio::task::spawn_blocking(move || {
            dir.evict_to_low_watermark();
            dir.is_evicting.store(false, Ordering::Release);
        });
    }
}

/// The blobs in `dir`, with the disk space of each. The last uses have the order of the changes of the journals.
fn find_blobs(dir: &Path, budget: &DiskBudget) -> io::Result<HashMap<String, KnownBlob>> {
    let mut found: HashMap<String, (u64, SystemTime)> = HashMap::new();
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let name = entry.file_name();
        let blob = name.to_str();
        let blob = blob.and_then(|name| {
            ENDINGS
                .iter()
                .find_map(|ending| Some((name.strip_suffix(ending)?, *ending)))
        });
        let Some((blob, ending)) = blob else { continue };
        let metadata = entry.metadata()?;
        let (bytes, used) = found.entry(blob.to_owned()).or_insert((0, SystemTime::UNIX_EPOCH));
        *bytes += disk_usage::of_file(&metadata);
        if ending == ENDINGS[0] {
            *used = metadata.modified()?;
        }
    }
    let mut found: Vec<_> = found.into_iter().collect();
    found.sort_by_key(|(_, (_, used))| *used);
    let known = found.into_iter().map(|(name, (bytes, _))| {
        let usage = Arc::new(BlobUsage::default());
        usage.set_last_use(budget.tick());
        budget.set_allocated(&usage, bytes);
        let open = Weak::new();
        (name, KnownBlob { usage, open })
    });
    Ok(known.collect())
}
