//! From a reference to an image that is ready to be read.

use std::{
    collections::HashMap,
    io,
    path::{Path, PathBuf},
    sync::{Arc, Weak},
    time::{Duration, Instant},
};

use bytes::Bytes;
use parking_lot::Mutex;

use super::{
    bootstrap,
    error::ImageError,
    library::Library,
    loaded::{Backing, LoadedImage, Parts},
    manifest::{Document, Manifest, ManifestError},
    reference::Reference,
};
use crate::{
    blob::{cache::BlobCache, reader::Fetching},
    digest::Digest,
    files,
    registry::{Client, Repository},
};

/// Largest image configuration, in bytes.
const MAX_CONFIG: u64 = 8 << 20;

/// Bounds for resolving images.
#[derive(Debug, Clone)]
pub struct Limits {
    /// How long a look-up may wait for a registry.
    pub resolve_timeout: Duration,
    /// How long a failed look-up is remembered.
    pub negative_ttl: Duration,
    /// Largest bootstrap layer, in uncompressed bytes.
    pub max_bootstrap_size: u64,
    /// How many units of stored bytes are fetched and decompressed at a time.
    pub max_fetches: usize,
}

/// All images of a root.
pub struct Images {
    client: Client,
    library: Arc<Library>,
    cache: BlobCache,
    fetching: Arc<Fetching>,
    scratch: PathBuf,
    limits: Limits,
    loaded: Mutex<HashMap<Digest, Weak<LoadedImage>>>,
    /// The outcome of the last time a registry was asked for a reference.
    asked: Mutex<HashMap<Reference, (Instant, Result<Digest, ImageError>)>>,
    /// One look-up at a time for each reference, so that those who come together ask once.
    turns: Mutex<HashMap<Reference, Weak<tokio::sync::Mutex<()>>>>,
}

impl Images {
    /// Opens the images of `root`. What an earlier process left half-done is removed.
    pub fn open(root: &Path, client: Client, limits: Limits) -> io::Result<Self> {
        files::make_private_dir(root)?;
        let scratch = root.join("scratch");
        if scratch.exists() {
            std::fs::remove_dir_all(&scratch)?;
        }
        files::make_private_dir(&scratch)?;
        Ok(Self {
            client,
            library: Arc::new(Library::open(&root.join("images"))?),
            cache: BlobCache::open(&root.join("cache"))?,
            fetching: Fetching::new(limits.max_fetches),
            scratch,
            limits,
            loaded: Mutex::default(),
            asked: Mutex::default(),
            turns: Mutex::default(),
        })
    }

    /// Counts of what was fetched for chunks.
    pub fn fetching(&self) -> &Fetching {
        &self.fetching
    }

    /// The image that `reference` names and that has `layer`; `None` if the image has no such layer.
    ///
    /// A layer is named by its digest, so an image that is known on this host is served without asking whether its
    /// tag has moved since.
    pub async fn with_layer(
        &self,
        reference: &Reference,
        layer: &Digest,
    ) -> Result<Option<Arc<LoadedImage>>, ImageError> {
        if let Some(image) = self.known_with_layer(reference, layer).await {
            return Ok(Some(image));
        }
        let limit = self.limits.resolve_timeout;
        let resolved = tokio::time::timeout(limit, async {
            let turn = self.turn(reference);
            let _turn = turn.lock().await;
            if let Some(image) = self.known_with_layer(reference, layer).await {
                return Ok(Some(image));
            }
            let manifest = self.ask_within_reason(reference).await?;
            let (image, _) = self.manifest(reference, manifest).await?;
            if image.position(layer).is_none() {
                return Ok(None);
            }
            self.load(reference, manifest).await.map(Some)
        });
        let outcome = resolved.await.unwrap_or(Err(ImageError::TimedOut(limit.as_secs())));
        if let Err(error) = &outcome {
            self.note(reference, Err(error.clone()));
        }
        outcome
    }

