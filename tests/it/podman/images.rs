//! Which images: names, tags, digests, indexes, ordinary images.

use std::time::{Duration, Instant};

use nydus_store::fixtures::{self, BuildOptions, BuiltImage, Conversion, ImageIndex, LayerSource, NydusMark};

use super::{Lab, note, runnable_tree};

#[tokio::test(flavor = "multi_thread")]
async fn by_digest() {
    let (lab, _, built) = Lab::with_image().await;
    let image = format!("{}/base@{}", lab.registry.host(), built.manifest_digest());
    assert_eq!(lab.sh(&image, "cat /data/hello"), "hello");
    assert!(lab.serve.log().contains("layer is used"));
}

#[tokio::test(flavor = "multi_thread")]
async fn in_a_nested_repository_without_a_tag() {
    let lab = Lab::start();
    let built = lab.build(&[lab.layer(runnable_tree)], &BuildOptions::default());
    lab.push(&built, "some/deeply/nested_repo/of-mine", "latest").await;
    let image = format!("{}/some/deeply/nested_repo/of-mine", lab.registry.host());
    assert_eq!(lab.sh(&image, "cat /data/hello"), "hello");
    assert!(lab.serve.log().contains("layer is used"));
}

/// What a converter makes after a build is soon pulled from the host that has just pulled the last one.
#[tokio::test(flavor = "multi_thread")]
async fn a_tag_that_moves_gives_the_new_image_and_old_containers_keep_theirs() {
    let lab = Lab::start();
    let base = lab.layer(runnable_tree);
    let old = [base.clone(), lab.layer(note("version", "old"))];
    let new = [base, lab.layer(note("version", "new"))];
    let image = lab
        .push(&lab.build(&old, &BuildOptions::default()), "moving", "latest")
        .await;
    lab.podman.run(&[
        "run",
        "--detach",
        "--name",
        "old",
        "--network",
        "none",
        &image,
        "sleep",
        "1000",
    ]);
    lab.push(&lab.build(&new, &BuildOptions::default()), "moving", "latest")
        .await;
    lab.podman.run(&["pull", &image]);
    assert_eq!(lab.sh(&image, "cat /version"), "new");
    assert_eq!(lab.podman.run(&["exec", "old", "cat", "/version"]), "old");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_that_was_converted_under_its_own_tag() {
    let lab = Lab::start();
    let layers = [lab.layer(runnable_tree)];
    let image = lab.push(&lab.build_plain(&layers), "converted", "1").await;
    assert_eq!(lab.sh(&image, "cat /data/hello"), "hello");
    lab.podman.run(&["rmi", &image]);
    lab.push(&lab.build(&layers, &BuildOptions::default()), "converted", "1")
        .await;
    assert_eq!(lab.sh(&image, "cat /data/hello"), "hello");
    assert!(lab.serve.log().contains("layer is used"));
}

/// An ordinary image and a lazy one of the same layers: in the lazy one's place these are empty.
async fn original_layers(lab: &Lab) -> [BuiltImage; 2] {
    let tar = |make: LayerSource, name: &str| {
        let out = lab.new_path().join(name);
        let LayerSource::Dir(dir) = make else {
            unreachable!("it is a directory")
        };
        std::fs::create_dir_all(out.parent().unwrap()).unwrap();
        fixtures::tar_of(&dir, &out, true).unwrap();
        LayerSource::Tar(out)
    };
    let layers = [
        tar(lab.layer(runnable_tree), "base.tar.gz"),
        tar(lab.layer(note("more", "more")), "more.tar.gz"),
    ];
    let zran = BuildOptions {
        conversion: Conversion::Zran,
        ..BuildOptions::default()
    };
    let (plain, lazy) = (lab.build_plain(&layers), lab.build(&layers, &zran));
    assert_eq!(plain.blobs[0].digest, lazy.blobs[0].digest, "they share layers");
    [plain, lazy]
}

#[tokio::test(flavor = "multi_thread")]
async fn an_index_of_images_that_share_their_layers() {
    for lazy_first in [false, true] {
        let lab = Lab::start();
        let [plain, lazy] = original_layers(&lab).await;
        let mut entries = [(&plain, NydusMark::None), (&lazy, NydusMark::OsFeatures)];
        if lazy_first {
            entries.reverse();
        }
        let index = ImageIndex::new(&entries).unwrap();
        index.push(&lab.registry.url(), "index", "1").await.unwrap();
        let image = lab.registry.reference("index", "1");
        assert_eq!(
            lab.sh(&image, "cat /data/hello /more"),
            "hello\nmore",
            "lazy first: {lazy_first}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tag_that_moves_to_an_ordinary_image_of_the_same_layers() {
    let lab = Lab::start();
    let [plain, lazy] = original_layers(&lab).await;
    let image = lab.push(&lazy, "moving", "1").await;
    assert_eq!(lab.sh(&image, "cat /data/hello /more"), "hello\nmore");
    assert!(lab.serve.log().contains("layer is used"));
    lab.podman.run(&["rmi", &image]);
    lab.push(&plain, "moving", "1").await;
    assert_eq!(lab.sh(&image, "cat /data/hello /more"), "hello\nmore");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_ordinary_image_is_pulled_the_ordinary_way() {
    let lab = Lab::start();
    let image = lab
        .push(&lab.build_plain(&[lab.layer(runnable_tree)]), "plain", "1")
        .await;
    let requests = lab.our_requests(|| assert_eq!(lab.sh(&image, "cat /data/hello"), "hello"));
    assert!(!lab.serve.log().contains("layer is used"));
    assert!(requests.len() <= 3, "a ping and the manifest: {requests:#?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn ordinary_and_lazy_containers_side_by_side() {
    let (lab, lazy, _) = Lab::with_image().await;
    let plain = lab
        .push(&lab.build_plain(&[lab.layer(runnable_tree)]), "plain", "1")
        .await;
    for (name, image) in [("lazy", &lazy), ("plain", &plain)] {
        lab.podman.run(&[
            "run",
            "--detach",
            "--name",
            name,
            "--network",
            "none",
            image,
            "sleep",
            "1000",
        ]);
    }
    for name in ["lazy", "plain"] {
        assert_eq!(lab.podman.run(&["exec", name, "cat", "/data/hello"]), "hello");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_ordinary_image_may_share_a_repository_with_its_lazy_form() {
    let (lab, lazy, _) = Lab::with_image().await;
    let plain = lab.build_plain(&[lab.layer(runnable_tree)]);
    let plain = lab.push(&plain, "base", "plain").await;
    assert_eq!(lab.sh(&plain, "cat /data/hello"), "hello");
    assert_eq!(lab.sh(&lazy, "cat /data/hello"), "hello");
}

/// Podman takes the first manifest for its platform, whatever else is said of it.
async fn index(marks: [Option<NydusMark>; 2]) {
    let lab = Lab::start();
    let layers = [lab.layer(runnable_tree)];
    let (plain, lazy) = (lab.build_plain(&layers), lab.build(&layers, &BuildOptions::default()));
    let entries = marks.map(|mark| match mark {
        Some(mark) => (&lazy, mark),
        None => (&plain, NydusMark::None),
    });
    let index = ImageIndex::new(&entries).unwrap();
    index.push(&lab.registry.url(), "index", "1").await.unwrap();
    let image = lab.registry.reference("index", "1");
    assert_eq!(lab.sh(&image, "cat /data/hello"), "hello");
    assert_eq!(lab.serve.log().contains("layer is used"), marks[0].is_some());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_index_with_the_ordinary_image_first() {
    index([None, Some(NydusMark::OsFeatures)]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_index_with_the_lazy_image_first() {
    index([Some(NydusMark::ArtifactType), None]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_that_does_not_exist_fails_as_usual() {
    let (lab, _, _) = Lab::with_image().await;
    let start = Instant::now();
    let missing = lab.registry.reference("base", "missing");
    let error = lab.podman.fails(&["run", "--rm", &missing, "true"]);
    assert!(error.contains("manifest unknown"), "{error}");
    assert!(start.elapsed() < Duration::from_secs(10));
}
