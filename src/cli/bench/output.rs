//! Prints, plots and compares a benchmark's report.

use std::{fs, path::PathBuf};

use anyhow::Context as _;
use clap::Args;

use super::super::print;
use crate::bench::{
    plot::plot,
    report::{BenchKind, BenchReport},
    table,
};

/// Output options of both benchmarks.
#[derive(Debug, Args)]
pub(super) struct OutputArgs {
    /// Print JSON (docs/benchmarks.md lists the keys)
    #[arg(long)]
    json: bool,

    /// Plot latency and throughput to an SVG file
    #[arg(long, value_name = "FILE.svg")]
    plot: Option<PathBuf>,

    /// Compare with an earlier run's --json output
    #[arg(long, value_name = "FILE.json")]
    compare: Option<PathBuf>,
}

/// Validated [`OutputArgs`]: the comparison is read and the plot's file is writable.
pub(super) struct ReportOutput<'a> {
    args: &'a OutputArgs,
    other: Option<(BenchReport, &'a PathBuf)>,
}

impl OutputArgs {
    /// Validates the options for a report of `kind` before the measurement.
    pub(super) fn open(&self, kind: BenchKind) -> anyhow::Result<ReportOutput<'_>> {
        let other = match &self.compare {
            Some(file) => Some((BenchReport::read(file, kind)?, file)),
            None => None,
        };
        if let Some(file) = &self.plot {
            // Fails before the measurement instead of after it.
            let opened = fs::OpenOptions::new().append(true).create(true).open(file);
            opened.with_context(|| format!("cannot write {}", file.display()))?;
        }
        Ok(ReportOutput { args: self, other })
    }
}

impl ReportOutput<'_> {
    /// Prints, compares and plots the report.
    pub(super) fn show(&self, report: &BenchReport) -> anyhow::Result<()> {
        let OutputArgs { json, plot: file, .. } = self.args;
        if *json {
            print(&format!("{}\n", serde_json::to_string(report)?))?;
        } else {
            print(&table::text(report))?;
        }
        let other = self.other.as_ref().map(|(other, _)| other);
        if let Some((other, file)) = &self.other {
            let text = table::comparison(report, other, file);
            match json {
                // Standard output holds JSON only.
                true => eprint!("{text}"),
                false => print(&text)?,
            }
            for difference in report.differences(other) {
                eprintln!("warning: different {difference}");
            }
        }
        if let Some(file) = file {
            fs::write(file, plot(report, other)).with_context(|| format!("cannot write {}", file.display()))?;
        }
        Ok(())
    }
}

/// Fails with the first cause if no operation succeeded.
pub(super) fn ensure_any_succeeded(report: &BenchReport) -> anyhow::Result<()> {
    if report.rows.iter().any(|row| row.operations > 0) {
        return Ok(());
    }
    match report.rows.iter().flat_map(|row| &row.failures).next() {
        Some(failure) => anyhow::bail!("nothing succeeded: {}", failure.first),
        None => anyhow::bail!("interrupted before the first measurement"),
    }
}
