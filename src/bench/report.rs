//! [`BenchReport`]: the results of a benchmark, with its settings. The JSON format is stable; docs/benchmarks.md lists
//! its keys.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::sample::{Distribution, FailureCount, Samples, Throughput, TimedStep};
use crate::digest::Digest;

/// Version of the JSON format.
const FORMAT_VERSION: u32 = 1;
/// Maximum size of a report file, in bytes.
const MAX_REPORT_BYTES: u64 = 256 << 20;

/// The kind of a benchmark.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BenchKind {
    /// `bench fetch`: fetches chunks from a registry.
    Fetch,
    /// `bench read`: reads a directory.
    Read,
}

/// The results of one benchmark, with one row for each run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct BenchReport {
    /// Version of the format.
    pub nydus_store_bench: u32,
    /// Kind of the benchmark.
    pub kind: BenchKind,
    /// Version of the program.
    pub version: String,
    /// Start time (RFC 3339).
    pub time: String,
    /// The machine that measured.
    pub machine: Machine,
    /// The measured image or directory.
    pub subject: Subject,
    /// Settings. Reports with equal settings are comparable.
    pub settings: BTreeMap<String, Value>,
    /// Results of the runs.
    pub rows: Vec<Row>,
}

/// The machine that ran the benchmark.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine {
    /// Host name.
    pub name: String,
    /// Number of hardware threads.
    pub cores: usize,
    /// Kernel name and release.
    pub kernel: String,
}

/// The measured image or directory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Subject {
    /// Image name or directory, as on the command line.
    pub name: String,
    /// Digest of the image's manifest.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub image: Option<Digest>,
    /// Host and repository that served the chunks.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub from: Option<String>,
    /// File system type of the directory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub file_system: Option<String>,
}

/// The results of one run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// Name, unique in the report: `8 × chunk`, or the phase.
    pub name: String,
    /// Concurrent requests or readers.
    pub concurrency: usize,
    /// Request size.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub request_size: Option<String>,
    /// Time from the start to the end of the last operation.
    pub seconds: f64,
    /// Whether the run ended early.
    pub interrupted: bool,
    /// Successful requests, files or reads.
    pub operations: u64,
    /// Failed requests, files or reads.
    pub failed: u64,
    /// Failures by cause, the most frequent first.
    pub failures: Vec<FailureCount>,
    /// Bytes of successful operations; compressed bytes for `bench fetch`.
    pub bytes: u64,
    /// Decompressed and verified bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub plain_bytes: Option<u64>,
    /// HTTP requests, including retries, redirects and token requests.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub http_requests: Option<u64>,
    /// New connections.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub connections: Option<u64>,
    /// Times of operations and of their steps.
    pub latency: BTreeMap<TimedStep, Distribution>,
    /// Bytes over time.
    pub throughput: Throughput,
}

impl Row {
    /// A row of the samples of a run.
    pub fn new(name: String, concurrency: usize, interrupted: bool, samples: &Samples) -> Self {
        let failures = samples.failures();
        Self {
            name,
            concurrency,
            request_size: None,
            seconds: samples.elapsed.as_secs_f64(),
            interrupted,
            operations: samples.operations,
            failed: failures.iter().map(|failure| failure.count).sum(),
            failures,
            bytes: samples.bytes,
            plain_bytes: None,
            http_requests: None,
            connections: None,
            latency: samples.latency.clone(),
            throughput: samples.throughput.clone(),
        }
    }

    /// Times of whole operations.
    pub fn total(&self) -> Option<&Distribution> {
        self.latency.get(&TimedStep::Total)
    }

    /// `count` per second of the run; 0 if the run took no time.
    pub fn per_second(&self, count: u64) -> f64 {
        if self.seconds > 0.0 {
            count as f64 / self.seconds
        } else {
            0.0
        }
    }
}

/// A report file is unusable.
#[derive(Debug, thiserror::Error)]
pub enum ReportError {
    /// The file cannot be read.
    #[error("cannot read {file}: {source}")]
    Io {
        /// The file.
        file: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The file is not a report.
    #[error("{file} is not output of `nydus-store bench --json`: {reason}")]
    Malformed {
        /// The file.
        file: PathBuf,
        /// The cause.
        reason: String,
    },
    /// The report is of another kind of benchmark.
    #[error("cannot compare {file} of `bench {}` with `bench {}`", .theirs.name(), .ours.name())]
    OtherKind {
        /// The file.
        file: PathBuf,
        /// The file's kind.
        theirs: BenchKind,
        /// The expected kind.
        ours: BenchKind,
    },
}

impl BenchKind {
    /// Name of the subcommand.
    pub fn name(self) -> &'static str {
        match self {
            Self::Fetch => "fetch",
            Self::Read => "read",
        }
    }
}

impl BenchReport {
    /// A report without rows, for this program, machine and time.
    pub fn new(kind: BenchKind, subject: Subject, settings: BTreeMap<String, Value>) -> Self {
        Self {
            nydus_store_bench: FORMAT_VERSION,
            kind,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            time: jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string(),
            machine: Machine::this(),
            subject,
            settings,
            rows: Vec::new(),
        }
    }

