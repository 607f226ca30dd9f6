//! Images that share data.

use nydus_store::fixtures::BuildOptions;

use super::{NUMBERS, PodmanLab, Release, blob_paths, note, on_each_release, runnable_tree, sha256_in};
use crate::common::RunPodman as _;

on_each_release!(
    shared_layer_is_fetched_once,
    chunks_of_a_dictionary_are_fetched_once,
    two_tags_of_one_image_share_layers,
);

async fn shared_layer_is_fetched_once(release: Release) {
    let lab = PodmanLab::start(release);
    let base = lab.layer(runnable_tree);
    let (one, two) = (lab.layer(note("one", "1")), lab.layer(note("two", "2")));
    let one = lab.build(&[base.clone(), one], &BuildOptions::default());
    let two = lab.build(&[base.clone(), two], &BuildOptions::default());
    assert_eq!(one.blobs[0].digest, two.blobs[0].digest);
    let expected = sha256_in(&base, NUMBERS);
    let one = lab.push(&one, "team/one", "1").await;
    let two = lab.push(&two, "team/two", "1").await;
    assert_eq!(lab.sha256(&one, NUMBERS), expected);
    lab.podman.run(&["pull", &two]);
    let requests = lab.our_requests(|| assert_eq!(lab.sha256(&two, NUMBERS), expected));
    assert_eq!(blob_paths(&requests), [""; 0]);
}

async fn chunks_of_a_dictionary_are_fetched_once(release: Release) {
    let lab = PodmanLab::start(release);
    let base = lab.layer(runnable_tree);
    let dict = lab.build(std::slice::from_ref(&base), &BuildOptions::default());
    let changed = lab.layer(|dir| {
        runnable_tree(dir);
        note("new", "new")(dir);
    });
    let options = BuildOptions {
        chunk_dict: dict.bootstrap.clone(),
        ..BuildOptions::default()
    };
    let image = lab.build(&[changed], &options);
    assert!(image.blob_ids.contains(&dict.blob_ids[0]), "the dictionary is used");
    let dict = lab.push(&dict, "dict", "1").await;
    let image = lab.push(&image, "image", "1").await;
    let expected = sha256_in(&base, NUMBERS);
    assert_eq!(lab.sha256(&dict, NUMBERS), expected);
    lab.podman.run(&["pull", &image]);
    let requests = lab.our_requests(|| assert_eq!(lab.sha256(&image, NUMBERS), expected));
    assert_eq!(blob_paths(&requests), [""; 0]);
    assert_eq!(lab.sh(&image, "cat /new"), "new");
}

async fn two_tags_of_one_image_share_layers(release: Release) {
    let (lab, first, built) = PodmanLab::with_image(release).await;
    let second = lab.push(&built, "base", "2").await;
    std::thread::scope(|scope| {
        for image in [&first, &second] {
            let lab = &lab;
            scope.spawn(move || assert_eq!(lab.sh(image, "cat /data/hello"), "hello"));
        }
    });
    let published = std::fs::read_dir(lab.serve.overlay().join("l")).unwrap();
    assert_eq!(published.count(), built.blobs.len());
    lab.podman.run(&["rmi", &first]);
    assert_eq!(lab.sh(&second, "cat /data/hello"), "hello");
}
