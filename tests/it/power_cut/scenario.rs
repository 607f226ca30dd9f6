//! [`Scenario`]: what a daemon is asked to do while its changes are recorded.

use std::{collections::BTreeMap, fs, process::Command, time::Duration};

use nydus_store::{fixtures::BuildOptions, internals::Digest};

use super::{
    check::Expected,
    recording::{Change, Recorder, Step, now},
};
use crate::common::{BINARY, Lab, Sample, Serve, StoreLayer, output};

/// Files of the images: some of several chunks, one smaller than a page.
const FILES: [(&str, usize); 4] = [
    ("small", 900),
    ("one", 16 << 10),
    ("dir/odd", 50_001),
    ("large", 100_000),
];

/// Images, and what a daemon did with them.
pub struct Scenario {
    lab: Lab,
    /// Images by repository.
    pub samples: Vec<(&'static str, Sample)>,
    /// All changes of the root.
    pub steps: Vec<Step>,
    /// From when on something is expected of an image; `None`: from then on, nothing is known.
    expected: Vec<(Duration, Digest, Option<Expected>)>,
}

impl Scenario {
    /// Records three lives of a daemon on a new root. It is stopped after the first one and killed after the second.
    pub fn record() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let options = |batch_size| BuildOptions {
            chunk_size: 16 << 10,
            batch_size,
            // So that the blob meta of the packed image is fetched and cached.
            keep_meta: batch_size == 0,
            ..BuildOptions::default()
        };
        let sample = |seed, batch_size| Sample::of(&FILES, seed, &options(batch_size));
        let samples = vec![
            ("announced", sample(1, 0)),
            ("pulled", sample(2, 0)),
            ("seeded", sample(3, 0)),
            ("packed", sample(4, 0x4000)),
            ("removed", sample(5, 0)),
        ];
        let mut scenario = Self {
            lab: Lab::with_daemon(Serve::prepare("")),
            samples,
            steps: Vec::new(),
            expected: Vec::new(),
        };
        for (name, sample) in &scenario.samples {
            scenario.lab.add(sample, name);
        }
        let mut recorder = Recorder::new(&scenario.lab.serve, dir.path());
        recorder.launch(&mut scenario.lab.serve);
        scenario.first_life();
        scenario.lab.serve.stop();
        recorder.launch(&mut scenario.lab.serve);
        scenario.second_life();
        scenario.lab.serve.kill();
        recorder.launch(&mut scenario.lab.serve);
        scenario.third_life();
        scenario.lab.serve.stop();
        scenario.steps = recorder.steps(&scenario.lab.serve);
        scenario.check_coverage();
        scenario
    }

    fn first_life(&mut self) {
        self.expect("seeded", Some(Expected::DataIfRecord));
        self.publish("announced");
        self.read("announced", "large");
        self.command("pull", "pulled");
        self.expect("pulled", Some(Expected::Record));
        self.read("pulled", "dir/odd");
        self.command("preseed", "seeded");
        self.expect("seeded", Some(Expected::Data));
    }

    fn second_life(&mut self) {
        self.command("pull", "removed");
        self.expect("removed", Some(Expected::Record));
        self.publish("packed");
        self.read("packed", "small");
        self.read("announced", "one");
    }

    /// With the files that the killed daemon left.
    fn third_life(&mut self) {
        self.read("announced", "small");
        self.expect("removed", None);
        self.command("rm", "removed");
        self.expect("removed", Some(Expected::NoRecord));
        for name in ["pulled", "packed"] {
            self.command("preseed", name);
            self.expect(name, Some(Expected::Data));
        }
    }

    /// Panics unless all kinds of files were written, and a trace was written twice.
    fn check_coverage(&self) {
        let written = |ending: &str| {
            let is_written = |step: &&Step| match &step.change {
                Change::Write { path, .. } | Change::Rename { to: path, .. } => path.ends_with(ending),
                _ => false,
            };
            self.steps.iter().filter(is_written).count()
        };
        for ending in [
            "published.redb",
            "layers.json",
            "images.json",
            ".blob.data",
            ".blob.claims",
            ".blob.meta",
            "lock",
        ] {
            assert!(written(ending) > 0, "{ending} was not written");
        }
        let trace = format!("{}.trace", self.sample("announced").image.manifest_digest().hex());
        assert!(written(&trace) > 1, "the trace was not rewritten");
    }

    fn sample(&self, name: &str) -> &Sample {
        &self.samples.iter().find(|(known, _)| *known == name).unwrap().1
    }

    /// The layer that shows an image's files in the store of `serve`.
    pub fn layer(&self, name: &str, serve: &Serve) -> StoreLayer {
        serve.layer(&self.lab.reference(name), &self.sample(name).bootstrap_digest())
    }

    /// Announces a pull.
    fn publish(&mut self, name: &str) {
        assert!(self.layer(name, &self.lab.serve).pull_publishes());
        self.expect(name, Some(Expected::Layers));
    }

    fn read(&self, name: &str, file: &str) {
        let path = self.layer(name, &self.lab.serve).diff().join(file);
        assert!(fs::read(path).unwrap() == self.sample(name).content(file));
    }

    fn command(&self, command: &str, name: &str) {
        let reference = self.lab.reference(name);
        let image = match command {
            "preseed" => format!("docker://{reference}"),
            _ => reference,
        };
        let root = self.lab.serve.root();
        output(Command::new(BINARY).args([command, &image, "--root"]).arg(root));
    }

    fn expect(&mut self, name: &str, expected: Option<Expected>) {
        let image = self.sample(name).image.manifest_digest();
        self.expected.push((now(), image, expected));
    }

    /// What must hold of images after the first `count` steps: what was acknowledged before the last of them began.
    pub fn expected_after(&self, count: usize) -> BTreeMap<Digest, Expected> {
        let cut = count
            .checked_sub(1)
            .map_or(Duration::ZERO, |last| self.steps[last].began);
        let mut expected = BTreeMap::new();
        for (_, image, held) in self.expected.iter().filter(|(since, ..)| *since < cut) {
            match held {
                Some(held) => expected.insert(*image, *held),
                None => expected.remove(image),
            };
        }
        expected
    }
}
