//! `nydus-store status` and the metrics: what they say, compared with what readers and the registry did.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    io::{BufRead as _, BufReader, Read, Write},
    net::TcpStream,
    os::unix::net::UnixStream,
    process::{Command, Stdio},
};

use nydus_store::fixtures::Fault;
use prometheus_parse::{Scrape, Value};

use crate::common::{BINARY, Guard, Lab, Sample, Serve, failure_with, free_port, output, wait_until};

/// Nothing is fetched before a reader asks for it.
const ON_DEMAND: &str = "[fetch]\nread_ahead = false\nprefetch = false\nlearn = false\n";

/// Sends a GET request and returns headers and body of the answer.
fn get(mut connection: impl Read + Write, path: &str) -> (String, String) {
    write!(connection, "GET {path} HTTP/1.0\r\n\r\n").unwrap();
    let mut answer = String::new();
    connection.read_to_string(&mut answer).unwrap();
    let (headers, body) = answer.split_once("\r\n\r\n").unwrap();
    (headers.to_owned(), body.to_owned())
}

/// The metrics of a daemon.
fn metrics_text(serve: &Serve) -> String {
    let connection = UnixStream::connect(serve.root().join("nydus-store.sock")).unwrap();
    let (headers, body) = get(connection, "/metrics");
    assert!(headers.starts_with("HTTP/1.0 200"), "{headers}");
    assert!(headers.contains("content-type: text/plain; version=0.0.4"), "{headers}");
    body
}

/// Parsed metrics.
struct Metrics(Scrape);

impl Metrics {
    fn of(serve: &Serve) -> Self {
        Self::parse(&metrics_text(serve))
    }

    /// Also checks what the parser would pass over: malformed lines, and samples without a type.
    fn parse(text: &str) -> Self {
        let scrape = Scrape::parse(text.lines().map(|line| Ok(line.to_owned()))).unwrap();
        let samples = scrape.samples.iter().map(|sample| match &sample.value {
            // The parser takes the buckets of a histogram for one sample.
            Value::Histogram(buckets) => buckets.len(),
            _ => 1,
        });
        let lines = text.lines().filter(|line| !line.starts_with('#'));
        assert_eq!(samples.sum::<usize>(), lines.count(), "{text}");
        for sample in &scrape.samples {
            let is_typed = !matches!(sample.value, Value::Untyped(_)) || is_part_of_histogram(&sample.metric);
            assert!(is_typed, "{} has no type", sample.metric);
        }
        Self(scrape)
    }

    /// The value of the sample with that name and these labels.
    fn get(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        let found = self.0.samples.iter().find(|sample| {
            sample.metric == name
                && labels
                    .iter()
                    .all(|(label, value)| sample.labels.get(label) == Some(value))
        });
        match found.unwrap_or_else(|| panic!("no {name} with {labels:?}")).value {
            Value::Counter(value) | Value::Gauge(value) | Value::Untyped(value) => value,
            ref other => panic!("{name}: {other:?}"),
        }
    }

    /// The sum of all samples with that name.
    fn sum(&self, name: &str) -> f64 {
        let samples = self.0.samples.iter().filter(|sample| sample.metric == name);
        let values = samples.map(|sample| match sample.value {
            Value::Counter(value) | Value::Gauge(value) | Value::Untyped(value) => value,
            _ => 0.0,
        });
        values.sum()
    }
}

const HISTOGRAM_SUFFIXES: [&str; 3] = ["_bucket", "_count", "_sum"];

fn is_part_of_histogram(sample: &str) -> bool {
    HISTOGRAM_SUFFIXES.iter().any(|suffix| sample.ends_with(suffix))
}

/// The name of the metric family of a sample.
fn family(sample: &str) -> &str {
    let stripped = HISTOGRAM_SUFFIXES.iter().find_map(|suffix| sample.strip_suffix(suffix));
    stripped.unwrap_or(sample)
}

fn status_command(serve: &Serve, args: &[&str]) -> Command {
    let mut command = Command::new(BINARY);
    command.arg("status").args(args).arg("--root").arg(serve.root());
    command
}