    /// The image that `reference` names now: the registry is asked, unless the reference is by digest and known.
    pub async fn current(&self, reference: &Reference) -> Result<Arc<LoadedImage>, ImageError> {
        let limit = self.limits.resolve_timeout;
        let resolved = tokio::time::timeout(limit, async {
            let manifest = match self.library.last(reference) {
                Some((_, manifest)) if reference.is_by_digest() => manifest,
                Some((top, manifest)) if self.still_names(reference, top).await? => manifest,
                _ => self.ask(reference).await?,
            };
            self.load(reference, manifest).await
        });
        resolved.await.unwrap_or(Err(ImageError::TimedOut(limit.as_secs())))
    }

    /// Whether the registry still gives `top` for the tag. Costs one HEAD request.
    async fn still_names(&self, reference: &Reference, top: Digest) -> Result<bool, ImageError> {
        let now = self
            .client
            .manifest_digest(&reference.repository(), reference.selector())
            .await?;
        Ok(now == top)
    }

    async fn known_with_layer(&self, reference: &Reference, layer: &Digest) -> Option<Arc<LoadedImage>> {
        for digest in self.library.manifests(reference) {
            let Some(Ok(Document::Image(manifest))) = self.library.get(&digest).map(|bytes| Document::parse(&bytes))
            else {
                continue;
            };
            if manifest.position(layer).is_none() {
                continue;
            }
            match self.load(reference, digest).await {
                Ok(image) => return Some(image),
                Err(error) => tracing::debug!(%reference, %digest, %error, "a known image cannot be loaded"),
            }
        }
        None
    }

    fn turn(&self, reference: &Reference) -> Arc<tokio::sync::Mutex<()>> {
        let mut turns = self.turns.lock();
        if let Some(turn) = turns.get(reference).and_then(Weak::upgrade) {
            return turn;
        }
        turns.retain(|_, turn| turn.strong_count() > 0);
        let turn = Arc::new(tokio::sync::Mutex::new(()));
        turns.insert(reference.clone(), Arc::downgrade(&turn));
        turn
    }

    /// Asks the registry for the reference, or answers as it did a moment ago.
    async fn ask_within_reason(&self, reference: &Reference) -> Result<Digest, ImageError> {
        let remembered = self.asked.lock().get(reference).cloned();
        if let Some((when, outcome)) = remembered
            && when.elapsed() < self.limits.negative_ttl
        {
            return outcome;
        }
        let outcome = self.ask(reference).await;
        self.note(reference, outcome.clone());
        outcome
    }

    fn note(&self, reference: &Reference, outcome: Result<Digest, ImageError>) {
        let mut asked = self.asked.lock();
        asked.retain(|_, (when, _)| when.elapsed() < self.limits.negative_ttl);
        asked.insert(reference.clone(), (Instant::now(), outcome));
    }

    /// Asks the registry which manifest the reference names for this machine, and remembers it if it is a Nydus image.
    async fn ask(&self, reference: &Reference) -> Result<Digest, ImageError> {
        let repository = reference.repository();
        let top = self.client.manifest(&repository, reference.selector()).await?;
        let digest = match Document::parse(&top.bytes)? {
            Document::Image(_) => {
                self.keep(&top.digest, &top.bytes)?;
                top.digest
            }
            Document::Index(digest) => digest,
        };
        let (manifest, _) = self.manifest(reference, digest).await?;
        if manifest.bootstrap.is_none() {
            return Err(ImageError::NotNydus);
        }
        let remembered = self.library.remember(reference, top.digest, digest);
        remembered.map_err(ImageError::io("cannot note the image's manifest"))?;
        Ok(digest)
    }

