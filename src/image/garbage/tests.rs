use std::{
    fs,
    path::PathBuf,
    sync::Arc,
    time::{Duration, SystemTime},
};

use super::*;
use crate::{
    config::Config,
    fixtures::{self, BuildOptions, BuiltImage, EmbeddedRegistry, LayerSource},
    image::{loaded::LoadedImage, reference::Reference, trace::Trace},
    rafs::ROOT,
    registry::Client,
};

const NOW: GarbageOptions = GarbageOptions {
    min_age: Duration::ZERO,
    dry_run: false,
};
const TEN_MINUTES: GarbageOptions = GarbageOptions {
    min_age: Duration::from_secs(600),
    dry_run: false,
};

/// Two images that share nothing, each with a chunk in the cache, metadata and a trace.
struct TestRoot {
    images: Images,
    built: [BuiltImage; 2],
    references: [Reference; 2],
    root: PathBuf,
    _registry: EmbeddedRegistry,
    _dir: tempfile::TempDir,
}

impl TestRoot {
    async fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let registry = EmbeddedRegistry::start().unwrap();
        let built = ["first", "second"].map(|name| {
            let tree = dir.path().join(name);
            fs::create_dir(&tree).unwrap();
            fs::write(tree.join("file"), name.repeat(2000)).unwrap();
            let built = fixtures::build(
                &[LayerSource::Dir(tree)],
                &BuildOptions::default(),
                &dir.path().join(format!("{name}.image")),
            );
            built
                .inspect(|built| registry.add_image(built, name, "1").unwrap())
                .unwrap()
        });
        let references = ["first", "second"].map(|name| registry.reference(name, "1").parse().unwrap());
        let config = Config::default();
        let client = Client::new(config.registry_options()).unwrap();
        let root = dir.path().join("root");
        let images = Images::open(&root, client, config.limits()).unwrap();
        let test = Self {
            images,
            built,
            references,
            root,
            _registry: registry,
            _dir: dir,
        };
        for position in 0..2 {
            test.read(position).await;
        }
        test
    }

    fn manifest(&self, position: usize) -> Digest {
        self.built[position].manifest_digest()
    }

    /// Reads the image's file, and stores a trace of the image.
    async fn read(&self, position: usize) -> Arc<LoadedImage> {
        let image = self.images.resolve(&self.references[position]).await.unwrap();
        let file = image.contents.tree.lookup(ROOT, b"file").unwrap();
        let mut bytes = vec![0; 10_000];
        image.contents.read(file, 0, &mut bytes).await.unwrap();
        assert!(bytes.starts_with(["first", "second"][position].as_bytes()));
        let trace = Trace {
            image: image.digest,
            parts: Vec::new(),
        };
        self.images.loader.backing().traces.put(&trace).unwrap();
        image
    }

    /// Makes all files old.
    fn age(&self) {
        let old = SystemTime::now() - Duration::from_secs(3600);
        for dir in ["images/content", "traces"] {
            for file in fs::read_dir(self.root.join(dir)).unwrap() {
                let file = fs::File::options().append(true).open(file.unwrap().path()).unwrap();
                file.set_modified(old).unwrap();
            }
        }
    }

    /// Numbers of files of content, references, traces and the cache.
    fn files(&self) -> [usize; 4] {
        let dirs = ["images/content", "images/references", "traces", "cache"];
        dirs.map(|dir| fs::read_dir(self.root.join(dir)).unwrap().count())
    }

    fn collect(&self, needed: &[usize], options: GarbageOptions) -> Garbage {
        let needed = needed.iter().map(|position| self.manifest(*position)).collect();
        self.images.remove_garbage(&needed, options).unwrap()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn all_of_unneeded_images_is_removed() {
    let test = TestRoot::new().await;
    let all = test.files();
    assert_eq!(test.collect(&[0, 1], NOW), Garbage::default());
    let planned = test.collect(&[0], GarbageOptions { dry_run: true, ..NOW });
    assert_eq!(test.files(), all);
    assert_eq!(
        (planned.images.clone(), planned.blobs, planned.traces),
        (vec![test.manifest(1)], 1, 1)
    );
    let used = test.images.cache().usage().0;
    assert_eq!(test.collect(&[0], NOW), planned);
    assert_eq!(test.images.cache().usage().0, used - planned.bytes);
    assert_eq!(test.files(), all.map(|files| files / 2));
    test.read(0).await;
    test.collect(&[], NOW);
    assert_eq!((test.files(), test.images.cache().usage().0), ([0; 4], 0));
    test.read(1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_used_lately_or_is_being_fetched_stays() {
    let test = TestRoot::new().await;
    let all = test.files();
    assert_eq!(test.collect(&[], TEN_MINUTES), Garbage::default());
    test.age();
    // Each look-up is a use.
    test.read(0).await;
    let removed = test.collect(&[], TEN_MINUTES);
    assert_eq!(removed.images, [test.manifest(1)]);
    let kept = test.images.keep(test.manifest(0));
    assert_eq!(test.collect(&[], NOW), Garbage::default());
    assert_eq!(test.files(), all.map(|files| files / 2));
    drop(kept);
    assert_eq!(test.collect(&[], NOW).images, [test.manifest(0)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn blob_of_a_loaded_image_is_emptied_and_deleted_later() {
    let test = TestRoot::new().await;
    let loaded = test.read(0).await;
    test.collect(&[], NOW);
    assert_eq!((test.files(), test.images.cache().usage().0), ([0, 0, 0, 2], 0));
    // The image still works.
    let file = loaded.contents.tree.lookup(ROOT, b"file").unwrap();
    let mut bytes = vec![0; 10_000];
    loaded.contents.read(file, 0, &mut bytes).await.unwrap();
    assert!(bytes == "first".repeat(2000).as_bytes());
    assert_eq!(test.collect(&[], NOW).blobs, 1);
    drop(loaded);
    assert_eq!(test.collect(&[], NOW), Garbage::default());
    assert_eq!(test.files(), [0; 4]);
}
