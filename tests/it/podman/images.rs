//! Image references: names, tags, digests, indexes, ordinary images.

use std::time::{Duration, Instant};

use nydus_store::fixtures::{
    self, BuildOptions, BuiltImage, Conversion, ImageIndex, ImageOptions, LayerSource, NydusMark,
};

use super::{PUBLISHED, PodmanLab, Release, note, on_each_release, runnable_tree};
use crate::common::RunPodman as _;

on_each_release!(
    image_runs_by_digest,
    image_runs_by_short_name,
    image_with_a_repeated_layer_runs,
    all_tags_are_pulled,
    missing_platform_of_an_index_fails,
    other_platform_of_an_index_is_pulled,
    nested_repository_without_a_tag_runs,
    moved_tag_gives_the_new_image_and_old_containers_keep_theirs,
    image_converted_under_its_own_tag_becomes_lazy,
    index_of_images_that_share_layers_runs,
    tag_moved_to_an_ordinary_image_of_the_same_layers_runs,
    ordinary_image_is_pulled_as_usual,
    ordinary_and_lazy_containers_run_side_by_side,
    ordinary_and_lazy_images_share_a_repository,
    ordinary_image_first_in_an_index_is_pulled_as_usual,
    lazy_image_first_in_an_index_is_published,
    missing_image_fails_as_usual,
);

async fn image_runs_by_digest(release: Release) {
    let (lab, tagged, built) = PodmanLab::with_image(release).await;
    let digest = built.manifest_digest();
    for image in [
        format!("{}/base@{digest}", lab.registry.host()),
        format!("{tagged}@{digest}"),
    ] {
        assert_eq!(lab.sh(&image, "cat /data/hello"), "hello");
        let format = "{{.Digest}}";
        assert_eq!(
            lab.podman.run(&["image", "inspect", "--format", format, &image]),
            digest.to_string()
        );
        lab.podman.run(&["rmi", "--all", "--force"]);
    }
    assert!(lab.logged(PUBLISHED) > 0);
}

/// overlayfs rejects a lower directory that occurs twice, and both layers have one digest.
async fn image_with_a_repeated_layer_runs(release: Release) {
    let lab = PodmanLab::start(release);
    let twice = lab.layer(note("twice", "told"));
    let layers = [lab.layer(runnable_tree), twice.clone(), twice];
    let image = lab.build(&layers, &BuildOptions::default());
    assert_eq!(image.blobs[1].digest, image.blobs[2].digest);
    let image = lab.push(&image, "twice", "1").await;
    for _ in 0..2 {
        assert_eq!(lab.sh(&image, "cat /twice"), "told");
    }
}

async fn image_runs_by_short_name(release: Release) {
    let (lab, _, _) = PodmanLab::with_image(release).await;
    assert_eq!(lab.sh("base:1", "cat /data/hello"), "hello");
    assert!(lab.logged(PUBLISHED) > 0);
}

async fn all_tags_are_pulled(release: Release) {
    let (lab, _, built) = PodmanLab::with_image(release).await;
    lab.push(&built, "base", "2").await;
    let repository = format!("{}/base", lab.registry.host());
    lab.podman.run(&["pull", "--all-tags", &repository]);
    for tag in ["1", "2"] {
        let image = format!("{repository}:{tag}");
        let args = [
            "run",
            "--rm",
            "--pull=never",
            "--network",
            "none",
            &image,
            "cat",
            "/data/hello",
        ];
        assert_eq!(lab.podman.run(&args), "hello");
    }
    assert!(lab.logged(PUBLISHED) > 0);
}

/// Pushes an index: a lazy and an ordinary image for this machine, and an ordinary one for another. Returns the latter
/// too.
async fn push_two_platforms(lab: &PodmanLab) -> (String, BuiltImage) {
    let layers = [lab.layer(runnable_tree)];
    let other = ImageOptions {
        architecture: "s390x".to_owned(),
        ..ImageOptions::default()
    };
    let other = fixtures::plain_image(&layers, &other, &lab.new_path()).unwrap();
    let (plain, lazy) = (lab.build_plain(&layers), lab.build(&layers, &BuildOptions::default()));
    let entries = [
        (&other, NydusMark::None),
        (&plain, NydusMark::None),
        (&lazy, NydusMark::OsFeatures),
    ];
    let index = ImageIndex::new(&entries).unwrap();
    index.push(&lab.registry.url(), "platforms", "1").await.unwrap();
    (lab.registry.reference("platforms", "1"), other)
}

async fn missing_platform_of_an_index_fails(release: Release) {
    let lab = PodmanLab::start(release);
    let (image, _) = push_two_platforms(&lab).await;
    let error = lab.podman.fails(&["pull", "--platform", "linux/riscv64", &image]);
    assert!(error.contains("no image found in"), "{error}");
    assert!(error.contains("riscv64"), "{error}");
}

async fn other_platform_of_an_index_is_pulled(release: Release) {
    let lab = PodmanLab::start(release);
    let (image, other) = push_two_platforms(&lab).await;
    lab.podman.run(&["pull", "--platform", "linux/s390x", &image]);
    let format = "{{.Id}} {{.Architecture}}";
    let pulled = lab.podman.run(&["image", "inspect", "--format", format, &image]);
    assert_eq!(pulled, format!("{} s390x", other.config_digest().hex()));
}

