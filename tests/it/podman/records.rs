//! The records read by containers/storage match what is published, after any sequence of changes.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    process::Stdio,
    time::Duration,
};

use nydus_store::fixtures::{BuildOptions, content::Random};
use serde_json::Value;

use super::{PodmanLab, Release, note, on_each_release, runnable_tree};
use crate::common::{Guard, RunPodman as _, wait_until};

on_each_release!(records_match_a_model, running_service_sees_changes);

/// Names and ids of known images, as shown by `podman images`.
fn listed_images(lab: &PodmanLab) -> BTreeMap<String, String> {
    let format = "{{.Repository}}:{{.Tag}} {{.ID}}";
    let lines = lab.podman.run(&["images", "--no-trunc", "--format", format]);
    let pair = |line: &str| line.split_once(' ').map(|(name, id)| (name.to_owned(), id.to_owned()));
    lines.lines().map(|line| pair(line).unwrap()).collect()
}

fn records(lab: &PodmanLab, file: &str) -> Vec<Value> {
    serde_json::from_slice(&fs::read(lab.serve.store().join(file)).unwrap()).unwrap()
}

/// Checks the invariants that containers/storage relies on.
fn assert_records_consistent(lab: &PodmanLab) {
    let layers = records(lab, "overlay-layers/layers.json");
    let ids: BTreeSet<_> = layers.iter().map(|layer| layer["id"].as_str().unwrap()).collect();
    assert_eq!(ids.len(), layers.len());
    for layer in &layers {
        let id = layer["id"].as_str().unwrap();
        assert!(layer["parent"].as_str().is_none_or(|parent| ids.contains(parent)));
        assert!(lab.serve.overlay().join(id).join("diff").is_dir(), "{id}");
    }
    for image in records(lab, "overlay-images/images.json") {
        assert!(ids.contains(image["layer"].as_str().unwrap()));
    }
    for lock in ["overlay-layers/layers.lock", "overlay-images/images.lock"] {
        let len = fs::metadata(lab.serve.store().join(lock)).unwrap().len();
        assert!(len == 0 || len == 64, "{lock}: {len}");
    }
}

async fn records_match_a_model(release: Release) {
    let mut lab = PodmanLab::start(release);
    let base = lab.layer(runnable_tree);
    let mut images = Vec::new();
    for number in 0..4 {
        let text: &'static str = format!("{number}").leak();
        let layers = [base.clone(), lab.layer(note("number", text))];
        images.push(lab.build(&layers, &BuildOptions::default()));
    }
    let mut random = Random::new(9);
    let mut model = BTreeMap::new();
    for _ in 0..24 {
        let tag = random.below(3).to_string();
        let name = lab.registry.reference("known", &tag);
        match random.below(8) {
            0..4 => {
                // The tag may move.
                let image = &images[random.below(4) as usize];
                lab.push(image, "known", &tag).await;
                lab.nydus_store(&["pull", &name]);
                model.insert(name, image.config_digest().to_string());
            }
            4..6 if model.contains_key(&name) => {
                lab.nydus_store(&["rm", &name]);
                model.remove(&name);
            }
            6 => lab.serve.restart(),
            7 => lab.serve.kill_and_restart(),
            _ => {}
        }
        assert_eq!(listed_images(&lab), model);
        assert_records_consistent(&lab);
    }
    for (name, id) in model {
        let number = images.iter().position(|image| image.config_digest().to_string() == id);
        assert_eq!(lab.sh(&name, "cat /number"), number.unwrap().to_string());
    }
}

/// Like CRI-O, Podman's API service keeps the store open.
async fn running_service_sees_changes(release: Release) {
    let (lab, image, built) = PodmanLab::with_image(release).await;
    let socket = lab.podman.dir().join("service.sock");
    let url = format!("unix://{}", socket.display());
    let mut service = lab.podman.command(&["system", "service", "--time", "0", &url]);
    let _service = Guard(service.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap());
    let remote = |args: &[&str]| lab.podman.run(&[&["--url", &url], args].concat());
    wait_until("the service answers", || {
        std::thread::sleep(Duration::from_millis(100));
        let asked = lab.podman.command(&["--url", &url, "version"]).output().unwrap();
        asked.status.success().then_some(())
    });
    let known = || remote(&["images", "--no-trunc", "--quiet"]);
    assert_eq!(known(), "");
    lab.nydus_store(&["pull", &image]);
    assert_eq!(known(), built.config_digest().to_string());
    lab.nydus_store(&["rm", &image]);
    assert_eq!(known(), "");
    // The service announces its pulls too.
    remote(&["pull", &image]);
    assert_eq!(lab.sh(&image, "cat /data/hello"), "hello");
    lab.podman.run(&["rmi", &image]);
    assert_eq!(known(), "");
}
