//! `nydus-store bench`.

use std::{
    fs,
    path::Path,
    process::{Command, Output, Stdio},
    time::Duration,
};

use nydus_store::fixtures::{BuildOptions, EmbeddedRegistry, Fault, RequestInfo};
use rustix::process::Signal;
use serde_json::Value;

use crate::common::{BINARY, DockerRegistry, Guard, Sample, failure_with, output, text, wait_until};

mod read;

/// `nydus-store bench ARGS…`
fn bench(args: &[&str]) -> Command {
    let mut command = Command::new(BINARY);
    command.arg("bench").args(args);
    command
}

fn run(args: &[&str]) -> Output {
    bench(args).output().unwrap()
}

fn succeeds(args: &[&str]) -> String {
    output(&mut bench(args))
}

fn json(args: &[&str]) -> Value {
    serde_json::from_str(&succeeds(&[args, &["--json"]].concat())).unwrap()
}

/// Runs it, requires this exit status, and returns its standard error.
fn fails(status: i32, args: &[&str]) -> String {
    failure_with(status, &mut bench(args))
}

fn number(value: &Value) -> u64 {
    value.as_u64().unwrap_or_else(|| panic!("no number: {value}"))
}

/// Pushes the sample with skopeo and returns its reference.
fn push_with_skopeo(sample: &Sample, registry: &DockerRegistry) -> String {
    let layout = sample.dir().join("layout");
    sample.image.write_oci_layout(&layout, "1").unwrap();
    let name = registry.reference("app", "1");
    let from = format!("oci:{}:1", text(&layout));
    let to = format!("docker://{name}");
    output(Command::new("skopeo").args(["copy", "--quiet", "--dest-tls-verify=false", &from, &to]));
    name
}

/// Number of chunks and their uncompressed bytes, as reported by `inspect`.
fn inspect_chunks(name: &str) -> (u64, u64) {
    let text = output(Command::new(BINARY).args(["inspect", "--json", name]));
    let report: Value = serde_json::from_str(&text).unwrap();
    (number(&report["chunks"]), number(&report["chunk_bytes"]))
}

#[test]
fn fetch_report_matches_the_access_log() {
    let (registry, sample) = (DockerRegistry::start(), Sample::new(61));
    let name = push_with_skopeo(&sample, &registry);
    let (chunks, plain_bytes) = inspect_chunks(&name);
    let before = registry.accesses().len();
    let report = json(&["fetch", &name, "--concurrency", "1,4"]);
    let data = format!("/blobs/{}", sample.data_digest());
    let asked = registry.accesses();
    let asked: Vec<_> = asked
        .iter()
        .skip(before)
        .filter(|access| access.path.ends_with(&data))
        .collect();
    let rows = report["rows"].as_array().unwrap();
    let sum = |key: &str| rows.iter().map(|row| number(&row[key])).sum::<u64>();
    assert_eq!((rows.len(), sum("operations"), sum("failed")), (2, 2 * chunks, 0));
    assert_eq!(sum("operations"), asked.len() as u64);
    assert_eq!(sum("bytes"), asked.iter().map(|access| access.bytes).sum::<u64>());
    for row in rows {
        assert_eq!(row["plain_bytes"], plain_bytes);
        assert_eq!(
            row["throughput"]["bytes"]
                .as_array()
                .unwrap()
                .iter()
                .map(number)
                .sum::<u64>(),
            number(&row["bytes"])
        );
        assert!(
            number(&row["http_requests"]) >= chunks && number(&row["connections"]) >= 1,
            "{row}"
        );
        for phase in ["total", "first_byte", "transfer", "decompress", "verify"] {
            let latency = &row["latency"][phase];
            assert_eq!(latency["count"], chunks, "{phase}");
            let order = ["min", "p50", "p90", "p99", "max"].map(|key| number(&latency[key]));
            assert!(order.is_sorted(), "{phase}: {order:?}");
        }
        assert!(number(&row["latency"]["connect"]["count"]) >= 1);
        assert!(
            row["latency"].get("write").is_none(),
            "nothing was written to the cache"
        );
    }
    assert_eq!(
        (&rows[0]["name"], &rows[1]["name"]),
        (&"1 × chunk".into(), &"4 × chunk".into())
    );
    assert_eq!(report["subject"]["image"], sample.image.manifest_digest().to_string());
    assert_eq!(report["subject"]["from"], format!("{}/app", registry.host()));
    assert_eq!(
        (&report["kind"], &report["nydus_store_bench"]),
        (&"fetch".into(), &1.into())
    );
    assert_eq!(
        (&report["settings"]["order"], &report["settings"]["fill"]),
        (&"seq".into(), &false.into())
    );
    for key in ["version", "time", "machine"] {
        assert!(report.get(key).is_some(), "{key}");
    }

    // Larger requests are fewer and fetch the same bytes.
    let large = json(&["fetch", &name, "--request-size", "4M"]);
    let row = &large["rows"][0];
    assert_eq!(
        (&row["request_size"], &row["plain_bytes"]),
        (&"4M".into(), &plain_bytes.into())
    );
    assert!(number(&row["operations"]) < chunks, "{row}");

    let table = succeeds(&["fetch", &name]);
    for word in [
        "8 × chunk",
        "MB/S",
        "first byte",
        "decompress",
        "P99",
        &sample.image.manifest_digest().to_string(),
    ] {
        assert!(table.contains(word), "{word}: {table}");
    }
}

