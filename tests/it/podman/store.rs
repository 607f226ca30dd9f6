//! Uses: what Podman announces and takes back, and what is freed then.

use nydus_store::fixtures::BuildOptions;

use super::{Lab, NUMBERS, Release, runnable_tree};
use crate::common::wait_until;

on_both!(
    rmi_closes_the_image_and_keeps_what_is_cached,
    rmi_of_one_of_two_tags_keeps_the_image_open,
    twenty_images_that_come_and_go_leave_no_memory_behind,
);

async fn rmi_closes_the_image_and_keeps_what_is_cached(release: Release) {
    let (lab, image, built) = Lab::with_image(release).await;
    lab.sha256(&image, NUMBERS);
    assert_eq!(lab.open_images(), 1);
    lab.podman.run(&["rmi", &image]);
    wait_until("the image is closed", || (lab.open_images() == 0).then_some(()));
    assert_eq!(
        lab.serve.log().matches("layer is no longer used").count(),
        built.blobs.len()
    );
    let cache = lab.serve.root().join("cache");
    assert!(cache.join(format!("{}.blob.data", built.blob_ids[0])).exists());
}

async fn rmi_of_one_of_two_tags_keeps_the_image_open(release: Release) {
    let (lab, first, built) = Lab::with_image(release).await;
    let second = lab.push(&built, "base", "2").await;
    lab.podman.run(&["pull", &first]);
    lab.podman.run(&["pull", &second]);
    lab.podman.run(&["rmi", &first]);
    assert_eq!(lab.sh(&second, "cat /data/hello"), "hello");
    lab.podman.run(&["rmi", &second]);
    wait_until("the image is closed", || (lab.open_images() == 0).then_some(()));
}

async fn twenty_images_that_come_and_go_leave_no_memory_behind(release: Release) {
    let lab = Lab::start(release);
    let mut after_first = 0;
    for number in 0..20 {
        let layer = lab.layer(|dir| {
            runnable_tree(dir);
            std::fs::write(dir.join("data/hello"), format!("hello {number}\n")).unwrap();
            std::fs::create_dir(dir.join("data/many")).unwrap();
            for file in 0..500 {
                std::fs::write(dir.join(format!("data/many/{file}")), format!("{number}")).unwrap();
            }
        });
        let built = lab.build(&[layer], &BuildOptions::default());
        let image = lab.push(&built, "many", &number.to_string()).await;
        let files = lab.sh(&image, "cat /data/hello; ls -l /data/many | wc -l");
        assert_eq!(files, format!("hello {number}\n501"));
        lab.podman.run(&["rmi", &image]);
        wait_until("the image is closed", || (lab.open_images() == 0).then_some(()));
        if number == 2 {
            after_first = lab.serve.resident();
        }
    }
    let grown = lab.serve.resident().saturating_sub(after_first);
    assert!(grown < 24 << 20, "grown by {grown} bytes");
}