fn status(serve: &Serve) -> serde_json::Value {
    serde_json::from_str(&output(&mut status_command(serve, &["--json"]))).unwrap()
}

#[test]
fn metrics_count_what_readers_and_the_registry_did() {
    let lab = Lab::new(ON_DEMAND);
    let sample = Sample::new(1);
    let layer = lab.add(&sample, "image");
    assert!(layer.pull_publishes());
    let before = Metrics::of(&lab.serve);
    lab.registry.reset();
    sample.check(&layer);
    let after = Metrics::of(&lab.serve);
    let host = lab.registry.addr().to_string();
    let grown = |after: &Metrics, name, labels: &[(&str, &str)]| after.get(name, labels) - before.get(name, labels);

    let sent: u64 = lab.registry.stats().values().map(|blob| blob.bytes).sum();
    let received = grown(&after, "nydus_store_registry_received_bytes_total", &[("host", &host)]);
    assert!(received == sent as f64 && sent > 0, "received {received} of {sent}");
    let requests = grown(&after, "nydus_store_registry_requests_total", &[("host", &host)]);
    assert_eq!(requests, lab.registry.log().len() as f64);
    let answered = grown(
        &after,
        "nydus_store_registry_answers_total",
        &[("host", &host), ("status", "2xx")],
    );
    assert_eq!(answered, requests);
    assert_eq!(after.get("nydus_store_registry_circuit_open", &[("host", &host)]), 0.0);

    let files: usize = sample.names().iter().map(|name| sample.content(name).len()).sum();
    let read = after.get("nydus_store_fuse_read_bytes_total", &[]);
    assert!(read >= files as f64, "{read} of {files}");
    assert_eq!(after.sum("nydus_store_cache_read_bytes_total"), read);
    let missed = after.get("nydus_store_cache_chunk_reads_total", &[("result", "miss")]);
    assert!(missed > 0.0);
    let ok = [("operation", "read"), ("outcome", "ok")];
    let reads = after.get("nydus_store_fuse_requests_total", &ok);
    assert!(reads > 0.0);
    let of_reads = [("operation", "read")];
    assert_eq!(
        after.get("nydus_store_fuse_request_duration_seconds_count", &of_reads),
        reads
    );
    let waited = after.get("nydus_store_fuse_wait_duration_seconds_count", &of_reads);
    assert!(0.0 < waited && waited <= reads, "{waited} of {reads}");
    assert_eq!(
        after.get("nydus_store_announcements_total", &[("outcome", "published")]),
        1.0
    );
    assert_eq!(after.get("nydus_store_waits", &[("kind", "chunk")]), 0.0);
    assert!(after.get("nydus_store_cache_size_bytes", &[]) >= files as f64 / 2.0);
    assert!(after.get("process_resident_memory_bytes", &[]) > 1e6);
    assert!(after.get("process_open_fds", &[]) > 5.0);

    sample.drop_pages(&layer);
    sample.check(&layer);
    let again = Metrics::of(&lab.serve);
    let hits = again.get("nydus_store_cache_chunk_reads_total", &[("result", "hit")]);
    assert!(hits > after.get("nydus_store_cache_chunk_reads_total", &[("result", "hit")]));
    assert_eq!(
        again.get("nydus_store_cache_chunk_reads_total", &[("result", "miss")]),
        missed
    );
    assert_eq!(
        again.sum("nydus_store_registry_received_bytes_total"),
        after.sum("nydus_store_registry_received_bytes_total")
    );
}

#[test]
fn metrics_and_status_count_corrupt_bytes_and_failed_reads() {
    let lab = Lab::new(ON_DEMAND);
    let sample = Sample::new(1);
    let layer = lab.add(&sample, "image");
    assert!(layer.pull_publishes());
    lab.fault_on("image", sample.data_digest(), Fault::FlipByte(0));
    assert!(fs::read(layer.diff().join("one")).is_err());
    let metrics = Metrics::of(&lab.serve);
    assert!(metrics.get("nydus_store_registry_corrupt_answers_total", &[]) >= 2.0);
    let failed = metrics.get(
        "nydus_store_fuse_requests_total",
        &[("operation", "read"), ("outcome", "io_error")],
    );
    assert!(failed > 0.0);
    let errors = &status(&lab.serve)["errors"];
    assert_eq!(errors["failed_reads"].as_f64(), Some(failed));
    let table = output(&mut status_command(&lab.serve, &[]));
    assert!(
        table.contains("failed reads") && table.contains("corrupt answers"),
        "{table}"
    );
}

