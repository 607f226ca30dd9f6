//! What is in an image: its tree of files, and readers for the blobs that hold their bytes.

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
    /// The tree.
    pub tree: Tree,
    blobs: Vec<Arc<BlobReader>>,
    /// For each blob, the chunks that come beforehand.
    expected: Arc<[AtomicBitSet]>,
    needs: OnceLock<Arc<AccessRecorder>>,
    given_up: Arc<AtomicBool>,
    /// Holds the blob metas that came with the bootstrap, which blobs may have to read yet.
    _files: Option<Unpacked>,
}

/// Where chunks are kept.
pub struct Cached<'a> {
    /// The cache.
    pub cache: &'a SharedBlobs,
    /// What all readers of the registry share.
    pub lane: Arc<RegistryScheduler>,
    /// Tells the image from others, in file names: hexadecimal digits.
    pub image: String,
}

impl Contents {
    /// Reads `bootstrap` and prepares its blobs. `metas` are blob meta files by blob id; `source` tells where a blob's
    /// bytes come from. Blocks, but does not use the network.
    pub fn load(
        bootstrap: &Path,
        metas: &HashMap<String, PathBuf>,
        cached: &Cached<'_>,
        source: impl Fn(Digest) -> Arc<dyn Source>,
    ) -> Result<Self, ImageError> {
        let tree = Tree::load(bootstrap).map_err(|error| ImageError::Rafs(Arc::new(error)))?;
        let reader = |layout: &Arc<BlobLayout>| {
            // The loader of the tree accepts no blob id that is not a digest.
            let digest = Digest::from_hex(&layout.id).map_err(|_| ImageError::Aborted)?;
            let blob = cached
                .cache
                .blob(layout, &cached.image)
                .map_err(ImageError::io("cannot open the blob cache"))?;
            let lane = Arc::clone(&cached.lane);
            let meta = meta_source(layout, metas, &source)?;
            Ok(BlobReader::new(Arc::clone(layout), blob, source(digest), lane, meta))
        };
        let blobs = tree.blobs().iter().map(reader).collect::<Result<_, ImageError>>()?;
        let expected = tree
            .blobs()
            .iter()
            .map(|blob| AtomicBitSet::new(blob.chunks.len()))
            .collect();
        Ok(Self {
            tree,
            blobs,
            expected,
            needs: OnceLock::new(),
            given_up: Arc::default(),
            _files: None,
        })
    }

    /// Keeps the files of the bootstrap layer as long as these contents.
    pub fn keeping(mut self, files: Option<Unpacked>) -> Self {
        self._files = files;
        self
    }

    /// Has `needs` note what is read, from now on. Once only.
    pub(super) fn note_in(&self, needs: Arc<AccessRecorder>) {
        // A second time is none: the first one's notes go on.
        self.needs.set(needs).ok();
    }

    /// Marks the chunks at these places, blob and position in its layout, as prefetched: reading them tells nothing of
    /// where to read ahead. Suspends coalescing, since what lies between them is not needed.
    pub(super) fn mark_prefetched(&self, places: &[(usize, usize)]) -> Replay {
        let replay = Replay {
            expected: Arc::clone(&self.expected),
            is_complete: false,
            _suspended: self.blobs.iter().map(|blob| blob.suspend_coalescing()).collect(),
        };
        for (blob, chunk) in places {
            self.expected[*blob].insert(*chunk);
        }
        replay
    }

