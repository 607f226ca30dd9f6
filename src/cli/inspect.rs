//! `nydus-store inspect`: prints an image's format, layers, blobs and chunk statistics.

use anyhow::Context as _;
use clap::Args;
use serde::Serialize;

use super::{ConfigArg, image_arg::ImageArg, mount::Workspace, print, runtime};
use crate::{
    config::Config,
    digest::Digest,
    humanize::size,
    image::{loaded::LoadedImage, reference::Reference, resolve::Images},
    rafs::{BootstrapSummary, Tree},
    registry,
};

/// Show an image's format, layers, blobs and chunk statistics
#[derive(Debug, Args)]
pub struct InspectCommand {
    /// Image in a registry, or a bootstrap file
    #[arg(value_name = "REF|BOOTSTRAP")]
    image: String,

    /// Print JSON
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    config: ConfigArg,
}

/// The JSON document of `--json`.
#[derive(Serialize)]
struct ImageReport {
    #[serde(skip_serializing_if = "Option::is_none")]
    manifest: Option<Digest>,
    layers: Vec<LayerReport>,
    #[serde(flatten)]
    summary: BootstrapSummary,
    /// Paths in the bootstrap's prefetch table.
    prefetch_paths: Vec<String>,
}

#[derive(Serialize)]
struct LayerReport {
    digest: Digest,
    size: u64,
    media_type: String,
    bootstrap: bool,
}

impl InspectCommand {
    pub fn run(&self) -> anyhow::Result<()> {
        let config = self.config.load()?;
        let report = match ImageArg::new(&self.image)? {
            ImageArg::Bootstrap(path) => {
                let tree = Tree::load(path).with_context(|| format!("cannot read {}", self.image))?;
                ImageReport::new(None, &tree)
            }
            ImageArg::Reference(reference) => load_from_registry(&reference, &config)?,
        };
        if self.json {
            print(&format!("{}\n", serde_json::to_string_pretty(&report)?))?;
        } else {
            print(&report.text(&self.image))?;
        }
        Ok(())
    }
}

fn load_from_registry(reference: &Reference, config: &Config) -> anyhow::Result<ImageReport> {
    let workspace = Workspace::open(None)?;
    let client = registry::Client::new(config.registry_options())?;
    let images = Images::open(workspace.path(), client, config.limits())?;
    let image = runtime()?.block_on(images.resolve(reference));
    let image = image.with_context(|| format!("cannot use {reference}"))?;
    Ok(ImageReport::new(Some(&image), &image.contents.tree))
}

impl ImageReport {
    fn new(image: Option<&LoadedImage>, tree: &Tree) -> Self {
        let layers = image.map(|image| {
            let describe = |(position, layer): (usize, &crate::image::manifest::LayerDescriptor)| LayerReport {
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
        let BootstrapSummary {
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
        if !features.is_empty() {
            // The line `format` shows compressor and digester already.
            let told = |name: &&String| !name.starts_with("COMPRESSION_") && !name.starts_with("HASH_");
            let names: Vec<_> = features.iter().filter(told).map(String::as_str).collect();
            line("features", names.join(", ").to_lowercase());
        }
        line("bootstrap", size(self.summary.bootstrap_size));
        let BootstrapSummary {
            file_bytes,
            chunk_refs,
            chunk_bytes,
            chunks,
            hard_links,
            ..
        } = &self.summary;
        line("content", format!("{} in {chunk_refs} chunks", size(*file_bytes)));
        line("distinct", format!("{} in {chunks} chunks", size(*chunk_bytes)));
        let kinds = [
            (kinds.regular, "regular"),
            (kinds.directories, "directories"),
            (kinds.symlinks, "symlinks"),
            (*hard_links, "hard links"),
            (kinds.char_devices + kinds.block_devices, "devices"),
            (kinds.fifos, "fifos"),
            (kinds.sockets, "sockets"),
        ];
        let there = kinds.iter().filter(|(count, _)| *count > 0);
        let there: Vec<_> = there.map(|(count, kind)| format!("{count} {kind}")).collect();
        line("files", there.join(", "));
        for path in &self.prefetch_paths {
            line("prefetch", path.clone());
        }
        text.push_str(&self.layer_table());
        text.push_str(&self.blob_table());
        text
    }

    fn layer_table(&self) -> String {
        if self.layers.is_empty() {
            return String::new();
        }
        let mut text = format!("\n  {:<14}{:>12}  {:<10}  MEDIA TYPE\n", "LAYER", "SIZE", "KIND");
        for layer in &self.layers {
            let kind = if layer.bootstrap { "bootstrap" } else { "data" };
            let (id, size) = (layer.digest.hex(), size(layer.size));
            text.push_str(&format!(
                "  {:<14}{size:>12}  {kind:<10}  {}\n",
                short(&id),
                layer.media_type
            ));
        }
        text
    }

    fn blob_table(&self) -> String {
        if self.summary.blobs.is_empty() {
            return String::new();
        }
        let mut text = format!(
            "\n  {:<14}{:>12}  {:>12}  {:>20}  {:<10}  UNIT\n",
            "BLOB", "STORED", "UNPACKED", "CHUNKS USED", "COMPRESSOR"
        );
        for blob in &self.summary.blobs {
            let chunks = format!("{} of {}", blob.chunks_used, blob.chunk_count);
            text.push_str(&format!(
                "  {:<14}{:>12}  {:>12}  {chunks:>20}  {:<10}  {}\n",
                short(&blob.id),
                size(blob.compressed_size),
                size(blob.uncompressed_size),
                blob.compressor,
                blob.packing
            ));
        }
        text
    }
}

/// The first 12 characters of an id.
fn short(id: &str) -> &str {
    id.get(..12).unwrap_or(id)
}
