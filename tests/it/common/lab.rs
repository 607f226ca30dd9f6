//! Small images, and a registry with faults per repository.

use std::{
    collections::HashMap,
    fs,
    io::Write as _,
    path::{Path, PathBuf},
    sync::Arc,
};

use flate2::{Compression, write::GzEncoder};
use nydus_store::{
    fixtures::{
        self, BuildOptions, BuiltImage, EmbeddedRegistry, Fault, LayerSource, RequestInfo,
        content::{Random, mixed},
        image::BlobKind,
    },
    internals::Digest,
};
use parking_lot::Mutex;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::{Serve, StoreLayer};

/// Names and lengths in bytes of the files of [`Sample::new`]. Chunks are 64 KiB.
const FILES: [(&str, usize); 5] = [
    ("hello", 6),
    ("small", 9000),
    ("one", 64 << 10),
    ("large", 1 << 20),
    ("dir/odd", 200_001),
];

/// A small image and its source tree.
pub struct Sample {
    pub image: BuiltImage,
    pub tree: PathBuf,
    dir: TempDir,
}

impl Sample {
    /// An image of [`FILES`], whose contents depend on `seed`.
    pub fn new(seed: u64) -> Self {
        Self::of(&FILES, seed, &Self::options())
    }

    pub fn options() -> BuildOptions {
        BuildOptions {
            chunk_size: 64 << 10,
            ..BuildOptions::default()
        }
    }

    /// An image of files with these names and lengths.
    pub fn of(files: &[(&str, usize)], seed: u64, options: &BuildOptions) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let tree = dir.path().join("tree");
        let mut random = Random::new(seed);
        for (name, len) in files {
            let path = tree.join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, mixed(*len, &mut random)).unwrap();
        }
        let layers = [LayerSource::Dir(tree.clone())];
        let image = fixtures::build(&layers, options, &dir.path().join("image")).unwrap();
        Self { image, tree, dir }
    }

    /// A temporary directory, deleted with the sample.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Digest of the bootstrap layer, whose `diff` shows the files.
    pub fn bootstrap_digest(&self) -> Digest {
        self.image.bootstrap_blob().unwrap().digest
    }

    /// Digest of the data blob.
    pub fn data_digest(&self) -> Digest {
        let data = self.image.blobs.iter().find(|blob| blob.kind == BlobKind::Data);
        data.unwrap().digest
    }

    /// The data blob's bytes.
    pub fn data_bytes(&self) -> Vec<u8> {
        let data = self.image.blobs.iter().find(|blob| blob.kind == BlobKind::Data);
        fs::read(&data.unwrap().path).unwrap()
    }

    /// Contents of a file.
    pub fn content(&self, name: &str) -> Vec<u8> {
        fs::read(self.tree.join(name)).unwrap()
    }

    /// Sorted names of all files.
    pub fn names(&self) -> Vec<String> {
        let files = walkdir::WalkDir::new(&self.tree).sort_by_file_name().into_iter();
        let files = files.map(Result::unwrap).filter(|entry| entry.file_type().is_file());
        let name = |entry: walkdir::DirEntry| entry.path().strip_prefix(&self.tree).unwrap().to_owned();
        files
            .map(|entry| name(entry).into_os_string().into_string().unwrap())
            .collect()
    }

    /// Drops the layer's files from the page cache, so that the next read reaches the daemon.
    pub fn drop_pages(&self, layer: &StoreLayer) {
        for name in self.names() {
            let file = fs::File::open(layer.diff().join(&name)).unwrap();
            rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
        }
    }

    /// Panics unless every file of the layer has its source's contents.
    pub fn check(&self, layer: &StoreLayer) {
        assert!(layer.is_served(), "{} is not served", layer.diff().display());
        for name in self.names() {
            let read = fs::read(layer.diff().join(&name)).unwrap_or_else(|error| panic!("{name}: {error}"));
            assert!(read == self.content(&name), "{name} reads wrong");
        }
    }
}

type Hook = Arc<dyn Fn(&RequestInfo) -> Fault + Send + Sync>;

/// A daemon, and a registry with faults per repository.
pub struct Lab {
    pub serve: Serve,
    pub registry: EmbeddedRegistry,
    faults: Arc<Mutex<HashMap<String, Hook>>>,
}

impl Lab {
    /// Starts a daemon with this configuration.
    pub fn new(config: &str) -> Self {
        Self::with_daemon(Serve::with_config(config))
    }

    /// Uses a daemon that need not be running yet.
    pub fn with_daemon(serve: Serve) -> Self {
        let registry = EmbeddedRegistry::start().unwrap();
        let faults: Arc<Mutex<HashMap<String, Hook>>> = Arc::default();
        let hooks = Arc::clone(&faults);
        registry.set_fault(Some(Arc::new(move |request| {
            let repository = request.path.strip_prefix("/v2/").unwrap_or_default();
            let repository = repository.split('/').next().unwrap_or_default();
            let hook = hooks.lock().get(repository).cloned();
            hook.map_or(Fault::None, |hook| hook(request))
        })));
        Self {
            serve,
            registry,
            faults,
        }
    }

