//! The steps of the tour.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use tokio::runtime::Runtime;

use super::{
    console::{Console, percent, plural, time},
    image::{GREETING_PATH, MadeImage, PROGRAM_PATH},
    meter::{Meter, Traffic},
    podman::HostPodman,
    reading::{FileListing, PlannedRead},
    sandbox,
};
use crate::{
    config::Config,
    daemon::Daemon,
    fixtures::{BuiltImage, EmbeddedRegistry},
    fuse::mountpoint,
    handover::Inherited,
    humanize::size,
    image::reference::Reference,
    store::layer_index::PublishedLayer,
};

/// Numbers for the closing paragraph.
pub struct TourSummary {
    /// Number of files in the image, and their bytes.
    files: (usize, u64),
    /// Number of reads, and their bytes.
    read: (usize, u64),
    fetched: Traffic,
    /// Bytes of a full pull.
    image_bytes: u64,
    /// Whether a container ran.
    container: bool,
}

/// What the steps after the announcement use.
struct TourContext<'a> {
    /// The daemon's root.
    root: &'a Path,
    /// The mounted root directory of the image.
    files: &'a Path,
    registry: &'a EmbeddedRegistry,
    reference: &'a str,
    made: &'a MadeImage,
    meter: Meter<'a>,
}

/// The steps, and what they share.
pub struct Tour<'a> {
    pub console: Console,
    /// The tour's temporary directory.
    pub dir: PathBuf,
    pub runtime: &'a Runtime,
    /// Podman, with `--podman`.
    pub podman: Option<HostPodman>,
}

