//! `nydus-store verify`.

use std::fs;

use nydus_store::{
    fixtures::{BuildOptions, Conversion, LayerSource, build, tar_of},
    internals::Digest,
};

use super::{PreseedSite, corrupt, layout, text};
use crate::common::Sample;

#[test]
fn verify_reports_complete_incomplete_and_corrupt_images() {
    let mut site = PreseedSite::with_config("");
    let (whole, part, bad) = (Sample::new(13), Sample::new(14), Sample::new(15));
    for (name, sample) in [("bad", &bad), ("part", &part), ("whole", &whole)] {
        site.registry.add_image(&sample.image, name, "1").unwrap();
    }
    let name = |repository: &str| site.registry.reference(repository, "1");
    let source = |repository: &str| format!("docker://{}", name(repository));
    site.succeeds(&["preseed", &source("whole"), &source("bad")]);
    let part_name = name("part");
    site.serve.launch();
    let layer = site.serve.layer(&part_name, &part.bootstrap_digest());
    assert_eq!(fs::read(layer.diff().join("small")).unwrap(), part.content("small"));
    site.serve.stop();
    corrupt(&site.cache_file(&bad.data_digest()));

    let (status, report) = site.verify(&[]);
    assert_eq!(status, Some(1));
    let image = |name: &str| {
        let images = report["images"].as_array().unwrap();
        images.iter().find(|image| image["reference"] == name).unwrap().clone()
    };
    let [bad_image, part_image, whole_image] = ["bad", "part", "whole"].map(|repository| image(&name(repository)));
    assert_eq!(bad_image["condition"], "corrupt");
    assert_eq!(bad_image["chunks"]["corrupt"], 1);
    assert_eq!(part_image["condition"], "incomplete");
    assert!(part_image["chunks"]["missing"].as_u64() > Some(0) && part_image["chunks"]["good"].as_u64() > Some(0));
    assert_eq!(whole_image["condition"], "complete");

    // Only the named images.
    assert_eq!(site.verify(&[&name("whole")]).0, Some(0));
    let (status, report) = site.verify(&["registry.example/unknown"]);
    assert_eq!(status, Some(1));
    assert_eq!(report["failures"][0]["what"], "registry.example/unknown:latest");

    let (status, _) = site.verify(&["--repair"]);
    assert_eq!(status, Some(0));
    let (status, report) = site.verify(&[]);
    assert_eq!(status, Some(0), "{report}");
    site.registry.reset();
    site.succeeds(&["preseed", &source("bad")]);
    let fetched = site.registry.blob_stats(bad.data_digest()).bytes;
    assert!((1..=128 << 10).contains(&fetched), "not one chunk: {fetched} bytes");

    // A damaged bootstrap, and a blob of no image in the root.
    let content = site.serve.root().join("images/content");
    corrupt(&content.join(whole.bootstrap_digest().hex()));
    fs::write(site.cache_file(&Digest::of(b"unknown")), [1; 5000]).unwrap();
    let (status, report) = site.verify(&[]);
    assert_eq!(status, Some(1));
    assert!(report["images"].to_string().contains("the bootstrap ("), "{report}");
    assert!(report["unknown"]["blobs"].as_u64() >= Some(1), "{report}");
    let text = site.run(&["verify"]);
    let text = String::from_utf8_lossy(&text.stdout).into_owned();
    assert!(
        text.contains("CORRUPT") && text.contains("belong to no image in the root"),
        "{text}"
    );
}

/// Writes an image that shares the sample's data blob, with another layer below, to `sharing-layout`.
fn write_sharing_image(sample: &Sample, name: &str) -> Digest {
    let other = sample.dir().join("other");
    fs::create_dir(&other).unwrap();
    fs::write(other.join("more"), "more").unwrap();
    let layers = [LayerSource::Dir(other), LayerSource::Dir(sample.tree.clone())];
    let image = build(&layers, &Sample::options(), &sample.dir().join("sharing")).unwrap();
    let dir = sample.dir().join("sharing-layout");
    image.write_oci_layout(&dir, name).unwrap();
    image.bootstrap_blob().unwrap().digest
}

#[test]
fn corrupt_chunk_affects_all_images_that_share_the_blob() {
    let site = PreseedSite::new();
    let sample = Sample::new(17);
    site.succeeds(&["preseed", &layout(&sample, "registry.example/one:v1")]);
    write_sharing_image(&sample, "registry.example/two:v1");
    let shared = format!("oci:{}", text(&sample.dir().join("sharing-layout")));
    site.succeeds(&["preseed", &shared]);
    corrupt(&site.cache_file(&sample.data_digest()));
    let conditions = site.conditions();
    assert!(
        conditions.len() == 2 && conditions.iter().all(|(_, condition)| condition == "corrupt"),
        "{conditions:?}"
    );
    assert_eq!(site.verify(&["--repair"]).0, Some(0));
    site.succeeds(&["preseed", &shared]);
    assert!(site.conditions().iter().all(|(_, condition)| condition == "complete"));
}

#[test]
fn layer_converted_with_two_chunk_sizes_is_cached_twice() {
    let mut site = PreseedSite::new();
    let sample = Sample::new(18);
    let tar = sample.dir().join("layer.tar");
    tar_of(&sample.tree, &tar, true).unwrap();
    let name = |chunk_size: u32| format!("127.0.0.1:1/zran:{chunk_size}");
    let mut keys = Vec::new();
    for chunk_size in [64 << 10, 1 << 20] {
        let options = BuildOptions {
            conversion: Conversion::Zran,
            chunk_size,
            ..BuildOptions::default()
        };
        let layers = [LayerSource::Tar(tar.clone())];
        let image = build(&layers, &options, &sample.dir().join(format!("zran-{chunk_size}"))).unwrap();
        let dir = sample.dir().join(format!("zran-layout-{chunk_size}"));
        image.write_oci_layout(&dir, &name(chunk_size)).unwrap();
        keys.push((name(chunk_size), image.bootstrap_blob().unwrap().digest));
        // One process each, so that they meet only on disk.
        site.succeeds(&["preseed", &format!("oci:{}", text(&dir))]);
    }
    for _ in 0..2 {
        let conditions = site.conditions();
        assert!(
            conditions.len() == 2 && conditions.iter().all(|(_, condition)| condition == "complete"),
            "{conditions:?}"
        );
    }
    site.serve.launch();
    for (name, key) in keys {
        sample.check(&site.serve.layer(&name, &key));
    }
}

#[test]
fn name_with_a_digest_is_refused_for_another_image() {
    let site = PreseedSite::new();
    let sample = Sample::new(19);
    let source = layout(&sample, "v1");
    let name = |digest: Digest| format!("registry.example/app@{digest}");
    let message = site.fails(&["preseed", &source, "--as", &name(Digest::of(b"other"))]);
    assert!(message.contains("cannot record the image as"), "{message}");
    site.succeeds(&["preseed", &source, "--as", &name(sample.image.manifest_digest())]);
}

#[test]
fn unreadable_record_is_reported() {
    let site = PreseedSite::new();
    let sample = Sample::new(20);
    site.succeeds(&["preseed", &layout(&sample, "registry.example/app:v1")]);
    let references = site.serve.root().join("images/references");
    let file = fs::read_dir(references).unwrap().next().unwrap().unwrap().path();
    fs::write(&file, "{").unwrap();
    let (status, report) = site.verify(&[]);
    assert_eq!(status, Some(1));
    assert_eq!(report["failures"][0]["what"], text(&file));
}
