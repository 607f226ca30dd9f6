//! What is kept on disk of each data blob: its uncompressed bytes and which chunks of them are there.
//!
//! A blob `ID` is two files. `ID.blob.data` is sparse and holds each chunk at its uncompressed offset: the layout of
//! nydus-storage's file cache, and what the kernel's EROFS takes as a device once it is complete. `ID.chunk.map` is a
//! log of the chunks that were written, as 32-bit little-endian indexes. The two are not synced in order, and a cache
//! may be copied from another host or lie on a failing disk, so the map is only a claim: a claimed chunk is hashed
//! again before its first use in this process, and fetched again if it is not what it should be.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fs::{self, File, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::{FileExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    sync::{Arc, Weak},
    time::{Duration, Instant},
};

use parking_lot::Mutex;

use super::{
    layout::{BlobLayout, Chunk},
    reader::Flight,
    unit::UnitId,
};

/// How often it is logged that the cache cannot be written to.
const LOG_EVERY: Duration = Duration::from_secs(60);

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
    map: Mutex<File>,
    chunks: Mutex<Chunks>,
    /// Units on their way, with what to wait on.
    pub(super) flights: Mutex<HashMap<UnitId, Flight>>,
    last_failure: Arc<Mutex<Option<Instant>>>,
}

/// What the images that share the blob say of its chunks, and which are there.
#[derive(Default)]
struct Chunks {
    by_index: HashMap<u32, (Chunk, ChunkState)>,
    /// Uncompressed ranges in use: start → end.
    ranges: BTreeMap<u64, u64>,
    claimed: HashSet<u32>,
}

impl BlobCache {
    /// Opens the cache in `dir`, which is made if it is missing; only its owner can enter it.
    pub fn open(dir: &Path) -> io::Result<Self> {
        crate::files::make_private_dir(dir)?;
        Ok(Self {
            dir: dir.to_owned(),
            last_failure: Arc::default(),
            blobs: Mutex::default(),
        })
    }

    /// The cached blob that `layout` describes.
    ///
    /// Images whose tables agree share one. A table that contradicts those of the images in use (which no honest
    /// converter makes: a blob's id is its digest) gets a blob of its own, named after `image` (the hexadecimal digest
    /// of the image's bootstrap layer), so that one image's lies cannot reach another.
    pub fn blob(&self, layout: &BlobLayout, image: &str) -> io::Result<Arc<CachedBlob>> {
        let shared = self.named(&layout.id)?;
        if shared.chunks.lock().add(layout) {
            return Ok(shared);
        }
        tracing::warn!(
            blob = layout.id,
            image,
            "the image's chunk table contradicts another image's: caching apart"
        );
        let own = self.named(&format!("{}.{image}", layout.id))?;
        if own.chunks.lock().add(layout) {
            return Ok(own);
        }
        Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "the chunk table contradicts itself",
        ))
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
        let open = |suffix: &str, append: bool| {
            let mut options = OpenOptions::new();
            options.read(true).create(true).mode(0o600);
            if append {
                options.append(true)
            } else {
                options.write(true).truncate(false)
            };
            options.open(dir.join(format!("{name}.{suffix}")))
        };
        let data = open("blob.data", false)?;
        let map = open("chunk.map", true)?;
        let log = fs::read(dir.join(format!("{name}.chunk.map")))?;
        let (entries, torn) = log.as_chunks::<4>();
        if !torn.is_empty() {
            // A write that was cut short would shift every later entry.
            map.set_len((entries.len() * 4) as u64)?;
        }
        let claimed = entries.iter().map(|entry| u32::from_le_bytes(*entry)).collect();
        Ok(Self {
            name: name.to_owned(),
            data,
            map: Mutex::new(map),
            chunks: Mutex::new(Chunks {
                claimed,
                ..Chunks::default()
            }),
            flights: Mutex::default(),
            last_failure: Arc::clone(last_failure),
        })
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

    fn set_state(&self, index: u32, new: ChunkState) {
        if let Some((_, state)) = self.chunks.lock().by_index.get_mut(&index) {
            *state = new;
        }
    }

    /// Reads part of a chunk from disk. The caller has seen that the chunk is [`ChunkState::Ready`], or checks the
    /// bytes itself.
    pub fn read(&self, chunk: &Chunk, offset: u32, into: &mut [u8]) -> io::Result<()> {
        self.data
            .read_exact_at(into, chunk.uncompressed_offset + u64::from(offset))
    }

    /// Keeps a chunk whose bytes were verified. Failing to (a full disk, say) is not an error for the reader, who has
    /// the bytes: it is logged, and the chunk is fetched again when it is needed again.
    pub fn keep(&self, chunk: &Chunk, plain: &[u8]) {
        let Err(error) = self.store(chunk, plain) else {
            return self.set_state(chunk.index, ChunkState::Ready);
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
    }

    fn store(&self, chunk: &Chunk, plain: &[u8]) -> io::Result<()> {
        self.data.write_all_at(plain, chunk.uncompressed_offset)?;
        if self.chunks.lock().claimed.contains(&chunk.index) {
            return Ok(());
        }
        let mut map = self.map.lock();
        if let Err(error) = map.write_all(&chunk.index.to_le_bytes()) {
            // Half an entry would shift all that follow.
            let len = map.metadata()?.len();
            map.set_len(len - len % 4)?;
            return Err(error);
        }
        self.chunks.lock().claimed.insert(chunk.index);
        Ok(())
    }

    /// A claimed chunk was hashed and is right.
    pub fn confirm(&self, index: u32) {
        self.set_state(index, ChunkState::Ready);
    }

    /// The bytes on disk are not what they should be: the chunk is to be fetched again.
    pub fn distrust(&self, index: u32) {
        self.set_state(index, ChunkState::Missing);
    }
}

impl Chunks {
    /// Adds the chunks of `layout` unless they contradict those already known; then nothing is changed.
    fn add(&mut self, layout: &BlobLayout) -> bool {
        let mut new: Vec<&Chunk> = Vec::new();
        for chunk in &layout.chunks {
            match self.by_index.get(&chunk.index) {
                Some((known, _)) if known == chunk => {}
                Some(_) => return false,
                None => new.push(chunk),
            }
        }
        let mut added = Vec::with_capacity(new.len());
        let fits = new
            .iter()
            .all(|chunk| self.claim_range(chunk).inspect(|start| added.push(*start)).is_some());
        if !fits {
            for start in added {
                self.ranges.remove(&start);
            }
            return false;
        }
        for chunk in new {
            let claimed = self.claimed.contains(&chunk.index);
            let state = if claimed {
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