impl Tour<'_> {
    /// Runs all steps. The daemon and the registry are stopped when this returns.
    pub fn run(&mut self) -> anyhow::Result<TourSummary> {
        self.introduction()?;
        let made = self.make_image()?;
        let (registry, reference) = self.serve_image(&made.built)?;
        let daemon = self.start_store()?;
        let meter = Meter::new(&registry, &made.built);
        let layer = self.announce(&daemon, &reference, &meter)?;
        let context = TourContext {
            root: &self.root(),
            files: &daemon.layout().overlay().join(&layer.id).join("diff"),
            meter,
            registry: &registry,
            reference: &reference,
            made: &made,
        };
        let summary = sandbox::without_fuse_descriptors(|| self.visit(&context))?;
        self.stop_store(daemon)?;
        Ok(summary)
    }

    fn root(&self) -> PathBuf {
        self.dir.join("root")
    }

    /// Runs the steps that read the mounted image.
    fn visit(&mut self, context: &TourContext<'_>) -> anyhow::Result<TourSummary> {
        let listing = self.list(context.files, context)?;
        let reads = self.read(context.files, &listing, context)?;
        self.read_again(context.files, &reads, &context.meter)?;
        let container = self.container(context)?;
        Ok(TourSummary {
            files: (listing.files.len(), listing.bytes()),
            read: (reads.len(), reads.iter().map(PlannedRead::bytes).sum()),
            fetched: context.meter.total_when_idle(),
            image_bytes: context.meter.image_bytes(),
            container,
        })
    }

    fn introduction(&mut self) -> anyhow::Result<()> {
        self.console.text(
            "A container engine usually downloads and unpacks a whole image before it starts a container, which then \
             reads a small part of the image. nydus-store presents the image's files to Podman and CRI-O at once. It \
             fetches data from the registry when a container reads it.",
        )?;
        self.console.text(&format!(
            "This tour needs no network. It keeps all its files in {} and deletes them at the end.",
            self.dir.display()
        ))
    }

    fn make_image(&mut self) -> anyhow::Result<MadeImage> {
        self.console.step(
            "Build an image",
            "A Nydus image stores each layer's files as compressed chunks in a data blob. One bootstrap lists all \
             files and the chunks that each file consists of.",
        )?;
        let made = MadeImage::make(&self.dir).context("cannot build the image")?;
        let widths = [8, 14, 16];
        self.console.row("", widths, ["files", "content", "in the registry"])?;
        for (layer, blob) in made.layers.iter().zip(&made.built.blobs) {
            let columns = [&layer.files.to_string(), &size(layer.bytes), &size(blob.size)];
            let columns = columns.map(String::as_str);
            self.console.row(&format!("layer {:?}", layer.name), widths, columns)?;
        }
        let bootstrap = made.built.bootstrap_blob()?.size;
        self.console.row("bootstrap", widths, ["", "", &size(bootstrap)])?;
        self.console.gap()?;
        Ok(made)
    }

    fn serve_image(&mut self, image: &BuiltImage) -> anyhow::Result<(EmbeddedRegistry, String)> {
        self.console.step(
            "Start a registry",
            "A registry inside this process serves the image over HTTP and counts the requests.",
        )?;
        let registry = EmbeddedRegistry::start()?;
        registry.add_image(image, "demo/app", "1")?;
        let reference = registry.reference("demo/app", "1");
        self.console.fact("image", &reference)?;
        self.console.gap()?;
        Ok((registry, reference))
    }

    fn start_store(&mut self) -> anyhow::Result<Daemon> {
        self.console.step(
            "Start the store",
            "Podman and CRI-O use the library containers/storage. For that library, nydus-store is an additional image \
             store: a directory with records of layers, and a FUSE mount with the layers' files. On a real host, \
             `nydus-store serve` runs the store.",
        )?;
        let mut config = Config::default();
        // The tour must not read the user's credentials.
        config.registry.auth_files = Some(Vec::new());
        let daemon = Daemon::start(&self.root(), &config, Inherited::default(), self.runtime.handle())?;
        let layout = daemon.layout();
        self.console.fact("store", &layout.store().display().to_string())?;
        self.console
            .fact("mounted on", &layout.overlay().display().to_string())?;
        self.console.gap()?;
        Ok(daemon)
    }

    fn announce(&mut self, daemon: &Daemon, reference: &str, meter: &Meter<'_>) -> anyhow::Result<Arc<PublishedLayer>> {
        self.console.step(
            "Announce the pull",
            "Before Podman downloads layers, it runs `nydus-store auth-helper`, which announces the pull to the store. \
             The store fetches and verifies the bootstrap, and publishes the image's layers. Podman then finds all \
             layers in the store and downloads none. Here, the tour announces the pull.",
        )?;
        let (before, start) = (meter.total(), Instant::now());
        let reference: Reference = reference.parse()?;
        let top = self.runtime.block_on(daemon.announcer().announce(&reference))?;
        let took = start.elapsed();
        let store = &daemon.root().store;
        for layer in store.layers() {
            let shows = match &layer.tree {
                Some(tree) => format!("shows the whole image ({})", plural(tree.inodes.into(), "inode")),
                None => "empty".to_owned(),
            };
            let id: String = layer.id.chars().take(12).collect();
            self.console.fact("published", &format!("{id}…  {shows}"))?;
        }
        self.fetched(meter.total_when_idle() - before, meter)?;
        self.console.fact("ready to run after", &time(took))?;
        self.console.gap()?;
        store.layer(&top).context("the layer is not published")
    }

    fn fetched(&self, traffic: Traffic, meter: &Meter<'_>) -> anyhow::Result<()> {
        let share = percent(traffic.bytes, meter.image_bytes());
        self.console
            .fact("fetched", &format!("{traffic}, {share} of the image"))
    }

    fn list(&mut self, root: &Path, context: &TourContext<'_>) -> anyhow::Result<FileListing> {
        self.console.step(
            "List all files",
            "The bootstrap has all names, sizes, owners and permissions, so listing needs no request.",
        )?;
        let (before, start) = (context.meter.total(), Instant::now());
        let listing = FileListing::of(root)?;
        let took = start.elapsed();
        let (found, expected) = (listing.files.len(), context.made.files());
        ensure!(
            found == expected,
            "the mounted image has {found} files, but its layers have {expected}"
        );
        let found = format!(
            "{} of {} in {}",
            plural(found as u64, "file"),
            size(listing.bytes()),
            plural(listing.directories as u64, "directory")
        );
        self.console.fact("found", &found)?;
        self.console.fact("took", &time(took))?;
        self.fetched(context.meter.total_when_idle() - before, &context.meter)?;
        self.console.gap()?;
        Ok(listing)
    }

    fn read(
        &mut self,
        root: &Path,
        listing: &FileListing,
        context: &TourContext<'_>,
    ) -> anyhow::Result<Vec<PlannedRead>> {
        self.console.step(
            "Read some files",
            "A read fetches the chunks of the file from the registry. The store verifies each chunk before it returns \
             any of its bytes. The tour compares the SHA-256 of each read with that of the file's source.",
        )?;
        let reads = listing.choose();
        let widths = [12, 10, 9, 12, 8];
        let header = ["read", "requests", "took", "fetched", "SHA-256"];
        self.console.row(&format!("{:<43}", "file"), widths, header)?;
        let start = context.meter.total_when_idle();
        for read in &reads {
            let before = context.meter.total();
            let done = read.read(root)?;
            read.ensure_same_as(&done, &context.made.source(&read.path)?)?;
            let fetched = context.meter.total_when_idle() - before;
            let columns = [
                size(read.bytes()),
                fetched.requests.to_string(),
                time(done.took),
                size(fetched.bytes),
                "same".to_owned(),
            ];
            let label = format!("{:<43}", format!("/{}", read.path.display()));
            self.console
                .row(&label, widths, columns.each_ref().map(String::as_str))?;
        }
        if let Some(part) = reads.last().filter(|read| read.is_part()) {
            let (part, whole) = (size(part.bytes()), size(part.size));
            self.console.line(&format!(
                "(The last line reads {part} in the middle of a file of {whole}; only a part is fetched.)"
            ))?;
        }
        self.console.gap()?;
        self.fetched(context.meter.total_when_idle() - start, &context.meter)?;
        self.console.gap()?;
        Ok(reads)
    }

    fn read_again(&mut self, root: &Path, reads: &[PlannedRead], meter: &Meter<'_>) -> anyhow::Result<()> {
        self.console.step(
            "Read the same files again",
            "The store keeps fetched chunks in its cache and shares them between images with the same blobs. The tour \
             drops the kernel's page cache first, so that each read reaches the store.",
        )?;
        let (before, mut took) = (meter.total(), Duration::ZERO);
        for read in reads {
            self.console.stop().check()?;
            took += read.read_again(root)?.took;
        }
        let fetched = meter.total_when_idle() - before;
        ensure!(
            fetched.requests == 0,
            "the store fetched cached chunks again: {fetched}"
        );
        self.console.fact("took", &time(took))?;
        self.fetched(fetched, meter)?;
        self.console.gap()
    }

    /// Pulls with Podman and runs a container. Returns whether a container ran.
    fn container(&mut self, context: &TourContext<'_>) -> anyhow::Result<bool> {
        let Some(podman) = &self.podman else {
            return Ok(false);
        };
        let version = &podman.version;
        self.console.step(
            "Run a container",
            &format!(
                "Podman {version}, with separate storage, runs the image's program {PROGRAM_PATH}. It prints the file \
                 {GREETING_PATH} and exits."
            ),
        )?;
        if !podman.announces_pulls() {
            self.console.paragraph(
                "Skipped: Podman 5.1 cannot announce pulls to the store. Older versions look layers up by digest, and \
                 newer versions run the auth helper.",
            )?;
            self.console.gap()?;
            return Ok(false);
        }
        let address = context.registry.addr().to_string();
        let here = podman.set_up(&self.dir, context.root, &address, self.console.stop())?;
        let (before, start) = (context.meter.total(), Instant::now());
        here.pull(context.reference)?;
        self.console.fact(
            "podman pull",
            &format!("{}; found all layers in the store", time(start.elapsed())),
        )?;
        self.fetched(context.meter.total_when_idle() - before, &context.meter)?;
        let before = context.meter.total();
        let (runtime, printed, took) = here.run_container(context.reference)?;
        self.console
            .fact("podman run", &format!("{}, with {runtime}", time(took)))?;
        self.fetched(context.meter.total_when_idle() - before, &context.meter)?;
        self.console.fact("the container printed", printed.trim_end())?;
        let expected = context.made.greeting();
        ensure!(printed == expected, "the container should have printed: {expected}");
        self.console.gap()?;
        Ok(true)
    }

    fn stop_store(&self, daemon: Daemon) -> anyhow::Result<()> {
        let store = daemon.layout().overlay();
        daemon.stop();
        ensure!(
            mountpoint::mounted_on(&store)?.is_none(),
            "{} is still mounted",
            store.display()
        );
        self.console.fact("store", "unmounted")
    }

    /// Prints the closing paragraph, after the clean-up.
    pub fn goodbye(&self, summary: &TourSummary) -> anyhow::Result<()> {
        let TourSummary {
            files,
            read,
            fetched,
            image_bytes,
            container,
        } = summary;
        self.console.fact("directory", "deleted")?;
        self.console.gap()?;
        let with_container = if *container { " and ran a container" } else { "" };
        self.console.print_unconditionally(&format!(
            "Read {} ({}) of {} ({}){with_container}: fetched {fetched}, {} of the image. A full pull would have \
             fetched {}.",
            plural(read.0 as u64, "file"),
            size(read.1),
            files.0,
            size(files.1),
            percent(fetched.bytes, *image_bytes),
            size(*image_bytes),
        ))
    }
}
