//! `nydus-store pull`, `images`, `rm`, `pin` and `unpin`: image records of the store.

use clap::Args;

use super::{ConfigArg, RootArg, columns::columns, job, print};
use crate::{
    humanize::size,
    image::reference::Reference,
    jobs::{Event, Job, RegisteredImage},
};

/// Register images by name, without downloading their contents
///
/// The images appear in `podman images`, and `podman run` starts them without a pull. Contents are fetched when they
/// are read.
#[derive(Debug, Args)]
pub struct PullCommand {
    /// Images to register
    #[arg(value_name = "REF", required = true)]
    references: Vec<Reference>,

    #[command(flatten)]
    common: CommonArgs,
}

/// List the registered images
///
/// Podman and CRI-O list the images that they pulled themselves.
#[derive(Debug, Args)]
pub struct ImagesCommand {
    /// Print JSON
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    common: CommonArgs,
}

/// Unregister images
///
/// Cached data stays. An image that a container uses cannot be unregistered.
#[derive(Debug, Args)]
pub struct RmCommand {
    /// Images to unregister
    #[arg(value_name = "REF", required = true)]
    references: Vec<Reference>,

    #[command(flatten)]
    common: CommonArgs,
}

/// Keep all cached data of registered images, whatever the limit of the cache
///
/// Fetches nothing; `preseed` fetches all data and pins the image.
#[derive(Debug, Args)]
pub struct PinCommand {
    /// Images to pin
    #[arg(value_name = "REF", required = true)]
    references: Vec<Reference>,

    #[command(flatten)]
    common: CommonArgs,
}

/// Let the cache evict data of pinned images again
#[derive(Debug, Args)]
pub struct UnpinCommand {
    /// Images to unpin
    #[arg(value_name = "REF", required = true)]
    references: Vec<Reference>,

    #[command(flatten)]
    common: CommonArgs,
}

#[derive(Debug, Args)]
struct CommonArgs {
    #[command(flatten)]
    root: RootArg,

    #[command(flatten)]
    config: ConfigArg,
}

impl PullCommand {
    pub fn run(&self) -> anyhow::Result<()> {
        let show = self
            .common
            .run(Job::Pull(to_strings(&self.references)), |event| match event {
                Event::Pulled(image) => print(&format!("{} {}\n", image.names.join(", "), image.digest)),
                _ => Ok(()),
            })?;
        show.outcome()
    }
}

impl RmCommand {
    pub fn run(&self) -> anyhow::Result<()> {
        let job = Job::Remove {
            names: to_strings(&self.references),
            is_resumed: false,
        };
        let show = self.common.run(job, |event| match event {
            Event::Removed(name) => print(&format!("{name}\n")),
            _ => Ok(()),
        })?;
        show.outcome()
    }
}

impl PinCommand {
    pub fn run(&self) -> anyhow::Result<()> {
        set_pinned(&self.references, true, &self.common)
    }
}

impl UnpinCommand {
    pub fn run(&self) -> anyhow::Result<()> {
        set_pinned(&self.references, false, &self.common)
    }
}

fn set_pinned(references: &[Reference], is_pinned: bool, common: &CommonArgs) -> anyhow::Result<()> {
    let names = to_strings(references);
    let show = common.run(Job::Pin { names, is_pinned }, |event| match event {
        Event::Pinned(image) => print(&format!("{}\n", image.names.join(", "))),
        _ => Ok(()),
    })?;
    show.outcome()
}

impl ImagesCommand {
    pub fn run(&self) -> anyhow::Result<()> {
        let show = self.common.run(Job::List, |_| Ok(()))?;
        if self.json {
            print(&format!("{}\n", serde_json::to_string_pretty(&show.images)?))?;
        } else {
            print(&table(&show.images))?;
        }
        show.outcome()
    }
}

fn to_strings(references: &[Reference]) -> Vec<String> {
    references.iter().map(ToString::to_string).collect()
}

impl CommonArgs {
    fn run(&self, job: Job, print: fn(&Event) -> anyhow::Result<()>) -> anyhow::Result<RegisteredImagesOutput> {
        let mut show = RegisteredImagesOutput {
            print,
            images: Vec::new(),
            failed: 0,
        };
        job::run(job, &self.root, &self.config, &mut show)?;
        Ok(show)
    }
}

struct RegisteredImagesOutput {
    print: fn(&Event) -> anyhow::Result<()>,
    images: Vec<RegisteredImage>,
    failed: usize,
}

impl RegisteredImagesOutput {
    fn outcome(&self) -> anyhow::Result<()> {
        anyhow::ensure!(self.failed == 0, "{} failed", self.failed);
        Ok(())
    }
}

impl job::JobOutput for RegisteredImagesOutput {
    fn show(&mut self, event: Event) {
        (self.print)(&event).ok();
        match event {
            Event::Listed(image) => self.images.push(image),
            Event::Warning(warning) => eprintln!("warning: {warning}"),
            Event::Failed { what, why } => {
                self.failed += 1;
                eprintln!("{what}: {why}");
            }
            _ => {}
        }
    }

    fn clear(&mut self) {}
}

/// One row for each name.
fn table(images: &[RegisteredImage]) -> String {
    let mut rows = vec![["NAME", "DIGEST", "SIZE", "CACHED", "PINNED", "LAYERS IN USE"].map(str::to_owned)];
    for image in images {
        let (cached, all) = image.cached;
        // Rounds down, so that 100 % means complete.
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
    columns(&rows)
}
