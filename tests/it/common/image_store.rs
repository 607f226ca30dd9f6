//! Image stores of containers/storage made without the daemon.

use std::{fs, path::Path};

/// Makes a valid, empty additional image store at `dir`.
pub fn empty_image_store(dir: &Path) {
    for (kind, lists) in [("overlay-layers", "layers"), ("overlay-images", "images")] {
        let kind = dir.join(kind);
        fs::create_dir_all(&kind).unwrap();
        fs::write(kind.join(format!("{lists}.json")), "[]").unwrap();
        fs::write(kind.join(format!("{lists}.lock")), "").unwrap();
    }
    fs::create_dir_all(dir.join("overlay/l")).unwrap();
}
