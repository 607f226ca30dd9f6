//! `nydus-store gc`: what remains after images were removed from Podman.

use std::fs;

use serde_json::Value;

use super::{NUMBERS, PodmanLab, Release, on_each_release};
use crate::{bounds::usage, common::RunPodman as _};

on_each_release!(
    root_is_as_small_as_at_first_after_rmi_and_gc,
    registered_image_survives_gc
);

impl PodmanLab {
    /// Tells the daemon where Podman stores images and containers.
    fn name_graph_root(&mut self) {
        // Creates the directory.
        self.podman.run(&["images"]);
        let config = format!("[store]\ngraph_roots = [\"{}\"]\n", self.podman.graph_root().display());
        fs::write(self.serve.config_path(), config).unwrap();
        self.serve.restart();
    }

    /// Numbers of removed images and layers, and bytes freed.
    fn gc(&self, args: &[&str]) -> (usize, u64, u64) {
        let printed = self.nydus_store(&[&["gc", "--json"], args].concat());
        let garbage: Value = serde_json::from_str(&printed).unwrap();
        let images = garbage["images"].as_array().unwrap().len();
        (
            images,
            garbage["layers"].as_u64().unwrap(),
            garbage["bytes"].as_u64().unwrap(),
        )
    }
}

async fn root_is_as_small_as_at_first_after_rmi_and_gc(release: Release) {
    let (mut lab, image, built) = PodmanLab::with_image(release).await;
    lab.name_graph_root();
    let before = usage(lab.serve.root());
    let numbers = lab.sha256(&image, NUMBERS);
    lab.keep("used", &image);
    assert_eq!(lab.gc(&["--min-age", "0"]), (0, 0, 0));
    assert_eq!(lab.sha256(&image, NUMBERS), numbers);
    lab.podman.run(&["rm", "--force", "--time", "0", "used"]);
    lab.podman.run(&["rmi", &image]);
    // Pulled less than ten minutes ago.
    assert_eq!(lab.gc(&[]), (0, 0, 0));
    let full = usage(lab.serve.root());
    let planned = lab.gc(&["--min-age", "0", "--dry-run"]);
    assert_eq!((planned.0, planned.1), (1, built.blobs.len() as u64));
    assert_eq!(usage(lab.serve.root()), full);
    assert_eq!(lab.gc(&["--min-age", "0"]), planned);
    assert_eq!(usage(lab.serve.root()), before);
    assert_eq!(before + planned.2, full);
    assert_eq!(fs::read_dir(lab.serve.overlay().join("l")).unwrap().count(), 0);
    assert_eq!(lab.sha256(&image, NUMBERS), numbers);
    // Its tree is still in memory when it is published again, by name this time.
    lab.podman.run(&["rmi", &image]);
    assert_eq!(lab.gc(&["--min-age", "0"]).0, 1);
    lab.nydus_store(&["pull", &image]);
    assert_eq!(lab.sha256(&image, NUMBERS), numbers);
}

async fn registered_image_survives_gc(release: Release) {
    let (mut lab, image, _) = PodmanLab::with_image(release).await;
    lab.name_graph_root();
    lab.nydus_store(&["preseed", &format!("docker://{image}")]);
    assert_eq!(lab.gc(&["--min-age", "0"]), (0, 0, 0));
    lab.registry.stop();
    let numbers = lab.sha256(&image, NUMBERS);
    // Also without a daemon.
    lab.serve.stop();
    assert_eq!(lab.gc(&["--min-age", "0"]), (0, 0, 0));
    lab.serve.launch();
    assert_eq!(lab.sha256(&image, NUMBERS), numbers);
    lab.nydus_store(&["rm", &image]);
    assert_eq!(lab.gc(&["--min-age", "0"]).0, 1);
    assert_eq!(usage(lab.serve.root()), 0);
}
