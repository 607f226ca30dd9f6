//! `nydus-store inspect`

use std::path::Path;

use anyhow::Context as _;
use clap::Args;
use serde::Serialize;

use super::{ConfigArg, mount::Workspace, runtime};
use crate::{
    config::Config,
    digest::Digest,
    image::{loaded::LoadedImage, reference::Reference, resolve::Images},
    rafs::{BlobSummary, Summary, Tree},
    registry,
};

/// Show what an image is made of
#[derive(Debug, Args)]
pub struct Inspect {
    /// An image in a registry, or the file of a bootstrap
    #[arg(value_name = "REF|BOOTSTRAP")]
    image: String,

    /// Print JSON
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    config: ConfigArg,
}

/// What is shown.
#[derive(Serialize)]
struct Report {
    #[serde(skip_serializing_if = "Option::is_none")]
    manifest: Option<Digest>,
    layers: Vec<LayerReport>,
    #[serde(flatten)]
    summary: Summary,
    /// Paths of the prefetch list.
    prefetch_paths: Vec<String>,
}

#[derive(Serialize)]
struct LayerReport {
    digest: Digest,
    size: u64,
    media_type: String,
    bootstrap: bool,
}

impl Inspect {
    pub fn run(&self) -> anyhow::Result<()> {
        let config = self.config.load()?;
        let report = if Path::new(&self.image).is_file() {
            let tree = Tree::load(Path::new(&self.image)).with_context(|| format!("cannot read {}", self.image))?;
            Report::new(None, &tree)
        } else {
            self.remote(&config)?
        };
        if self.json {
            println!("{}", serde_json::to_string_pretty(&report)?);
        } else {
            print!("{}", report.text(&self.image));
        }
        Ok(())
    }

    fn remote(&self, config: &Config) -> anyhow::Result<Report> {
        let reference: Reference = self
            .image
            .parse()
            .context("it is neither a file nor the name of an image")?;
        let workspace = Workspace::open(None)?;
        let client = registry::Client::new(config.registry_options())?;
        let images = Images::open(workspace.path(), client, config.limits())?;
        let image = runtime()?.block_on(images.current(&reference));
        let image = image.with_context(|| format!("cannot use {reference}"))?;
        Ok(Report::new(Some(&image), &image.contents.tree))
    }
}

impl Report {
    fn new(image: Option<&LoadedImage>, tree: &Tree) -> Self {
        let layers = image.map(|image| {
            let describe = |(position, layer): (usize, &crate::image::manifest::Layer)| LayerReport {
                digest: layer.digest,
                size: layer.size,
                media_type: layer.media_type.clone(),
                bootstrap: image.is_bootstrap(position),
            };
            image.manifest.layers.iter().enumerate().map(describe).collect()
        });
        let summary = tree.summary().clone();
        let prefetch_paths = summary.prefetch.iter().filter_map(|ino| tree.path(*ino)).collect();
        Self {
            manifest: image.map(|image| image.digest),
            layers: layers.unwrap_or_default(),
            summary,
            prefetch_paths,
        }
    }

    fn text(&self, name: &str) -> String {
        let Summary {
            version,
            compressor,
            digester,
            chunk_size,
            features,
            kinds,
            ..
        } = &self.summary;
        let mut text = format!("{name}\n");
        let mut line = |what: &str, value: String| text.push_str(&format!("  {what:<14}{value}\n"));
        if let Some(digest) = &self.manifest {
            line("manifest", digest.to_string());
        }
        line(
            "format",
            format!(
                "RAFS v{version}, chunks of {}, {compressor}, {digester}",
                size(u64::from(*chunk_size))
            ),
        );
        line("features", features.join(", "));
        line("bootstrap", size(self.summary.bootstrap_size));
        line(
            "content",
            format!(
                "{} in {} chunks",
                size(self.summary.file_bytes),
                self.summary.chunk_refs
            ),
        );
        line(
            "distinct",
            format!("{} in {} chunks", size(self.summary.chunk_bytes), self.summary.chunks),
        );
        line(
            "files",
            format!(
                "{} regular, {} directories, {} symlinks, {} hard links, {} devices, {} fifos, {} sockets",
                kinds.regular,
                kinds.directories,
                kinds.symlinks,
                self.summary.hard_links,
                kinds.char_devices + kinds.block_devices,
                kinds.fifos,
                kinds.sockets
            ),
        );
        for layer in &self.layers {
            let what = if layer.bootstrap { "bootstrap" } else { "blob" };
            line(
                "layer",
                format!("{} {:>10} {what} {}", layer.digest, size(layer.size), layer.media_type),
            );
        }
        for blob in &self.summary.blobs {
            line("blob", blob_line(blob));
        }
        for path in &self.prefetch_paths {
            line("prefetch", path.clone());
        }
        text
    }
}

fn blob_line(blob: &BlobSummary) -> String {
    format!(
        "{} {} stored, {} uncompressed, {} of {} chunks used, {}, packed by {}",
        blob.id,
        size(blob.compressed_size),
        size(blob.uncompressed_size),
        blob.chunks_used,
        blob.chunk_count,
        blob.compressor,
        blob.packing
    )
}

/// A number of bytes as people read it.
pub(super) fn size(bytes: u64) -> String {
    indicatif::BinaryBytes(bytes).to_string()
}
