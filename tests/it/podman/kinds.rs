//! Images of every format made by converters.

use nydus_rafs::metadata::RafsVersion;
use nydus_store::fixtures::{BuildOptions, Conversion, ImageOptions, ZranManifest};
use nydus_utils::compress::Algorithm;

use super::{NUMBERS, PUBLISHED, PodmanLab, Release, note, on_each_release, runnable_tree, sha256_in};
use crate::common::RunPodman as _;

on_each_release!(
    rafs_v5_runs,
    rafs_v6_with_batches_runs,
    rafs_v6_with_lz4_and_meta_in_the_blob_runs,
    zran_with_original_layers_is_lazy_by_name_only,
    zran_with_references_to_layers_runs,
    zran_with_docker_media_types_is_lazy_by_name_only,
    podman_refuses_rafs_blobs_in_a_docker_manifest,
);

/// Builds an image with these options, runs it, and checks a file of each of its two layers.
async fn build_and_run(release: Release, options: BuildOptions) {
    let lab = PodmanLab::start(release);
    let layers = [
        lab.layer(runnable_tree),
        lab.layer(note("second", "of the second layer")),
    ];
    let image = lab.push(&lab.build(&layers, &options), "kind", "1").await;
    assert_eq!(lab.sha256(&image, NUMBERS), sha256_in(&layers[0], NUMBERS));
    assert_eq!(lab.sh(&image, "cat /second"), "of the second layer");
    assert!(lab.logged(PUBLISHED) > 0, "Podman pulled the ordinary way");
}

async fn rafs_v5_runs(release: Release) {
    build_and_run(
        release,
        BuildOptions {
            version: RafsVersion::V5,
            ..BuildOptions::default()
        },
    )
    .await;
}

async fn rafs_v6_with_batches_runs(release: Release) {
    build_and_run(
        release,
        BuildOptions {
            batch_size: 128 << 10,
            ..BuildOptions::default()
        },
    )
    .await;
}

async fn rafs_v6_with_lz4_and_meta_in_the_blob_runs(release: Release) {
    build_and_run(
        release,
        BuildOptions {
            compressor: Algorithm::Lz4Block,
            keep_meta: false,
            ..BuildOptions::default()
        },
    )
    .await;
}

/// An image with its data in ordinary layers. A pull downloads it, because published layers would be empty for other
/// images that share them. Known by name, it is lazy.
async fn run_zran_by_name(release: Release, options: BuildOptions) {
    let lab = PodmanLab::start(release);
    let layers = [
        lab.layer(runnable_tree),
        lab.layer(note("second", "of the second layer")),
    ];
    let image = lab.push(&lab.build(&layers, &options), "kind", "1").await;
    assert_eq!(lab.sh(&image, "cat /second"), "of the second layer");
    assert_eq!(lab.logged(PUBLISHED), 0);
    lab.podman.run(&["rmi", &image]);
    lab.nydus_store(&["pull", &image]);
    let before = lab.accesses().len();
    assert_eq!(
        lab.sh(&image, "cat /second; ls -d /image || echo none"),
        "of the second layernone"
    );
    let requests = lab.accesses().split_off(before);
    let whole = requests.iter().filter(|access| access.agent.starts_with("containers/"));
    assert_eq!(whole.count(), 0, "Podman asks no registry: {requests:#?}");
    assert_eq!(lab.sha256(&image, NUMBERS), sha256_in(&layers[0], NUMBERS));
}

async fn zran_with_original_layers_is_lazy_by_name_only(release: Release) {
    let options = BuildOptions {
        conversion: Conversion::Zran,
        ..BuildOptions::default()
    };
    run_zran_by_name(release, options).await;
}

async fn zran_with_references_to_layers_runs(release: Release) {
    build_and_run(
        release,
        BuildOptions {
            conversion: Conversion::Zran,
            zran_manifest: ZranManifest::Reference,
            ..BuildOptions::default()
        },
    )
    .await;
}

fn docker() -> ImageOptions {
    ImageOptions {
        docker: true,
        ..ImageOptions::default()
    }
}

async fn zran_with_docker_media_types_is_lazy_by_name_only(release: Release) {
    let options = BuildOptions {
        conversion: Conversion::Zran,
        image: docker(),
        ..BuildOptions::default()
    };
    run_zran_by_name(release, options).await;
}

/// Podman accepts no Docker manifest with layers of other media types.
async fn podman_refuses_rafs_blobs_in_a_docker_manifest(release: Release) {
    let lab = PodmanLab::start(release);
    let options = BuildOptions {
        image: docker(),
        ..BuildOptions::default()
    };
    let image = lab.build(&[lab.layer(runnable_tree)], &options);
    let image = lab.push(&image, "kind", "1").await;
    let error = lab.podman.fails(&["pull", &image]);
    assert!(error.contains("unsupported docker v2s2 media type"), "{error}");
    lab.nydus_store(&["pull", &image]);
    assert_eq!(lab.sh(&image, "cat /data/hello"), "hello");
}
