//! Images of every kind, served by the daemon, equal their source trees.

use std::{
    fs::{self, File},
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
};

use nydus_store::fixtures::{
    BuildOptions, BuiltImage, CompareOptions, EmbeddedRegistry, LayerSource, build, compare_trees,
    image::{Blob, BlobKind},
};
use tempfile::TempDir;

use crate::common::{Serve, StoreLayer};

mod idmap;
mod kinds;
mod layers;
mod overlay;
mod random;
mod special;

/// A daemon, a registry and a directory for images.
struct ImageSite {
    registry: EmbeddedRegistry,
    serve: Serve,
    dir: TempDir,
}

/// An image served by the daemon.
struct ServedImage {
    name: String,
    image: BuiltImage,
    /// One per layer of the manifest.
    layers: Vec<StoreLayer>,
}

impl ImageSite {
    fn new() -> Self {
        Self {
            registry: EmbeddedRegistry::start().unwrap(),
            serve: Serve::start(),
            dir: tempfile::tempdir().unwrap(),
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Builds an image of `layers` and adds it to the registry.
    fn serve_image(&self, name: &str, layers: &[LayerSource], options: &BuildOptions) -> ServedImage {
        let out = self.path(&format!("out-{name}"));
        let image = build(layers, options, &out).unwrap_or_else(|error| panic!("build {name}: {error:#}"));
        self.add_to_registry(name, image)
    }

    fn add_to_registry(&self, name: &str, image: BuiltImage) -> ServedImage {
        self.registry.add_image(&image, name, "1").unwrap();
        let reference = self.registry.reference(name, "1");
        let layers = (image.blobs.iter())
            .map(|blob| self.serve.layer(&reference, &blob.digest))
            .collect();
        ServedImage {
            name: name.to_owned(),
            image,
            layers,
        }
    }
}

impl Drop for ImageSite {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let log = self.serve.log();
            let bad = log
                .lines()
                .filter(|line| line.contains("WARN") || line.contains("ERROR"));
            let bad: Vec<_> = bad.collect();
            eprintln!("warnings and errors of the daemon:\n{}", bad.join("\n"));
        }
    }
}

impl ServedImage {
    /// The image's files.
    fn diff(&self) -> PathBuf {
        let is_bootstrap = |blob: &Blob| blob.kind == BlobKind::Bootstrap;
        self.layers[self.image.blobs.iter().position(is_bootstrap).unwrap()].diff()
    }

    /// Panics unless the image's files equal those of `expected`.
    fn assert_equals(&self, expected: &Path) {
        self.assert_equals_with(expected, &CompareOptions::default());
    }

    fn assert_equals_with(&self, expected: &Path, options: &CompareOptions) {
        assert_same(&self.name, expected, &self.diff(), options);
    }

    /// Panics unless the layers have correct records, and data layers an empty `diff`.
    fn assert_layers(&self) {
        for (blob, layer) in self.image.blobs.iter().zip(&self.layers) {
            assert!(layer.pull_publishes(), "{} {}", self.name, blob.digest);
            if blob.kind == BlobKind::Plain {
                // Never published, because ordinary images may share it.
                assert_eq!(layer.record(), None, "{}", self.name);
                continue;
            }
            if blob.kind != BlobKind::Bootstrap {
                assert_eq!(fs::read_dir(layer.diff()).unwrap().count(), 0, "{}", self.name);
            }
            if let Some(record) = layer.record() {
                self.assert_record(blob, &record);
            }
        }
    }

    fn assert_record(&self, blob: &Blob, record: &serde_json::Value) {
        let gzip = blob.media_type.ends_with("gzip");
        assert_eq!(
            record["compressed-diff-digest"],
            blob.digest.to_string(),
            "{}",
            self.name
        );
        assert_eq!(record["compressed-size"], blob.size, "{}", self.name);
        assert_eq!(record["diff-digest"], blob.diff_id.to_string(), "{}", self.name);
        assert_eq!(
            record["compression"].as_u64().unwrap_or(0),
            if gzip { 2 } else { 0 },
            "{}",
            self.name
        );
        let diff_size = match blob.kind {
            BlobKind::Bootstrap => {
                let packed = File::open(&blob.path).unwrap();
                std::io::copy(&mut flate2::read::MultiGzDecoder::new(packed), &mut std::io::sink()).unwrap()
            }
            BlobKind::Data | BlobKind::Plain => blob.size,
        };
        assert_eq!(record["diff-size"], diff_size, "{}", self.name);
    }
}

/// Panics with the first differences of two trees, if there are any.
fn assert_same(name: &str, expected: &Path, actual: &Path, options: &CompareOptions) {
    let found = compare_trees(expected, actual, options).unwrap_or_else(|error| panic!("{name}: {error:#}"));
    let first: Vec<_> = found.iter().take(20).map(ToString::to_string).collect();
    assert!(
        found.is_empty(),
        "{name}: {} differences\n{}",
        found.len(),
        first.join("\n")
    );
}

/// Reads until `bytes` is full or the file ends; returns the number of bytes read.
fn read_fully(file: &File, bytes: &mut [u8], at: u64) -> usize {
    let mut got = 0;
    while got < bytes.len() {
        match file.read_at(&mut bytes[got..], at + got as u64).unwrap() {
            0 => break,
            len => got += len,
        }
    }
    got
}
