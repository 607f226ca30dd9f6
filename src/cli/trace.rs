//! `nydus-store trace`: lists, exports and imports start-up traces.

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
    error_chain::ErrorChain,
    image::{
        metadata_store::MetadataStore,
        reference::Reference,
        trace::{Trace, Traces},
    },
    jobs::control,
};

/// Time-out for the daemon to start replaying imported traces.
const REPLAY_TIMEOUT: Duration = Duration::from_secs(5);

/// List, export and import start-up traces
///
/// A trace records the chunks that a container reads while it starts. The daemon prefetches them at the next start from
/// an empty cache. A trace recorded on one host can be imported on others.
#[derive(Debug, Args)]
pub struct TraceCommand {
    #[command(subcommand)]
    action: TraceSubcommand,
}

#[derive(Debug, Subcommand)]
enum TraceSubcommand {
    /// List the images that have a trace
    List {
        #[command(flatten)]
        root: RootArg,

        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Export an image's trace for other hosts
    Export {
        /// Image name, or digest of its manifest
        #[arg(value_name = "REF|DIGEST")]
        image: String,

        /// Output file [default: standard output]
        #[arg(long, short, value_name = "FILE")]
        output: Option<PathBuf>,

        #[command(flatten)]
        root: RootArg,
    },
    /// Import traces from other hosts, replacing this host's
    ///
    /// If the daemon has such an image in use, it fetches the traced chunks at once; otherwise it fetches them at the
    /// image's next look-up.
    Import {
        /// Output of `trace export`; - for standard input
        #[arg(value_name = "FILE", required = true)]
        files: Vec<PathBuf>,

        #[command(flatten)]
        root: RootArg,
    },
}

/// One entry of `trace list`.
#[derive(serde::Serialize)]
struct ListedTrace {
    image: Digest,
    names: Vec<String>,
    chunks: usize,
    blobs: usize,
}

impl TraceCommand {
    pub fn run(&self) -> anyhow::Result<()> {
        match &self.action {
            TraceSubcommand::List { root, json } => list(root, *json),
            TraceSubcommand::Export { image, output, root } => export(image, output.as_ref(), root),
            TraceSubcommand::Import { files, root } => import(files, root),
        }
    }
}

/// Opens the root's traces. Fails if the root is missing, instead of creating a mistyped directory.
fn traces(root: &RootArg) -> anyhow::Result<Traces> {
    let dir = root.root.join("traces");
    anyhow::ensure!(
        root.root.is_dir(),
        "{} does not exist: pass the daemon's root with --root",
        root.root.display()
    );
    Traces::open(&dir).with_context(|| format!("cannot open {}", dir.display()))
}

fn metadata_store(root: &RootArg) -> anyhow::Result<MetadataStore> {
    let dir = root.root.join("images");
    MetadataStore::open(&dir).with_context(|| format!("cannot open {}", dir.display()))
}

fn list(root: &RootArg, json: bool) -> anyhow::Result<()> {
    let traces = traces(root)?;
    let known = metadata_store(root)?.all()?;
    let mut all = Vec::new();
    for image in traces.images()? {
        let trace = match traces.get(&image) {
            Ok(Some(trace)) => trace,
            Ok(None) => continue,
            Err(error) => {
                tracing::warn!(manifest = %image, %error, "skipped unreadable trace");
                continue;
            }
        };
        let names = known
            .references
            .iter()
            .filter(|(_, named)| named.iter().any(|named| named.manifest == image));
        let blobs: std::collections::HashSet<_> = trace.parts.iter().map(|part| &part.blob).collect();
        all.push(ListedTrace {
            image,
            names: names.map(|(reference, _)| reference.to_string()).collect(),
            chunks: trace.chunks(),
            blobs: blobs.len(),
        });
    }
    if json {
        return print(&format!("{}\n", serde_json::to_string_pretty(&all)?));
    }
    let line = |listed: &ListedTrace| {
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
            let named = metadata_store(root)?.named(&reference);
            let newest = named.first().with_context(|| format!("unknown image {reference}"))?;
            newest.manifest
        }
    };
    let trace = traces.get(&digest)?;
    let trace = trace.with_context(|| format!("no trace of {image}: no container of it has run on this host"))?;
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
    // Reads all traces before storing the first.
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
            .with_context(|| format!("cannot store the trace of {}", trace.image))?;
        print(&format!("{}: {} chunks\n", trace.image, trace.chunks()))?;
    }
    let images: Vec<_> = read.iter().map(|trace| trace.image).collect();
    let replaying = async {
        let replaying = control::replay(&root.root, &images);
        let replayed = tokio::time::timeout(REPLAY_TIMEOUT, replaying).await;
        replayed.context("the daemon does not respond")?
    };
    match runtime()?.block_on(replaying) {
        Ok(replayed) => replayed
            .iter()
            .try_for_each(|image| print(&format!("{image}: in use; the daemon fetches the chunks now\n"))),
        Err(error) => {
            tracing::warn!(
                error = %ErrorChain(error.as_ref()),
                "failed to replay imported traces; they apply at the next look-up of their images"
            );
            Ok(())
        }
    }
}