#[test]
fn status_shows_images_hosts_and_waits() {
    let lab = Lab::new(&format!(
        "{ON_DEMAND}[registry]\nread_timeout = 15\nretries = 0\ncircuit_failures = 1\ncircuit_pause = 3600\ncircuit_max_pause = 3600\n"
    ));
    let (sample, host) = (Sample::new(1), lab.registry.addr().to_string());
    let layer = lab.add(&sample, "image");
    sample.check(&layer);
    let idle = status(&lab.serve);
    let image = &idle["images"][0];
    assert_eq!(image["names"], serde_json::json!([lab.reference("image")]));
    assert_eq!(
        (&image["engine"], &image["digest"]),
        (&"fuse".into(), &sample.image.manifest_digest().to_string().into())
    );
    assert_eq!(image["loaded"]["cached_bytes"], image["loaded"]["total_bytes"]);
    assert_eq!(idle["layers"], serde_json::json!({"published": 2, "in_use": 0}));
    assert_eq!(idle["waits"]["oldest"], serde_json::json!([]));
    let served = idle["traffic"]["served_bytes"].as_u64().unwrap();
    assert!(
        served
            >= sample
                .names()
                .iter()
                .map(|name| sample.content(name).len() as u64)
                .sum()
    );
    let table = output(&mut status_command(&lab.serve, &[]));
    for text in [
        "up ",
        "1 published, 1 loaded",
        &lab.reference("image"),
        "FUSE",
        "100%",
        &host,
        "closed",
        "none",
    ] {
        assert!(table.contains(text), "{text} is not in:\n{table}");
    }

    // A registry that accepts requests and is silent: a reader waits, and then the circuit opens.
    let other = Sample::new(2);
    let stalled = lab.add(&other, "stalled");
    assert!(stalled.pull_publishes());
    lab.fault_on("stalled", other.data_digest(), Fault::Stall);
    let file = stalled.diff().join("hello");
    let reader = std::thread::spawn(move || fs::read(file).map_err(|error| error.raw_os_error()));
    let waits = |serve: &Serve| status(serve)["waits"]["oldest"][0]["what"].as_str().map(str::to_owned);
    let what = wait_until("a reader waits", || waits(&lab.serve));
    assert!(
        what.contains(&other.image.blob_ids[0]) && what.contains(&host),
        "{what}"
    );
    let table = output(&mut status_command(&lab.serve, &[]));
    assert!(table.contains("for chunks") && table.contains(&what), "{table}");
    let metrics = Metrics::of(&lab.serve);
    assert!(metrics.get("nydus_store_waits", &[("kind", "chunk")]) >= 1.0);
    assert!(metrics.get("nydus_store_longest_wait_seconds", &[("kind", "chunk")]) > 0.0);
    assert_eq!(reader.join().unwrap(), Err(Some(libc::EIO)));
    let after = status(&lab.serve);
    let known = after["hosts"].as_array().unwrap().iter();
    let registry = known.into_iter().find(|known| known["host"] == host.as_str()).unwrap();
    assert!(registry["circuit"]["open"].as_f64().unwrap() > 60.0, "{registry}");
    assert_eq!(registry["load"], serde_json::json!({"in_flight": 0, "waiting": 0}));
    assert_eq!(
        Metrics::of(&lab.serve).get("nydus_store_registry_circuit_open", &[("host", &host)]),
        1.0
    );
}

#[test]
fn status_without_a_daemon_fails() {
    let mut serve = Serve::prepare("");
    let error = failure_with(1, &mut status_command(&serve, &[]));
    assert!(error.contains("no daemon is running on"), "{error}");
    serve.launch();
    serve.stop();
    let error = failure_with(1, &mut status_command(&serve, &["--json", "--watch"]));
    assert!(error.contains("no daemon is running on"), "{error}");
}