    /// Sets the fault of requests for a repository.
    pub fn fault(&self, repository: &str, hook: impl Fn(&RequestInfo) -> Fault + Send + Sync + 'static) {
        self.faults.lock().insert(repository.to_owned(), Arc::new(hook));
    }

    /// Sets the fault of requests for one blob of a repository.
    pub fn fault_on(&self, repository: &str, blob: Digest, fault: Fault) {
        self.fault(repository, move |request| match request.digest == Some(blob) {
            true => fault.clone(),
            false => Fault::None,
        });
    }

    /// Removes the fault of a repository.
    pub fn clear_fault(&self, repository: &str) {
        self.faults.lock().remove(repository);
    }

    /// `127.0.0.1:PORT/REPOSITORY:1`
    pub fn reference(&self, repository: &str) -> String {
        self.registry.reference(repository, "1")
    }

    /// Adds the sample to the registry as `repository`; returns its bootstrap layer.
    pub fn add(&self, sample: &Sample, repository: &str) -> StoreLayer {
        self.registry.add_image(&sample.image, repository, "1").unwrap();
        self.layer(repository, sample.bootstrap_digest())
    }

    /// A layer of the image `repository`.
    pub fn layer(&self, repository: &str, layer: Digest) -> StoreLayer {
        self.serve.layer(&self.reference(repository), &layer)
    }

    /// Adds an image of `layers` and `config` to the registry as `repository`; returns the manifest's digest.
    pub fn add_manifest(&self, repository: &str, layers: &[Value], config: &[u8]) -> Digest {
        let config_digest = Digest::of(config);
        self.registry
            .add_blob(repository, config_digest, config.to_vec().into());
        let manifest = manifest_json(layers, config_digest, config.len());
        let kind = fixtures::image::MEDIA_TYPE_MANIFEST;
        self.registry.add_manifest(repository, Some("1"), kind, manifest)
    }

    /// Adds an image of the sample's data blob and another bootstrap layer; returns that layer.
    pub fn with_bootstrap(&self, sample: &Sample, repository: &str, layer: Vec<u8>, diff_id: Digest) -> StoreLayer {
        let digest = Digest::of(&layer);
        let (data, bytes) = (sample.data_digest(), sample.data_bytes());
        let layers = [
            descriptor(data, bytes.len(), false),
            descriptor(digest, layer.len(), true),
        ];
        self.registry.add_blob(repository, data, bytes.into());
        self.registry.add_blob(repository, digest, layer.into());
        self.add_manifest(repository, &layers, &image_config(&[data, diff_id]));
        self.layer(repository, digest)
    }

    /// The daemon's log from byte `from` on.
    pub fn log_since(&self, from: usize) -> String {
        self.serve.log()[from..].to_owned()
    }

    /// Panics unless a line of [`Self::log_since`] contains all of `words`, or if the log reports a panic.
    pub fn assert_logged(&self, from: usize, words: &[&str]) {
        let log = self.log_since(from);
        let found = log.lines().any(|line| words.iter().all(|word| line.contains(word)));
        assert!(found, "no line with {words:?} in:\n{log}");
        assert!(!log.contains("panicked"), "{log}");
    }
}

/// An image manifest.
pub fn manifest_json(layers: &[Value], config: Digest, config_size: usize) -> Vec<u8> {
    serde_json::to_vec(&json!({
        "schemaVersion": 2,
        "mediaType": fixtures::image::MEDIA_TYPE_MANIFEST,
        "config": {
            "mediaType": "application/vnd.oci.image.config.v1+json", "digest": config, "size": config_size,
        },
        "layers": layers,
    }))
    .unwrap()
}

/// The descriptor of a Nydus layer.
pub fn descriptor(digest: Digest, size: usize, bootstrap: bool) -> Value {
    let (kind, mark) = if bootstrap {
        (
            fixtures::image::MEDIA_TYPE_LAYER_GZIP,
            "containerd.io/snapshot/nydus-bootstrap",
        )
    } else {
        (
            fixtures::image::MEDIA_TYPE_NYDUS_BLOB,
            "containerd.io/snapshot/nydus-blob",
        )
    };
    json!({"mediaType": kind, "digest": digest, "size": size, "annotations": {mark: "true"}})
}

/// An image configuration for this machine.
pub fn image_config(diff_ids: &[Digest]) -> Vec<u8> {
    serde_json::to_vec(&json!({
        "architecture": fixtures::ImageOptions::default().architecture,
        "os": "linux",
        "config": {},
        "rootfs": {"type": "layers", "diff_ids": diff_ids},
    }))
    .unwrap()
}

/// A gzip layer of these entries, whose names may be invalid; returns its bytes and its diff ID.
pub fn bootstrap_layer(entries: &[(&str, &[u8])]) -> (Vec<u8>, Digest) {
    let mut archive = tar::Builder::new(Vec::new());
    for (name, content) in entries {
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        // `set_path` refuses hostile names.
        header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
        header.set_cksum();
        archive.append(&header, *content).unwrap();
    }
    let tar = archive.into_inner().unwrap();
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(&tar).unwrap();
    (encoder.finish().unwrap(), Digest::of(&tar))
}