    /// Set when nobody holds the image any more.
    pub(super) fn given_up(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.given_up)
    }

    /// What notes what is read, if anything does.
    pub(super) fn needs(&self) -> Option<&Arc<AccessRecorder>> {
        self.needs.get()
    }

    /// Readers of the blobs, as they stand in the bootstrap's table.
    pub fn blobs(&self) -> &[Arc<BlobReader>] {
        &self.blobs
    }

    /// Fills `into` from the file's bytes at `offset`, if all of them are in the cache and verified. Does not wait.
    /// The caller keeps the range within the file.
    pub fn read_ready(&self, file: Ino, offset: u64, into: &mut [u8]) -> bool {
        let (mut covered, mut ready, mut is_step) = (0, true, true);
        for segment in self.segments(file, offset, into.len()) {
            self.note(&segment, &mut is_step);
            let part = &mut into[segment.buffer..segment.buffer + segment.len];
            covered += part.len();
            ready = ready && self.blobs[segment.blob].read_ready(segment.chunk, segment.offset, part);
        }
        ready && covered == into.len()
    }

    /// That part of a chunk is wanted by a request, of which it may be the first (`is_step`) that was not wanted before.
    fn note(&self, segment: &Segment, is_step: &mut bool) {
        let reader = &self.blobs[segment.blob];
        if reader.mark_seen(segment.chunk) {
            if let Some(needs) = self.needs.get() {
                needs.note(segment.blob, segment.chunk);
            }
            if !self.expected[segment.blob].contains(segment.chunk) {
                reader.on_first_access(segment.chunk, std::mem::take(is_step));
            }
        }
    }

    /// Fills `into` from the file's bytes at `offset`, fetching what is missing. The caller keeps the range within
    /// the file, and has tried [`Self::read_ready`], which notes what is wanted.
    pub async fn read(&self, file: Ino, offset: u64, into: &mut [u8]) -> Result<(), ReadError> {
        let segments: Vec<_> = self.segments(file, offset, into.len()).collect();
        if segments.iter().map(|segment| segment.len).sum::<usize>() != into.len() {
            return Err(self.uncovered(segments.last()));
        }
        // All at once first, so that chunks come side by side and not one after the other. What comes is held on to:
        // on a full disk it is nowhere else.
        let many = segments.len() > 1;
        let start = |segment: &Segment| self.blobs[segment.blob].start(segment.chunk);
        let started: Vec<_> = segments
            .iter()
            .map(|part| many.then(|| start(part)).flatten())
            .collect();
        for (segment, started) in segments.into_iter().zip(started) {
            let part = &mut into[segment.buffer..segment.buffer + segment.len];
            self.blobs[segment.blob]
                .read(segment.chunk, started, segment.offset, part)
                .await?;
        }
        Ok(())
    }

    /// The error of a file whose chunks end after `last`.
    fn uncovered(&self, last: Option<&Segment>) -> ReadError {
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
    fn segments(&self, file: Ino, offset: u64, len: usize) -> impl Iterator<Item = Segment> + '_ {
        let chunk_size = u64::from(self.tree.chunk_size());
        let chunks = self.tree.chunks(file);
        let end = offset + len as u64;
        let mut at = offset;
        std::iter::from_fn(move || {
            let number = at / chunk_size;
            let chunk = chunks.get(usize::try_from(number).ok()?).filter(|_| at < end)?;
            let stop = end.min((number + 1) * chunk_size);
            let segment = Segment {
                blob: chunk.blob as usize,
                chunk: chunk.chunk as usize,
                // Below the chunk size, which is at most 16 MiB.
                offset: (at % chunk_size) as u32,
                buffer: (at - offset) as usize,
                len: (stop - at) as usize,
            };
            at = stop;
            Some(segment)
        })
    }
}

/// The prefetch of what a trace names, as long as this exists. Unless it ends with all chunks, none counts as
/// prefetched any more.
#[must_use]
pub(super) struct Replay {
    expected: Arc<[AtomicBitSet]>,
    is_complete: bool,
    _suspended: Vec<SuspendedCoalescing>,
}

impl Replay {
    /// Ends it; `is_complete` tells whether all chunks have come.
    pub(super) fn end(mut self, is_complete: bool) {
        self.is_complete = is_complete;
    }
}

impl Drop for Replay {
    fn drop(&mut self) {
        if !self.is_complete {
            self.expected.iter().for_each(AtomicBitSet::clear);
        }
    }
}

impl Drop for Contents {
    fn drop(&mut self) {
        self.given_up.store(true, Ordering::Relaxed);
        self.blobs.iter().for_each(|blob| blob.cancel_read_ahead());
    }
}

/// The file that came with the bootstrap, which is named after the blob that holds the meta, or else that blob.
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

/// A part of a chunk, and where it goes in the reader's buffer.
struct Segment {
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

    /// An image of one file with that content.
    fn contents_of(dir: &Path, content: &[u8]) -> Contents {
        let tree = dir.join("tree");
        fs::create_dir(&tree).unwrap();
        fs::write(tree.join("file"), content).unwrap();
        let options = BuildOptions {
            chunk_size: 4096,
            ..BuildOptions::default()
        };
        let image = build(&[LayerSource::Dir(tree)], &options, &dir.join("image")).unwrap();
        let cached = Cached {
            cache: &SharedBlobs::open(&dir.join("cache")).unwrap(),
            lane: FetchScheduler::new(Duration::from_secs(10), true, usize::MAX).registry(""),
            image: "ab".to_owned(),
        };
        let source = |digest: Digest| {
            let blob = image.blobs.iter().find(|blob| blob.digest == digest).unwrap();
            Arc::new(Bytes(fs::read(&blob.path).unwrap().into())) as Arc<dyn Source>
        };
        Contents::load(image.bootstrap_path().unwrap(), &HashMap::new(), &cached, source).unwrap()
    }

    #[tokio::test]
    async fn only_a_complete_replay_leaves_chunks_marked() {
        let dir = tempfile::tempdir().unwrap();
        let contents = contents_of(dir.path(), &b"0123456789".repeat(1000));
        let is_marked = |chunk| contents.expected[0].contains(chunk);
        let replay = contents.mark_prefetched(&[(0, 0), (0, 2)]);
        assert!(is_marked(0) && !is_marked(1) && is_marked(2));
        replay.end(true);
        assert!(is_marked(0) && is_marked(2));
        drop(contents.mark_prefetched(&[(0, 1)]));
        assert!(!is_marked(0) && !is_marked(1));
    }

    #[tokio::test]
    async fn what_chunks_do_not_cover_is_not_answered() {
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
