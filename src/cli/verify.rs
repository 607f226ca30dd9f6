//! `nydus-store verify`

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

/// Check every byte that is cached
#[derive(Debug, Args)]
pub struct Verify {
    /// Only these images
    #[arg(value_name = "REF")]
    references: Vec<Reference>,

    /// Drop what is corrupt, so that it is fetched again when it is read, or by `preseed`
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

/// What was found.
#[derive(Default, Serialize)]
struct Report {
    images: Vec<VerifiedImage>,
    /// Cached blobs of no known image.
    unknown: UnknownBlobs,
    /// What could not be checked.
    failures: Vec<Failure>,
}

#[derive(Serialize)]
struct Failure {
    what: String,
    why: String,
}

impl Verify {
    pub fn run(&self) -> anyhow::Result<()> {
        let root = &self.root.root;
        anyhow::ensure!(
            root.is_dir(),
            "{} is not there: name the daemon's directory with --root",
            root.display()
        );
        let references = self.references.iter().map(ToString::to_string).collect();
        let job = Job::Verify {
            references,
            repair: self.repair,
        };
        let mut show = Show {
            report: Report::default(),
            lines: !self.json,
            repair: self.repair,
        };
        job::run(job, &self.root, &self.config, &mut show)?;
        let report = show.report;
        if self.json {
            print(&format!("{}\n", serde_json::to_string_pretty(&report)?))?;
        } else if report.images.is_empty() && report.failures.is_empty() {
            print("no image is known on this host\n")?;
        }
        let corrupt = report.images.iter().filter(|image| image.stays).count();
        if corrupt > 0 && !self.repair {
            anyhow::bail!(
                "{corrupt} corrupt: `nydus-store verify --repair` drops what is, so that it is fetched again"
            );
        }
        anyhow::ensure!(corrupt == 0, "{corrupt} corrupt that could not be mended");
        anyhow::ensure!(report.failures.is_empty(), "not all could be checked");
        Ok(())
    }
}

struct Show {
    report: Report,
    lines: bool,
    repair: bool,
}

impl job::Show for Show {
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
                        "{} cached blobs of no known image, {}\n",
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
                self.report.failures.push(Failure { what, why });
            }
            _ => {}
        }
    }

    fn clear(&mut self) {}
}

impl Show {
    fn lines_of(&self, checked: &VerifiedImage) -> String {
        let condition = match checked.condition {
            Condition::Complete => "complete",
            Condition::Incomplete => "incomplete",
            Condition::Corrupt => "CORRUPT",
        };
        let chunks = &checked.chunks;
        let all = chunks.good_bytes + chunks.missing_bytes + chunks.corrupt_bytes;
        let superseded = if checked.superseded {
            ", an older image of that name"
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
