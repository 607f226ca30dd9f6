//! What is fetched before anybody asks: what earlier starts needed, what the builder listed, and the rest in the background.

use std::{fs, path::PathBuf, process::Command};

use nydus_store::{
    fixtures::{BuildOptions, Fault},
    image::trace::{Trace, TracePart},
    rafs::{ROOT, Tree},
};

use crate::common::{BINARY, Lab, Sample, Serve, StorePath, output, wait_until};

/// What is wanted beforehand alone, so that each byte can be told.
const NO_AHEAD: &str = "[fetch]\nread_ahead = false\n";
const FILES: usize = 40;

/// An image of files of a chunk each.
fn sample(seed: u64, options: &BuildOptions) -> Sample {
    let names: Vec<_> = (0..FILES).map(|number| format!("f{number:02}")).collect();
    let files: Vec<_> = names.iter().map(|name| (name.as_str(), 64 << 10)).collect();
    Sample::of(&files, seed, options)
}

fn read(sample: &Sample, layer: &StorePath, names: &[&str]) {
    for name in names {
        assert!(
            fs::read(layer.diff().join(name)).unwrap() == sample.content(name),
            "{name}"
        );
    }
}

fn run(serve: &Serve, args: &[&str]) -> Command {
    let mut command = Command::new(BINARY);
    command.args(args).arg("--root").arg(serve.root());
    command
}

/// Waits until so many requests for data have been made, and no more come.
fn wait_for_requests(lab: &Lab, sample: &Sample, requests: u64) {
    let stats = || lab.registry.blob_stats(sample.data());
    wait_until("it is fetched beforehand", || {
        (stats().requests >= requests).then_some(())
    });
    // Each is kept as soon as it has come.
    std::thread::sleep(std::time::Duration::from_millis(300));
    assert_eq!(stats().requests, requests);
}

fn forget_data(serve: &Serve) {
    fs::remove_dir_all(serve.root().join("cache")).unwrap();
}

#[test]
fn a_second_start_finds_what_the_first_needed() {
    let mut lab = Lab::new(NO_AHEAD);
    let sample = sample(1, &Sample::options());
    let layer = lab.add(&sample, "a");
    // Not next to each other, so that no request is for two of them.
    let needed = ["f31", "f07", "f22"];
    read(&sample, &layer, &needed);
    let first = lab.registry.blob_stats(sample.data());
    assert_eq!(first.requests, 3);
    lab.serve.stop();
    let listed = output(&mut run(&lab.serve, &["trace", "list"]));
    assert!(
        listed.contains("3 chunks") && listed.contains(&lab.reference("a")),
        "{listed}"
    );

    forget_data(&lab.serve);
    lab.registry.reset();
    lab.serve.launch();
    // Looked for, as Podman does, and not read.
    assert!(layer.is_there());
    wait_for_requests(&lab, &sample, 3);
    read(&sample, &layer, &needed);
    let second = lab.registry.blob_stats(sample.data());
    assert_eq!(second, first, "the same bytes, and none for the readers");
    read(&sample, &layer, &["f00"]);
    assert_eq!(lab.registry.blob_stats(sample.data()).requests, 4);
}

#[test]
fn what_one_host_has_learned_serves_another() {
    let lab = Lab::new(NO_AHEAD);
    let sample = sample(2, &Sample::options());
    let layer = lab.add(&sample, "a");
    read(&sample, &layer, &["f20", "f03"]);
    let (file, name) = (sample.dir().join("trace"), lab.reference("a"));
    let path = file.to_str().unwrap();
    let mut command = run(&lab.serve, &["trace", "export", &name, "--output", path]);
    let mut export = || command.output().unwrap().status.success();
    // While the daemon runs, too.
    wait_until("what was needed is on disk", || export().then_some(()));
    let text = fs::read_to_string(&file).unwrap();
    assert!(text.contains(&sample.image.manifest_digest().to_string()), "{text}");

    let other = Serve::with_config(NO_AHEAD);
    output(run(&other, &["trace", "import"]).arg(&file));
    lab.registry.reset();
    let there = other.layer(&name, &sample.key());
    assert!(there.is_there());
    wait_for_requests(&lab, &sample, 2);
    read(&sample, &there, &["f20", "f03"]);
    assert_eq!(lab.registry.blob_stats(sample.data()).requests, 2);

    // It is exported as it was taken.
    let again = output(&mut run(
        &other,
        &["trace", "export", &sample.image.manifest_digest().to_string()],
    ));
    assert!(
        again.lines().count() >= 2 && again.lines().next() == text.lines().next(),
        "{again}"
    );
}