    /// Reads a report of `kind` from a file.
    ///
    /// # Errors
    /// If the file cannot be read, or is not a report of that kind.
    pub fn read(file: &Path, kind: BenchKind) -> Result<Self, ReportError> {
        let io = |source| ReportError::Io {
            file: file.to_owned(),
            source,
        };
        let malformed = |reason: String| ReportError::Malformed {
            file: file.to_owned(),
            reason,
        };
        if fs::metadata(file).map_err(io)?.len() > MAX_REPORT_BYTES {
            return Err(malformed(format!("larger than {} MiB", MAX_REPORT_BYTES >> 20)));
        }
        let text = fs::read(file).map_err(io)?;
        let report: Self = serde_json::from_slice(&text).map_err(|error| malformed(error.to_string()))?;
        if report.nydus_store_bench != FORMAT_VERSION {
            let form = report.nydus_store_bench;
            return Err(malformed(format!("unknown format version {form}")));
        }
        if report.kind != kind {
            return Err(ReportError::OtherKind {
                file: file.to_owned(),
                theirs: report.kind,
                ours: kind,
            });
        }
        Ok(report)
    }

    /// Describes the differences in image, settings, machine and version that impair a comparison with `other`.
    pub fn differences(&self, other: &Self) -> Vec<String> {
        let mut differences = Vec::new();
        let mut compare = |what: &str, this: String, other: String| {
            if this != other {
                differences.push(format!("{what}: {this} here, {other} there"));
            }
        };
        let shown = |value: Option<&Value>| value.map_or_else(|| "none".to_owned(), ToString::to_string);
        if self.kind == BenchKind::Fetch {
            let image = |report: &Self| report.subject.image.map_or_else(String::new, |image| image.to_string());
            compare("image", image(self), image(other));
        }
        let keys: std::collections::BTreeSet<_> = self.settings.keys().chain(other.settings.keys()).collect();
        for key in keys {
            compare(key, shown(self.settings.get(key)), shown(other.settings.get(key)));
        }
        let machine = |report: &Self| format!("{} with {} cores", report.machine.name, report.machine.cores);
        compare("machine", machine(self), machine(other));
        compare("version", self.version.clone(), other.version.clone());
        differences
    }
}

impl Machine {
    fn this() -> Self {
        let uname = rustix::system::uname();
        let text = |part: &std::ffi::CStr| part.to_string_lossy().into_owned();
        Self {
            name: text(uname.nodename()),
            cores: std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
            kernel: format!("{} {}", text(uname.sysname()), text(uname.release())),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn report(kind: BenchKind) -> BenchReport {
        let subject = Subject {
            name: "registry.example/app:v1".to_owned(),
            image: Some(Digest::of(b"image")),
            from: None,
            file_system: None,
        };
        let settings = BTreeMap::from([("order".to_owned(), Value::from("seq"))]);
        let mut report = BenchReport::new(kind, subject, settings);
        let mut samples = Samples::start();
        samples.succeeded(1000, [(TimedStep::Total, Duration::from_millis(3))]);
        samples.failed("timeout", || "too late".to_owned());
        report.rows.push(Row::new("1 × chunk".to_owned(), 1, false, &samples));
        report
    }

    #[test]
    fn report_round_trips_through_json() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("a.json");
        let this = report(BenchKind::Fetch);
        fs::write(&file, serde_json::to_vec(&this).unwrap()).unwrap();
        let back = BenchReport::read(&file, BenchKind::Fetch).unwrap();
        assert_eq!(
            serde_json::to_value(&back).unwrap(),
            serde_json::to_value(&this).unwrap()
        );
        assert!(back.differences(&this).is_empty());
        let error = BenchReport::read(&file, BenchKind::Read).unwrap_err().to_string();
        assert!(error.contains("bench fetch") && error.contains("bench read"), "{error}");
        for text in ["", "{}", "[1]"] {
            fs::write(&file, text).unwrap();
            let error = BenchReport::read(&file, BenchKind::Fetch).unwrap_err().to_string();
            assert!(error.contains("a.json is not output of"), "{error}");
        }
    }

    #[test]
    fn differences_are_reported() {
        let (this, mut other) = (report(BenchKind::Fetch), report(BenchKind::Fetch));
        other.subject.image = Some(Digest::of(b"other"));
        other.settings.insert("order".to_owned(), Value::from("random"));
        other.settings.insert("seed".to_owned(), Value::from(3));
        other.machine.cores += 1;
        let differences = this.differences(&other);
        let told = |word: &str| differences.iter().any(|line| line.starts_with(word));
        assert!(
            differences.len() == 4 && ["image", "order", "seed", "machine"].iter().all(|word| told(word)),
            "{differences:?}"
        );
        assert!(differences.contains(&"order: \"seq\" here, \"random\" there".to_owned()));
    }
}
