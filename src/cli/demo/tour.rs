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
    image::{GREETING, MadeImage, PROGRAM},
    meter::{Meter, Traffic},
    place,
    podman::Podman,
    reading::{Listing, Read},
};
use crate::{
    config::Config,
    daemon::Daemon,
    fixtures::{BuiltImage, EmbeddedRegistry},
    fuse::mountpoint,
    humanize::size,
    image::reference::Reference,
    store::layer_index::PublishedLayer,
};

/// What the last lines say.
pub struct Summary {
    /// Files of the image and their bytes.
    files: (usize, u64),
    /// Files that were read, and the bytes read of them.
    read: (usize, u64),
    fetched: Traffic,
    /// What a full pull fetches.
    whole: u64,
    container: bool,
}

/// What there is to visit.
struct Site<'a> {
    /// The daemon's root.
    root: &'a Path,
    /// The image's files.
    files: &'a Path,
    registry: &'a EmbeddedRegistry,
    reference: &'a str,
    made: &'a MadeImage,
    meter: Meter<'a>,
}

/// The steps, and what they share.
pub struct Tour<'a> {
    pub console: Console,
    /// Where everything is.
    pub dir: PathBuf,
    pub runtime: &'a Runtime,
    /// Podman, if a container is to be run.
    pub podman: Option<Podman>,
}

