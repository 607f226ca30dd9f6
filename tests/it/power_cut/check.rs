//! [`Checker`]: whether a root is right after a power cut.

use std::{collections::BTreeMap, ffi::OsStr, fs, path::Path};

use nydus_store::{
    fixtures::content::Random,
    internals::{Client, Config, Digest, ImageStore, Images, ROOT, RootLock, Traces, Tree, install_crypto_provider},
};
use serde_json::Value;
use tokio::runtime::Runtime;

use crate::common::Sample;

/// What must hold of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Expected {
    /// Its layers are published.
    Layers,
    /// It is registered.
    Record,
    /// It is registered, and all its data is there.
    Data,
    /// If it is registered, then all its data is there.
    DataIfRecord,
    /// It is not registered.
    NoRecord,
}

/// Opens roots and reads the images in them.
pub struct Checker {
    runtime: Runtime,
    config: Config,
    client: Client,
    /// Asks no registry.
    offline: Client,
    /// Files by manifest.
    images: BTreeMap<Digest, Vec<(String, Vec<u8>)>>,
}

impl Checker {
    /// A checker that knows the contents of these images.
    pub fn new<'a>(samples: impl IntoIterator<Item = &'a Sample>) -> Self {
        install_crypto_provider();
        let files = |sample: &Sample| {
            let file = |name: String| (name.clone(), sample.content(&name));
            sample.names().into_iter().map(file).collect()
        };
        let images = samples
            .into_iter()
            .map(|sample| (sample.image.manifest_digest(), files(sample)));
        let mut config = Config::default();
        config.fetch.read_ahead = false;
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build();
        let client = Client::new(config.registry_options()).unwrap();
        config.offline = true;
        Self {
            client,
            offline: Client::new(config.registry_options()).unwrap(),
            images: images.collect(),
            runtime: runtime.unwrap(),
            config,
        }
    }

    /// Panics unless the daemon would open `root`, everything published reads right, and what is expected of images
    /// (by their manifests) holds. Returns the number of files that were read.
    pub fn check(&self, root: &Path, expected: &BTreeMap<Digest, Expected>, random: &mut Random) -> usize {
        // What Podman reads if it comes before the daemon.
        read_records(root);
        let _inside = self.runtime.enter();
        let _lock = RootLock::take(root).unwrap();
        let complete = self.check_offline(root, expected);
        let images = Images::open(root, self.client.clone(), self.config.limits()).unwrap();
        let store = ImageStore::open(root, &[]).unwrap();
        let published = store.published();
        let mut trees: Vec<_> = published.layers.values().filter_map(|row| row.tree.as_ref()).collect();
        if !trees.is_empty() {
            let first = random.below(trees.len() as u64) as usize;
            trees.rotate_left(first);
        }
        let read = |manifest, sources: &[String]| self.runtime.block_on(self.read_image(&images, manifest, sources));
        complete
            + trees
                .into_iter()
                .map(|tree| read(tree.manifest, &tree.sources))
                .sum::<usize>()
    }

    /// Checks what needs no registry.
    fn check_offline(&self, root: &Path, expected: &BTreeMap<Digest, Expected>) -> usize {
        let images = Images::open(root, self.offline.clone(), self.config.limits()).unwrap();
        let store = ImageStore::open(root, &[]).unwrap();
        let published = store.published();
        let (layers, records) = read_records(root);
        assert!(
            layers.iter().eq(published.layers.keys()),
            "layers.json differs from the database"
        );
        assert!(
            records.iter().eq(published.images.keys()),
            "images.json differs from the database"
        );
        for row in published.images.values() {
            assert!(published.layers.contains_key(&row.layer), "a record without its layer");
        }
        let mut all = walkdir::WalkDir::new(root).into_iter().map(Result::unwrap);
        let unfinished = all.find(|entry| is_unfinished(entry.file_name()));
        assert!(unfinished.is_none(), "{unfinished:?} is left");
        let traces = Traces::open(&root.join("traces")).unwrap();
        for image in traces.images().unwrap() {
            traces.get(&image).unwrap();
        }
        let mut files = 0;
        for (manifest, expected) in expected {
            let mut trees = published.layers.values().filter_map(|row| row.tree.as_ref());
            let tree = trees.find(|tree| tree.manifest == *manifest);
            let has_record = published
                .images
                .values()
                .any(|row| row.manifest == *manifest && !row.names.is_empty());
            let (holds, has_data) = match expected {
                Expected::Layers => (tree.is_some(), false),
                Expected::Record => (has_record, false),
                Expected::Data => (has_record, true),
                Expected::DataIfRecord => (true, has_record),
                Expected::NoRecord => (!has_record, false),
            };
            assert!(holds, "an image is not as it was acknowledged: {expected:?}");
            if has_data {
                let sources = &tree.expect("the layers of the record").sources;
                files += self.runtime.block_on(self.read_image(&images, *manifest, sources));
            }
        }
        files
    }

    /// Reads all files of an image.
    async fn read_image(&self, images: &Images, manifest: Digest, sources: &[String]) -> usize {
        let image = images.load_manifest(manifest, sources).await.unwrap();
        let files = &self.images[&manifest];
        for (name, content) in files {
            let tree = &image.contents.tree;
            let file = find(tree, name);
            let mut bytes = vec![0xee; tree.inode(file).unwrap().size as usize];
            if !image.contents.read_ready(file, 0, &mut bytes) {
                image.contents.read(file, 0, &mut bytes).await.unwrap();
            }
            assert!(bytes == *content, "{name} reads wrong");
        }
        files.len()
    }
}

fn find(tree: &Tree, path: &str) -> u32 {
    path.split('/')
        .fold(ROOT, |dir, name| tree.lookup(dir, name.as_bytes()).unwrap())
}

/// The sorted ids in `layers.json` and `images.json`. Panics unless both are intact where they exist, and the images
/// have their data.
fn read_records(root: &Path) -> (Vec<String>, Vec<String>) {
    let store = root.join("store");
    let layers = records(&store.join("overlay-layers/layers.json"));
    let images = records(&store.join("overlay-images/images.json"));
    for image in &images {
        let dir = store.join("overlay-images").join(id(image));
        let sizes: u64 = image["big-data-sizes"]
            .as_object()
            .unwrap()
            .values()
            .filter_map(Value::as_u64)
            .sum();
        let files = fs::read_dir(&dir).unwrap().map(Result::unwrap);
        let finished = files.filter(|entry| !is_unfinished(&entry.file_name()));
        let bytes: u64 = finished.map(|entry| entry.metadata().unwrap().len()).sum();
        assert_eq!(bytes, sizes, "data of an image is missing");
    }
    let ids = |records: &[Value]| {
        let mut ids: Vec<_> = records.iter().map(id).collect();
        ids.sort();
        ids
    };
    (ids(&layers), ids(&images))
}

fn is_unfinished(name: &OsStr) -> bool {
    name.to_string_lossy().starts_with(".new-")
}

fn records(path: &Path) -> Vec<Value> {
    fs::read(path).map_or_else(|_| Vec::new(), |bytes| serde_json::from_slice(&bytes).unwrap())
}

fn id(record: &Value) -> String {
    record["id"].as_str().unwrap().to_owned()
}
