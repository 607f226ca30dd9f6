//! `nydus-store trace`

use std::{
    fs::File,
    io::{self, BufWriter},
    path::PathBuf,
    time::Duration,
};

use anyhow::Context as _;
use clap::{Args, Subcommand};

use super::{RootArg, print, runtime};
use crate::{
    digest::Digest,
    image::{
        metadata_store::MetadataStore,
        reference::Reference,
        trace::{Trace, Traces},
    },
    jobs::control,
};

/// How long the daemon may take to begin with what was imported.
const PATIENCE: Duration = Duration::from_secs(5);

/// See, export and import what starts of images have needed
#[derive(Debug, Args)]
pub struct TraceCommand {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Show which images there is a trace of
    List {
        #[command(flatten)]
        root: RootArg,

        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Write the trace of an image, for other hosts
    Export {
        /// The image, by its name on this host or the digest of its manifest
        #[arg(value_name = "REF|DIGEST")]
        image: String,

        /// Where to write it [default: standard output]
        #[arg(long, short, value_name = "FILE")]
        output: Option<PathBuf>,

        #[command(flatten)]
        root: RootArg,
    },
    /// Take traces from other hosts, in the place of this one's
    ///
    /// If the daemon runs and has such an image in use, what its trace names is fetched at once; otherwise when the image is
    /// looked for the next time.
    Import {
        /// What `trace export` wrote; - for standard input
        #[arg(value_name = "FILE", required = true)]
        files: Vec<PathBuf>,

        #[command(flatten)]
        root: RootArg,
    },
}

/// A line of `trace list`.
#[derive(serde::Serialize)]
struct Listed {
    image: Digest,
    names: Vec<String>,
    chunks: usize,
    blobs: usize,
}

impl TraceCommand {
    pub fn run(&self) -> anyhow::Result<()> {
        match &self.action {
            Action::List { root, json } => list(root, *json),
            Action::Export { image, output, root } => export(image, output.as_ref(), root),
            Action::Import { files, root } => import(files, root),
        }
    }
}

/// The traces of the root, which must be there: nothing is to be made for who mistypes it.
fn traces(root: &RootArg) -> anyhow::Result<Traces> {
    let dir = root.root.join("traces");
    anyhow::ensure!(
        root.root.is_dir(),
        "there is no {}: name the daemon's root with --root",
        root.root.display()
    );
    Traces::open(&dir).with_context(|| format!("cannot open {}", dir.display()))
}

fn library(root: &RootArg) -> anyhow::Result<MetadataStore> {
    let dir = root.root.join("images");
    MetadataStore::open(&dir).with_context(|| format!("cannot open {}", dir.display()))
}

fn list(root: &RootArg, json: bool) -> anyhow::Result<()> {
    let traces = traces(root)?;
    let known = library(root)?.all()?;
    let mut all = Vec::new();
    for image in traces.images()? {
        let trace = match traces.get(&image) {
            Ok(Some(trace)) => trace,
            Ok(None) => continue,
            Err(error) => {
                tracing::warn!(%image, %error, "a trace is passed over");
                continue;
            }
        };
        let names = known
            .references
            .iter()
            .filter(|(_, named)| named.iter().any(|named| named.manifest == image));
        let blobs: std::collections::HashSet<_> = trace.parts.iter().map(|part| &part.blob).collect();
        all.push(Listed {
            image,
            names: names.map(|(reference, _)| reference.to_string()).collect(),
            chunks: trace.chunks(),
            blobs: blobs.len(),
        });
    }
    if json {
        return print(&format!("{}\n", serde_json::to_string_pretty(&all)?));
    }
    let line = |listed: &Listed| {
        let names = match listed.names.as_slice() {
            [] => "(no name)".to_owned(),
            names => names.join(", "),
        };
        format!("{}  {:>6} chunks  {names}\n", listed.image, listed.chunks)
    };
    print(&all.iter().map(line).collect::<String>())
}

fn export(image: &str, output: Option<&PathBuf>, root: &RootArg) -> anyhow::Result<()> {
    let traces = traces(root)?;
    let digest = match image.parse::<Digest>() {
        Ok(digest) => digest,
        Err(_) => {
            let reference: Reference = image.parse()?;
            let named = library(root)?.named(&reference);
            let newest = named
                .first()
                .with_context(|| format!("{reference} is not known on this host"))?;
            newest.manifest
        }
    };
    let trace = traces.get(&digest)?;
    let trace =
        trace.with_context(|| format!("there is no trace of {image}: no container of it has run on this host"))?;
    match output {
        Some(path) => {
            let file = File::create(path).with_context(|| format!("cannot write to {}", path.display()))?;
            Ok(trace.write(BufWriter::new(file))?)
        }
        None => {
            let mut bytes = Vec::new();
            trace.write(&mut bytes)?;
            print(&String::from_utf8_lossy(&bytes))
        }
    }
}

fn import(files: &[PathBuf], root: &RootArg) -> anyhow::Result<()> {
    // All are read before the first is kept.
    let read = |path: &PathBuf| {
        let from: Box<dyn io::Read> = match path.to_str() {
            Some("-") => Box::new(io::stdin()),
            _ => Box::new(File::open(path).with_context(|| format!("cannot open {}", path.display()))?),
        };
        Trace::read(from).with_context(|| path.display().to_string())
    };
    let read: Vec<_> = files.iter().map(read).collect::<anyhow::Result<_>>()?;
    let traces = traces(root)?;
    for trace in &read {
        traces
            .put(trace)
            .with_context(|| format!("cannot keep the trace of {}", trace.image))?;
        print(&format!("{}: {} chunks\n", trace.image, trace.chunks()))?;
    }
    let images: Vec<_> = read.iter().map(|trace| trace.image).collect();
    let replaying = async {
        let replaying = control::replay(&root.root, &images);
        let replayed = tokio::time::timeout(PATIENCE, replaying).await;
        replayed.context("the daemon does not answer")?
    };
    match runtime()?.block_on(replaying) {
        Ok(replayed) => replayed
            .iter()
            .try_for_each(|image| print(&format!("{image}: in use, so the daemon fetches them now\n"))),
        Err(error) => {
            tracing::warn!("imported traces are used when their images are looked for the next time only: {error:#}");
            Ok(())
        }
    }
}
