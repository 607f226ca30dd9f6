//! The paths of a layer in the store, used as containers/storage uses them.

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, bail};
use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};

use crate::digest::Digest;

/// `<store>/<reference in base64>/<digest>`
pub struct LayerPaths {
    dir: PathBuf,
}

impl LayerPaths {
    pub fn new(store: &Path, reference: &str, layer: &Digest) -> Self {
        Self {
            dir: store.join(BASE64.encode(reference)).join(layer.to_string()),
        }
    }

    /// The layer's files.
    pub fn diff(&self) -> PathBuf {
        self.dir.join("diff")
    }

    /// Podman's look-up: `diff`, `info` and `blob` must be there, or it downloads the layer.
    pub fn look_up(&self) -> anyhow::Result<()> {
        for name in ["diff", "info", "blob"] {
            let path = self.dir.join(name);
            fs::metadata(&path).with_context(|| format!("the store does not have {}", path.display()))?;
        }
        let info = fs::read(self.dir.join("info")).context("cannot read the layer's info")?;
        serde_json::from_slice::<serde_json::Value>(&info).context("the layer's info is not JSON")?;
        Ok(())
    }

    /// How many entries the layer's directory has.
    pub fn entries(&self) -> anyhow::Result<usize> {
        Ok(fs::read_dir(self.diff()).context("cannot list the layer")?.count())
    }

    /// Says that the layer is in use.
    pub fn add_use(&self) -> anyhow::Result<()> {
        not_found(File::create(self.dir.join("use")).map(drop), "creating `use`")
    }

    /// Says that the layer is not in use any more.
    pub fn release(&self) -> anyhow::Result<()> {
        not_found(fs::remove_dir(&self.dir), "removing the layer's directory")
    }
}

/// The protocol's way to say "noted": nothing is created and nothing removed.
fn not_found(done: io::Result<()>, what: &str) -> anyhow::Result<()> {
    match done {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error).with_context(|| format!("{what} must give ENOENT")),
        Ok(()) => bail!("{what} must give ENOENT, but succeeded"),
    }
}