#[test]
fn fill_keeps_fetched_chunks() {
    let (registry, dir) = (EmbeddedRegistry::start().unwrap(), tempfile::tempdir().unwrap());
    let batch = BuildOptions {
        batch_size: 0x8000,
        ..Sample::options()
    };
    let files = [("a", 5000), ("b", 7000), ("c", 300_000), ("d", 100)];
    for (name, options) in [("chunk", Sample::options()), ("batch", batch)] {
        let sample = Sample::of(&files, 62, &options);
        registry.add_image(&sample.image, name, "1").unwrap();
        let (reference, root) = (registry.reference(name, "1"), dir.path().join(name));
        let kept = ["--fill", "--root", text(&root)];
        let report = json(&[&["fetch", &reference, "--request-size", "64K"][..], &kept].concat());
        let row = &report["rows"][0];
        assert_eq!(row["latency"]["write"]["count"], row["operations"], "{name}");
        let verified = output(Command::new(BINARY).args(["verify", "--root", text(&root)]));
        assert!(verified.contains(": complete"), "{name}: {verified}");
        fails(2, &[&["fetch", &reference, "--concurrency", "1,2"][..], &kept].concat());
    }
}

#[test]
fn chunks_are_fetched_in_the_given_order() {
    let (registry, sample) = (EmbeddedRegistry::start().unwrap(), Sample::new(63));
    registry.add_image(&sample.image, "app", "1").unwrap();
    let name = registry.reference("app", "1");
    let data = sample.data_digest();
    let asked = |args: &[&str]| {
        registry.reset();
        succeeds(&[&["fetch", &name, "--concurrency", "1"], args].concat());
        let log = registry.log().into_iter();
        log.filter(|request| request.digest == Some(data))
            .map(|request| request.range.unwrap())
            .collect::<Vec<_>>()
    };
    let in_order = asked(&[]);
    let first_byte = |range: &String| {
        range["bytes=".len()..]
            .split('-')
            .next()
            .unwrap()
            .parse::<u64>()
            .unwrap()
    };
    assert!(in_order.iter().is_sorted_by_key(first_byte) && in_order.len() > 15);
    let random = asked(&["--order", "random", "--seed", "5"]);
    assert_eq!(random, asked(&["--order", "random", "--seed", "5"]));
    assert!(random != in_order && random != asked(&["--order", "random", "--seed", "6"]));

    let trace = sample.dir().join("trace");
    let line = |chunk: u32| format!("{{\"blob\":\"{}\",\"chunks\":[{chunk},{chunk}]}}\n", data.hex());
    let header = format!(
        "{{\"nydus-store-trace\":1,\"image\":\"{}\"}}\n",
        sample.image.manifest_digest()
    );
    fs::write(
        &trace,
        [header.clone(), line(3), line(0), line(3), line(999_999)].concat(),
    )
    .unwrap();
    let order = format!("trace:{}", text(&trace));
    assert_eq!(asked(&["--order", &order]), [in_order[3].clone(), in_order[0].clone()]);
    let foreign = format!("{header}{{\"blob\":\"{}\",\"chunks\":[0]}}\n", "cd".repeat(32));
    fs::write(&trace, foreign).unwrap();
    assert!(fails(1, &["fetch", &name, "--order", &order]).contains("the trace has no chunk of this image"));
    assert!(fails(1, &["fetch", &name, "--order", "trace:/nowhere"]).contains("/nowhere"));
    fails(2, &["fetch", &name, "--order", "backwards"]);

    // `--bytes` repeats the image until the total is reached.
    let bytes = in_order.len() as u64 * 2 * (64 << 10);
    let report = json(&["fetch", &name, "--bytes", &bytes.to_string()]);
    assert!(number(&report["rows"][0]["bytes"]) >= bytes, "{report}");
}

