//! `nydus-store gc`: removes what nothing needs.

use std::time::Duration;

use clap::Args;

use super::{ConfigArg, RootArg, job, print};
use crate::{
    humanize::size,
    image::garbage::{Garbage, GarbageOptions},
    jobs::{Event, Job},
};

/// Remove data that no image and no container needs
///
/// Withdraws the layers of pulled images that Podman and CRI-O have removed. Then removes metadata, cached data and
/// start-up traces of all images that are neither registered nor in their storage. The daemon does the same after some
/// days. If the daemon runs, the daemon does the work.
#[derive(Debug, Args)]
pub struct GcCommand {
    /// Print what would be removed, and remove nothing
    #[arg(long)]
    dry_run: bool,

    /// Keep what was pulled or first read within so many minutes. With less than a pull takes, running pulls may fail
    #[arg(long, value_name = "MINUTES", default_value_t = 10)]
    min_age: u32,

    /// Print JSON
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    root: RootArg,

    #[command(flatten)]
    config: ConfigArg,
}

impl GcCommand {
    pub fn run(&self) -> anyhow::Result<()> {
        let root = &self.root.root;
        anyhow::ensure!(
            root.is_dir(),
            "{} does not exist: pass the daemon's root with --root",
            root.display()
        );
        let job = Job::Gc(GarbageOptions {
            min_age: Duration::from_secs(60 * u64::from(self.min_age)),
            dry_run: self.dry_run,
        });
        let mut output = GcOutput::default();
        job::run(job, &self.root, &self.config, &mut output)?;
        let garbage = match (output.garbage, output.failure) {
            (_, Some(why)) => anyhow::bail!("{why}"),
            (garbage, None) => garbage.unwrap_or_default(),
        };
        if self.json {
            return print(&format!("{}\n", serde_json::to_string_pretty(&garbage)?));
        }
        print(&self.text(&garbage))
    }

    fn text(&self, garbage: &Garbage) -> String {
        let mut text = String::new();
        for image in &garbage.images {
            text.push_str(&format!("{image}\n"));
        }
        let verb = if self.dry_run { "would free" } else { "freed" };
        text.push_str(&format!(
            "{verb} {}: {} images, {} blobs, {} traces, {} layers\n",
            size(garbage.bytes),
            garbage.images.len(),
            garbage.blobs,
            garbage.traces,
            garbage.layers
        ));
        text
    }
}

#[derive(Default)]
struct GcOutput {
    garbage: Option<Garbage>,
    failure: Option<String>,
}

impl job::JobOutput for GcOutput {
    fn show(&mut self, event: Event) {
        match event {
            Event::Collected(garbage) => self.garbage = Some(garbage),
            Event::Failed { why, .. } => self.failure = Some(why),
            _ => {}
        }
    }

    fn clear(&mut self) {}
}
