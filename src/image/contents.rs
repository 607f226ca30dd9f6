//! Contents of an image: its file tree, and readers for the blobs that hold the file data.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
};

use super::{access_recorder::AccessRecorder, bootstrap::Unpacked, error::ImageError};
use crate::{
    blob::{
        atomic_bit_set::AtomicBitSet,
        error::{ReadCause, ReadError},
        layout::BlobLayout,
        reader::{BlobReader, MetaSource, SuspendedCoalescing},
        scheduler::RegistryScheduler,
        shared::SharedBlobs,
        source::Source,
    },
    digest::Digest,
    rafs::{Ino, Tree},
};

/// The files of an image.
pub struct Contents {
    /// The file tree.
    pub tree: Tree,
    blobs: Vec<Arc<BlobReader>>,
    /// For each blob, the chunks that a trace replay prefetches.
    prefetched: Arc<[AtomicBitSet]>,
    recorder: OnceLock<Arc<AccessRecorder>>,
    is_abandoned: Arc<AtomicBool>,
    /// Owns the blob meta files of the bootstrap layer, which blobs may still have to read.
    _unpacked: Option<Unpacked>,
}

/// Cache and scheduler for the chunks of an image.
pub struct ChunkStorage<'a> {
    /// The cache.
    pub cache: &'a SharedBlobs,
    /// Scheduler shared by all readers of the registry.
    pub scheduler: Arc<RegistryScheduler>,
    /// Distinguishes the image from others in file names: hexadecimal digits.
    pub image: String,
}

impl Contents {
    /// Parses `bootstrap` and prepares the blobs. `metas` maps blob ids to blob meta files; `source` opens a blob for
    /// reading. Blocks, but does not use the network.
    pub fn load(
        bootstrap: &Path,
        metas: &HashMap<String, PathBuf>,
        storage: &ChunkStorage<'_>,
        source: impl Fn(Digest) -> Arc<dyn Source>,
    ) -> Result<Self, ImageError> {
        let tree = Tree::load(bootstrap).map_err(|error| ImageError::Rafs(Arc::new(error)))?;
        let reader = |layout: &Arc<BlobLayout>| {
            // Cannot fail: the tree's loader accepts only digests as blob ids.
            let digest = Digest::from_hex(&layout.id).map_err(|_| ImageError::Aborted)?;
            let blob = storage
                .cache
                .blob(layout, &storage.image)
                .map_err(ImageError::io("cannot open the blob cache"))?;
            let scheduler = Arc::clone(&storage.scheduler);
            let meta = meta_source(layout, metas, &source)?;
            Ok(BlobReader::new(
                Arc::clone(layout),
                blob,
                source(digest),
                scheduler,
                meta,
            ))
        };
        let blobs = tree.blobs().iter().map(reader).collect::<Result<_, ImageError>>()?;
        let prefetched = tree
            .blobs()
            .iter()
            .map(|blob| AtomicBitSet::new(blob.chunks.len()))
            .collect();
        Ok(Self {
            tree,
            blobs,
            prefetched,
            recorder: OnceLock::new(),
            is_abandoned: Arc::default(),
            _unpacked: None,
        })
    }

    /// Keeps the unpacked files as long as these contents.
    pub fn with_unpacked(mut self, files: Option<Unpacked>) -> Self {
        self._unpacked = files;
        self
    }

    /// Records accesses in `recorder` from now on. Only the first call has an effect.
    pub(super) fn record_in(&self, recorder: Arc<AccessRecorder>) {
        self.recorder.set(recorder).ok();
    }

    /// Marks chunks as prefetched: first accesses to them do not count for sequential read-ahead. Suspends coalescing
    /// as long as the result exists, because the chunks between them are not needed.
    pub(super) fn mark_prefetched(&self, chunks: &[(usize, usize)]) -> Replay {
        let replay = Replay {
            prefetched: Arc::clone(&self.prefetched),
            is_complete: false,
            _suspended: self.blobs.iter().map(|blob| blob.suspend_coalescing()).collect(),
        };
        for (blob, chunk) in chunks {
            self.prefetched[*blob].insert(*chunk);
        }
        replay
    }