#[test]
fn chunks_are_fetched_from_the_given_registry() {
    let (own, mirror) = (EmbeddedRegistry::start().unwrap(), EmbeddedRegistry::start().unwrap());
    let sample = Sample::new(64);
    own.add_image(&sample.image, "app", "1").unwrap();
    mirror.add_image(&sample.image, "cache/app", "1").unwrap();
    let (name, from) = (own.reference("app", "1"), format!("{}/cache", mirror.addr()));
    let report = json(&["fetch", &name, "--from", &from]);
    assert_eq!(report["subject"]["from"], format!("{from}/app"));
    assert_eq!(own.blob_stats(sample.data_digest()).requests, 0);
    assert_eq!(
        number(&report["rows"][0]["operations"]),
        mirror.blob_stats(sample.data_digest()).requests
    );
}

#[test]
fn failures_are_counted_by_cause() {
    let (registry, sample) = (EmbeddedRegistry::start().unwrap(), Sample::new(65));
    registry.add_image(&sample.image, "app", "1").unwrap();
    let (name, data) = (registry.reference("app", "1"), sample.data_digest());
    let is_data = move |request: &RequestInfo| request.digest == Some(data);
    // Every third response is corrupt.
    registry.set_fault(Some(std::sync::Arc::new(move |request| match request.number % 3 {
        0 if is_data(request) => Fault::FlipByte(40),
        _ => Fault::None,
    })));
    let report = json(&["fetch", &name]);
    let row = &report["rows"][0];
    let failures = row["failures"].as_array().unwrap();
    assert!(number(&row["failed"]) > 3 && number(&row["operations"]) > 3, "{row}");
    assert_eq!(
        failures.iter().map(|failure| number(&failure["count"])).sum::<u64>(),
        number(&row["failed"])
    );
    assert!(
        failures
            .iter()
            .all(|failure| ["wrong digest", "damaged"].contains(&failure["cause"].as_str().unwrap()))
    );

    // Every request fails.
    registry.set_fault(Some(std::sync::Arc::new(move |request| match is_data(request) {
        true => Fault::Status(403),
        false => Fault::None,
    })));
    registry.reset();
    let message = fails(1, &["fetch", &name, "--duration", "60"]);
    assert!(
        message.contains("nothing succeeded") && message.contains("denies access"),
        "{message}"
    );
    let requests = registry.log().iter().filter(|request| is_data(request)).count();
    assert!((1..=120).contains(&requests), "requests are not bounded: {requests}");

    let missing = registry.reference("none", "1");
    let message = fails(1, &["fetch", &missing]);
    assert!(
        message.contains("cannot use") && message.contains("does not exist"),
        "{message}"
    );
    fails(2, &["fetch", &name, "--concurrency", "0"]);
    fails(2, &["fetch", &name, "--request-size", "1"]);
}