    /// The image manifest of that digest, from disk or the registry.
    async fn manifest(&self, reference: &Reference, digest: Digest) -> Result<(Manifest, Bytes), ImageError> {
        let bytes = match self.library.get(&digest) {
            Some(bytes) => bytes,
            None => {
                let fetched = self
                    .client
                    .manifest(&reference.repository(), &digest.to_string())
                    .await?;
                self.keep(&digest, &fetched.bytes)?;
                fetched.bytes
            }
        };
        match Document::parse(&bytes)? {
            Document::Image(manifest) => Ok((manifest, bytes)),
            Document::Index(_) => {
                let reason = "an index lists another index".to_owned();
                Err(ManifestError::Malformed { what: "index", reason }.into())
            }
        }
    }

    fn keep(&self, digest: &Digest, bytes: &[u8]) -> Result<(), ImageError> {
        self.library
            .put(digest, bytes)
            .map_err(ImageError::io(format!("cannot keep {digest}")))
    }

    /// Loads the image of that manifest, or gives the one that is loaded.
    async fn load(&self, reference: &Reference, digest: Digest) -> Result<Arc<LoadedImage>, ImageError> {
        let loaded = || self.loaded.lock().get(&digest).and_then(Weak::upgrade);
        if let Some(image) = loaded() {
            return Ok(image);
        }
        let repository = reference.repository();
        let (manifest, _) = self.manifest(reference, digest).await?;
        let position = manifest.bootstrap.ok_or(ImageError::NotNydus)?;
        let bootstrap_layer = manifest.layers[position].digest;
        let config = self.blob(&repository, &manifest.config, MAX_CONFIG).await?;
        let diff_ids = manifest.diff_ids(&config)?;
        // Compressed bytes can be no more than a few more than the uncompressed.
        self.blob(&repository, &bootstrap_layer, self.limits.max_bootstrap_size)
            .await?;
        let image = self
            .unpack_and_load(repository, digest, manifest, diff_ids, bootstrap_layer, position)
            .await?;
        let mut all = self.loaded.lock();
        all.retain(|_, image| image.strong_count() > 0);
        // Two references may have loaded the same image side by side: the first stays.
        if let Some(other) = all.get(&digest).and_then(Weak::upgrade) {
            return Ok(other);
        }
        all.insert(digest, Arc::downgrade(&image));
        Ok(image)
    }

    async fn unpack_and_load(
        &self,
        repository: Repository,
        digest: Digest,
        manifest: Manifest,
        diff_ids: Vec<Digest>,
        bootstrap_layer: Digest,
        position: usize,
    ) -> Result<Arc<LoadedImage>, ImageError> {
        let file = self
            .library
            .file(&bootstrap_layer)
            .map_err(ImageError::io("cannot open the bootstrap layer"))?;
        let (limit, scratch, diff_id) = (self.limits.max_bootstrap_size, self.scratch.clone(), diff_ids[position]);
        let unpack = move || bootstrap::unpack(file, diff_id, limit, &scratch);
        let unpacked = tokio::task::spawn_blocking(unpack)
            .await
            .map_err(|_| ImageError::Aborted)?;
        let unpacked = unpacked.map_err(Arc::new)?;
        let parts = Parts {
            digest,
            manifest,
            diff_ids,
            bootstrap_layer,
            unpacked,
        };
        let backing = Backing {
            client: self.client.clone(),
            repository,
            cache: &self.cache,
            fetching: Arc::clone(&self.fetching),
            library: Arc::clone(&self.library),
        };
        // Reading a bootstrap of many files takes a while: other requests of this thread move elsewhere meanwhile.
        tokio::task::block_in_place(|| LoadedImage::new(parts, backing)).map(Arc::new)
    }

    /// A whole blob, from disk or the registry; kept on disk.
    async fn blob(&self, repository: &Repository, digest: &Digest, limit: u64) -> Result<Bytes, ImageError> {
        if let Some(bytes) = self.library.get(digest) {
            return Ok(bytes);
        }
        let bytes = self.client.blob(repository, digest, limit).await?;
        self.keep(digest, &bytes)?;
        Ok(bytes)
    }
}
