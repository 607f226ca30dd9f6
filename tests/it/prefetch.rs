//! Prefetch: traces of earlier starts, the builder's list, background fill, and read-ahead.

use std::{fs, path::PathBuf, process::Command};

use nydus_store::{
    fixtures::{BuildOptions, Fault},
    internals::{ROOT, Trace, TracePart, Tree},
};

use crate::common::{BINARY, Lab, Sample, Serve, StoreLayer, output, wait_until};

/// Without read-ahead, so that prefetch requests can be counted.
const NO_READ_AHEAD: &str = "[fetch]\nread_ahead = false\n";
const FILES: usize = 40;

/// An image of [`FILES`] files of one chunk each.
fn sample(seed: u64, options: &BuildOptions) -> Sample {
    let names: Vec<_> = (0..FILES).map(|number| format!("f{number:02}")).collect();
    let files: Vec<_> = names.iter().map(|name| (name.as_str(), 64 << 10)).collect();
    Sample::of(&files, seed, options)
}

fn read(sample: &Sample, layer: &StoreLayer, names: &[&str]) {
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

/// Waits until exactly this number of requests for data has been made.
fn wait_for_requests(lab: &Lab, sample: &Sample, requests: u64) {
    let stats = || lab.registry.blob_stats(sample.data_digest());
    wait_until("it is prefetched", || (stats().requests >= requests).then_some(()));
    // Time for unexpected requests, and for chunks to be written to the cache.
    std::thread::sleep(std::time::Duration::from_millis(300));
    assert_eq!(stats().requests, requests);
}

fn forget_data(serve: &Serve) {
    fs::remove_dir_all(serve.root().join("cache")).unwrap();
}

#[test]
fn second_start_prefetches_the_chunks_of_the_first() {
    let mut lab = Lab::new(NO_READ_AHEAD);
    let sample = sample(1, &Sample::options());
    let layer = lab.add(&sample, "a");
    // Not adjacent, so that no request covers two of them.
    let needed = ["f31", "f07", "f22"];
    read(&sample, &layer, &needed);
    let first = lab.registry.blob_stats(sample.data_digest());
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
    // A look-up, as by Podman, without a read.
    assert!(layer.pull_publishes());
    wait_for_requests(&lab, &sample, 3);
    read(&sample, &layer, &needed);
    let second = lab.registry.blob_stats(sample.data_digest());
    assert_eq!(second, first, "the same bytes, and no requests for readers");
    read(&sample, &layer, &["f00"]);
    assert_eq!(lab.registry.blob_stats(sample.data_digest()).requests, 4);
}

#[test]
fn exported_trace_prefetches_on_another_host() {
    let lab = Lab::new(NO_READ_AHEAD);
    let sample = sample(2, &Sample::options());
    let layer = lab.add(&sample, "a");
    read(&sample, &layer, &["f20", "f03"]);
    let (file, name) = (sample.dir().join("trace"), lab.reference("a"));
    let path = file.to_str().unwrap();
    let mut command = run(&lab.serve, &["trace", "export", &name, "--output", path]);
    let mut export = || command.output().unwrap().status.success();
    // Works while the daemon runs.
    wait_until("the trace is on disk", || export().then_some(()));
    let text = fs::read_to_string(&file).unwrap();
    assert!(text.contains(&sample.image.manifest_digest().to_string()), "{text}");

    let other = Serve::with_config(NO_READ_AHEAD);
    output(run(&other, &["trace", "import"]).arg(&file));
    lab.registry.reset();
    let there = other.layer(&name, &sample.bootstrap_digest());
    assert!(there.pull_publishes());
    wait_for_requests(&lab, &sample, 2);
    read(&sample, &there, &["f20", "f03"]);
    assert_eq!(lab.registry.blob_stats(sample.data_digest()).requests, 2);

    // The imported trace can be exported again.
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
fn imported_trace_is_replayed_for_an_image_in_use() {
    for (learn, requests) in [(true, 3), (false, 1)] {
        let config = format!("{NO_READ_AHEAD}learn = {learn}\n");
        let mut lab = Lab::new(&config);
        let sample = sample(7, &Sample::options());
        let layer = lab.add(&sample, "a");
        read(&sample, &layer, &["f31"]);
        assert_eq!(lab.registry.blob_stats(sample.data_digest()).requests, 1);
        let file = trace_of(&sample, &[20, 3]);
        let imported = output(run(&lab.serve, &["trace", "import"]).arg(&file));
        assert_eq!(imported.contains("in use"), learn, "{imported}");
        wait_for_requests(&lab, &sample, requests);
        read(&sample, &layer, &["f20", "f03", "f31"]);
        assert_eq!(lab.registry.blob_stats(sample.data_digest()).requests, 3);

        // Without a running daemon, the trace takes effect at the next look-up of the image.
        lab.serve.stop();
        forget_data(&lab.serve);
        let imported = output(run(&lab.serve, &["trace", "import"]).arg(&file));
        assert!(
            imported.contains("2 chunks") && !imported.contains("in use"),
            "{imported}"
        );
        lab.registry.reset();
        lab.serve.launch();
        assert!(layer.pull_publishes());
        wait_for_requests(&lab, &sample, if learn { 2 } else { 0 });
    }
}

#[test]
fn trace_replay_suspends_coalescing() {
    let mut lab = Lab::with_daemon(Serve::prepare(""));
    let sample = sample(8, &Sample::options());
    let layer = lab.add(&sample, "a");
    fs::create_dir_all(lab.serve.root()).unwrap();
    output(run(&lab.serve, &["trace", "import"]).arg(trace_of(&sample, &[20, 3, 11])));
    lab.serve.launch();
    assert!(layer.pull_publishes());
    wait_for_requests(&lab, &sample, 3);
    read(&sample, &layer, &["f20", "f03", "f11"]);
    wait_for_requests(&lab, &sample, 3);
    // Reads outside the trace are coalesced again.
    read(&sample, &layer, &["f30", "f31", "f32"]);
    wait_for_requests(&lab, &sample, 4);
}

/// Writes a trace of the chunks of the files with these numbers; returns its path.
fn trace_of(sample: &Sample, files: &[usize]) -> PathBuf {
    let tree = Tree::load(sample.image.bootstrap_path().unwrap()).unwrap();
    let chunk = |file: &usize| {
        let file = tree.lookup(ROOT, format!("f{file:02}").as_bytes()).unwrap();
        let place = &tree.chunks(file)[0];
        tree.blobs()[usize::from(place.blob)].chunks[place.chunk as usize].index
    };
    let part = TracePart {
        blob: sample.data_digest().hex(),
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
fn prefetch_list_of_the_builder_is_fetched() {
    for (wanted, requests) in [(true, 1), (false, 0)] {
        let lab = Lab::new(&format!("{NO_READ_AHEAD}prefetch = {wanted}\n"));
        let options = BuildOptions {
            prefetch: vec!["/f09".to_owned()],
            ..Sample::options()
        };
        let sample = sample(3, &options);
        let layer = lab.add(&sample, "a");
        assert!(layer.pull_publishes());
        wait_for_requests(&lab, &sample, requests);
        read(&sample, &layer, &["f09"]);
        assert_eq!(lab.registry.blob_stats(sample.data_digest()).requests, 1);
    }
}

#[test]
fn background_fill_completes_the_image() {
    let lab = Lab::new(&format!("{NO_READ_AHEAD}fill = true\nfill_rate = 100\n"));
    let sample = sample(4, &Sample::options());
    let layer = lab.add(&sample, "a");
    assert!(layer.pull_publishes());
    let is_complete = || output(&mut run(&lab.serve, &["verify"])).contains(": complete");
    wait_until("the image is complete", || is_complete().then_some(()));
    let filled = lab.registry.blob_stats(sample.data_digest());
    assert!(filled.requests < 5, "{filled:?}");
    sample.check(&layer);
    assert_eq!(lab.registry.blob_stats(sample.data_digest()), filled);
}

#[test]
fn sequential_reads_are_coalesced() {
    let lab = Lab::new("");
    let sample = sample(5, &Sample::options());
    let layer = lab.add(&sample, "a");
    sample.check(&layer);
    let stats = lab.registry.blob_stats(sample.data_digest());
    assert!(stats.requests < FILES as u64 / 2, "{stats:?}");
    assert!(
        stats.bytes <= sample.data_bytes().len() as u64,
        "each byte is fetched once: {stats:?}"
    );
}

#[test]
fn malformed_trace_is_replaced_and_rejected_on_import() {
    let mut lab = Lab::with_daemon(Serve::prepare(NO_READ_AHEAD));
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
            fs::read_to_string(&place)
                .unwrap()
                .contains(&sample.data_digest().hex()),
            "the trace is recorded again"
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

/// Without range support, each request costs the bytes before its range. So read-ahead goes on with few large requests,
/// and nothing is coalesced speculatively.
#[test]
fn ignored_ranges_keep_read_ahead_and_stop_coalescing() {
    let requests = |read_ahead: bool, files: usize, step: usize| {
        let lab = Lab::new(&format!("[fetch]\nread_ahead = {read_ahead}\n"));
        let names: Vec<_> = (0..files).map(|number| format!("f{number:03}")).collect();
        let files: Vec<_> = names.iter().map(|name| (name.as_str(), 64 << 10)).collect();
        let sample = Sample::of(&files, 7, &Sample::options());
        let layer = lab.add(&sample, "a");
        let data = sample.data_digest();
        lab.fault_on("a", data, Fault::IgnoreRange);
        let wanted: Vec<_> = names.iter().step_by(step).map(String::as_str).collect();
        read(&sample, &layer, &wanted);
        (wanted.len() as u64, lab.registry.blob_stats(data).requests)
    };
    let ((files, in_order), (_, alone)) = (requests(true, 120, 1), requests(false, 120, 1));
    assert!(
        alone >= files && in_order < files / 4,
        "{in_order} and {alone} of {files}"
    );
    // Farther apart than read-ahead windows. Two extra requests: ranges count as supported until the first response.
    let (files, here_and_there) = requests(true, 400, 50);
    assert!(here_and_there <= files + 2, "{here_and_there} of {files}");
}