#[test]
fn a_trace_that_comes_while_the_image_is_in_use_counts_at_once() {
    for (learn, requests) in [(true, 3), (false, 1)] {
        let config = format!("{NO_AHEAD}learn = {learn}\n");
        let mut lab = Lab::new(&config);
        let sample = sample(7, &Sample::options());
        let layer = lab.add(&sample, "a");
        read(&sample, &layer, &["f31"]);
        assert_eq!(lab.registry.blob_stats(sample.data()).requests, 1);
        let file = trace_of(&sample, &[20, 3]);
        let imported = output(run(&lab.serve, &["trace", "import"]).arg(&file));
        assert_eq!(imported.contains("in use"), learn, "{imported}");
        wait_for_requests(&lab, &sample, requests);
        read(&sample, &layer, &["f20", "f03", "f31"]);
        assert_eq!(lab.registry.blob_stats(sample.data()).requests, 3);

        // Nobody is there to be told, and then it is found when the image is looked for.
        lab.serve.stop();
        forget_data(&lab.serve);
        let imported = output(run(&lab.serve, &["trace", "import"]).arg(&file));
        assert!(
            imported.contains("2 chunks") && !imported.contains("in use"),
            "{imported}"
        );
        lab.registry.reset();
        lab.serve.launch();
        assert!(layer.is_there());
        wait_for_requests(&lab, &sample, if learn { 2 } else { 0 });
    }
}

#[test]
fn what_lies_beside_learned_chunks_is_not_read_ahead() {
    let mut lab = Lab::with(Serve::prepare(""));
    let sample = sample(8, &Sample::options());
    let layer = lab.add(&sample, "a");
    fs::create_dir_all(lab.serve.root()).unwrap();
    output(run(&lab.serve, &["trace", "import"]).arg(trace_of(&sample, &[20, 3, 11])));
    lab.serve.launch();
    assert!(layer.is_there());
    wait_for_requests(&lab, &sample, 3);
    read(&sample, &layer, &["f20", "f03", "f11"]);
    wait_for_requests(&lab, &sample, 3);
    // For who leaves the trace, what lies behind comes along.
    read(&sample, &layer, &["f30", "f31", "f32"]);
    wait_for_requests(&lab, &sample, 4);
}

/// A trace that names the chunks of the files with these numbers.
fn trace_of(sample: &Sample, files: &[usize]) -> PathBuf {
    let tree = Tree::load(sample.image.bootstrap_path().unwrap()).unwrap();
    let chunk = |file: &usize| {
        let file = tree.lookup(ROOT, format!("f{file:02}").as_bytes()).unwrap();
        let place = &tree.chunks(file)[0];
        tree.blobs()[usize::from(place.blob)].chunks[place.chunk as usize].index
    };
    let part = TracePart {
        blob: sample.data().hex(),
        chunks: files.iter().map(chunk).collect(),
        unused: 0,
    };
    let image = sample.image.manifest_digest();
    let parts = vec![part];
    let path = sample.dir().join("trace");
    Trace { image, parts }.write(fs::File::create(&path).unwrap()).unwrap();
    path
}

#[test]
fn what_the_builder_has_listed_is_fetched() {
    for (wanted, requests) in [(true, 1), (false, 0)] {
        let lab = Lab::new(&format!("{NO_AHEAD}prefetch = {wanted}\n"));
        let options = BuildOptions {
            prefetch: vec!["/f09".to_owned()],
            ..Sample::options()
        };
        let sample = sample(3, &options);
        let layer = lab.add(&sample, "a");
        assert!(layer.is_there());
        wait_for_requests(&lab, &sample, requests);
        read(&sample, &layer, &["f09"]);
        assert_eq!(lab.registry.blob_stats(sample.data()).requests, 1);
    }
}