    /// A flag that is set when these contents are dropped.
    pub(super) fn is_abandoned(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.is_abandoned)
    }

    /// The recorder of accesses, if there is one.
    pub(super) fn recorder(&self) -> Option<&Arc<AccessRecorder>> {
        self.recorder.get()
    }

    /// Readers of the blobs, in the order of the bootstrap's blob table.
    pub fn blobs(&self) -> &[Arc<BlobReader>] {
        &self.blobs
    }

    /// Fills `into` from the file's bytes at `offset`, if all of them are cached and verified. Does not wait. The range
    /// must lie within the file.
    pub fn read_ready(&self, file: Ino, offset: u64, into: &mut [u8]) -> bool {
        let (mut covered, mut parts, mut ready, mut is_step) = (0, 0, true, true);
        for part_of_chunk in self.segments(file, offset, into.len()) {
            self.record(&part_of_chunk, &mut is_step);
            let part = &mut into[part_of_chunk.buffer..part_of_chunk.buffer + part_of_chunk.len];
            covered += part.len();
            parts += 1;
            ready = ready && self.blobs[part_of_chunk.blob].read_ready(part_of_chunk.chunk, part_of_chunk.offset, part);
        }
        let is_complete = ready && covered == into.len();
        // All blobs share the counters of the cache. Counted once all is there: else the whole is read again.
        if let Some(blob) = self.blobs.first().filter(|_| is_complete) {
            blob.counters().record_hits(parts, covered);
        }
        is_complete
    }

    /// Records the access to a part of a chunk. `is_step` is true for the first chunk of a request that was not
    /// accessed before; a request advances the sequential detector once.
    fn record(&self, part_of_chunk: &ChunkPart, is_step: &mut bool) {
        let reader = &self.blobs[part_of_chunk.blob];
        let is_first = reader.mark_seen(part_of_chunk.chunk);
        if is_first && let Some(recorder) = self.recorder.get() {
            recorder.record(part_of_chunk.blob, part_of_chunk.chunk);
        }
        if (is_first || reader.notice_eviction(part_of_chunk.chunk))
            && !self.prefetched[part_of_chunk.blob].contains(part_of_chunk.chunk)
        {
            reader.on_first_access(part_of_chunk.chunk, std::mem::take(is_step));
        }
    }

    /// Fills `into` from the file's bytes at `offset`, and fetches missing chunks. The range must lie within the file.
    /// The caller has tried [`Self::read_ready`], which records the accesses.
    pub async fn read(&self, file: Ino, offset: u64, into: &mut [u8]) -> Result<(), ReadError> {
        let segments: Vec<_> = self.segments(file, offset, into.len()).collect();
        if segments.iter().map(|part_of_chunk| part_of_chunk.len).sum::<usize>() != into.len() {
            return Err(self.uncovered(segments.last()));
        }
        // Starts all fetches first, so that chunks arrive concurrently. The results are held here: on a full disk, they
        // are stored nowhere else.
        let many = segments.len() > 1;
        let start = |part_of_chunk: &ChunkPart| self.blobs[part_of_chunk.blob].start(part_of_chunk.chunk);
        let started: Vec<_> = segments
            .iter()
            .map(|part| many.then(|| start(part)).flatten())
            .collect();
        for (part_of_chunk, started) in segments.into_iter().zip(started) {
            let part = &mut into[part_of_chunk.buffer..part_of_chunk.buffer + part_of_chunk.len];
            self.blobs[part_of_chunk.blob]
                .read(part_of_chunk.chunk, started, part_of_chunk.offset, part)
                .await?;
        }
        Ok(())
    }

    /// The error for a file whose chunks end after `last`.
    fn uncovered(&self, last: Option<&ChunkPart>) -> ReadError {
        let layout = last.map(|last| self.blobs[last.blob].layout());
        let chunk = layout
            .zip(last)
            .and_then(|(layout, last)| layout.chunks.get(last.chunk));
        ReadError {
            blob: layout.map_or_else(|| "none".to_owned(), |layout| layout.id.clone()),
            chunk: chunk.map_or(0, |chunk| chunk.index),
            cause: ReadCause::Uncovered,
        }
    }

    /// The parts of chunks that make up a range of a file.
    fn segments(&self, file: Ino, offset: u64, len: usize) -> impl Iterator<Item = ChunkPart> + '_ {
        let chunk_size = u64::from(self.tree.chunk_size());
        let chunks = self.tree.chunks(file);
        let end = offset + len as u64;
        let mut at = offset;
        std::iter::from_fn(move || {
            let number = at / chunk_size;
            let chunk = chunks.get(usize::try_from(number).ok()?).filter(|_| at < end)?;
            let stop = end.min((number + 1) * chunk_size);
            let part_of_chunk = ChunkPart {
                blob: chunk.blob as usize,
                chunk: chunk.chunk as usize,
                // Less than the chunk size, which is at most 16 MiB.
                offset: (at % chunk_size) as u32,
                buffer: (at - offset) as usize,
                len: (stop - at) as usize,
            };
            at = stop;
            Some(part_of_chunk)
        })
    }
}

/// A running prefetch of a trace's chunks. Unless it ends completely, no chunk counts as prefetched any more.
#[must_use]
pub(super) struct Replay {
    prefetched: Arc<[AtomicBitSet]>,
    is_complete: bool,
    _suspended: Vec<SuspendedCoalescing>,
}

impl Replay {
    /// Ends the replay; `is_complete` tells whether all chunks have been fetched.
    pub(super) fn end(mut self, is_complete: bool) {
        self.is_complete = is_complete;
    }
}

