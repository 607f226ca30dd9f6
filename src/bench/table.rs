//! Formats reports as text tables.

use std::{path::Path, time::Duration};

use super::{
    report::{BenchKind, BenchReport, Row},
    sample::{Distribution, TimedStep},
};
use crate::humanize::{digits, megabytes, size, thousands, time};

/// Maximum characters of a failure's message.
const MAX_FAILURE_CHARS: usize = 300;

/// Formats the whole report.
pub fn text(report: &BenchReport) -> String {
    let mut text = heading(report);
    match report.kind {
        BenchKind::Fetch => text.push_str(&fetched(report)),
        BenchKind::Read => text.push_str(&read(report)),
    }
    for row in &report.rows {
        for failure in &row.failures {
            let first: String = failure.first.chars().take(MAX_FAILURE_CHARS).collect();
            text.push_str(&format!(
                "\n{}: {} failed ({}), first: {first}",
                row.name,
                thousands(failure.count),
                failure.cause
            ));
        }
    }
    if report.rows.iter().any(|row| !row.failures.is_empty()) {
        text.push('\n');
    }
    text
}

fn heading(report: &BenchReport) -> String {
    let subject = &report.subject;
    let mut text = subject.name.clone();
    if let Some(image) = &subject.image {
        text.push_str(&format!("\n  image     {image}"));
    }
    if let Some(from) = &subject.from {
        text.push_str(&format!("\n  from      {from}"));
    }
    if let Some(file_system) = &subject.file_system {
        text.push_str(&format!("\n  on        {file_system}"));
    }
    let machine = &report.machine;
    format!(
        "{text}\n  machine   {}, {} cores, {}\n\n",
        machine.name, machine.cores, machine.kernel
    )
}

fn fetched(report: &BenchReport) -> String {
    let mut text = format!(
        "{:<16}{:>9}{:>8}{:>12}{:>13}{:>9}{:>10}{:>12}\n",
        "RUN", "REQUESTS", "FAILED", "BYTES", "CONNECTIONS", "SECONDS", "MB/S", "PLAIN MB/S"
    );
    for row in &report.rows {
        text.push_str(&format!(
            "{:<16}{:>9}{:>8}{:>12}{:>13}{:>9}{:>10}{:>12}{}\n",
            row.name,
            thousands(row.operations),
            thousands(row.failed),
            size(row.bytes),
            row.connections.map(thousands).unwrap_or_default(),
            digits(row.seconds),
            megabytes(row.per_second(row.bytes)),
            megabytes(row.per_second(row.plain_bytes.unwrap_or(0))),
            ended(row)
        ));
    }
    for row in report.rows.iter().filter(|row| row.operations > 0) {
        text.push_str(&format!(
            "\n{:<16}{:>9}{:>11}{:>11}{:>11}{:>11}{:>11}\n",
            row.name, "COUNT", "MIN", "P50", "P90", "P99", "MAX"
        ));
        for phase in TimedStep::ALL {
            if let Some(took) = row.latency.get(&phase) {
                let count = thousands(took.count());
                text.push_str(&format!("  {:<14}{count:>9}{}\n", phase.name(), percentiles(took)));
            }
        }
    }
    text
}

fn read(report: &BenchReport) -> String {
    let mut text = format!(
        "{:<10}{:>8}{:>12}{:>8}{:>12}{:>9}{:>9}{:>12}{:>11}{:>11}{:>11}{:>11}{:>11}\n",
        "PHASE",
        "READERS",
        "OPERATIONS",
        "FAILED",
        "BYTES",
        "SECONDS",
        "MB/S",
        "PER SECOND",
        "MIN",
        "P50",
        "P90",
        "P99",
        "MAX"
    );
    for row in &report.rows {
        let rate = match row.bytes {
            0 => "-".to_owned(),
            bytes => megabytes(row.per_second(bytes)),
        };
        let none = Distribution::default();
        text.push_str(&format!(
            "{:<10}{:>8}{:>12}{:>8}{:>12}{:>9}{rate:>9}{:>12}{}{}\n",
            row.name,
            row.concurrency,
            thousands(row.operations),
            thousands(row.failed),
            size(row.bytes),
            digits(row.seconds),
            digits(row.per_second(row.operations)),
            percentiles(row.total().unwrap_or(&none)),
            ended(row)
        ));
    }
    text
}

fn percentiles(took: &Distribution) -> String {
    let [p50, p90, p99] = [50.0, 90.0, 99.0].map(|percent| time(took.percentile(percent)));
    format!(
        "{:>11}{p50:>11}{p90:>11}{p99:>11}{:>11}",
        time(took.min()),
        time(took.max())
    )
}

fn ended(row: &Row) -> &'static str {
    if row.interrupted { "  ended early" } else { "" }
}

