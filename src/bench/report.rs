//! What a benchmark gives: what was measured of what, with which settings. Written and read as JSON, whose keys stay;
//! docs/benchmarks.md lists them.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::sample::{Distribution, Failure, Phase, Samples, Throughput};
use crate::digest::Digest;

/// The version of the form.
const FORM: u32 = 1;
/// The longest file that is read, in bytes.
const MAX_FILE: u64 = 256 << 20;

/// What a benchmark measures.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Chunks fetched from a registry.
    Fetch,
    /// A directory read.
    Read,
}

/// One benchmark, with one row for each run of it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Version of this form.
    pub nydus_store_bench: u32,
    /// What was measured.
    pub kind: Kind,
    /// Version of the program.
    pub version: String,
    /// When, as RFC 3339 has it.
    pub time: String,
    /// On what.
    pub machine: Machine,
    /// Of what.
    pub subject: Subject,
    /// How. Two reports with the same settings can be compared.
    pub settings: BTreeMap<String, Value>,
    /// The runs.
    pub rows: Vec<Row>,
}

/// The machine that measures.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine {
    /// Its name.
    pub name: String,
    /// Threads that run at a time.
    pub cores: usize,
    /// System and version of its kernel.
    pub kernel: String,
}

/// What was read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Subject {
    /// The image's name or the directory, as it was given.
    pub name: String,
    /// Digest of the image's manifest.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub image: Option<Digest>,
    /// The host, and the repository there, that chunks were fetched from.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub from: Option<String>,
    /// Type of the directory's file system.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub file_system: Option<String>,
}

/// One run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// What tells it from others: `8 × chunk`, or the phase.
    pub name: String,
    /// Requests, or readers, at a time.
    pub concurrency: usize,
    /// How much was asked for at a time.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub request_size: Option<String>,
    /// From the start to the end of the last operation.
    pub seconds: f64,
    /// Whether the run was ended before its time.
    pub interrupted: bool,
    /// Requests, files or reads that succeeded.
    pub operations: u64,
    /// Those that failed.
    pub failed: u64,
    /// Why, the most frequent first.
    pub failures: Vec<Failure>,
    /// Bytes that came by those that succeeded: stored ones, where chunks were fetched.
    pub bytes: u64,
    /// Bytes of chunks in these, decompressed and verified.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub plain_bytes: Option<u64>,
    /// HTTP requests sent, with retries, redirects and tokens.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub http_requests: Option<u64>,
    /// Connections made.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub connections: Option<u64>,
    /// What operations and their parts took.
    pub latency: BTreeMap<Phase, Distribution>,
    /// Bytes over time.
    pub throughput: Throughput,
}

impl Row {
    /// A row of what was measured.
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

    /// What whole operations took.
    pub fn total(&self) -> Option<&Distribution> {
        self.latency.get(&Phase::Total)
    }

    /// So many of something in a second of the run; 0 if it took no time.
    pub fn per_second(&self, count: u64) -> f64 {
        if self.seconds > 0.0 {
            count as f64 / self.seconds
        } else {
            0.0
        }
    }
}

/// A report cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum ReportError {
    /// The file cannot be read.
    #[error("cannot read {file}: {source}")]
    Io {
        /// Which.
        file: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It is something else.
    #[error("{file} is not what `nydus-store bench --json` prints: {reason}")]
    Malformed {
        /// Which.
        file: PathBuf,
        /// Why.
        reason: String,
    },
    /// It is of another benchmark.
    #[error("{file} is of `bench {}`, which cannot be compared with `bench {}`", .theirs.name(), .ours.name())]
    OtherKind {
        /// Which.
        file: PathBuf,
        /// What it is of.
        theirs: Kind,
        /// What it is to be compared with.
        ours: Kind,
    },
}

impl Kind {
    /// The subcommand.
    pub fn name(self) -> &'static str {
        match self {
            Self::Fetch => "fetch",
            Self::Read => "read",
        }
    }
}

impl Report {
    /// A report without rows, of this program on this machine, now.
    pub fn new(kind: Kind, subject: Subject, settings: BTreeMap<String, Value>) -> Self {
        Self {
            nydus_store_bench: FORM,
            kind,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            time: jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string(),
            machine: Machine::this(),
            subject,
            settings,
            rows: Vec::new(),
        }
    }

    /// Reads a report of that kind from a file.
    ///
    /// # Errors
    /// If it cannot be read, or is another thing.
    pub fn read(file: &Path, kind: Kind) -> Result<Self, ReportError> {
        let io = |source| ReportError::Io {
            file: file.to_owned(),
            source,
        };
        let malformed = |reason: String| ReportError::Malformed {
            file: file.to_owned(),
            reason,
        };
        if fs::metadata(file).map_err(io)?.len() > MAX_FILE {
            return Err(malformed("it is too long".to_owned()));
        }
        let text = fs::read(file).map_err(io)?;
        let report: Self = serde_json::from_slice(&text).map_err(|error| malformed(error.to_string()))?;
        if report.nydus_store_bench != FORM {
            let form = report.nydus_store_bench;
            return Err(malformed(format!("it has form {form}, which is not known here")));
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

    /// What makes a comparison with `other` doubtful, in words.
    pub fn differences(&self, other: &Self) -> Vec<String> {
        let mut differences = Vec::new();
        let mut compare = |what: &str, this: String, other: String| {
            if this != other {
                differences.push(format!("{what}: {this} here, {other} there"));
            }
        };
        let shown = |value: Option<&Value>| value.map_or_else(|| "none".to_owned(), ToString::to_string);
        if self.kind == Kind::Fetch {
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

    fn report(kind: Kind) -> Report {
        let subject = Subject {
            name: "registry.example/app:v1".to_owned(),
            image: Some(Digest::of(b"image")),
            from: None,
            file_system: None,
        };
        let settings = BTreeMap::from([("order".to_owned(), Value::from("seq"))]);
        let mut report = Report::new(kind, subject, settings);
        let mut samples = Samples::start();
        samples.succeeded(1000, [(Phase::Total, Duration::from_millis(3))]);
        samples.failed("timeout", || "too late".to_owned());
        report.rows.push(Row::new("1 × chunk".to_owned(), 1, false, &samples));
        report
    }

    #[test]
    fn reports_survive_json() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("a.json");
        let this = report(Kind::Fetch);
        fs::write(&file, serde_json::to_vec(&this).unwrap()).unwrap();
        let back = Report::read(&file, Kind::Fetch).unwrap();
        assert_eq!(
            serde_json::to_value(&back).unwrap(),
            serde_json::to_value(&this).unwrap()
        );
        assert!(back.differences(&this).is_empty());
        let error = Report::read(&file, Kind::Read).unwrap_err().to_string();
        assert!(error.contains("bench fetch") && error.contains("bench read"), "{error}");
        for text in ["", "{}", "[1]"] {
            fs::write(&file, text).unwrap();
            let error = Report::read(&file, Kind::Fetch).unwrap_err().to_string();
            assert!(error.contains("a.json is not what"), "{error}");
        }
    }

    #[test]
    fn what_differs_is_told() {
        let (this, mut other) = (report(Kind::Fetch), report(Kind::Fetch));
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
