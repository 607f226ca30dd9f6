//! Every RAFS version, compressor, digester, chunk size and blob layout.

use std::fs::File;

use nydus_rafs::metadata::RafsVersion;
use nydus_store::fixtures::{
    BuildOptions, Conversion, ImageOptions, LayerSource, TreeSpec, ZranManifest, demo_tree, make_tree, tar_of,
};
use nydus_utils::{compress::Algorithm as Compressor, digest::Algorithm as Digester};

use super::ImageSite;

/// Makes a tree with all kinds of entries.
fn full_tree(site: &ImageSite, name: &str, chunk_size: u32) -> std::path::PathBuf {
    let (tree, spec) = (
        site.path(name),
        TreeSpec {
            chunk_size,
            ..TreeSpec::default()
        },
    );
    assert_eq!(make_tree(&tree, &spec).unwrap(), [""; 0], "left out");
    tree
}

/// Makes a tree and a tar of it.
fn tarred_tree(site: &ImageSite, name: &str, chunk_size: u32) -> (std::path::PathBuf, LayerSource) {
    let (tree, tar) = (site.path(name), site.path(&format!("{name}.tar")));
    let spec = TreeSpec {
        chunk_size,
        ..TreeSpec::for_tar()
    };
    assert_eq!(make_tree(&tree, &spec).unwrap(), [""; 0], "left out");
    tar_of(&tree, &tar, false).unwrap();
    (tree, LayerSource::Tar(tar))
}

#[test]
fn every_compressor_and_digester_reads_back() {
    const CHUNK: u32 = 0x10000;
    let site = ImageSite::new();
    let tree = full_tree(&site, "tree", CHUNK);
    let (tarred, tar) = tarred_tree(&site, "tarred", CHUNK);
    for version in [RafsVersion::V5, RafsVersion::V6] {
        for compressor in [
            Compressor::None,
            Compressor::Lz4Block,
            Compressor::GZip,
            Compressor::Zstd,
        ] {
            for digester in [Digester::Blake3, Digester::Sha256] {
                let (source, layer) = match digester {
                    Digester::Blake3 => (&tree, LayerSource::Dir(tree.clone())),
                    Digester::Sha256 => (&tarred, tar.clone()),
                };
                let options = BuildOptions {
                    version,
                    compressor,
                    digester,
                    chunk_size: CHUNK,
                    // Without kept meta, the blob meta is read from the end of the blob.
                    keep_meta: digester == Digester::Blake3,
                    ..BuildOptions::default()
                };
                let name = format!("{version:?}-{compressor}-{digester}").to_lowercase();
                let served = site.serve_image(&name, &[layer], &options);
                served.assert_layers();
                served.assert_equals(source);
            }
        }
    }
}

#[test]
fn every_chunk_size_reads_back() {
    let site = ImageSite::new();
    for (chunk_size, tree_chunk) in [
        (0x1000, 0x1000),
        (0x8000, 0x8000),
        (0x4_0000, 0x4_0000),
        (0x10_0000, 0x10_0000),
        // Chunks longer than all files but one.
        (0x100_0000, 0x4_0000),
    ] {
        let tree = full_tree(&site, &format!("tree-{chunk_size}"), tree_chunk);
        if chunk_size == 0x100_0000 {
            let bytes = nydus_store::fixtures::content::mixed(
                (16 << 20) + 1,
                &mut nydus_store::fixtures::content::Random::new(16),
            );
            std::fs::write(tree.join("long"), bytes).unwrap();
        }
        for (version, compressor) in [
            (RafsVersion::V5, Compressor::Lz4Block),
            (RafsVersion::V6, Compressor::Zstd),
        ] {
            let options = BuildOptions {
                version,
                compressor,
                chunk_size,
                toc_digest: true,
                ..BuildOptions::default()
            };
            let name = format!("{version:?}-{chunk_size}").to_lowercase();
            site.serve_image(&name, &[LayerSource::Dir(tree.clone())], &options)
                .assert_equals(&tree);
        }
    }
}