/// A comparison of two rows of the same name. Arrays hold this report's value and the other's.
#[derive(Debug, Clone, PartialEq)]
pub struct RowComparison {
    /// The row's name.
    pub name: String,
    /// Median time of an operation.
    pub median: [Duration; 2],
    /// Bytes per second, or operations per second if `is_bytes` is false.
    pub rate: [f64; 2],
    /// Whether `rate` counts bytes.
    pub is_bytes: bool,
}

impl RowComparison {
    /// Ratio of this median to the other's.
    pub fn median_ratio(&self) -> f64 {
        ratio(self.median.map(|median| median.as_secs_f64()))
    }

    /// Ratio of this rate to the other's.
    pub fn rate_ratio(&self) -> f64 {
        ratio(self.rate)
    }
}

fn ratio([this, other]: [f64; 2]) -> f64 {
    // 0 / 0 counts as 1.
    if this == other { 1.0 } else { this / other }
}

/// Compares the rows that both reports have.
pub fn compare(this: &BenchReport, other: &BenchReport) -> Vec<RowComparison> {
    let beside = |row: &Row| {
        let there = other.rows.iter().find(|there| there.name == row.name)?;
        let is_bytes = row.bytes > 0 && there.bytes > 0;
        let median = |row: &Row| row.total().map_or(Duration::ZERO, |total| total.percentile(50.0));
        let rate = |row: &Row| row.per_second(if is_bytes { row.bytes } else { row.operations });
        Some(RowComparison {
            name: row.name.clone(),
            median: [median(row), median(there)],
            rate: [rate(row), rate(there)],
            is_bytes,
        })
    };
    this.rows.iter().filter_map(beside).collect()
}

/// Formats a comparison with `other`, which was read from `file`.
pub fn comparison(this: &BenchReport, other: &BenchReport, file: &Path) -> String {
    let mut text = format!("\nCompared with {} of {}:\n", file.display(), other.time);
    let rows = compare(this, other);
    if rows.is_empty() {
        text.push_str("  no common runs\n");
        return text;
    }
    text.push_str(&format!(
        "  {:<16}{:>11}{:>11}{:>8}{:>16}{:>16}{:>8}\n",
        "RUN", "P50 HERE", "THERE", "RATIO", "RATE HERE", "THERE", "RATIO"
    ));
    for row in &rows {
        let [here, there] = row.rate.map(|rate| match row.is_bytes {
            true => format!("{} MB/s", megabytes(rate)),
            false => format!("{} /s", digits(rate)),
        });
        text.push_str(&format!(
            "  {:<16}{:>11}{:>11}{:>8.2}{here:>16}{there:>16}{:>8.2}\n",
            row.name,
            time(row.median[0]),
            time(row.median[1]),
            row.median_ratio(),
            row.rate_ratio()
        ));
    }
    text
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::bench::{report::Subject, sample::Samples};

    fn report(kind: BenchKind, milliseconds: u64) -> BenchReport {
        let subject = Subject {
            name: "registry.example/app:v1".to_owned(),
            image: None,
            from: None,
            file_system: None,
        };
        let mut samples = Samples::start();
        for _ in 0..10 {
            samples.succeeded(1_000_000, [(TimedStep::Total, Duration::from_millis(milliseconds))]);
        }
        samples.failed("timeout", || "too late".to_owned());
        let mut report = BenchReport::new(kind, subject, BTreeMap::new());
        let mut row = Row::new("4 × chunk".to_owned(), 4, true, &samples);
        row.seconds = milliseconds as f64 / 100.0;
        report.rows.push(row);
        report
    }

    #[test]
    fn tables_show_rates_and_failures() {
        let text = text(&report(BenchKind::Fetch, 20));
        let row = text.lines().find(|line| line.starts_with("4 × chunk ")).unwrap();
        let words: Vec<_> = row.split_whitespace().collect();
        assert_eq!(words[3..5], ["10", "1"], "{text}");
        assert_eq!(words[8], "50.0", "10 MB in 0.2 s: {text}");
        assert!(row.ends_with("ended early") && text.contains("too late"), "{text}");
        assert!(text.contains("  total                10"), "{text}");
        assert!(super::text(&report(BenchKind::Read, 20)).contains("OPERATIONS"));
    }

    #[test]
    fn comparison_shows_ratios() {
        let (this, other) = (report(BenchKind::Fetch, 20), report(BenchKind::Fetch, 10));
        let rows = compare(&this, &other);
        assert!((rows[0].median_ratio() - 2.0).abs() < 0.05 && (rows[0].rate_ratio() - 0.5).abs() < 1e-9);
        let with_itself = comparison(&this, &this, Path::new("a.json"));
        assert_eq!(with_itself.matches("1.00").count(), 2, "{with_itself}");
        let mut renamed = other;
        renamed.rows[0].name = "8 × chunk".to_owned();
        assert!(comparison(&this, &renamed, Path::new("a.json")).contains("no common runs"));
    }
}