impl Tour<'_> {
    /// Goes all the way. What was started is stopped when this returns.
    pub fn run(&mut self) -> anyhow::Result<Summary> {
        self.introduction()?;
        let made = self.make_image()?;
        let (registry, reference) = self.serve_image(&made.built)?;
        let daemon = self.start_store()?;
        let meter = Meter::new(&registry, &made.built);
        let layer = self.announce(&daemon, &reference, &meter)?;
        let site = Site {
            root: &self.root(),
            files: &daemon.layout().overlay().join(&layer.id).join("diff"),
            meter,
            registry: &registry,
            reference: &reference,
            made: &made,
        };
        let summary = place::apart(|| self.visit(&site))?;
        self.stop_store(daemon)?;
        Ok(summary)
    }

    fn root(&self) -> PathBuf {
        self.dir.join("root")
    }

    /// Uses the store.
    fn visit(&mut self, site: &Site<'_>) -> anyhow::Result<Summary> {
        let listing = self.list(site.files, site)?;
        let reads = self.read(site.files, &listing, site)?;
        self.read_again(site.files, &reads, &site.meter)?;
        let container = self.container(site)?;
        Ok(Summary {
            files: (listing.files.len(), listing.bytes()),
            read: (reads.len(), reads.iter().map(Read::bytes).sum()),
            fetched: site.meter.settled(),
            whole: site.meter.whole(),
            container,
        })
    }

    fn introduction(&mut self) -> anyhow::Result<()> {
        self.console.text(
            "A container usually starts when its whole image has been downloaded and unpacked, of which it then reads \
             a small part. nydus-store shows Podman and CRI-O the files of an image at once, and fetches from the \
             registry what is read, when it is read.",
        )?;
        self.console.text(&format!(
            "This tour needs no network. All that it makes is in {} and deleted at the end.",
            self.dir.display()
        ))
    }

    fn make_image(&mut self) -> anyhow::Result<MadeImage> {
        self.console.step(
            "A made-up image",
            "A Nydus image has the files of each layer cut into chunks, in a data blob, and one bootstrap that lists \
             all files and says which chunks they consist of.",
        )?;
        let made = MadeImage::make(&self.dir).context("cannot make an image")?;
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
            "A registry",
            "It serves the image over HTTP as any registry does, from within this process, and counts what is asked \
             of it.",
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
            "The store",
            "For containers/storage, the library under Podman and CRI-O, nydus-store is an additional image store: a \
             directory with records of layers, and a file system mounted in it that shows their files. Usually \
             `nydus-store serve` does this.",
        )?;
        let mut config = Config::default();
        // Nobody's credentials are needed here.
        config.registry.auth_files = Some(Vec::new());
        let daemon = Daemon::start(&self.root(), &config, self.runtime.handle())?;
        let layout = daemon.layout();
        self.console.fact("store", &layout.store().display().to_string())?;
        self.console
            .fact("mounted on", &layout.overlay().display().to_string())?;
        self.console.gap()?;
        Ok(daemon)
    }

    fn announce(&mut self, daemon: &Daemon, reference: &str, meter: &Meter<'_>) -> anyhow::Result<Arc<PublishedLayer>> {
        self.console.step(
            "What happens before Podman downloads",
            "Podman has the image's manifest and runs a helper, `nydus-store auth-helper`, before it looks for layers. \
             That announces the pull: the store fetches the bootstrap, verifies it, and publishes the image's layers. \
             Podman then finds all of them, and downloads none.",
        )?;
        let (before, start) = (meter.total(), Instant::now());
        let reference: Reference = reference.parse()?;
        let top = self.runtime.block_on(daemon.announcer().announce(&reference))?;
        let took = start.elapsed();
        let store = &daemon.root().store;
        for layer in store.layers() {
            let shows = match &layer.tree {
                Some(tree) => format!("its diff is the whole image ({})", plural(tree.inodes.into(), "inode")),
                None => "its diff is empty".to_owned(),
            };
            let id: String = layer.id.chars().take(12).collect();
            self.console.fact("published", &format!("{id}…  {shows}"))?;
        }
        self.fetched(meter.settled() - before, meter)?;
        self.console.fact("ready to run after", &time(took))?;
        self.console.gap()?;
        store.layer(&top).context("the layer is not published")
    }

    fn fetched(&self, traffic: Traffic, meter: &Meter<'_>) -> anyhow::Result<()> {
        let share = percent(traffic.bytes, meter.whole());
        self.console
            .fact("fetched", &format!("{traffic}, {share} of the image"))
    }

    fn list(&mut self, root: &Path, site: &Site<'_>) -> anyhow::Result<Listing> {
        self.console.step(
            "List all files",
            "Names, sizes, owners and permissions are all in the bootstrap, so no registry is asked.",
        )?;
        let (before, start) = (site.meter.total(), Instant::now());
        let listing = Listing::of(root)?;
        let took = start.elapsed();
        let (found, put) = (listing.files.len(), site.made.files());
        ensure!(
            found == put,
            "{put} files were put into the image, but it shows {found}"
        );
        let found = format!(
            "{} of {} in {}",
            plural(found as u64, "file"),
            size(listing.bytes()),
            plural(listing.directories as u64, "directory")
        );
        self.console.fact("found", &found)?;
        self.console.fact("took", &time(took))?;
        self.fetched(site.meter.settled() - before, &site.meter)?;
        self.console.gap()?;
        Ok(listing)
    }

    fn read(&mut self, root: &Path, listing: &Listing, site: &Site<'_>) -> anyhow::Result<Vec<Read>> {
        self.console.step(
            "Read some files",
            "The chunks of a file come from the registry when it is read. Each is verified before a byte of it is \
             handed out; the tour compares the SHA-256 of what it reads with that of the file that went in.",
        )?;
        let reads = listing.choose();
        let widths = [12, 10, 9, 12, 8];
        let header = ["read", "requests", "took", "fetched", "SHA-256"];
        self.console.row(&format!("{:<43}", "file"), widths, header)?;
        let start = site.meter.settled();
        for read in &reads {
            let before = site.meter.total();
            let done = read.read(root)?;
            read.prove(&done, &site.made.source(&read.path)?)?;
            let fetched = site.meter.settled() - before;
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
                "(The last read is {part} in the middle of a file of {whole}: a chunk came, not the file.)"
            ))?;
        }
        self.console.gap()?;
        self.fetched(site.meter.settled() - start, &site.meter)?;
        self.console.gap()?;
        Ok(reads)
    }

    fn read_again(&mut self, root: &Path, reads: &[Read], meter: &Meter<'_>) -> anyhow::Result<()> {
        self.console.step(
            "Read the same again",
            "What was fetched is kept in the store's cache, for as long as there is room and for all images that \
             have the same blobs. (The kernel's copies are dropped first, so that the store is asked.)",
        )?;
        let (before, mut took) = (meter.total(), Duration::ZERO);
        for read in reads {
            self.console.stop().check()?;
            took += read.read_again(root)?.took;
        }
        let fetched = meter.settled() - before;
        ensure!(
            fetched.requests == 0,
            "what was in the cache was fetched again: {fetched}"
        );
        self.console.fact("took", &time(took))?;
        self.fetched(fetched, meter)?;
        self.console.gap()
    }

    /// Tells whether a container was run.
    fn container(&mut self, site: &Site<'_>) -> anyhow::Result<bool> {
        let Some(podman) = &self.podman else {
            return Ok(false);
        };
        let version = &podman.version;
        self.console.step(
            "Run a container",
            &format!(
                "Podman {version}, with storage of its own, runs the image's program {PROGRAM}, which prints the \
                 file {GREETING} and ends."
            ),
        )?;
        if !podman.announces_pulls() {
            self.console.paragraph(
                "Skipped. Podman 5.1 neither runs a helper at a pull nor looks layers up by their digests, so that the \
                 store does not learn of a pull. Older and newer versions do.",
            )?;
            self.console.gap()?;
            return Ok(false);
        }
        let address = site.registry.addr().to_string();
        let here = podman.set_up(&self.dir, site.root, &address, self.console.stop())?;
        let (before, start) = (site.meter.total(), Instant::now());
        here.pull(site.reference)?;
        self.console.fact(
            "podman pull",
            &format!("{}; all layers were in the store", time(start.elapsed())),
        )?;
        self.fetched(site.meter.settled() - before, &site.meter)?;
        let before = site.meter.total();
        let (runtime, printed, took) = here.run_container(site.reference)?;
        self.console
            .fact("podman run", &format!("{}, with {runtime}", time(took)))?;
        self.fetched(site.meter.settled() - before, &site.meter)?;
        self.console.fact("the container printed", printed.trim_end())?;
        let expected = site.made.greeting();
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

    /// What is left to say when everything is gone.
    pub fn goodbye(&self, summary: &Summary) -> anyhow::Result<()> {
        let Summary {
            files,
            read,
            fetched,
            whole,
            container,
        } = summary;
        self.console.fact("directory", "deleted")?;
        self.console.gap()?;
        let with_container = if *container { " and ran a container" } else { "" };
        self.console.last(&format!(
            "Read {} ({}) of {} ({}){with_container}: fetched {fetched}, {} of the image. A full pull would have \
             fetched {}.",
            plural(read.0 as u64, "file"),
            size(read.1),
            files.0,
            size(files.1),
            percent(fetched.bytes, *whole),
            size(*whole),
        ))
    }
}