impl Drop for Replay {
    fn drop(&mut self) {
        if !self.is_complete {
            self.prefetched.iter().for_each(AtomicBitSet::clear);
        }
    }
}

impl Drop for Contents {
    fn drop(&mut self) {
        self.is_abandoned.store(true, Ordering::Relaxed);
        self.blobs.iter().for_each(|blob| blob.cancel_read_ahead());
    }
}

/// Source of the blob's meta: a file of the bootstrap layer, or else the blob that holds the meta.
fn meta_source(
    layout: &BlobLayout,
    metas: &HashMap<String, PathBuf>,
    source: impl Fn(Digest) -> Arc<dyn Source>,
) -> Result<MetaSource, ImageError> {
    let holder = layout.meta_blob.as_ref().unwrap_or(&layout.id);
    if let Some(file) = metas.get(holder).or_else(|| metas.get(&layout.id)) {
        return Ok(MetaSource::File(file.clone()));
    }
    let holder = Digest::from_hex(holder).map_err(|_| ImageError::Aborted)?;
    Ok(MetaSource::Blob(source(holder)))
}

/// A part of a chunk and its position in the reader's buffer.
struct ChunkPart {
    blob: usize,
    chunk: usize,
    offset: u32,
    buffer: usize,
    len: usize,
}

#[cfg(test)]
mod tests {
    use std::{fs, time::Duration};

    use super::*;
    use crate::{
        blob::{
            scheduler::FetchScheduler,
            size_limit::SizeLimit,
            source::{Pending, SourceError, SourcedBytes},
        },
        fixtures::{BuildOptions, LayerSource, build},
    };

    /// A blob in memory.
    struct Bytes(bytes::Bytes);

    impl Source for Bytes {
        fn read(&self, offset: u64, len: usize) -> Pending {
            let range = offset as usize..offset as usize + len;
            let inside = range.end <= self.0.len();
            let part = inside.then(|| self.0.slice(range));
            Box::pin(async move {
                part.map(SourcedBytes::from)
                    .ok_or_else(|| SourceError::range_failed(std::io::Error::other("outside")))
            })
        }
    }

    /// An image with one file of the given content.
    fn contents_of(dir: &Path, content: &[u8]) -> Contents {
        let tree = dir.join("tree");
        fs::create_dir(&tree).unwrap();
        fs::write(tree.join("file"), content).unwrap();
        let options = BuildOptions {
            chunk_size: 4096,
            ..BuildOptions::default()
        };
        let image = build(&[LayerSource::Dir(tree)], &options, &dir.join("image")).unwrap();
        let storage = ChunkStorage {
            cache: &SharedBlobs::open(&dir.join("cache"), SizeLimit::NONE).unwrap(),
            scheduler: FetchScheduler::new(Duration::from_secs(10), true, usize::MAX).registry(""),
            image: "ab".to_owned(),
        };
        let source = |digest: Digest| {
            let blob = image.blobs.iter().find(|blob| blob.digest == digest).unwrap();
            Arc::new(Bytes(fs::read(&blob.path).unwrap().into())) as Arc<dyn Source>
        };
        Contents::load(image.bootstrap_path().unwrap(), &HashMap::new(), &storage, source).unwrap()
    }

    #[tokio::test]
    async fn only_a_complete_replay_leaves_chunks_marked() {
        let dir = tempfile::tempdir().unwrap();
        let contents = contents_of(dir.path(), &b"0123456789".repeat(1000));
        let is_marked = |chunk| contents.prefetched[0].contains(chunk);
        let replay = contents.mark_prefetched(&[(0, 0), (0, 2)]);
        assert!(is_marked(0) && !is_marked(1) && is_marked(2));
        replay.end(true);
        assert!(is_marked(0) && is_marked(2));
        drop(contents.mark_prefetched(&[(0, 1)]));
        assert!(!is_marked(0) && !is_marked(1));
    }

    #[tokio::test]
    async fn read_beyond_the_chunks_fails() {
        let dir = tempfile::tempdir().unwrap();
        let content = [b"0123456789".repeat(1000), b"x".repeat(500)].concat();
        let contents = contents_of(dir.path(), &content);
        let file = contents.tree.lookup(crate::rafs::ROOT, b"file").unwrap();
        let mut bytes = vec![0xee; content.len()];
        contents.read(file, 0, &mut bytes).await.unwrap();
        assert!(bytes == content);
        for (offset, len) in [(0, 10_501), (0, 12_288), (0, 20_000), (10_500, 1), (12_288, 5)] {
            let mut bytes = vec![0xee; len];
            assert!(!contents.read_ready(file, offset, &mut bytes), "{len} from {offset}");
            assert!(
                contents.read(file, offset, &mut bytes).await.is_err(),
                "{len} from {offset}"
            );
        }
        assert!(contents.read_ready(file, 0, &mut bytes));
        assert!(bytes == content);
    }
}
