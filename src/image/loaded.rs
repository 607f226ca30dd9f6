//! An image that is ready to be read: its tree of files, its layers, and readers for its blobs.

use std::{os::unix::fs::FileExt as _, path::Path, sync::Arc};

use bytes::Bytes;

use super::{
    bootstrap::Unpacked,
    error::ImageError,
    library::Library,
    manifest::{LayerInfo, Manifest},
};
use crate::{
    blob::{
        cache::BlobCache,
        error::ReadError,
        reader::{BlobReader, Fetching},
        source::{Pending, Source, SourceError},
    },
    digest::Digest,
    rafs::{Ino, Tree},
    registry::{Client, Repository},
};

/// An image that is ready to be read.
pub struct LoadedImage {
    /// Digest of the image's manifest.
    pub digest: Digest,
    /// The manifest.
    pub manifest: Manifest,
    /// The files.
    pub tree: Tree,
    diff_ids: Vec<Digest>,
    blobs: Vec<Arc<BlobReader>>,
    unpacked: Unpacked,
    bootstrap_layer: Digest,
    registry: RegistrySource,
    library: Arc<Library>,
}

/// Reads a blob from a repository.
#[derive(Clone)]
struct RegistrySource {
    client: Client,
    repository: Repository,
}

/// One blob of a [`RegistrySource`].
struct RegistryBlob {
    source: RegistrySource,
    digest: Digest,
}

/// What [`LoadedImage::new`] is made from.
pub struct Parts {
    /// Digest of the manifest.
    pub digest: Digest,
    /// The manifest.
    pub manifest: Manifest,
    /// One for each layer.
    pub diff_ids: Vec<Digest>,
    /// Digest of the bootstrap layer.
    pub bootstrap_layer: Digest,
    /// The files of the bootstrap layer.
    pub unpacked: Unpacked,
}

/// Where an image's bytes come from and go to.
pub struct Backing<'a> {
    /// The registry client.
    pub client: Client,
    /// The repository that holds the image's blobs.
    pub repository: Repository,
    /// The cache of chunks.
    pub cache: &'a BlobCache,
    /// What all readers share.
    pub fetching: Arc<Fetching>,
    /// The library that holds the bootstrap layer.
    pub library: Arc<Library>,
}

impl LoadedImage {
    /// Reads the bootstrap and prepares the blobs. Blocks, but does not use the network.
    pub fn new(parts: Parts, backing: Backing<'_>) -> Result<Self, ImageError> {
        let Parts {
            digest,
            manifest,
            diff_ids,
            bootstrap_layer,
            unpacked,
        } = parts;
        let tree = load_tree(&unpacked.bootstrap())?;
        let registry = RegistrySource {
            client: backing.client,
            repository: backing.repository,
        };
        let image = bootstrap_layer.hex();
        let reader = |layout: &Arc<crate::blob::layout::BlobLayout>| {
            // The loader of the tree accepts no blob id that is not a digest.
            let digest = Digest::from_hex(&layout.id).map_err(|_| ImageError::Aborted)?;
            let cached = backing
                .cache
                .blob(layout, &image)
                .map_err(ImageError::io("cannot open the blob cache"))?;
            let source = Arc::new(RegistryBlob {
                source: registry.clone(),
                digest,
            });
            let meta = unpacked.metas.get(&layout.id).cloned();
            Ok(BlobReader::new(
                Arc::clone(layout),
                cached,
                source,
                Arc::clone(&backing.fetching),
                meta,
            ))
        };
        let blobs = tree.blobs().iter().map(reader).collect::<Result<_, ImageError>>()?;
        let library = backing.library;
        Ok(Self {
            digest,
            manifest,
            tree,
            diff_ids,
            blobs,
            unpacked,
            bootstrap_layer,
            registry,
            library,
        })
    }

    /// Whether the layer at `position` is the one whose `diff` shows the files.
    pub fn is_bootstrap(&self, position: usize) -> bool {
        self.manifest.bootstrap == Some(position)
    }

    /// The `info` of the layer at `position`.
    pub fn info(&self, position: usize) -> LayerInfo {
        let size = self.is_bootstrap(position).then_some(self.unpacked.size);
        self.manifest.layers[position].info(self.diff_ids[position], size)
    }

    /// The raw bytes of the layer at `position`, fetched as asked. They are not verified here: whoever reads a layer
    /// whole knows its digest.
    pub async fn read_layer(&self, position: usize, offset: u64, len: usize) -> Result<Bytes, SourceError> {
        let layer = &self.manifest.layers[position];
        let len = usize::try_from(layer.size.saturating_sub(offset)).map_or(len, |left| len.min(left));
        if len == 0 {
            return Ok(Bytes::new());
        }
        if layer.digest == self.bootstrap_layer
            && let Ok(file) = self.library.file(&layer.digest)
        {
            let mut bytes = vec![0; len];
            if file.read_exact_at(&mut bytes, offset).is_ok() {
                return Ok(bytes.into());
            }
        }
        self.registry.read(layer.digest, offset, len).await
    }

    /// Fills `into` from the file's bytes at `offset`, if all of them are in the cache and verified. Does not wait.
    /// The caller keeps the range within the file.
    pub fn read_ready(&self, file: Ino, offset: u64, into: &mut [u8]) -> bool {
        self.segments(file, offset, into.len()).all(|segment| {
            let part = &mut into[segment.buffer..segment.buffer + segment.len];
            self.blobs[segment.blob].read_ready(segment.chunk, segment.offset, part)
        })
    }

    /// Fills `into` from the file's bytes at `offset`, fetching what is missing. The caller keeps the range within
    /// the file.
    pub async fn read(&self, file: Ino, offset: u64, into: &mut [u8]) -> Result<(), ReadError> {
        // All at once first, so that chunks come side by side and not one after the other.
        for segment in self.segments(file, offset, into.len()).skip(1) {
            self.blobs[segment.blob].start(segment.chunk..segment.chunk + 1);
        }
        for segment in self.segments(file, offset, into.len()) {
            let part = &mut into[segment.buffer..segment.buffer + segment.len];
            self.blobs[segment.blob]
                .read(segment.chunk, segment.offset, part)
                .await?;
        }
        Ok(())
    }

    /// The parts of chunks that make up a range of a file.
    fn segments(&self, file: Ino, offset: u64, len: usize) -> impl Iterator<Item = Segment> + '_ {
        let chunk_size = u64::from(self.tree.summary().chunk_size);
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

/// A part of a chunk, and where it goes in the reader's buffer.
struct Segment {
    blob: usize,
    chunk: usize,
    offset: u32,
    buffer: usize,
    len: usize,
}

fn load_tree(bootstrap: &Path) -> Result<Tree, ImageError> {
    Tree::load(bootstrap).map_err(|error| ImageError::Rafs(Arc::new(error)))
}

impl RegistrySource {
    fn read(&self, digest: Digest, offset: u64, len: usize) -> Pending {
        let Self { client, repository } = self.clone();
        Box::pin(async move {
            client
                .blob_range(&repository, &digest, offset, len)
                .await
                .map_err(|error| Arc::new(error) as SourceError)
        })
    }
}

impl Source for RegistryBlob {
    fn read(&self, offset: u64, len: usize) -> Pending {
        self.source.read(self.digest, offset, len)
    }
}