#[test]
fn the_rest_comes_in_the_background() {
    let lab = Lab::new(&format!("{NO_AHEAD}fill = true\nfill_rate = 100\n"));
    let sample = sample(4, &Sample::options());
    let layer = lab.add(&sample, "a");
    assert!(layer.is_there());
    let is_complete = || output(&mut run(&lab.serve, &["verify"])).contains(": complete");
    wait_until("all is there", || is_complete().then_some(()));
    let filled = lab.registry.blob_stats(sample.data());
    assert!(filled.requests < 5, "{filled:?}");
    sample.check(&layer);
    assert_eq!(lab.registry.blob_stats(sample.data()), filled);
}

#[test]
fn who_reads_in_order_makes_few_requests() {
    let lab = Lab::new("");
    let sample = sample(5, &Sample::options());
    let layer = lab.add(&sample, "a");
    sample.check(&layer);
    let stats = lab.registry.blob_stats(sample.data());
    assert!(stats.requests < FILES as u64 / 2, "{stats:?}");
    assert!(
        stats.bytes <= sample.data_bytes().len() as u64,
        "each byte once: {stats:?}"
    );
}

#[test]
fn what_is_no_trace_does_no_harm() {
    let mut lab = Lab::with(Serve::prepare(NO_AHEAD));
    let sample = sample(6, &Sample::options());
    let layer = lab.add(&sample, "a");
    let traces = lab.serve.root().join("traces");
    fs::create_dir_all(&traces).unwrap();
    let place = traces.join(format!("{}.trace", sample.image.manifest_digest().hex()));
    let foreign = format!(
        "{{\"nydus-store-trace\":1,\"image\":\"{}\"}}\n{{\"blob\":\"{}\",\"chunks\":[4294967295,7]}}\n",
        sample.image.manifest_digest(),
        "ab".repeat(32)
    );
    for text in ["", "{", "\0\0\0", &foreign] {
        fs::write(&place, text).unwrap();
        let from = lab.serve.log().len();
        lab.serve.launch();
        sample.check(&layer);
        let log = lab.log_since(from);
        assert!(!log.contains("panicked"), "{log}");
        assert_eq!(log.contains("failed to read trace"), text != foreign, "{log}");
        lab.serve.stop();
        assert!(
            fs::read_to_string(&place).unwrap().contains(&sample.data().hex()),
            "made anew"
        );
    }

    let file = sample.dir().join("no-trace");
    fs::write(&file, "{\"nydus-store-trace\":1,\"image\":\"../../x\"}\n").unwrap();
    for (args, said) in [
        (vec!["trace", "import", file.to_str().unwrap()], "line 1"),
        (vec!["trace", "import", "/nonexistent"], "/nonexistent"),
        (vec!["trace", "export", "registry.example/b:1"], "unknown image"),
    ] {
        let failed = run(&lab.serve, &args).output().unwrap();
        let message = String::from_utf8_lossy(&failed.stderr);
        assert_eq!(failed.status.code(), Some(1), "{args:?}: {message}");
        assert!(message.contains(said), "{args:?}: {message}");
    }
}

/// Each request costs what lies before its range. So few for much are better than many for little, and none is made on a guess.
#[test]
fn where_ranges_are_ignored_what_is_read_on_is_read_ahead_and_nothing_guessed() {
    let requests = |read_ahead: bool, files: usize, step: usize| {
        let lab = Lab::new(&format!("[fetch]\nread_ahead = {read_ahead}\n"));
        let names: Vec<_> = (0..files).map(|number| format!("f{number:03}")).collect();
        let files: Vec<_> = names.iter().map(|name| (name.as_str(), 64 << 10)).collect();
        let sample = Sample::of(&files, 7, &Sample::options());
        let layer = lab.add(&sample, "a");
        let data = sample.data();
        lab.fault("a", move |request| match request.digest == Some(data) {
            true => Fault::IgnoreRange,
            false => Fault::None,
        });
        let wanted: Vec<_> = names.iter().step_by(step).map(String::as_str).collect();
        read(&sample, &layer, &wanted);
        (wanted.len() as u64, lab.registry.blob_stats(data).requests)
    };
    let ((files, in_order), (_, alone)) = (requests(true, 120, 1), requests(false, 120, 1));
    assert!(
        alone >= files && in_order < files / 4,
        "{in_order} and {alone} of {files}"
    );
    // Farther from each other than windows reach. Before the first answer nobody knows.
    let (files, here_and_there) = requests(true, 400, 50);
    assert!(here_and_there <= files + 2, "{here_and_there} of {files}");
}
