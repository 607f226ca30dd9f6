//! Images of every kind, served by the real daemon, show exactly what went into them.

use std::{
    fs::{self, File},
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
};

use nydus_store::{
    digest::Digest,
    fixtures::{
        BuildOptions, BuiltImage, CompareOptions, EmbeddedRegistry, LayerSource, build, compare_trees,
        content::Random,
        image::{Blob, BlobKind},
    },
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

    /// Everything but the image's files is as Podman needs it: `info`, `blob`, and the empty `diff` of data layers.
    fn layers_are_right(&self) {
        let mut random = Random::new(self.image.blobs.len() as u64);
        for (blob, layer) in self.image.blobs.iter().zip(&self.layers) {
            assert!(layer.is_there(), "{} {}", self.name, blob.digest);
            if blob.kind != BlobKind::Bootstrap {
                assert_eq!(fs::read_dir(layer.diff()).unwrap().count(), 0, "{}", self.name);
            }
            self.info_is_right(blob, layer);
            let expected = fs::read(&blob.path).unwrap();
            assert_eq!(
                Digest::of(&fs::read(layer.blob()).unwrap()),
                blob.digest,
                "{}",
                self.name
            );
            let file = File::open(layer.blob()).unwrap();
            for _ in 0..8 {
                let at = random.below(blob.size + 10);
                let mut bytes = vec![0; random.below(100_000) as usize];
                let got = read_fully(&file, &mut bytes, at);
                let start = expected.len().min(at as usize);
                let end = expected.len().min(start + bytes.len());
                assert!(bytes[..got] == expected[start..end], "{} {at}", self.name);
            }
        }
    }

    fn info_is_right(&self, blob: &Blob, layer: &StorePath) {
        let info = layer.info().unwrap();
        let gzip = blob.media_type.ends_with("gzip");
        assert_eq!(info["compressed-diff-digest"], blob.digest.to_string(), "{}", self.name);
        assert_eq!(info["compressed-size"], blob.size, "{}", self.name);
        assert_eq!(info["diff-digest"], blob.diff_id.to_string(), "{}", self.name);
        assert_eq!(info["compression"], if gzip { 2 } else { 0 }, "{}", self.name);
        let diff_size = match blob.kind {
            BlobKind::Bootstrap => {
                let packed = File::open(&blob.path).unwrap();
                std::io::copy(&mut flate2::read::MultiGzDecoder::new(packed), &mut std::io::sink()).unwrap() as i64
            }
            // What an original layer unpacks to is not known without fetching it, but Podman takes no image with a
            // layer of unknown size.
            BlobKind::Plain => info["diff-size"].as_i64().filter(|size| *size > 0).unwrap(),
            BlobKind::Data => blob.size as i64,
        };
        assert_eq!(info["diff-size"], diff_size, "{}", self.name);
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
