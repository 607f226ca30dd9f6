//! The made-up image of the tour, and where each of its files came from.

use std::{
    fs::{self, Permissions},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

use anyhow::Context as _;

use super::program;
use crate::fixtures::{self, BuildOptions, BuiltImage, ImageOptions, LayerSource};

/// The image's program, where this machine has one.
pub const PROGRAM: &str = "/bin/hello";
/// The file that the program prints.
pub const GREETING: &str = "/opt/app/greeting";
const GREETING_TEXT: &str = "Hello from a container whose image was never downloaded!\n";

/// An image and what it was made from.
pub struct MadeImage {
    pub built: BuiltImage,
    /// Lowest first.
    pub layers: Vec<MadeLayer>,
}

/// One source directory.
pub struct MadeLayer {
    pub name: &'static str,
    pub files: usize,
    pub bytes: u64,
    dir: PathBuf,
}

impl MadeImage {
    /// Makes two layers below `dir` and an image of them.
    pub fn make(dir: &Path) -> anyhow::Result<Self> {
        let (base, app) = (dir.join("layers/base"), dir.join("layers/app"));
        fixtures::demo_tree(&base, 260, 1)?;
        fixtures::demo_tree(&app.join("opt/app"), 80, 2)?;
        write(&app, GREETING, GREETING_TEXT.as_bytes(), 0o644)?;
        if let Some(program) = program::printing(GREETING) {
            write(&base, PROGRAM, &program, 0o755)?;
        }
        let options = BuildOptions {
            image: ImageOptions {
                cmd: vec![PROGRAM.to_owned()],
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

    /// The file that the image's `path` (relative) was made from.
    pub fn source(&self, path: &Path) -> anyhow::Result<PathBuf> {
        let candidates = self.layers.iter().rev().map(|layer| layer.dir.join(path));
        let mut present = candidates.filter(|source| source.is_file());
        present
            .next()
            .with_context(|| format!("the image shows {}, which was not put into it", path.display()))
    }

    /// How many files were put into the image.
    pub fn files(&self) -> usize {
        self.layers.iter().map(|layer| layer.files).sum()
    }

    /// What the image's program prints.
    pub fn greeting(&self) -> &'static str {
        GREETING_TEXT
    }
}

impl MadeLayer {
    fn new(name: &'static str, dir: PathBuf) -> anyhow::Result<Self> {
        let listing = super::reading::Listing::of(&dir)?;
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