#[test]
fn batched_chunks_read_back() {
    let site = ImageSite::new();
    for (chunk_size, batch_size, compressor) in [
        (0x10000, 0x8000, Compressor::Zstd),
        (0x10000, 0x10000, Compressor::Lz4Block),
        (0x10_0000, 0x10_0000, Compressor::Zstd),
        (0x1000, 0x1000, Compressor::None),
    ] {
        let name = format!("batch-{chunk_size}-{batch_size}");
        let tree = full_tree(&site, &format!("tree-{name}"), chunk_size.min(0x10000));
        for keep_meta in [true, false] {
            let options = BuildOptions {
                chunk_size,
                batch_size,
                compressor,
                keep_meta,
                ..BuildOptions::default()
            };
            let name = format!("{name}-{keep_meta}");
            let served = site.serve_image(&name, &[LayerSource::Dir(tree.clone())], &options);
            served.assert_layers();
            served.assert_equals(&tree);
        }
    }
}

#[test]
fn zran_images_read_back() {
    let site = ImageSite::new();
    for chunk_size in [0x1000, 0x10000, 0x20_0000] {
        let (tree, tar) = tarred_tree(&site, &format!("tree-{chunk_size}"), chunk_size);
        for (zran_manifest, keep_meta) in [
            (ZranManifest::Original, true),
            (ZranManifest::Reference, true),
            // Not with `Original`, where no other blob could hold the blob meta.
            (ZranManifest::Reference, false),
        ] {
            let options = BuildOptions {
                conversion: Conversion::Zran,
                zran_manifest,
                keep_meta,
                chunk_size,
                ..BuildOptions::default()
            };
            let name = format!("zran-{zran_manifest:?}-{keep_meta}-{chunk_size}").to_lowercase();
            let served = site.serve_image(&name, std::slice::from_ref(&tar), &options);
            served.assert_layers();
            served.assert_equals(&tree);
        }
    }
}

#[test]
fn zran_layer_in_a_single_deflate_block_reads_back() {
    let site = ImageSite::new();
    // In total, longer than the maximum chunk size.
    let (tree, LayerSource::Tar(tar)) = tarred_tree(&site, "tree", 0x20_0000) else {
        unreachable!("the source is a tar");
    };
    let packed = tar.with_extension("tar.gz");
    let mut packer = flate2::write::GzEncoder::new(File::create(&packed).unwrap(), flate2::Compression::fast());
    std::io::copy(&mut File::open(&tar).unwrap(), &mut packer).unwrap();
    packer.finish().unwrap();
    let options = BuildOptions {
        conversion: Conversion::Zran,
        ..BuildOptions::default()
    };
    site.serve_image("single", &[LayerSource::Tar(packed)], &options)
        .assert_equals(&tree);
}

#[test]
fn chunks_of_a_dictionary_image_read_back() {
    let site = ImageSite::new();
    let (first, second) = (site.path("first"), site.path("second"));
    demo_tree(&first, 60, 1).unwrap();
    demo_tree(&second, 60, 1).unwrap();
    demo_tree(&second.join("more"), 20, 2).unwrap();
    std::fs::write(second.join("new"), "only in the second").unwrap();
    for (version, batch_size) in [(RafsVersion::V5, 0), (RafsVersion::V6, 0), (RafsVersion::V6, 0x8000)] {
        let name = format!("{version:?}-{batch_size}").to_lowercase();
        let options = |chunk_dict| BuildOptions {
            version,
            batch_size,
            chunk_dict,
            chunk_size: 0x10000,
            ..BuildOptions::default()
        };
        let dict = site.serve_image(
            &format!("dict-{name}"),
            &[LayerSource::Dir(first.clone())],
            &options(None),
        );
        let bootstrap = dict.image.bootstrap_path().unwrap().to_owned();
        let layers = [LayerSource::Dir(second.clone())];
        let served = site.serve_image(&format!("uses-{name}"), &layers, &options(Some(bootstrap)));
        assert!(served.image.blob_ids.contains(&dict.image.blob_ids[0]), "{name}");
        // In this order, the second image finds no cached chunks.
        served.assert_equals(&second);
        dict.assert_equals(&first);
        served.assert_layers();
    }
}

#[test]
fn image_with_docker_media_types_reads_back() {
    let site = ImageSite::new();
    let tree = full_tree(&site, "tree", 0x1000);
    let options = BuildOptions {
        image: ImageOptions {
            docker: true,
            ..ImageOptions::default()
        },
        ..BuildOptions::default()
    };
    let served = site.serve_image("docker", &[LayerSource::Dir(tree.clone())], &options);
    served.assert_layers();
    served.assert_equals(&tree);
}
