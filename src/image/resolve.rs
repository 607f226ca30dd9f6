//! From a reference to an image that is ready to be read.

use std::{
    collections::HashMap,
    io,
    path::{Path, PathBuf},
    sync::{Arc, Weak},
    time::Duration,
};

use parking_lot::Mutex;
use tokio::sync::Semaphore;

use super::{
    error::ImageError,
    index::Selected,
    library::{Library, Named},
    loaded::LoadedImage,
    manifest::{Document, LookedUpBy, Manifest, ManifestError, Selection},
    prefetch,
    reference::Reference,
    trace::Traces,
    turns::Turns,
};
use crate::{
    blob::{cache::BlobCache, fetching::Fetching},
    digest::Digest,
    files,
    memory::Memory,
    registry::{self, Client, Credentials, Repository},
};

/// Failures of each kind that are remembered at most.
const MOST_REMEMBERED: usize = 1 << 16;

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
    /// Whether to fetch ahead of those who read in order.
    pub read_ahead: bool,
    /// What to fetch beforehand of images that are to be read.
    pub prefetch: prefetch::Options,
}

/// All images of a root.
pub struct Images {
    pub(super) client: Client,
    pub(super) library: Arc<Library>,
    pub(super) cache: Arc<BlobCache>,
    pub(super) fetching: Arc<Fetching>,
    pub(super) traces: Arc<Traces>,
    pub(super) scratch: PathBuf,
    pub(super) limits: Limits,
    pub(super) loaded: Mutex<HashMap<(Repository, Digest), Weak<LoadedImage>>>,
    /// References that cannot be used, and layers that their images lack. Podman asks several times for each layer,
    /// and should not wait each time.
    refused: Memory<Reference, ImageError>,
    lacking: Memory<(Reference, Digest), ()>,
    /// Images that cannot be loaded, though all of them is here.
    pub(super) broken: Memory<Digest, ImageError>,
    /// One look-up at a time for each reference, so that those who come together ask once.
    pub(super) turns: Turns<Reference>,
    /// One load at a time for each manifest of a repository.
    pub(super) loading: Turns<(Repository, Digest)>,
    /// One check at a time for each bootstrap layer on disk.
    pub(super) checking: Turns<Digest>,
    /// Few at a time unpack a bootstrap: it takes memory and a core.
    pub(super) unpacking: Arc<Semaphore>,
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
        let (library, cache) = (
            Library::open(&root.join("images"))?,
            BlobCache::open(&root.join("cache"))?,
        );
        library.remove_unfinished()?;
        let traces = Traces::open(&root.join("traces"))?;
        traces.remove_unfinished()?;
        let fetching = Fetching::new(limits.read_patience, limits.read_ahead, client.most_ahead());
        Ok(Self {
            client,
            library: Arc::new(library),
            cache: Arc::new(cache),
            fetching: Arc::new(fetching),
            refused: Memory::new(MOST_REMEMBERED, limits.negative_ttl),
            lacking: Memory::new(MOST_REMEMBERED, limits.negative_ttl),
            broken: Memory::new(MOST_REMEMBERED, limits.negative_ttl),
            traces: Arc::new(traces),
            scratch,
            limits,
            loaded: Mutex::default(),
            turns: Turns::default(),
            loading: Turns::default(),
            checking: Turns::default(),
            unpacking: Arc::new(Semaphore::new(2)),
        })
    }

    /// Keeps on disk what the images in use have needed so far.
    pub fn save_needs(&self) {
        let loaded: Vec<_> = self.loaded.lock().values().filter_map(Weak::upgrade).collect();
        loaded.iter().for_each(|image| image.save_needs());
    }

    /// A trace of the image with that manifest was put in the place of the one that was there: what it names is fetched now if
    /// the image is in use. Tells whether it is so. Within a runtime.
    pub async fn replay(&self, image: &Digest) -> bool {
        let of_image = |((_, digest), loaded): (&(Repository, Digest), &Weak<LoadedImage>)| {
            (digest == image).then(|| loaded.upgrade()).flatten()
        };
        let loaded: Vec<_> = self.loaded.lock().iter().filter_map(of_image).collect();
        let mut is_replayed = false;
        for image in loaded {
            is_replayed |= image.replay().await;
        }
        is_replayed
    }

    /// Uses credentials that Podman was given, see [`Client::hand_over`]. What was refused before may not be any more.
    pub fn hand_over(&self, repository: &Repository, credentials: Credentials) -> Result<(), registry::Error> {
        self.client.hand_over(repository, credentials)?;
        self.refused.clear();
        self.lacking.clear();
        Ok(())
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
        let limit = self.limits.resolve_timeout;
        let resolved = tokio::time::timeout(limit, async {
            match self.known_with_layer(reference, layer, Reach::Disk).await {
                Some(image) => Ok(Some(image)),
                None => self.ask_with_layer(reference, layer).await,
            }
        });
        let outcome = resolved.await.unwrap_or(Err(ImageError::TimedOut(limit.as_secs())));
        match &outcome {
            Ok(Some(image)) => image.prepare().await,
            Ok(None) | Err(ImageError::NotNydus) => self.lacking.keep((reference.clone(), *layer), ()),
            Err(error) => self.refused.keep(reference.clone(), error.clone()),
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
        if let Some(image) = self.known_with_layer(reference, layer, Reach::Disk).await {
            return Ok(Some(image));
        }
        if let Some(error) = self.refused.get(reference) {
            return Err(error);
        }
        if self.lacking.get(&(reference.clone(), *layer)).is_some() {
            return Ok(None);
        }
        // The mirror has learned a moment ago what the tag names, so there is no need to ask once more.
        if let Some(image) = self.known_with_layer(reference, layer, Reach::Registry).await {
            return Ok(Some(image));
        }
        let (named, manifest) = self.ask(reference).await?;
        match manifest.find(layer) {
            Some((_, LookedUpBy::Toc)) => {}
            Some((_, LookedUpBy::Digest)) if !is_ambiguous(named, &manifest) => {}
            _ => return Ok(None),
        }
        self.load(reference, named.manifest, Reach::Registry).await.map(Some)
    }

    /// The image that `reference` names now: the registry is asked, unless the reference is by digest and known.
    pub async fn current(&self, reference: &Reference) -> Result<Arc<LoadedImage>, ImageError> {
        let limit = self.limits.resolve_timeout;
        let resolved = tokio::time::timeout(limit, async {
            let digest = match self.named(reference).await.first() {
                Some(named) if reference.is_by_digest() => named.manifest,
                Some(named) if self.may_still_name(reference, named.top).await? => named.manifest,
                _ => self.ask(reference).await?.0.manifest,
            };
            self.load(reference, digest, Reach::Registry).await
        });
        resolved.await.unwrap_or(Err(ImageError::TimedOut(limit.as_secs())))
    }

    /// The same, but what cannot be asked for is believed to be as it was.
    async fn may_still_name(&self, reference: &Reference, top: Digest) -> Result<bool, ImageError> {
        match self.still_names(reference, top).await {
            Err(error) if error.is_unreachable() => {
                let error = crate::report::Report(&error);
                tracing::warn!(%reference, "the registry cannot be reached, so the image is used that was known last: {error}");
                Ok(true)
            }
            answered => answered,
        }
    }

    /// Whether the registry still gives `top` for the tag. Costs one HEAD request.
    async fn still_names(&self, reference: &Reference, top: Digest) -> Result<bool, ImageError> {
        let repository = reference.repository();
        Ok(self.client.manifest_digest(&repository, reference.selector()).await? == top)
    }

    /// A known image of the reference that has the layer, if all that it takes is within `reach`; on disk, if the layer
    /// is looked up by its digest.
    ///
    /// Who looks a layer up by its TOC digest has a manifest that the mirror has made, and so means no other image.
    async fn known_with_layer(&self, reference: &Reference, layer: &Digest, reach: Reach) -> Option<Arc<LoadedImage>> {
        for named in self.named(reference).await {
            let Ok(manifest) = self.manifest(reference, named.manifest, Reach::Disk).await else {
                continue;
            };
            let reach = match manifest.find(layer) {
                None => continue,
                Some((_, LookedUpBy::Toc)) => reach,
                Some((_, LookedUpBy::Digest)) if is_ambiguous(named, &manifest) => continue,
                Some((_, LookedUpBy::Digest)) => {
                    if manifest.has_original_layers() && self.is_now_ordinary(reference, named.top, layer).await {
                        continue;
                    }
                    Reach::Disk
                }
            };
            match self.load(reference, named.manifest, reach).await {
                Ok(image) => return Some(image),
                Err(error) => tracing::debug!(%reference, %error, "a known image cannot be loaded"),
            }
        }
        None
    }

    /// Whether the reference, which has named `top`, by now names an ordinary image that has the layer.
    async fn is_now_ordinary(&self, reference: &Reference, top: Digest, layer: &Digest) -> bool {
        if reference.is_by_digest() || !matches!(self.still_names(reference, top).await, Ok(false)) {
            return false;
        }
        let now = self
            .client
            .manifest(&reference.repository(), reference.selector())
            .await;
        let document = now.ok().map(|now| Document::parse(&now.bytes, Selection::PreferNydus));
        matches!(document, Some(Ok(Document::Image(image))) if image.is_ordinary_with(layer))
    }

    /// Asks the registry which manifest the reference names for this machine, and remembers it if it is a Nydus image.
    async fn ask(&self, reference: &Reference) -> Result<(Named, Manifest), ImageError> {
        let repository = reference.repository();
        let top = match reference.digest() {
            // It may be known by a tag.
            Some(digest) => self.by_digest(&repository, &digest).await?,
            None => self.client.manifest(&repository, reference.selector()).await?,
        };
        self.settle(reference, &top).await
    }

    /// Finds the manifest for this machine in what the registry gave for the reference, and remembers it if it is a
    /// Nydus image.
    pub(super) async fn settle(
        &self,
        reference: &Reference,
        top: &registry::Manifest,
    ) -> Result<(Named, Manifest), ImageError> {
        let (digest, manifest) = match Document::parse(&top.bytes, Selection::PreferNydus)? {
            Document::Image(manifest) => (top.digest, manifest),
            Document::Index(Selected { manifest, .. }) => {
                (manifest, self.manifest(reference, manifest, Reach::Registry).await?)
            }
        };
        if manifest.bootstrap.is_none() {
            // Nothing is said of other layers: the tag may be converted in the next moment.
            for layer in &manifest.layers {
                self.lacking.keep((reference.clone(), layer.digest), ());
            }
            return Err(ImageError::NotNydus);
        }
        // An index too: who asks for it by its digest may do so when the registry is out of reach.
        self.keep(&top.digest, top.bytes.clone()).await?;
        let named = Named {
            manifest: digest,
            top: top.digest,
        };
        self.remember(reference, named).await?;
        self.reconsider(reference, &manifest);
        Ok((named, manifest))
    }

    /// Forgets what went wrong with the reference before its registry gave this manifest.
    pub(super) fn reconsider(&self, reference: &Reference, manifest: &Manifest) {
        self.refused.forget(reference);
        for layer in manifest.nydus_layers() {
            for key in [layer.digest, layer.toc_digest()] {
                self.lacking.forget(&(reference.clone(), key));
            }
        }
    }

    /// The image manifest of that digest.
    pub(super) async fn manifest(
        &self,
        reference: &Reference,
        digest: Digest,
        reach: Reach,
    ) -> Result<Manifest, ImageError> {
        let kept = self.kept(&digest).await;
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
        let Document::Image(manifest) = Document::parse(&bytes, Selection::PreferNydus)? else {
            let reason = "an index lists another index".to_owned();
            return Err(ManifestError::Malformed { what: "index", reason }.into());
        };
        if kept.is_none() && manifest.bootstrap.is_some() {
            self.keep(&digest, bytes).await?;
        }
        Ok(manifest)
    }
}

/// Where to look for what is missing.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Reach {
    Disk,
    Registry,
}

/// Whether Podman may mean another image by the same layers. An index may have, beside the image, an ordinary one that
/// is made of the original layers, and which of them Podman takes is not known here. To that one, the layers that are
/// empty here would be a broken image.
fn is_ambiguous(named: Named, manifest: &Manifest) -> bool {
    manifest.has_original_layers() && named.top != named.manifest
}