#[test]
fn interrupted_bench_reports_partial_results() {
    let (registry, sample) = (EmbeddedRegistry::start().unwrap(), Sample::new(66));
    registry.add_image(&sample.image, "app", "1").unwrap();
    let (name, data) = (registry.reference("app", "1"), sample.data_digest());
    registry.set_fault(Some(std::sync::Arc::new(move |request| {
        match request.digest == Some(data) && request.number > 12 {
            true => Fault::Stall,
            false => Fault::None,
        }
    })));
    let file = sample.dir().join("out");
    let mut command = bench(&["fetch", &name, "--duration", "100", "--concurrency", "2,3", "--json"]);
    let mut process = Guard(
        command
            .stdout(fs::File::create(&file).unwrap())
            .stderr(Stdio::null())
            .spawn()
            .unwrap(),
    );
    wait_until("it stalls", || (registry.request_count() > 13).then_some(()));
    process.signal(Signal::INT);
    let status = process.wait(Duration::from_secs(20)).expect("it ends at once");
    assert!(status.success(), "{status}");
    let report: Value = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
    let rows = report["rows"].as_array().unwrap();
    assert_eq!((rows.len(), &rows[0]["interrupted"]), (1, &true.into()));
    assert!(number(&rows[0]["operations"]) > 0);
}

/// All texts of an SVG figure. Panics if it is malformed.
fn figure_texts(file: &Path) -> Vec<String> {
    let svg = fs::read_to_string(file).unwrap();
    let document = roxmltree::Document::parse(&svg).unwrap();
    assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
    let texts = document.descendants().filter(|node| node.has_tag_name("text"));
    texts.map(|node| node.text().unwrap_or_default().to_owned()).collect()
}

#[test]
fn plot_and_comparison_show_both_runs() {
    let (registry, sample) = (EmbeddedRegistry::start().unwrap(), Sample::new(67));
    registry.add_image(&sample.image, "app", "1").unwrap();
    let name = registry.reference("app", "1");
    let (figure, first) = (sample.dir().join("a.svg"), sample.dir().join("a.json"));
    let plot = ["--plot", text(&figure)];
    let printed = succeeds(&[&["fetch", &name, "--concurrency", "1,3", "--json"][..], &plot].concat());
    fs::write(&first, printed).unwrap();
    let has = |word: &str| figure_texts(&figure).iter().any(|text| text.contains(word));
    for word in [
        "Fetching chunks from",
        "Time per request",
        "median",
        "99 %",
        "first byte",
        "Throughput",
        "MB/s",
        "3 × chunk",
    ] {
        assert!(has(word), "{word}");
    }
    assert!(!has("compared"));

    let compared = ["--compare", text(&first)];
    let output = run(&[
        &["fetch", &name, "--concurrency", "1", "--order", "random"][..],
        &compared,
        &plot,
    ]
    .concat());
    let (table, warnings) = (
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
    assert!(output.status.success() && table.contains("RATIO"), "{table}{warnings}");
    assert!(warnings.contains("order: \"random\" here, \"seq\" there"), "{warnings}");
    assert!(has("compared") && has("Dashed"));

    fs::write(&first, "{}").unwrap();
    let message = fails(1, &[&["fetch", &name][..], &compared].concat());
    assert!(message.contains("a.json is not output of"), "{message}");
    let message = fails(1, &["fetch", &name, "--plot", "/nowhere/a.svg"]);
    assert!(message.contains("cannot write /nowhere/a.svg"), "{message}");
}
