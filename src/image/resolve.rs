//! From a reference to an image that is ready to be read.

use std::{
    collections::HashMap,
    io,
    path::{Path, PathBuf},
    sync::{Arc, Weak},
    time::Duration,
};

use bytes::Bytes;
use parking_lot::Mutex;

use super::{
    bootstrap::{self, UnpackError},
    error::ImageError,
    library::Library,
    loaded::{Backing, LoadedImage, Parts},
    manifest::{Document, Manifest, ManifestError},
    recent::{Recent, Turns},
    reference::Reference,
};
use crate::{
    blob::{cache::BlobCache, fetching::Fetching},
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
    /// How long a read may wait for a chunk.
    pub read_patience: Duration,
}

/// All images of a root.
pub struct Images {
    client: Client,
    library: Arc<Library>,
    cache: Arc<BlobCache>,
    fetching: Arc<Fetching>,
    scratch: PathBuf,
    limits: Limits,
    loaded: Mutex<HashMap<Digest, Weak<LoadedImage>>>,
    /// References that cannot be used, and layers that their images lack. Podman asks several times for each layer,
    /// and should not wait each time.
    refused: Recent<Reference, ImageError>,
    lacking: Recent<(Reference, Digest), ()>,
    /// Images that cannot be loaded, though all of them is here.
    broken: Recent<Digest, ImageError>,
    /// One look-up at a time for each reference, so that those who come together ask once.
    turns: Turns<Reference>,
    /// One at a time loads an image.
    loading: Turns<Digest>,
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
            cache: Arc::new(BlobCache::open(&root.join("cache"))?),
            fetching: Arc::new(Fetching::new(limits.read_patience)),
            refused: Recent::new(limits.negative_ttl),
            lacking: Recent::new(limits.negative_ttl),
            broken: Recent::new(limits.negative_ttl),
            scratch,
            limits,
            loaded: Mutex::default(),
            turns: Turns::default(),
            loading: Turns::default(),
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
        let resolved = tokio::time::timeout(limit, self.ask_with_layer(reference, layer));
        let outcome = resolved.await.unwrap_or(Err(ImageError::TimedOut(limit.as_secs())));
        match &outcome {
            Ok(Some(_)) => {}
            Ok(None) | Err(ImageError::NotNydus) => self.lacking.note((reference.clone(), *layer), ()),
            Err(error) => self.refused.note(reference.clone(), error.clone()),
        }
        outcome
    }

    async fn ask_with_layer(
        &self,
        reference: &Reference,
        layer: &Digest,
    ) -> Result<Option<Arc<LoadedImage>>, ImageError> {
        let _turn = self.turns.take(reference).await;
        // Whoever had the turn before may have found it, or that there is nothing to be found.
        if let Some(image) = self.known_with_layer(reference, layer).await {
            return Ok(Some(image));
        }
        if let Some(error) = self.refused.recall(reference) {
            return Err(error);
        }
        if self.lacking.recall(&(reference.clone(), *layer)).is_some() {
            return Ok(None);
        }
        let (digest, manifest) = self.ask(reference).await?;
        if manifest.position(layer).is_none() {
            return Ok(None);
        }
        self.load(reference, digest, Reach::Registry).await.map(Some)
    }

    /// The image that `reference` names now: the registry is asked, unless the reference is by digest and known.
    pub async fn current(&self, reference: &Reference) -> Result<Arc<LoadedImage>, ImageError> {
        let limit = self.limits.resolve_timeout;
        let resolved = tokio::time::timeout(limit, async {
            let digest = match self.library.last(reference) {
                Some((_, digest)) if reference.is_by_digest() => digest,
                Some((top, digest)) if self.still_names(reference, top).await? => digest,
                _ => self.ask(reference).await?.0,
            };
            self.load(reference, digest, Reach::Registry).await
        });
        resolved.await.unwrap_or(Err(ImageError::TimedOut(limit.as_secs())))
    }

    /// Whether the registry still gives `top` for the tag. Costs one HEAD request.
    async fn still_names(&self, reference: &Reference, top: Digest) -> Result<bool, ImageError> {
        let repository = reference.repository();
        Ok(self.client.manifest_digest(&repository, reference.selector()).await? == top)
    }

    /// A known image of the reference that has the layer, if all that it takes is on disk.
    async fn known_with_layer(&self, reference: &Reference, layer: &Digest) -> Option<Arc<LoadedImage>> {
        for digest in self.library.manifests(reference) {
            let Ok(manifest) = self.manifest(reference, digest, Reach::Disk).await else {
                continue;
            };
            if manifest.position(layer).is_none() {
                continue;
            }
            match self.load(reference, digest, Reach::Disk).await {
                Ok(image) => return Some(image),
                Err(error) => tracing::debug!(%reference, %digest, %error, "a known image cannot be loaded from disk"),
            }
        }
        None
    }

    /// Asks the registry which manifest the reference names for this machine, and remembers it if it is a Nydus image.
    async fn ask(&self, reference: &Reference) -> Result<(Digest, Manifest), ImageError> {
        let top = self
            .client
            .manifest(&reference.repository(), reference.selector())
            .await?;
        let (digest, manifest) = match Document::parse(&top.bytes)? {
            Document::Image(manifest) => (top.digest, manifest),
            Document::Index(digest) => (digest, self.manifest(reference, digest, Reach::Registry).await?),
        };
        if manifest.bootstrap.is_none() {
            // Nothing is said of other layers: the tag may be converted in the next moment.
            for layer in &manifest.layers {
                self.lacking.note((reference.clone(), layer.digest), ());
            }
            return Err(ImageError::NotNydus);
        }
        if digest == top.digest {
            self.keep(&digest, &top.bytes)?;
        }
        let remembered = self.library.remember(reference, top.digest, digest);
        remembered.map_err(ImageError::io("cannot note the image's manifest"))?;
        Ok((digest, manifest))
    }

    /// The image manifest of that digest.
    async fn manifest(&self, reference: &Reference, digest: Digest, reach: Reach) -> Result<Manifest, ImageError> {
        let kept = self.library.get(&digest);
        let bytes = match &kept {
            Some(bytes) => bytes.clone(),
            None if reach == Reach::Disk => return Err(ImageError::NotHere(digest)),
            None => {
                self.client
                    .manifest(&reference.repository(), &digest.to_string())
                    .await?
                    .bytes
            }
        };
        let Document::Image(manifest) = Document::parse(&bytes)? else {
            let reason = "an index lists another index".to_owned();
            return Err(ManifestError::Malformed { what: "index", reason }.into());
        };
        if kept.is_none() && manifest.bootstrap.is_some() {
            self.keep(&digest, &bytes)?;
        }
        Ok(manifest)
    }

    fn keep(&self, digest: &Digest, bytes: &[u8]) -> Result<(), ImageError> {
        self.library
            .put(digest, bytes)
            .map_err(ImageError::io(format!("cannot keep {digest}")))
    }

    fn loaded(&self, digest: &Digest) -> Option<Arc<LoadedImage>> {
        self.loaded.lock().get(digest).and_then(Weak::upgrade)
    }

    /// Loads the image of that manifest, or gives the one that is loaded.
    async fn load(&self, reference: &Reference, digest: Digest, reach: Reach) -> Result<Arc<LoadedImage>, ImageError> {
        let _turn = self.loading.take(&digest).await;
        if let Some(image) = self.loaded(&digest) {
            return Ok(image);
        }
        if let Some(error) = self.broken.recall(&digest) {
            return Err(error);
        }
        let repository = reference.repository();
        let manifest = self.manifest(reference, digest, reach).await?;
        let position = manifest.bootstrap.ok_or(ImageError::NotNydus)?;
        let layer = &manifest.layers[position];
        let config = self.blob(&repository, &manifest.config, MAX_CONFIG, reach).await?;
        let diff_ids = manifest.diff_ids(&config)?;
        let limit = self.limits.max_bootstrap_size;
        if layer.size > limit {
            return Err(Arc::new(UnpackError::TooLarge(limit)).into());
        }
        self.blob(&repository, &layer.digest, layer.size, reach).await?;
        let file = self
            .library
            .file(&layer.digest)
            .map_err(ImageError::io("cannot open the bootstrap layer"))?;
        let (scratch, diff_id) = (self.scratch.clone(), diff_ids[position]);
        let bootstrap_layer = layer.digest;
        let backing = Backing {
            client: self.client.clone(),
            repository,
            cache: Arc::clone(&self.cache),
            fetching: Arc::clone(&self.fetching),
            library: Arc::clone(&self.library),
        };
        let work = move || {
            let unpacked = bootstrap::unpack(file, diff_id, limit, &scratch).map_err(Arc::new)?;
            let parts = Parts {
                digest,
                manifest,
                diff_ids,
                bootstrap_layer,
                unpacked,
            };
            LoadedImage::new(parts, backing).map(Arc::new)
        };
        let image = tokio::task::spawn_blocking(work)
            .await
            .unwrap_or(Err(ImageError::Aborted));
        let image = image.inspect_err(|error| self.broken.note(digest, error.clone()))?;
        let mut all = self.loaded.lock();
        all.retain(|_, image| image.strong_count() > 0);
        all.insert(digest, Arc::downgrade(&image));
        drop(all);
        Ok(image)
    }

    /// A whole blob; kept on disk.
    async fn blob(
        &self,
        repository: &Repository,
        digest: &Digest,
        limit: u64,
        reach: Reach,
    ) -> Result<Bytes, ImageError> {
        if let Some(bytes) = self.library.get(digest) {
            return Ok(bytes);
        }
        if reach == Reach::Disk {
            return Err(ImageError::NotHere(*digest));
        }
        let fetched = self.client.blob(repository, digest, limit).await;
        let bytes = fetched.map_err(|error| match error.is_not_found() {
            true => ImageError::Incomplete(error),
            false => error.into(),
        })?;
        self.keep(digest, &bytes)?;
        Ok(bytes)
    }
}

/// Where to look for what is missing.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Reach {
    Disk,
    Registry,
}
