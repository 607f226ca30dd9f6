//! What is kept on disk of each data blob: its uncompressed bytes and which chunks of them are there.
//!
//! A blob `ID` is two files, or three. `ID.blob.data` is sparse and holds each chunk at its uncompressed offset: the layout of
//! nydus-storage's file cache, and what the kernel's EROFS takes as a device once it is complete. `ID.blob.claims` is a
//! log of the chunks that were written. The two are not synced in order, and a cache may be copied from another host or
//! lie on a failing disk, so that it only claims: a claimed chunk is hashed again before its first use in this process,
//! and fetched again if it is not what it should be. `ID.blob.meta` is the blob meta of a packed blob, if it had to be
//! fetched.
//!
//! Images that share a blob share the files, unless what they say of its chunks differs from what others in use say or
//! from what is on disk. Such an image gets files `ID.IMAGE.…` of its own, from then on.
//!
//! What is written reaches the disk later, and may fail to. So it is synced a few seconds after it was written; if that
//! fails, what the kernel has in memory is dropped and everything is only claimed again: a new *epoch* begins.

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
    time::{Duration, Instant},
};

use parking_lot::Mutex;

use super::{
    chunk_journal::ChunkJournal,
    layout::{BlobLayout, Chunk},
};

/// How often it is logged that the cache cannot be written to.
const LOG_EVERY: Duration = Duration::from_secs(60);
/// How long what was written may not be on disk without anybody having asked for it.
const SYNC_AFTER: Duration = Duration::from_secs(5);

/// All cached blobs of a root.
pub struct BlobCache {
    dir: PathBuf,
    /// When a failure to write was last logged. All blobs lie on the same disk, and on one that is nearly full some
    /// chunks still fit while others do not.
    last_failure: Arc<Mutex<Option<Instant>>>,
    blobs: Mutex<HashMap<String, Weak<CachedBlob>>>,
}

/// What is known of a chunk in this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChunkState {
    /// Not on disk.
    Missing,
    /// Written by an earlier process: to be hashed before use.
    Claimed,
    /// On disk and verified by this process.
    Ready,
}

/// One blob in the cache, shared by all images that use it.
pub struct CachedBlob {
    name: String,
    data: File,
    /// Locked before `chunks`.
    claims: Mutex<ChunkJournal>,
    /// Where the blob meta is kept.
    meta: PathBuf,
    chunks: Mutex<Chunks>,
    /// Counts how often all chunks were doubted; changes with `chunks` locked. Never 0.
    epoch: AtomicU32,
    /// Counts how often what was written did not reach the disk.
    losses: AtomicU32,
    /// Up to where the data file has to reach at least, for the chunks that are ready.
    end: AtomicU64,
    /// Whether a sync is to come.
    sync_pending: AtomicBool,
    /// Held while syncing and drawing the conclusions: the system tells of a failure but once.
    syncing: Mutex<()>,
    last_failure: Arc<Mutex<Option<Instant>>>,
}

/// What the images that share the blob say of its chunks, and which are there.
#[derive(Default)]
struct Chunks {
    by_index: HashMap<u32, (Chunk, ChunkState)>,
    /// Uncompressed ranges in use: start → end.
    ranges: BTreeMap<u64, u64>,
}

impl BlobCache {
    /// Opens the cache in `dir`, which is made if it is missing; only its owner can enter it.
    pub fn open(dir: &Path) -> io::Result<Self> {
        crate::atomic_file::make_private_dir(dir)?;
        crate::atomic_file::remove_unfinished(dir)?;
        Ok(Self {
            dir: dir.to_owned(),
            last_failure: Arc::default(),
            blobs: Mutex::default(),
        })
    }

    /// The cached blob that `layout` describes.
    ///
    /// Images whose tables agree share one. A table that contradicts those of the images in use, or what is on disk, gets a
    /// blob of its own, named after `image` (the hexadecimal digest of the image's bootstrap layer), so that one image
    /// can do no harm to another: by lies, or since an original layer was converted in two ways.
    pub fn blob(&self, layout: &BlobLayout, image: &str) -> io::Result<Arc<CachedBlob>> {
        let own = format!("{}.{image}", layout.id);
        if !self.dir.join(format!("{own}.blob.data")).exists() {
            let shared = self.named(&layout.id)?;
            if shared.add(layout) {
                return Ok(shared);
            }
            tracing::warn!(
                blob = layout.id,
                image,
                "the image's chunk table contradicts another image's: caching apart"
            );
        }
        let own = self.named(&own)?;
        if own.add(layout) {
            return Ok(own);
        }
        Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "the chunk table contradicts itself",
        ))
    }

    /// Names of all blobs on disk, and the bytes that their chunks take of it.
    pub fn sizes(&self) -> io::Result<Vec<(String, u64)>> {
        let mut sizes = Vec::new();
        for entry in fs::read_dir(&self.dir)? {
            let entry = entry?;
            let name = entry.file_name();
            if let Some(name) = name.to_str().and_then(|name| name.strip_suffix(".blob.data")) {
                // In units of 512 bytes, whatever the file system's are (stat(2)).
                sizes.push((name.to_owned(), entry.metadata()?.blocks() * 512));
            }
        }
        Ok(sizes)
    }

    fn named(&self, name: &str) -> io::Result<Arc<CachedBlob>> {
        let mut blobs = self.blobs.lock();
        if let Some(blob) = blobs.get(name).and_then(Weak::upgrade) {
            return Ok(blob);
        }
        blobs.retain(|_, blob| blob.strong_count() > 0);
        let blob = Arc::new(CachedBlob::open(&self.dir, name, &self.last_failure)?);
        blobs.insert(name.to_owned(), Arc::downgrade(&blob));
        Ok(blob)
    }
}

