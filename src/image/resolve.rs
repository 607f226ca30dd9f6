//! From a reference to an image that is ready to be read.

use std::{
    collections::{HashMap, HashSet},
    io,
    path::{Path, PathBuf},
    sync::{Arc, Weak},
    time::Duration,
};

use parking_lot::Mutex;
use tokio::sync::{OwnedMutexGuard, Semaphore};

use super::{
    error::ImageError,
    index::Selected,
    keyed_mutex::KeyedMutex,
    loaded::LoadedImage,
    manifest::{Document, Manifest, ManifestError, Selection},
    metadata_store::{MetadataStore, Named},
    prefetch,
    reference::Reference,
    trace::Traces,
};
use crate::{
    atomic_file,
    blob::{cache::BlobCache, scheduler::FetchScheduler},
    digest::Digest,
    registry::{self, Client, Credentials, Repository},
    ttl_cache::TtlCache,
};

/// Failures of each kind that are remembered at most.
const MOST_REMEMBERED: usize = 1 << 16;

/// For how long it is remembered that a manifest is no Nydus image's. Its digest never means anything else.
const ORDINARY_TTL: Duration = Duration::from_secs(24 * 3600);

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

/// An image as its manifest and configuration describe it.
#[derive(Debug, Clone)]
pub struct Described {
    /// Digest of the manifest.
    pub digest: Digest,
    /// The manifest.
    pub manifest: Manifest,
    /// One for each layer: digests of the uncompressed layers.
    pub diff_ids: Vec<Digest>,
}

/// All images of a root.
pub struct Images {
    pub(super) client: Client,
    pub(super) library: Arc<MetadataStore>,
    pub(super) cache: Arc<BlobCache>,
    pub(super) fetching: Arc<FetchScheduler>,
    pub(super) traces: Arc<Traces>,
    pub(super) scratch: PathBuf,
    pub(super) limits: Limits,
    pub(super) loaded: Mutex<HashMap<(Repository, Digest), Weak<LoadedImage>>>,
    /// References that cannot be used. An older Podman asks for each layer, and should not wait each time.
    refused: TtlCache<Reference, ImageError>,
    /// Manifests of ordinary images, of which an index does not tell that they are, with their layers.
    ordinary: TtlCache<Digest, Arc<[Digest]>>,
    /// Layers of ordinary images.
    ordinary_layers: TtlCache<(Reference, Digest), ()>,
    /// Images that cannot be loaded, though all of them is here.
    pub(super) broken: TtlCache<Digest, ImageError>,
    /// One look-up at a time for each reference, so that those who come together ask once.
    pub(super) turns: KeyedMutex<Reference>,
    /// One load at a time for each manifest of a repository.
    pub(super) loading: KeyedMutex<(Repository, Digest)>,
    /// One check at a time for each bootstrap layer on disk.
    pub(super) checking: KeyedMutex<Digest>,
    /// Few at a time unpack a bootstrap: it takes memory and a core.
    pub(super) unpacking: Arc<Semaphore>,
}

