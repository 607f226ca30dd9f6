//! An image with false metadata for a blob does not affect other images of that blob.

use std::{fs, path::Path, time::Duration};

use nydus_store::fixtures::{self, BuildOptions, Fault, LayerSource};

use crate::common::{Lab, Sample, StoreLayer, bootstrap_layer};

/// Adds `victim` as `victim`, and as `attacker` an image whose bootstrap has the victim's blob id in place of its own.
/// The repository `attacker` serves the attacker's bytes under that id. Returns both layers.
fn add_poisoned(lab: &Lab, victim: &Sample, attacker: &Sample) -> (StoreLayer, StoreLayer) {
    let victim_layer = lab.add(victim, "victim");
    let (theirs, own) = (victim.data_digest().hex(), attacker.data_digest().hex());
    let mut boot = fs::read(attacker.image.bootstrap_path().unwrap()).unwrap();
    let mut places = 0;
    for at in 0..boot.len() - own.len() {
        if boot[at..].starts_with(own.as_bytes()) {
            boot[at..at + own.len()].copy_from_slice(theirs.as_bytes());
            places += 1;
        }
    }
    assert!(places > 0, "the bootstrap contains its blob id");
    let meta_path = attacker.dir().join("image/metas").join(format!("{own}.blob.meta"));
    let meta = fs::read(meta_path).unwrap();
    let meta_name = format!("image/{theirs}.blob.meta");
    let (layer, diff_id) = bootstrap_layer(&[("image/image.boot", &boot), (&meta_name, &meta)]);
    let attacker_layer = lab.with_bootstrap(attacker, "attacker", layer, diff_id);
    lab.registry
        .add_blob("attacker", victim.data_digest(), attacker.data_bytes().into());
    (victim_layer, attacker_layer)
}

/// Two attackers: the same file names and lengths with other bytes (same chunk offsets, other digests), and other files
/// (other chunk offsets).
fn attackers() -> [Sample; 2] {
    [
        Sample::new(666),
        Sample::of(
            &[("large", 1 << 20), ("hello", 30), ("other", 70_000)],
            1,
            &Sample::options(),
        ),
    ]
}

#[test]
fn forged_blob_id_does_not_poison_the_cache() {
    for attacker in attackers() {
        for attacker_first in [true, false] {
            let mut lab = Lab::new("");
            let victim = Sample::new(1);
            let (victim_layer, attacker_layer) = add_poisoned(&lab, &victim, &attacker);
            let order = if attacker_first {
                [(&attacker, &attacker_layer), (&victim, &victim_layer)]
            } else {
                [(&victim, &victim_layer), (&attacker, &attacker_layer)]
            };
            for (sample, layer) in order {
                sample.check(layer);
            }
            // Also from the cache: each alone, and both concurrently.
            lab.serve.restart();
            victim.check(&victim_layer);
            lab.serve.restart();
            attacker.check(&attacker_layer);
            lab.serve.restart();
            std::thread::scope(|scope| {
                for (sample, layer) in order {
                    scope.spawn(move || sample.check(layer));
                }
            });
            assert!(!lab.serve.log().contains("panicked"), "{}", lab.serve.log());
        }
    }
}

#[test]
fn mismatched_blob_gives_eio_for_its_image_only() {
    let lab = Lab::new("[registry]\nretries = 0\n");
    let (victim, attacker) = (Sample::new(1), Sample::new(2));
    let (victim_layer, attacker_layer) = add_poisoned(&lab, &victim, &attacker);
    // The attacker's repository serves the victim's true blob.
    lab.registry
        .add_blob("attacker", victim.data_digest(), victim.data_bytes().into());
    assert!(attacker_layer.pull_publishes());
    let error = fs::read(attacker_layer.diff().join("one")).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EIO), "{error}");
    victim.check(&victim_layer);
}

/// Two valid images share a batched blob. The second lacks some files, so its chunks have other positions in its chunk
/// table. Each image waits for units that the other fetches.
#[test]
fn images_that_share_a_batched_blob_share_flights() {
    let dir = tempfile::tempdir().unwrap();
    let lower = dir.path().join("lower");
    fs::create_dir(&lower).unwrap();
    let name = |number: usize| format!("f{number:02}");
    let content = |number: usize| vec![b'a' + number as u8; 3000 + number];
    for number in 0..20 {
        fs::write(lower.join(name(number)), content(number)).unwrap();
    }
    let upper = dir.path().join("upper");
    fs::create_dir(&upper).unwrap();
    for number in [0, 3, 4] {
        fs::write(upper.join(format!(".wh.{}", name(number))), b"").unwrap();
    }
    let options = BuildOptions {
        batch_size: 64 << 10,
        chunk_size: 64 << 10,
        ..BuildOptions::default()
    };
    let build = |layers: &[&Path], out: &str| {
        let layers: Vec<_> = layers
            .iter()
            .map(|layer| LayerSource::Dir(layer.to_path_buf()))
            .collect();
        fixtures::build(&layers, &options, &dir.path().join(out)).unwrap()
    };
    let images = [build(&[&lower], "one"), build(&[&lower, &upper], "two")];
    assert_eq!(images[0].blob_ids[0], images[1].blob_ids[0], "the blob is shared");
    for round in 0..6 {
        let lab = Lab::new("");
        let layers = ["one", "two"].map(|name| {
            let image = &images[usize::from(name == "two")];
            lab.registry.add_image(image, name, "1").unwrap();
            lab.fault(name, |request| match request.range {
                Some(_) => Fault::Delay(Duration::from_millis(500)),
                None => Fault::None,
            });
            lab.layer(name, image.bootstrap_blob().unwrap().digest)
        });
        assert!(layers.iter().all(StoreLayer::pull_publishes));
        std::thread::scope(|scope| {
            for image in 0..2 {
                // Alternates which image starts.
                let (layer, image) = (&layers[(image + round) % 2], (image + round) % 2);
                for number in 0..20 {
                    if image == 1 && [0, 3, 4].contains(&number) {
                        continue;
                    }
                    let path = layer.diff().join(name(number));
                    scope.spawn(move || assert!(fs::read(path).unwrap() == content(number), "{number} of {image}"));
                }
                std::thread::sleep(Duration::from_millis(100));
            }
        });
    }
}
