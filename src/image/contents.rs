//! What is in an image: its tree of files, and readers for the blobs that hold their bytes.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::Arc,
};

use super::{bootstrap::Unpacked, error::ImageError};
use crate::{
    blob::{
        cache::BlobCache,
        error::ReadError,
        fetching::Lane,
        layout::BlobLayout,
        reader::{BlobReader, MetaSource},
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
    /// Holds the files of the bootstrap layer, which blobs may have to read yet.
    _files: Option<Unpacked>,
}

/// Where chunks are kept.
pub struct Cached<'a> {
    /// The cache.
    pub cache: &'a BlobCache,
    /// What all readers of the registry share.
    pub lane: Arc<Lane>,
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
        Ok(Self {
            tree,
            blobs,
            _files: None,
        })
    }

    /// Keeps the files of the bootstrap layer as long as these contents.
    pub fn keeping(self, files: Unpacked) -> Self {
        Self {
            _files: Some(files),
            ..self
        }
    }

    /// Fills `into` from the file's bytes at `offset`, if all of them are in the cache and verified. Does not wait.
    /// The caller keeps the range within the file.
    pub fn read_ready(&self, file: Ino, offset: u64, into: &mut [u8]) -> bool {
        let mut filled = 0;
        for segment in self.segments(file, offset, into.len()) {
            let part = &mut into[segment.buffer..segment.buffer + segment.len];
            if !self.blobs[segment.blob].read_ready(segment.chunk, segment.offset, part) {
                return false;
            }
            filled += segment.len;
        }
        filled == into.len()
    }

    /// Fills `into` from the file's bytes at `offset`, fetching what is missing. The caller keeps the range within
    /// the file.
    pub async fn read(&self, file: Ino, offset: u64, into: &mut [u8]) -> Result<(), ReadError> {
        // All at once first, so that chunks come side by side and not one after the other.
        let start = |segment: Segment| (self.blobs[segment.blob].start(segment.chunk), segment);
        let started: Vec<_> = self.segments(file, offset, into.len()).map(start).collect();
        let mut filled = 0;
        for (started, segment) in started {
            let part = &mut into[segment.buffer..segment.buffer + segment.len];
            let reader = &self.blobs[segment.blob];
            reader.finish(started, segment.chunk, segment.offset, part).await?;
            filled += segment.len;
        }
        // The loader of the tree has seen to it that the chunks cover the file.
        if filled == into.len() {
            Ok(())
        } else {
            Err(ReadError::uncovered())
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
