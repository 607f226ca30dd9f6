//! `nydus-store verify`: checks the digest of every cached chunk.

use clap::Args;
use serde::Serialize;

use super::{ConfigArg, RootArg, job, print};
use crate::{
    humanize::size,
    image::{
        reference::Reference,
        verify::{Condition, UnknownBlobs, VerifiedImage},
    },
    jobs::{Event, Job},
};

/// Verify the digest of every cached chunk
///
/// Reports each image as complete (runs without a network), incomplete (missing chunks are fetched when they are read)
/// or corrupt. Exit status: 1 if corrupt data remains or a REF is unknown. If the daemon runs, the daemon does the
/// work.
#[derive(Debug, Args)]
pub struct VerifyCommand {
    /// Images to verify [default: all images in the root]
    #[arg(value_name = "REF")]
    references: Vec<Reference>,

    /// Drop corrupt data, so that a read or `preseed` fetches it again
    #[arg(long)]
    repair: bool,

    /// Print JSON
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    root: RootArg,

    #[command(flatten)]
    config: ConfigArg,
}

/// The JSON document of `--json`.
#[derive(Default, Serialize)]
struct VerifyReport {
    images: Vec<VerifiedImage>,
    /// Cached blobs that belong to no image in the root.
    unknown: UnknownBlobs,
    /// Images that could not be checked.
    failures: Vec<VerifyFailure>,
}

#[derive(Serialize)]
struct VerifyFailure {
    what: String,
    why: String,
}

impl VerifyCommand {
    pub fn run(&self) -> anyhow::Result<()> {
        let root = &self.root.root;
        anyhow::ensure!(
            root.is_dir(),
            "{} does not exist: pass the daemon's root with --root",
            root.display()
        );
        let references = self.references.iter().map(ToString::to_string).collect();
        let job = Job::Verify {
            references,
            repair: self.repair,
        };
        let mut show = VerifyOutput {
            report: VerifyReport::default(),
            lines: !self.json,
            repair: self.repair,
        };
        job::run(job, &self.root, &self.config, &mut show)?;
        let report = show.report;
        if self.json {
            print(&format!("{}\n", serde_json::to_string_pretty(&report)?))?;
        } else if report.images.is_empty() && report.failures.is_empty() {
            print("no images in the root\n")?;
        }
        let corrupt = report.images.iter().filter(|image| image.stays).count();
        if corrupt > 0 && !self.repair {
            anyhow::bail!(
                "{corrupt} corrupt: run `nydus-store verify --repair` to drop corrupt data, which is then fetched again"
            );
        }
        anyhow::ensure!(corrupt == 0, "{corrupt} corrupt that could not be repaired");
        anyhow::ensure!(
            report.failures.is_empty(),
            "{} could not be checked",
            report.failures.len()
        );
        Ok(())
    }
}

struct VerifyOutput {
    report: VerifyReport,
    lines: bool,
    repair: bool,
}

impl job::JobOutput for VerifyOutput {
    fn show(&mut self, event: Event) {
        match event {
            Event::Checked(checked) => {
                if self.lines {
                    print(&self.lines_of(&checked)).ok();
                }
                self.report.images.push(checked);
            }
            Event::Unknown(unknown) => {
                if self.lines && unknown.blobs > 0 {
                    print(&format!(
                        "{} cached blobs belong to no image in the root, {}\n",
                        unknown.blobs,
                        size(unknown.bytes)
                    ))
                    .ok();
                }
                self.report.unknown = unknown;
            }
            Event::Failed { what, why } => {
                if self.lines {
                    eprintln!("{what}: {why}");
                }
                self.report.failures.push(VerifyFailure { what, why });
            }
            _ => {}
        }
    }

    fn clear(&mut self) {}
}

impl VerifyOutput {
    fn lines_of(&self, checked: &VerifiedImage) -> String {
        let condition = match checked.condition {
            Condition::Complete => "complete",
            Condition::Incomplete => "incomplete",
            Condition::Corrupt => "CORRUPT",
        };
        let chunks = &checked.chunks;
        let all = chunks.good_bytes + chunks.missing_bytes + chunks.corrupt_bytes;
        let superseded = if checked.superseded {
            ", superseded by a newer image of that name"
        } else {
            ""
        };
        let mut text = format!(
            "{}: {condition}, {} of {} cached{superseded}\n",
            checked.reference,
            size(chunks.good_bytes),
            size(all)
        );
        let dropped = if self.repair { ", dropped" } else { "" };
        if chunks.corrupt > 0 {
            text.push_str(&format!(
                "  {} chunks are corrupt ({}){dropped}\n",
                chunks.corrupt,
                size(chunks.corrupt_bytes)
            ));
        }
        for problem in &checked.problems {
            text.push_str(&format!("  {problem}\n"));
        }
        text
    }
}