impl CachedBlob {
    fn open(dir: &Path, name: &str, last_failure: &Arc<Mutex<Option<Instant>>>) -> io::Result<Self> {
        let path = |suffix: &str| dir.join(format!("{name}.{suffix}"));
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false).mode(0o600);
        let is_new = !path("blob.data").exists();
        let data = options.open(path("blob.data"))?;
        let claims = ChunkJournal::open(&path("blob.claims"))?;
        if is_new {
            crate::atomic_file::sync_dir(dir)?;
        }
        let ranges = claims.ranges().collect();
        Ok(Self {
            name: name.to_owned(),
            data,
            claims: Mutex::new(claims),
            meta: path("blob.meta"),
            chunks: Mutex::new(Chunks {
                ranges,
                ..Chunks::default()
            }),
            epoch: AtomicU32::new(1),
            losses: AtomicU32::new(0),
            end: AtomicU64::new(0),
            sync_pending: AtomicBool::new(false),
            syncing: Mutex::default(),
            last_failure: Arc::clone(last_failure),
        })
    }

    /// Adds the chunks of `layout` unless they contradict those already known; then nothing is changed.
    fn add(&self, layout: &BlobLayout) -> bool {
        let claims = self.claims.lock();
        self.chunks.lock().add(layout, &claims)
    }

    /// The blob's id, with the image's where it is not shared.
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

    /// Whether the chunk is claimed to be on disk, even if it turned out not to be right.
    pub fn is_journaled(&self, index: u32) -> bool {
        self.claims.lock().contains(index)
    }

    /// How often what was written did not reach the disk.
    pub fn losses(&self) -> u32 {
        self.losses.load(Ordering::Acquire)
    }

    /// What is known of chunks is void once this changes. Never 0.
    pub fn epoch(&self) -> u32 {
        self.epoch.load(Ordering::Acquire)
    }

    /// Where the blob meta is kept, if it had to be fetched.
    pub fn meta_file(&self) -> &Path {
        &self.meta
    }

    /// Reads part of a chunk from disk. The caller has seen that the chunk is [`ChunkState::Ready`], or checks the
    /// bytes itself.
    pub fn read(&self, chunk: &Chunk, offset: u32, into: &mut [u8]) -> io::Result<()> {
        self.data
            .read_exact_at(into, chunk.uncompressed_offset + u64::from(offset))
    }

    /// Keeps a chunk whose bytes were verified. Failing to (a full disk, say) is logged, and no harm to a reader, who
    /// has the bytes: the chunk is fetched again when it is needed again.
    pub fn keep(self: &Arc<Self>, chunk: &Chunk, plain: &[u8]) -> io::Result<()> {
        let Err(error) = self.store(chunk, plain) else {
            self.sync_later();
            return Ok(());
        };
        let mut last = self.last_failure.lock();
        if last.is_none_or(|last| last.elapsed() >= LOG_EVERY) {
            *last = Some(Instant::now());
            tracing::error!(
                blob = self.name,
                %error,
                "cannot write to the blob cache; chunks are served but fetched again each time: make room or check the disk"
            );
        }
        Err(error)
    }

    fn store(&self, chunk: &Chunk, plain: &[u8]) -> io::Result<()> {
        // Written to, a file that was cut would be long again, with zeros where chunks were.
        // The end first: others make the file longer meanwhile.
        let end = self.end.load(Ordering::Acquire);
        if self.data.metadata()?.len() < end {
            self.was_cut();
        }
        let epoch = self.epoch();
        self.data.write_all_at(plain, chunk.uncompressed_offset)?;
        // Both together, so that what is ready is claimed.
        let mut claims = self.claims.lock();
        claims.add(chunk)?;
        self.confirm(chunk.index, epoch);
        Ok(())
    }

    /// A chunk was written or hashed, and is right, in what was then the epoch.
    pub fn confirm(&self, index: u32, epoch: u32) {
        let mut chunks = self.chunks.lock();
        if let Some((chunk, state)) = chunks.by_index.get_mut(&index) {
            if epoch != self.epoch() {
                *state = ChunkState::Claimed;
                return;
            }
            *state = ChunkState::Ready;
            let end = chunk.uncompressed_offset + u64::from(chunk.uncompressed_size);
            self.end.fetch_max(end, Ordering::AcqRel);
        }
    }

    /// Somebody has cut the data file: every chunk is hashed again before it is used.
    pub fn was_cut(&self) {
        tracing::error!(
            blob = self.name,
            "the blob cache was cut by somebody else; all of it is checked again"
        );
        self.doubt();
    }

    /// The bytes on disk are not what they should be: the chunk is to be fetched again. What readers know of the blob is
    /// void, so that those who have read the chunk notice.
    pub fn distrust(&self, index: u32) {
        let mut chunks = self.chunks.lock();
        if let Some((_, state)) = chunks.by_index.get_mut(&index) {
            *state = ChunkState::Missing;
        }
        self.next_epoch();
    }

    /// Called with `chunks` locked.
    fn next_epoch(&self) {
        // An epoch lasts long enough, so that numbers do not come again; 0 is what readers start with.
        self.epoch.store(self.epoch().wrapping_add(1).max(1), Ordering::Release);
    }

    /// Takes back the claims of those of the chunks that are not what they should be, and were not fetched again meanwhile, so
    /// that no later process believes in them.
    pub fn unclaim(&self, indexes: &[u32]) -> io::Result<()> {
        let mut claims = self.claims.lock();
        for index in indexes {
            if self.state(*index) == ChunkState::Missing {
                claims.remove(*index)?;
            }
        }
        claims.sync()
    }

    /// Waits until all that was kept is on disk.
    pub fn sync_all(&self) -> io::Result<()> {
        self.sync()?;
        self.claims.lock().sync()
    }

    /// Has the kernel read from disk what is read next, as far as it is there.
    pub fn drop_pages(&self) {
        rustix::fs::fadvise(&self.data, 0, None, rustix::fs::Advice::DontNeed).ok();
    }

    /// Sees to it that what was written is on disk soon, or known not to be. Called within a runtime.
    fn sync_later(self: &Arc<Self>) {
        if self.sync_pending.swap(true, Ordering::AcqRel) {
            return;
        }
        // Whoever opens the blob after it is dropped hashes everything again.
        let cached = Arc::downgrade(self);
        tokio::spawn(async move {
            tokio::time::sleep(SYNC_AFTER).await;
            if let Some(cached) = cached.upgrade() {
                tokio::task::spawn_blocking(move || cached.sync().ok());
            }
        });
    }

    fn sync(&self) -> io::Result<()> {
        let _syncing = self.syncing.lock();
        // First, so that what is written meanwhile has a sync to come.
        self.sync_pending.store(false, Ordering::Release);
        self.data.sync_data().inspect_err(|error| {
            tracing::error!(blob = self.name, %error, "the blob cache did not reach the disk; all of it is checked again");
            self.doubt();
        })
    }

    /// What was written may be lost: every chunk is hashed again before it is used.
    pub(super) fn doubt(&self) {
        self.losses.fetch_add(1, Ordering::AcqRel);
        // The kernel may still have in memory what it failed to write. Hashing that would say nothing of the disk.
        self.drop_pages();
        let mut chunks = self.chunks.lock();
        self.next_epoch();
        self.end.store(0, Ordering::Release);
        for (_, state) in chunks.by_index.values_mut() {
            if *state == ChunkState::Ready {
                *state = ChunkState::Claimed;
            }
        }
    }
}

impl Chunks {
    /// Adds the chunks of `layout` unless they contradict those already known; then nothing is changed.
    fn add(&mut self, layout: &BlobLayout, claims: &ChunkJournal) -> bool {
        let mut new: Vec<&Chunk> = Vec::new();
        for chunk in &layout.chunks {
            match self.by_index.get(&chunk.index) {
                Some((known, _)) if known == chunk => {}
                Some(_) => return false,
                None => new.push(chunk),
            }
        }
        let mut added = Vec::with_capacity(new.len());
        let fits = new.iter().all(|chunk| match claims.is_of(chunk) {
            // Its range has been taken since the file was opened.
            Some(same) => same,
            None => self.claim_range(chunk).inspect(|start| added.push(*start)).is_some(),
        });
        if !fits {
            for start in added {
                self.ranges.remove(&start);
            }
            return false;
        }
        for chunk in new {
            let state = if claims.contains(chunk.index) {
                ChunkState::Claimed
            } else {
                ChunkState::Missing
            };
            self.by_index.insert(chunk.index, (*chunk, state));
        }
        true
    }

    /// Takes the chunk's uncompressed range, if no other chunk has part of it.
    fn claim_range(&mut self, chunk: &Chunk) -> Option<u64> {
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