#[test]
fn watched_status_outlives_the_daemon_and_ends_with_its_reader() {
    let mut serve = Serve::start();
    let mut command = status_command(&serve, &["--json", "--watch"]);
    let mut watch = Guard(command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap());
    let mut lines = BufReader::new(watch.0.stdout.take().unwrap()).lines();
    let uptime = |line: String| {
        let status: serde_json::Value = serde_json::from_str(&line).unwrap();
        status["uptime_seconds"].as_f64().unwrap()
    };
    let first = uptime(lines.next().unwrap().unwrap());
    let second = uptime(lines.next().unwrap().unwrap());
    assert!(first < second, "{first} {second}");
    serve.restart();
    wait_until("the next daemon is shown", || {
        (uptime(lines.next()?.unwrap()) < second).then_some(())
    });
    drop(lines);
    let status = watch.wait(std::time::Duration::from_secs(20)).expect("it ends");
    assert!(status.success(), "{status}");
}

#[test]
fn metrics_are_served_on_loopback_if_configured() {
    let port = free_port();
    let serve = Serve::with_config(&format!("[metrics]\nlisten = \"127.0.0.1:{port}\"\n"));
    let connect = || TcpStream::connect(("127.0.0.1", port)).unwrap();
    let (headers, body) = get(connect(), "/metrics");
    assert!(headers.starts_with("HTTP/1.0 200"), "{headers}");
    let version = [("version", env!("CARGO_PKG_VERSION"))];
    assert_eq!(Metrics::parse(&body).get("nydus_store_build_info", &version), 1.0);
    for path in ["/v1/status", "/v1/jobs", "/"] {
        let (headers, _) = get(connect(), path);
        assert!(headers.starts_with("HTTP/1.0 404"), "{path}: {headers}");
    }
    // Clients that say nothing take only as many connections as there may be, and only for a while.
    let silent: Vec<_> = (0..20).map(|_| connect()).collect();
    let (headers, _) = get(connect(), "/metrics");
    assert!(headers.starts_with("HTTP/1.0 200"), "{headers}");
    drop(silent);
    drop(serve);
    assert!(TcpStream::connect(("127.0.0.1", port)).is_err());
}

#[test]
fn taken_metrics_port_does_not_stop_the_daemon() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let serve = Serve::with_config(&format!("[metrics]\nlisten = \"{address}\"\n"));
    assert!(
        serve.log().contains("failed to listen for requests of metrics"),
        "{}",
        serve.log()
    );
}

/// Names of metrics in a text.
fn names_in(text: &str) -> BTreeSet<&str> {
    // Names with colons are those of recording rules.
    let words = text.split(|char: char| !(char.is_ascii_alphanumeric() || "_:".contains(char)));
    let is_metric = |word: &&str| word.starts_with("nydus_store_") || word.starts_with("process_");
    words.filter(is_metric).collect()
}

#[test]
fn documents_name_all_metrics_and_no_others() {
    let lab = Lab::new("");
    let sample = Sample::new(1);
    let layer = lab.add(&sample, "image");
    sample.check(&layer);
    let text = metrics_text(&lab.serve);
    let types = text
        .lines()
        .filter_map(|line| line.strip_prefix("# TYPE ")?.split_once(' '));
    let families: BTreeMap<&str, &str> = types.collect();
    let is_sample = |name: &str| match families.get(family(name)) {
        Some(&"histogram") => is_part_of_histogram(name),
        Some(_) => true,
        None => false,
    };
    let rules = names_in(include_str!("../../docs/nydus-store.rules.yml"));
    let unknown: Vec<_> = rules.into_iter().filter(|name| !is_sample(name)).collect();
    assert!(unknown.is_empty(), "docs/nydus-store.rules.yml: {unknown:?}");
    let page = names_in(include_str!("../../docs/operations.md"));
    let documented: BTreeSet<_> = page.iter().map(|name| family(name)).collect();
    let exposed: BTreeSet<_> = families.keys().copied().collect();
    assert_eq!(documented, exposed, "docs/operations.md");
}
