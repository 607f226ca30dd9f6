//! `nydus-store preseed`: downloads whole images into the cache.

use std::{
    io::IsTerminal as _,
    time::{Duration, Instant},
};

use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};

use super::{ConfigArg, RootArg, job, print};
use crate::{
    humanize::size,
    image::reference::Reference,
    jobs::{Event, Job, SeedItem, source::SeedSource},
};

/// Interval of progress lines when standard error is not a terminal.
const LINE_INTERVAL: Duration = Duration::from_secs(5);

/// Download whole images into the cache, so that they run without a network
///
/// Fetches, verifies and caches every chunk, then records the image's name. An interrupted preseed continues where it
/// stopped when it is run again. For a complete image, it re-verifies the cache and fetches nothing. If the daemon
/// runs, the daemon does the work.
#[derive(Debug, Args)]
pub struct PreseedCommand {
    /// docker://REF, oci:DIR[:NAME] or oci-archive:FILE[:NAME], as in skopeo
    #[arg(value_name = "SOURCE", required = true)]
    sources: Vec<SeedSource>,

    /// Name for Podman, instead of SOURCE's own; repeatable, with a single SOURCE
    #[arg(long = "as", value_name = "REF")]
    names: Vec<Reference>,

    #[command(flatten)]
    root: RootArg,

    #[command(flatten)]
    config: ConfigArg,
}

impl PreseedCommand {
    pub fn run(&self) -> anyhow::Result<()> {
        if self.sources.len() > 1 && !self.names.is_empty() {
            let message = "--as requires exactly one SOURCE";
            clap::Error::raw(clap::error::ErrorKind::ArgumentConflict, format!("{message}\n")).exit();
        }
        let names: Vec<_> = self.names.iter().map(ToString::to_string).collect();
        let item = |source: &SeedSource| SeedItem {
            source: source.clone(),
            names: names.clone(),
        };
        let job = Job::Preseed(self.sources.iter().map(item).collect());
        let mut show = PreseedOutput::new();
        job::run(job, &self.root, &self.config, &mut show)?;
        match show.failed {
            0 => Ok(()),
            failed => anyhow::bail!("{failed} of {} failed", self.sources.len()),
        }
    }
}

/// Shows a progress bar on a terminal, and a line every [`LINE_INTERVAL`] elsewhere.
struct PreseedOutput {
    bar: Option<ProgressBar>,
    last_line: Instant,
    what: String,
    failed: usize,
}

impl PreseedOutput {
    fn new() -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::new(0);
            let style = ProgressStyle::with_template(
                "{msg} {bar:30} {binary_bytes:>10} of {binary_total_bytes}, {binary_bytes_per_sec}, {eta} left",
            );
            bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
            bar
        });
        Self {
            bar,
            last_line: Instant::now(),
            what: String::new(),
            failed: 0,
        }
    }

    fn begin(&mut self, what: String) {
        match &self.bar {
            Some(bar) => {
                bar.reset();
                bar.set_length(0);
                bar.set_message(what.clone());
            }
            None => eprintln!("{what}"),
        }
        (self.what, self.last_line) = (what, Instant::now());
    }

    fn progress(&mut self, there: u64, total: u64, fetched: u64) {
        if let Some(bar) = &self.bar {
            bar.set_length(total);
            bar.set_position(there);
        } else if self.last_line.elapsed() >= LINE_INTERVAL {
            self.last_line = Instant::now();
            eprintln!("  {} of {} cached, {} fetched", size(there), size(total), size(fetched));
        }
    }

    /// Prints a line above the bar.
    fn line(&self, print: impl FnOnce()) {
        match &self.bar {
            Some(bar) => bar.suspend(print),
            None => print(),
        }
    }
}

impl job::JobOutput for PreseedOutput {
    fn show(&mut self, event: Event) {
        match event {
            Event::Begin(what) => self.begin(what),
            Event::Progress { there, total, fetched } => self.progress(there, total, fetched),
            Event::Seeded(seeded) => self.line(|| {
                let names = seeded.names.join(", ");
                let fetched = match seeded.fetched {
                    0 => "nothing to fetch".to_owned(),
                    fetched => format!("{} fetched", size(fetched)),
                };
                print(&format!("{names}: complete, {} ({fetched})\n", size(seeded.bytes))).ok();
            }),
            Event::Warning(warning) => self.line(|| eprintln!("warning: {warning}")),
            Event::Failed { what, why } => {
                self.failed += 1;
                self.line(|| eprintln!("{what}: {why}"));
            }
            _ => {}
        }
    }

    fn clear(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
