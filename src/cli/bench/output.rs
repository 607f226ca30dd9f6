//! What becomes of a report.

use std::{fs, path::PathBuf};

use anyhow::Context as _;
use clap::Args;

use super::super::print;
use crate::bench::{
    plot::plot,
    report::{Kind, Report},
    table,
};

/// Options for what becomes of it.
#[derive(Debug, Args)]
pub(super) struct OutputArgs {
    /// Print JSON (docs/benchmarks.md lists the keys)
    #[arg(long)]
    json: bool,

    /// Draw latencies and throughput
    #[arg(long, value_name = "FILE.svg")]
    plot: Option<PathBuf>,

    /// Compare with what an earlier run has printed with --json
    #[arg(long, value_name = "FILE.json")]
    compare: Option<PathBuf>,
}

/// The same, with everything seen to that can fail before anything is measured.
pub(super) struct Output<'a> {
    args: &'a OutputArgs,
    other: Option<(Report, &'a PathBuf)>,
}

impl OutputArgs {
    /// Prepares for a report of that kind.
    pub(super) fn open(&self, kind: Kind) -> anyhow::Result<Output<'_>> {
        let other = match &self.compare {
            Some(file) => Some((Report::read(file, kind)?, file)),
            None => None,
        };
        if let Some(file) = &self.plot {
            // Nobody wants to learn afterwards that it cannot be written.
            let opened = fs::OpenOptions::new().append(true).create(true).open(file);
            opened.with_context(|| format!("cannot write {}", file.display()))?;
        }
        Ok(Output { args: self, other })
    }
}

impl Output<'_> {
    /// Prints and draws the report.
    pub(super) fn show(&self, report: &Report) -> anyhow::Result<()> {
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
                // Standard output is for the JSON alone.
                true => eprint!("{text}"),
                false => print(&text)?,
            }
            for difference in report.differences(other) {
                eprintln!("warning: not the same {difference}");
            }
        }
        if let Some(file) = file {
            fs::write(file, plot(report, other)).with_context(|| format!("cannot write {}", file.display()))?;
        }
        Ok(())
    }
}

/// Fails if nothing of what was tried has succeeded, with the first cause.
pub(super) fn ensure_some(report: &Report) -> anyhow::Result<()> {
    if report.rows.iter().any(|row| row.operations > 0) {
        return Ok(());
    }
    match report.rows.iter().flat_map(|row| &row.failures).next() {
        Some(failure) => anyhow::bail!("nothing succeeded: {}", failure.first),
        None => anyhow::bail!("interrupted before anything was measured"),
    }
}