impl Images {
    /// Opens the images of `root`. What an earlier process left half-done is removed.
    pub fn open(root: &Path, client: Client, limits: Limits) -> io::Result<Self> {
        atomic_file::make_private_dir(root)?;
        let scratch = root.join("scratch");
        if scratch.exists() {
            std::fs::remove_dir_all(&scratch)?;
        }
        atomic_file::make_private_dir(&scratch)?;
        let (library, cache) = (
            MetadataStore::open(&root.join("images"))?,
            BlobCache::open(&root.join("cache"))?,
        );
        library.remove_unfinished()?;
        let traces = Traces::open(&root.join("traces"))?;
        traces.remove_unfinished()?;
        let fetching = FetchScheduler::new(limits.read_patience, limits.read_ahead, client.max_prefetches());
        Ok(Self {
            client,
            library: Arc::new(library),
            cache: Arc::new(cache),
            fetching: Arc::new(fetching),
            refused: TtlCache::new(MOST_REMEMBERED, limits.negative_ttl),
            ordinary: TtlCache::new(MOST_REMEMBERED, ORDINARY_TTL),
            ordinary_layers: TtlCache::new(MOST_REMEMBERED, limits.negative_ttl),
            broken: TtlCache::new(MOST_REMEMBERED, limits.negative_ttl),
            traces: Arc::new(traces),
            scratch,
            limits,
            loaded: Mutex::default(),
            turns: KeyedMutex::default(),
            loading: KeyedMutex::default(),
            checking: KeyedMutex::default(),
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

    /// Uses credentials that Podman was given, see [`Client::push_credentials`]. What was refused before may not be any more.
    pub fn push_credentials(&self, repository: &Repository, credentials: Credentials) -> Result<(), registry::Error> {
        self.client.push_credentials(repository, credentials)?;
        self.refused.clear();
        Ok(())
    }

    /// How long resolving a reference may take.
    pub fn resolve_timeout(&self) -> Duration {
        self.limits.resolve_timeout
    }

    /// Waits until no other task resolves the reference; the turn ends when the guard is dropped.
    pub async fn turn(&self, reference: &Reference) -> OwnedMutexGuard<()> {
        self.turns.take(reference).await
    }

    /// Remembers for a while that the reference cannot be used.
    pub fn refuse(&self, reference: &Reference, error: &ImageError) {
        self.refused.insert(reference.clone(), error.clone());
    }

    /// What a pull of `reference` is about to take. Fails for an image that is not to be published, which is remembered for a
    /// while. The caller holds the turn of the reference.
    pub async fn announced(&self, reference: &Reference) -> Result<Described, ImageError> {
        if let Some(error) = self.refused.get(reference) {
            return Err(error);
        }
        let described = self.describe(reference).await;
        described.inspect_err(|error| {
            // A tag may be converted in the next moment.
            if !matches!(error, ImageError::NotNydus) {
                self.refuse(reference, error);
            }
        })
    }

    /// Whether `layer` is one of an ordinary image that the reference named a moment ago: an older Podman asks for each.
    pub fn is_ordinary(&self, reference: &Reference, layer: &Digest) -> bool {
        self.ordinary_layers.get(&(reference.clone(), *layer)).is_some()
    }

    async fn describe(&self, reference: &Reference) -> Result<Described, ImageError> {
        let named = match self.named(reference).await.first().copied() {
            Some(named) if reference.is_by_digest() => named,
            known => match (self.ask(reference, Selection::LikePodman).await, known) {
                (Ok((named, _)), _) => named,
                (Err(error), Some(known)) if error.is_unreachable() => {
                    let error = crate::error_chain::ErrorChain(&error);
                    tracing::warn!(%reference, "registry cannot be reached, publishing the last known image: {error}");
                    known
                }
                (Err(error), _) => return Err(error),
            },
        };
        let manifest = self.manifest(reference, named.manifest, FetchPolicy::Registry).await?;
        if manifest.has_original_layers() {
            return Err(ImageError::OriginalLayers);
        }
        let config = self
            .config(&reference.repository(), &manifest.config, FetchPolicy::Registry)
            .await?;
        Ok(Described {
            diff_ids: manifest.diff_ids(&config)?,
            digest: named.manifest,
            manifest,
        })
    }

    /// Loads the image that was described. What goes wrong is remembered for a while.
    pub async fn load_described(
        &self,
        reference: &Reference,
        described: &Described,
    ) -> Result<Arc<LoadedImage>, ImageError> {
        let loaded = self.load(reference, described.digest, FetchPolicy::Registry).await;
        loaded.inspect_err(|error| self.refuse(reference, error))
    }

    /// The image of that manifest, from disk or else from one of the references it was pulled by, the newest last.
    pub async fn load_known(&self, manifest: Digest, references: &[String]) -> Result<Arc<LoadedImage>, ImageError> {
        let mut references: Vec<Reference> = references.iter().rev().filter_map(|text| text.parse().ok()).collect();
        let mut seen = HashSet::new();
        references.retain(|reference| seen.insert(reference.repository()));
        let limit = self.limits.resolve_timeout;
        let loaded = tokio::time::timeout(limit, self.load_from(manifest, &references)).await;
        let image = loaded.unwrap_or(Err(ImageError::TimedOut(limit.as_secs())))?;
        image.add_repositories(references.iter().map(Reference::repository));
        Ok(image)
    }

    async fn load_from(&self, manifest: Digest, references: &[Reference]) -> Result<Arc<LoadedImage>, ImageError> {
        let mut failure = ImageError::NotHere(manifest);
        for reach in [FetchPolicy::Disk, FetchPolicy::Registry] {
            for reference in references {
                match self.load(reference, manifest, reach).await {
                    Ok(image) => return Ok(image),
                    Err(error) => failure = error,
                }
            }
        }
        Err(failure)
    }

    /// The image's manifest and configuration as its registry has them, for a loaded image.
    pub async fn documents(&self, image: &LoadedImage) -> Result<(String, String), ImageError> {
        let text = async |digest: &Digest| {
            let bytes = self.kept(digest).await.ok_or(ImageError::NotHere(*digest))?;
            String::from_utf8(bytes.to_vec())
                .map_err(|error| ImageError::io("manifest or configuration")(io::Error::other(error)))
        };
        Ok((text(&image.digest).await?, text(&image.manifest.config).await?))
    }

    /// The image that `reference` names now: the registry is asked, unless the reference is by digest and known.
    pub async fn current(&self, reference: &Reference) -> Result<Arc<LoadedImage>, ImageError> {
        let limit = self.limits.resolve_timeout;
        let resolved = tokio::time::timeout(limit, async {
            let digest = match self.named(reference).await.first() {
                Some(named) if reference.is_by_digest() => named.manifest,
                Some(named) if self.may_still_name(reference, named.top).await? => named.manifest,
                _ => self.ask(reference, Selection::PreferNydus).await?.0.manifest,
            };
            self.load(reference, digest, FetchPolicy::Registry).await
        });
        resolved.await.unwrap_or(Err(ImageError::TimedOut(limit.as_secs())))
    }

    /// The same, but what cannot be asked for is believed to be as it was.
    async fn may_still_name(&self, reference: &Reference, top: Digest) -> Result<bool, ImageError> {
        match self.still_names(reference, top).await {
            Err(error) if error.is_unreachable() => {
                let error = crate::error_chain::ErrorChain(&error);
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

    /// Asks the registry which manifest the reference names for this machine, and remembers it if it is a Nydus image.
    async fn ask(&self, reference: &Reference, selection: Selection) -> Result<(Named, Manifest), ImageError> {
        let repository = reference.repository();
        let kept = match reference.digest() {
            // It may be known by a tag.
            Some(digest) => self.kept(&digest).await.map(|bytes| (digest, bytes)),
            None => None,
        };
        let (top, bytes) = match kept {
            Some(kept) => kept,
            None => {
                let given = self.client.manifest(&repository, reference.selector()).await?;
                (given.digest, given.bytes)
            }
        };
        let (digest, manifest) = match Document::parse(&bytes, selection)? {
            Document::Image(manifest) => (top, manifest),
            // What is not marked beside one that is, is not one.
            Document::Index(selected) if selected.has_nydus && !selected.is_nydus => return Err(ImageError::NotNydus),
            Document::Index(Selected { manifest, .. }) => {
                if let Some(layers) = self.ordinary.get(&manifest) {
                    return Err(self.is_not_nydus(reference, &layers));
                }
                (
                    manifest,
                    self.manifest(reference, manifest, FetchPolicy::Registry).await?,
                )
            }
        };
        if manifest.bootstrap.is_none() {
            let layers: Arc<[_]> = manifest.layers.iter().map(|layer| layer.digest).collect();
            self.ordinary.insert(digest, Arc::clone(&layers));
            return Err(self.is_not_nydus(reference, &layers));
        }
        // An index too: who asks for it by its digest may do so when the registry is out of reach.
        if self.kept(&top).await.is_none() {
            self.keep(&top, bytes).await?;
        }
        let named = Named { manifest: digest, top };
        self.remember(reference, named).await?;
        self.refused.remove(reference);
        Ok((named, manifest))
    }

    fn is_not_nydus(&self, reference: &Reference, layers: &[Digest]) -> ImageError {
        for layer in layers {
            self.ordinary_layers.insert((reference.clone(), *layer), ());
        }
        ImageError::NotNydus
    }

    /// Forgets what went wrong with the reference.
    pub(super) fn reconsider(&self, reference: &Reference) {
        self.refused.remove(reference);
    }

    /// The image manifest of that digest.
    pub(super) async fn manifest(
        &self,
        reference: &Reference,
        digest: Digest,
        reach: FetchPolicy,
    ) -> Result<Manifest, ImageError> {
        let kept = self.kept(&digest).await;
        let bytes = match &kept {
            Some(bytes) => bytes.clone(),
            None if reach == FetchPolicy::Disk => return Err(ImageError::NotHere(digest)),
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
pub(super) enum FetchPolicy {
    Disk,
    Registry,
}