async fn nested_repository_without_a_tag_runs(release: Release) {
    let lab = PodmanLab::start(release);
    let built = lab.build(&[lab.layer(runnable_tree)], &BuildOptions::default());
    lab.push(&built, "some/deeply/nested_repo/of-mine", "latest").await;
    let image = format!("{}/some/deeply/nested_repo/of-mine", lab.registry.host());
    assert_eq!(lab.sh(&image, "cat /data/hello"), "hello");
    assert!(lab.logged(PUBLISHED) > 0);
}

/// A converter may move a tag soon after a host has pulled it.
async fn moved_tag_gives_the_new_image_and_old_containers_keep_theirs(release: Release) {
    let lab = PodmanLab::start(release);
    let base = lab.layer(runnable_tree);
    let old = [base.clone(), lab.layer(note("version", "old"))];
    let new = [base, lab.layer(note("version", "new"))];
    let image = lab
        .push(&lab.build(&old, &BuildOptions::default()), "moving", "latest")
        .await;
    lab.keep("old", &image);
    lab.push(&lab.build(&new, &BuildOptions::default()), "moving", "latest")
        .await;
    lab.podman.run(&["pull", &image]);
    assert_eq!(lab.sh(&image, "cat /version"), "new");
    assert_eq!(lab.podman.run(&["exec", "old", "cat", "/version"]), "old");
}

async fn image_converted_under_its_own_tag_becomes_lazy(release: Release) {
    let lab = PodmanLab::start(release);
    let layers = [lab.layer(runnable_tree)];
    let image = lab.push(&lab.build_plain(&layers), "converted", "1").await;
    assert_eq!(lab.sh(&image, "cat /data/hello"), "hello");
    lab.podman.run(&["rmi", &image]);
    lab.push(&lab.build(&layers, &BuildOptions::default()), "converted", "1")
        .await;
    assert_eq!(lab.sh(&image, "cat /data/hello"), "hello");
    assert!(lab.logged(PUBLISHED) > 0);
}

/// Builds an ordinary image and a zran image of the same layers. Published for the lazy one, these would be empty.
async fn build_plain_and_zran(lab: &PodmanLab) -> [BuiltImage; 2] {
    let tar = |make: LayerSource, name: &str| {
        let out = lab.new_path().join(name);
        let LayerSource::Dir(dir) = make else {
            unreachable!("the source is a directory")
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

async fn index_of_images_that_share_layers_runs(release: Release) {
    for lazy_first in [false, true] {
        let lab = PodmanLab::start(release);
        let [plain, lazy] = build_plain_and_zran(&lab).await;
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

async fn tag_moved_to_an_ordinary_image_of_the_same_layers_runs(release: Release) {
    let lab = PodmanLab::start(release);
    let [plain, lazy] = build_plain_and_zran(&lab).await;
    let image = lab.push(&lazy, "moving", "1").await;
    assert_eq!(lab.sh(&image, "cat /data/hello /more"), "hello\nmore");
    lab.podman.run(&["rmi", &image]);
    lab.push(&plain, "moving", "1").await;
    assert_eq!(lab.sh(&image, "cat /data/hello /more"), "hello\nmore");
}

async fn ordinary_image_is_pulled_as_usual(release: Release) {
    let lab = PodmanLab::start(release);
    let image = lab
        .push(&lab.build_plain(&[lab.layer(runnable_tree)]), "plain", "1")
        .await;
    let requests = lab.our_requests(|| assert_eq!(lab.sh(&image, "cat /data/hello"), "hello"));
    assert!(lab.logged(PUBLISHED) == 0);
    assert!(requests.len() <= 2, "a ping and the manifest: {requests:#?}");
}

async fn ordinary_and_lazy_containers_run_side_by_side(release: Release) {
    let (lab, lazy, _) = PodmanLab::with_image(release).await;
    let plain = lab
        .push(&lab.build_plain(&[lab.layer(runnable_tree)]), "plain", "1")
        .await;
    for (name, image) in [("lazy", &lazy), ("plain", &plain)] {
        lab.keep(name, image);
    }
    for name in ["lazy", "plain"] {
        assert_eq!(lab.podman.run(&["exec", name, "cat", "/data/hello"]), "hello");
    }
}

async fn ordinary_and_lazy_images_share_a_repository(release: Release) {
    let (lab, lazy, _) = PodmanLab::with_image(release).await;
    let plain = lab.build_plain(&[lab.layer(runnable_tree)]);
    let plain = lab.push(&plain, "base", "plain").await;
    assert_eq!(lab.sh(&plain, "cat /data/hello"), "hello");
    assert_eq!(lab.sh(&lazy, "cat /data/hello"), "hello");
}

/// Pulls from an index of a lazy image (`Some`) and an ordinary one (`None`). Podman takes the first manifest for its
/// platform.
async fn run_from_index(release: Release, marks: [Option<NydusMark>; 2]) {
    let lab = PodmanLab::start(release);
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
    assert_eq!(lab.logged(PUBLISHED) > 0, marks[0].is_some());
}

async fn ordinary_image_first_in_an_index_is_pulled_as_usual(release: Release) {
    run_from_index(release, [None, Some(NydusMark::OsFeatures)]).await;
}

async fn lazy_image_first_in_an_index_is_published(release: Release) {
    run_from_index(release, [Some(NydusMark::ArtifactType), None]).await;
}

async fn missing_image_fails_as_usual(release: Release) {
    let (lab, _, _) = PodmanLab::with_image(release).await;
    let start = Instant::now();
    let missing = lab.registry.reference("base", "missing");
    let error = lab.podman.fails(&["run", "--rm", &missing, "true"]);
    assert!(error.contains("manifest unknown"), "{error}");
    // Less than the time-out of a look-up.
    assert!(start.elapsed() < Duration::from_secs(25));
}
