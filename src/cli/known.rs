//! `nydus-store pull`, `images` and `rm`

use clap::Args;

use super::{ConfigArg, RootArg, job, print};
use crate::{
    humanize::size,
    image::reference::Reference,
    jobs::{Event, Job, KnownImage},
};

/// Make images known by name, without fetching their data
///
/// They show in `podman images`, and `podman run` takes them without asking a registry; their data comes when it is read.
#[derive(Debug, Args)]
pub struct Pull {
    /// The images
    #[arg(value_name = "REF", required = true)]
    references: Vec<Reference>,

    #[command(flatten)]
    common: Common,
}

/// List the images that are known by name
///
/// Those that were pulled by Podman or CRI-O are listed by these.
#[derive(Debug, Args)]
pub struct Images {
    /// Print JSON
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    common: Common,
}

/// Forget images by name
///
/// What is cached of them stays. An image of which there is a container is not forgotten.
#[derive(Debug, Args)]
pub struct Rm {
    /// The images
    #[arg(value_name = "REF", required = true)]
    references: Vec<Reference>,

    #[command(flatten)]
    common: Common,
}

#[derive(Debug, Args)]
struct Common {
    #[command(flatten)]
    root: RootArg,

    #[command(flatten)]
    config: ConfigArg,
}

impl Pull {
    pub fn run(&self) -> anyhow::Result<()> {
        let show = self
            .common
            .run(Job::Pull(texts(&self.references)), |event| match event {
                Event::Pulled(image) => print(&format!("{} {}\n", image.names.join(", "), image.digest)),
                _ => Ok(()),
            })?;
        show.outcome()
    }
}

impl Rm {
    pub fn run(&self) -> anyhow::Result<()> {
        let show = self
            .common
            .run(Job::Remove(texts(&self.references)), |event| match event {
                Event::Removed(name) => print(&format!("{name}\n")),
                _ => Ok(()),
            })?;
        show.outcome()
    }
}

impl Images {
    pub fn run(&self) -> anyhow::Result<()> {
        let show = self.common.run(Job::List, |_| Ok(()))?;
        if self.json {
            print(&format!("{}\n", serde_json::to_string_pretty(&show.known)?))?;
        } else {
            print(&table(&show.known))?;
        }
        show.outcome()
    }
}

fn texts(references: &[Reference]) -> Vec<String> {
    references.iter().map(ToString::to_string).collect()
}

impl Common {
    fn run(&self, job: Job, print: fn(&Event) -> anyhow::Result<()>) -> anyhow::Result<Show> {
        let mut show = Show {
            print,
            known: Vec::new(),
            failed: 0,
        };
        job::run(job, &self.root, &self.config, &mut show)?;
        Ok(show)
    }
}

struct Show {
    print: fn(&Event) -> anyhow::Result<()>,
    known: Vec<KnownImage>,
    failed: usize,
}

impl Show {
    fn outcome(&self) -> anyhow::Result<()> {
        anyhow::ensure!(self.failed == 0, "{} not done", self.failed);
        Ok(())
    }
}

impl job::Show for Show {
    fn show(&mut self, event: Event) {
        (self.print)(&event).ok();
        match event {
            Event::Known(image) => self.known.push(image),
            Event::Failed { what, why } => {
                self.failed += 1;
                eprintln!("{what}: {why}");
            }
            _ => {}
        }
    }

    fn clear(&mut self) {}
}

/// A line for each name.
fn table(images: &[KnownImage]) -> String {
    let mut rows = vec![["NAME", "DIGEST", "SIZE", "CACHED", "PINNED", "LAYERS IN USE"].map(str::to_owned)];
    for image in images {
        let (cached, all) = image.cached;
        // Rounded down: 100 % is all of it.
        let percent = if all == 0 {
            100
        } else {
            u128::from(cached) * 100 / u128::from(all)
        };
        let row = |name: &str| {
            [
                name.to_owned(),
                image.digest.to_string().chars().take(19).collect(),
                size(image.size),
                format!("{percent}%"),
                if image.pinned { "yes" } else { "no" }.to_owned(),
                format!("{} of {}", image.layers_in_use, image.layers),
            ]
        };
        match image.names.as_slice() {
            [] => rows.push(row("<none>")),
            names => rows.extend(names.iter().map(|name| row(name))),
        }
    }
    let width = |column: usize| {
        rows.iter()
            .map(|row| row[column].chars().count())
            .max()
            .unwrap_or_default()
    };
    let widths: [usize; 6] = std::array::from_fn(width);
    let line = |row: &[String; 6]| {
        let cells = row.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}"));
        format!("{}\n", cells.collect::<Vec<_>>().join("  ").trim_end())
    };
    rows.iter().map(line).collect()
}
