//! Images of every format that converters make.

use nydus_rafs::metadata::RafsVersion;
use nydus_store::fixtures::{BuildOptions, Conversion, ImageOptions, ZranManifest};
use nydus_utils::compress::Algorithm;

use super::{Lab, NUMBERS, PUBLISHED, Release, note, on_each_release, runnable_tree, sha256_in};

on_each_release!(
    rafs_v5,
    rafs_v6_with_batches,
    rafs_v6_with_lz4_and_its_meta_in_the_blob,
    zran_that_names_the_original_layers,
    zran_that_refers_to_the_original_layers,
    zran_with_media_types_of_docker,
    rafs_blobs_in_a_manifest_of_docker_are_podmans_to_refuse,
);

/// Builds an image so, and runs it: a file of each of its two layers is what it was.
async fn runs(release: Release, options: BuildOptions) {
    let lab = Lab::start(release);
    let layers = [
        lab.layer(runnable_tree),
        lab.layer(note("second", "of the second layer")),
    ];
    let image = lab.push(&lab.build(&layers, &options), "kind", "1").await;
    assert_eq!(lab.sha256(&image, NUMBERS), sha256_in(&layers[0], NUMBERS));
    assert_eq!(lab.sh(&image, "cat /second"), "of the second layer");
    assert!(lab.logged(PUBLISHED) > 0, "Podman pulled the ordinary way");
}

async fn rafs_v5(release: Release) {
    runs(
        release,
        BuildOptions {
            version: RafsVersion::V5,
            ..BuildOptions::default()
        },
    )
    .await;
}

async fn rafs_v6_with_batches(release: Release) {
    runs(
        release,
        BuildOptions {
            batch_size: 128 << 10,
            ..BuildOptions::default()
        },
    )
    .await;
}

async fn rafs_v6_with_lz4_and_its_meta_in_the_blob(release: Release) {
    runs(
        release,
        BuildOptions {
            compressor: Algorithm::Lz4Block,
            keep_meta: false,
            ..BuildOptions::default()
        },
    )
    .await;
}

/// Data in ordinary layers: published for a pull, these would be empty for images that share them. So a pull takes the image
/// whole, and by name it is lazy.
async fn zran_runs(release: Release, options: BuildOptions) {
    let lab = Lab::start(release);
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

async fn zran_that_names_the_original_layers(release: Release) {
    let options = BuildOptions {
        conversion: Conversion::Zran,
        ..BuildOptions::default()
    };
    zran_runs(release, options).await;
}

async fn zran_that_refers_to_the_original_layers(release: Release) {
    runs(
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

async fn zran_with_media_types_of_docker(release: Release) {
    let options = BuildOptions {
        conversion: Conversion::Zran,
        image: docker(),
        ..BuildOptions::default()
    };
    zran_runs(release, options).await;
}

/// Podman itself takes no manifest of Docker's type with layers of other types.
async fn rafs_blobs_in_a_manifest_of_docker_are_podmans_to_refuse(release: Release) {
    let lab = Lab::start(release);
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
