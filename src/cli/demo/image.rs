//! Generates the tour's image, and finds the source of each of its files.

use std::{
    fs::{self, Permissions},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

use anyhow::Context as _;

use super::program;
use crate::fixtures::{self, BuildOptions, BuiltImage, ImageOptions, LayerSource};

/// The image's entry point, on architectures that [`program`] supports.
pub const PROGRAM_PATH: &str = "/bin/hello";
/// The file that the entry point prints.
pub const GREETING_PATH: &str = "/opt/app/greeting";
const GREETING_TEXT: &str = "Hello from a container whose image was never downloaded!\n";

/// An image and its source directories.
pub struct MadeImage {
    pub built: BuiltImage,
    /// The layers, lowest first.
    pub layers: Vec<MadeLayer>,
}

/// The source directory of one layer.
pub struct MadeLayer {
    pub name: &'static str,
    pub files: usize,
    pub bytes: u64,
    dir: PathBuf,
}

impl MadeImage {
    /// Generates two layers below `dir` and builds an image of them.
    pub fn make(dir: &Path) -> anyhow::Result<Self> {
        let (base, app) = (dir.join("layers/base"), dir.join("layers/app"));
        fixtures::demo_tree(&base, 260, 1)?;
        fixtures::demo_tree(&app.join("opt/app"), 80, 2)?;
        write(&app, GREETING_PATH, GREETING_TEXT.as_bytes(), 0o644)?;
        if let Some(program) = program::program_printing(GREETING_PATH) {
            write(&base, PROGRAM_PATH, &program, 0o755)?;
        }
        let options = BuildOptions {
            image: ImageOptions {
                cmd: vec![PROGRAM_PATH.to_owned()],
                ..ImageOptions::default()
            },
            ..BuildOptions::default()
        };
        let sources = [LayerSource::Dir(base.clone()), LayerSource::Dir(app.clone())];
        Ok(Self {
            built: fixtures::build(&sources, &options, &dir.join("image"))?,
            layers: vec![MadeLayer::new("base", base)?, MadeLayer::new("app", app)?],
        })
    }

    /// The source of the image's file `path`, relative to its root.
    pub fn source(&self, path: &Path) -> anyhow::Result<PathBuf> {
        let candidates = self.layers.iter().rev().map(|layer| layer.dir.join(path));
        let mut present = candidates.filter(|source| source.is_file());
        present
            .next()
            .with_context(|| format!("the mounted image has {}, which none of its layers has", path.display()))
    }

    /// Number of files in all layers.
    pub fn files(&self) -> usize {
        self.layers.iter().map(|layer| layer.files).sum()
    }

    /// The expected output of a container.
    pub fn greeting(&self) -> &'static str {
        GREETING_TEXT
    }
}

impl MadeLayer {
    fn new(name: &'static str, dir: PathBuf) -> anyhow::Result<Self> {
        let listing = super::reading::FileListing::of(&dir)?;
        Ok(Self {
            name,
            files: listing.files.len(),
            bytes: listing.bytes(),
            dir,
        })
    }
}

fn write(root: &Path, path: &str, bytes: &[u8], mode: u32) -> anyhow::Result<()> {
    let path = root.join(path.trim_start_matches('/'));
    let parent = path.parent().unwrap_or(root);
    fs::create_dir_all(parent)
        .and_then(|()| fs::write(&path, bytes))
        .and_then(|()| fs::set_permissions(&path, Permissions::from_mode(mode)))
        .with_context(|| format!("cannot write {}", path.display()))
}
