use std::{fs, path::PathBuf, sync::mpsc, time::Duration};

use tokio::time::timeout;

use super::{super::resolve::Images, *};
use crate::{
    config::Config,
    fixtures::{self, BuildOptions, BuiltImage, EmbeddedRegistry, Fault, LayerSource},
    registry::Client,
};

/// Longer than any operation here takes.
const LONG: Duration = Duration::from_secs(20);

/// An image in two repositories of a registry.
struct TestImages {
    images: Arc<Images>,
    image: BuiltImage,
    references: [Reference; 2],
    registry: EmbeddedRegistry,
    dir: tempfile::TempDir,
}

fn setup() -> TestImages {
    let dir = tempfile::tempdir().unwrap();
    fixtures::demo_tree(&dir.path().join("tree"), 20, 3).unwrap();
    let layers = [LayerSource::Dir(dir.path().join("tree"))];
    let image = fixtures::build(&layers, &BuildOptions::default(), &dir.path().join("out")).unwrap();
    let registry = EmbeddedRegistry::start().unwrap();
    let references = ["slow/app", "team/app"].map(|repository| {
        registry.add_image(&image, repository, "1").unwrap();
        registry.reference(repository, "1").parse().unwrap()
    });
    let config = Config::default();
    let client = Client::new(config.registry_options()).unwrap();
    let images = Images::open(&dir.path().join("root"), client, config.limits()).unwrap();
    TestImages {
        images: Arc::new(images),
        image,
        references,
        registry,
        dir,
    }
}

impl TestImages {
    fn stored_bootstrap(&self) -> PathBuf {
        let name = self.image.bootstrap_blob().unwrap().digest.hex();
        self.dir.path().join("root/images/content").join(name)
    }
}

#[tokio::test]
async fn slow_repository_does_not_delay_the_same_image_from_another() {
    let setup = setup();
    let bootstrap = setup.image.bootstrap_blob().unwrap().digest;
    setup.registry.set_fault(Some(Arc::new(move |request| {
        let is_slow = request.path.contains("slow/app") && request.digest == Some(bootstrap);
        if is_slow { Fault::Stall } else { Fault::None }
    })));
    let (images, slow) = (Arc::clone(&setup.images), setup.references[0].clone());
    let loading = tokio::spawn(async move { images.resolve(&slow).await.map(|image| image.digest) });
    let asked = async {
        while setup.registry.blob_stats(bootstrap).requests == 0
            && !setup
                .registry
                .log()
                .iter()
                .any(|request| request.digest == Some(bootstrap))
        {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(LONG, asked).await.unwrap();
    let image = timeout(LONG, setup.images.resolve(&setup.references[1])).await.unwrap();
    assert_eq!(image.unwrap().digest, setup.image.manifest_digest());
    assert!(!loading.is_finished());
    loading.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn concurrent_loads_from_two_repositories_recover_from_a_damaged_layer() {
    let setup = setup();
    drop(setup.images.resolve(&setup.references[0]).await.unwrap());
    for _ in 0..5 {
        fs::write(setup.stored_bootstrap(), "damaged").unwrap();
        let loads = setup.references.clone().map(|reference| {
            let images = Arc::clone(&setup.images);
            tokio::spawn(async move { images.resolve(&reference).await })
        });
        for load in loads {
            timeout(LONG, load).await.unwrap().unwrap().unwrap();
        }
        let kept = fs::read(setup.stored_bootstrap()).unwrap();
        assert_eq!(Digest::of(&kept), setup.image.bootstrap_blob().unwrap().digest);
    }
}

#[tokio::test]
async fn unpacked_bootstrap_is_deleted_after_parsing() {
    let setup = setup();
    let image = setup.images.resolve(&setup.references[0]).await.unwrap();
    let scratch = setup.dir.path().join("root/scratch");
    let dirs = fs::read_dir(&scratch).unwrap().map(|dir| dir.unwrap().path());
    let files = dirs.flat_map(|dir| fs::read_dir(dir).unwrap().map(|file| file.unwrap().path()));
    for file in files {
        assert!(file.to_str().unwrap().ends_with(".blob.meta"), "{file:?}");
    }
    drop(image);
    assert_eq!(fs::read_dir(&scratch).unwrap().count(), 0);
}

#[tokio::test]
async fn unpack_permit_is_held_until_the_work_ends() {
    let permits = Arc::new(Semaphore::new(1));
    let (end, ended) = mpsc::channel::<()>();
    let work = with_permit(&permits, move || ended.recv().is_ok());
    assert!(
        timeout(Duration::from_millis(50), work).await.is_err(),
        "the caller stops waiting"
    );
    assert_eq!(permits.available_permits(), 0);
    end.send(()).unwrap();
    let other = timeout(LONG, with_permit(&permits, || 7)).await.unwrap();
    assert_eq!(other.unwrap(), 7);
}
