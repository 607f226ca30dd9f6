//! Images of every kind, served by the real daemon, show exactly what went into them.

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

use crate::common::{Serve, StorePath};

mod idmap;
mod kinds;
mod layers;
mod overlay;
mod random;
mod special;

/// A daemon, a registry and a place for images, shared by all that one test serves.
struct Site {
    registry: EmbeddedRegistry,
    serve: Serve,
    dir: TempDir,
}

/// An image that the daemon serves.
struct Shown {
    name: String,
    image: BuiltImage,
    /// One for each layer of the manifest.
    layers: Vec<StorePath>,
}

impl Site {
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

    /// Builds an image of `layers` and serves it.
    fn show(&self, name: &str, layers: &[LayerSource], options: &BuildOptions) -> Shown {
        let out = self.path(&format!("out-{name}"));
        let image = build(layers, options, &out).unwrap_or_else(|error| panic!("build {name}: {error:#}"));
        self.publish(name, image)
    }

    fn publish(&self, name: &str, image: BuiltImage) -> Shown {
        self.registry.add_image(&image, name, "1").unwrap();
        let reference = self.registry.reference(name, "1");
        let layers = (image.blobs.iter())
            .map(|blob| self.serve.layer(&reference, &blob.digest))
            .collect();
        Shown {
            name: name.to_owned(),
            image,
            layers,
        }
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let log = self.serve.log();
            let bad = log
                .lines()
                .filter(|line| line.contains("WARN") || line.contains("ERROR"));
            let bad: Vec<_> = bad.collect();
            eprintln!("the daemon's complaints:\n{}", bad.join("\n"));
        }
    }
}

impl Shown {
    /// The image's files.
    fn diff(&self) -> PathBuf {
        let is_bootstrap = |blob: &Blob| blob.kind == BlobKind::Bootstrap;
        self.layers[self.image.blobs.iter().position(is_bootstrap).unwrap()].diff()
    }

    /// The image's files are those of `expected`.
    fn is(&self, expected: &Path) {
        self.is_like(expected, &CompareOptions::default());
    }

    fn is_like(&self, expected: &Path, options: &CompareOptions) {
        assert_same(&self.name, expected, &self.diff(), options);
    }

    /// Everything but the image's files is as Podman needs it: records, and the empty `diff` of data layers.
    fn layers_are_right(&self) {
        for (blob, layer) in self.image.blobs.iter().zip(&self.layers) {
            assert!(layer.is_there(), "{} {}", self.name, blob.digest);
            if blob.kind == BlobKind::Plain {
                // Other images may share it, so that it is not published.
                assert_eq!(layer.record(), None, "{}", self.name);
                continue;
            }
            if blob.kind != BlobKind::Bootstrap {
                assert_eq!(fs::read_dir(layer.diff()).unwrap().count(), 0, "{}", self.name);
            }
            if let Some(record) = layer.record() {
                self.record_is_right(blob, &record);
            }
        }
    }

    fn record_is_right(&self, blob: &Blob, record: &serde_json::Value) {
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

/// Fails with the first differences of two trees, if there are any.
fn assert_same(name: &str, expected: &Path, actual: &Path, options: &CompareOptions) {
    let found = compare_trees(expected, actual, options).unwrap_or_else(|error| panic!("{name}: {error:#}"));
    let shown: Vec<_> = found.iter().take(20).map(ToString::to_string).collect();
    assert!(
        found.is_empty(),
        "{name}: {} differences\n{}",
        found.len(),
        shown.join("\n")
    );
}

/// Reads until `bytes` are full or the file ends.
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
