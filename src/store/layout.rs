//! Paths of the image store below a root, and its skeleton: what containers/storage must find before the first image is
//! published.
//!
//! The layout is that of containers/storage's overlay driver: `layers.go`, `images.go` and `drivers/overlay/overlay.go`
//! there read it.
//!
//! Podman and CRI-O do not start if storage.conf names `<root>/store` and a file of the skeleton is missing.

use std::{
    fs::{self, DirBuilder},
    io::{self, Write as _},
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _},
    path::{Path, PathBuf},
};

use crate::{
    atomic_file::{create_private_dir, new_beside, sync_dir, unless_unwritable},
    fuse::mountpoint,
};

/// The image store, relative to the root.
pub const STORE_DIR: &str = "store";
/// The layer store, relative to the root; look-ups in it announce pulls.
pub const LAYERS_DIR: &str = "layers";

/// Mount points of the daemon.
const MOUNT_POINTS: [&str; 2] = ["store/overlay", LAYERS_DIR];
/// Directories of the skeleton, outer ones first.
const SKELETON_DIRS: [&str; 6] = [
    STORE_DIR,
    "store/overlay-layers",
    "store/overlay-images",
    "store/overlay",
    "store/overlay/l",
    LAYERS_DIR,
];
/// Files of the skeleton with their content while nothing is published.
const SKELETON_FILES: [(&str, &str); 4] = [
    ("store/overlay-layers/layers.lock", ""),
    ("store/overlay-layers/layers.json", EMPTY_LIST),
    ("store/overlay-images/images.lock", ""),
    ("store/overlay-images/images.json", EMPTY_LIST),
];
const EMPTY_LIST: &str = "[]";

/// Paths below a root.
#[derive(Debug, Clone)]
pub struct StoreLayout {
    root: PathBuf,
}

impl StoreLayout {
    /// Paths below the daemon's root.
    pub fn new(root: &Path) -> Self {
        Self { root: root.to_owned() }
    }

    /// The additional image store.
    pub fn store(&self) -> PathBuf {
        self.root.join(STORE_DIR)
    }

    /// Mount point of the layers' files.
    pub fn overlay(&self) -> PathBuf {
        self.store().join("overlay")
    }

    /// The additional layer store: a FUSE file system in which a look-up announces a pull.
    pub fn layer_store(&self) -> PathBuf {
        self.root.join(LAYERS_DIR)
    }

    /// Layer records for containers/storage.
    pub fn layers_json(&self) -> PathBuf {
        self.store().join("overlay-layers/layers.json")
    }

    /// The lock of [`Self::layers_json`].
    pub fn layers_lock(&self) -> PathBuf {
        self.store().join("overlay-layers/layers.lock")
    }

    /// Image records for containers/storage.
    pub fn images_json(&self) -> PathBuf {
        self.image_dirs().join("images.json")
    }

    /// The lock of [`Self::images_json`].
    pub fn images_lock(&self) -> PathBuf {
        self.image_dirs().join("images.lock")
    }

    /// The directory with one subdirectory for each image record.
    pub fn image_dirs(&self) -> PathBuf {
        self.store().join("overlay-images")
    }

    /// The space that is held for changes on a full disk.
    pub fn reserve(&self) -> PathBuf {
        self.root.join("reserve")
    }

    /// The database of published layers and images.
    pub fn database(&self) -> PathBuf {
        self.root.join("published.redb")
    }
}

/// Creates the missing parts of an empty store below `root`, accessible to its owner only. Existing files are kept.
pub fn create_empty(root: &Path) -> io::Result<()> {
    create_private_dir(root)?;
    let is_mounted = mountpoint::mounted_on(&root.join(STORE_DIR).join("overlay")).is_ok_and(|mount| mount.is_some());
    for dir in SKELETON_DIRS {
        // Access to the mount of an earlier daemon would wait for this one.
        if is_mounted && dir.starts_with("store/overlay/") {
            continue;
        }
        match DirBuilder::new().mode(0o700).create(root.join(dir)) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            made => made?,
        }
    }
    SKELETON_FILES
        .iter()
        .try_for_each(|(file, content)| create_file(&root.join(file), content))?;
    unless_unwritable(sync_dir(&root.join(STORE_DIR)))?;
    unless_unwritable(sync_dir(root))
}

/// Creates a file with its content atomically, unless it exists.
fn create_file(path: &Path, content: &str) -> io::Result<()> {
    if path.try_exists()? {
        return Ok(());
    }
    let dir = path.parent().unwrap_or(Path::new("."));
    let mut file = new_beside(dir)?;
    file.write_all(content.as_bytes())?;
    file.as_file().sync_all()?;
    match file.persist_noclobber(path) {
        Err(failed) if failed.error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        created => created.map(drop).map_err(|failed| failed.error),
    }?;
    sync_dir(dir)
}

/// The first part of the store that is missing; `None` if the store is complete. Reads only the parent directories,
/// because access to a mount may hang.
pub fn missing_part(root: &Path) -> io::Result<Option<PathBuf>> {
    let parts = SKELETON_FILES.iter().map(|(file, _)| file).chain(&MOUNT_POINTS);
    for path in parts.map(|part| root.join(part)) {
        if !is_listed(&path)? {
            return Ok(Some(path));
        }
    }
    Ok(None)
}

/// Whether the parent directory lists the path.
fn is_listed(path: &Path) -> io::Result<bool> {
    let entries = match path.parent().unwrap_or(Path::new("/")).read_dir() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        entries => entries?,
    };
    let mut names = entries.map_while(Result::ok).map(|entry| entry.file_name());
    Ok(names.any(|name| Some(name.as_os_str()) == path.file_name()))
}

/// Removes the store if it is not mounted and nothing is published in it, and then `root` if that is empty. Returns
/// whether the store is gone.
pub fn remove_empty(root: &Path) -> io::Result<bool> {
    if !is_empty(root)? {
        return Ok(false);
    }
    for (file, _) in SKELETON_FILES {
        ignore_missing(fs::remove_file(root.join(file)))?;
    }
    for dir in SKELETON_DIRS.iter().rev() {
        ignore_missing(fs::remove_dir(root.join(dir)))?;
    }
    match fs::remove_dir(root) {
        Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty => {}
        removed => ignore_missing(removed)?,
    }
    Ok(true)
}

/// Whether the store has no content beyond the skeleton of [`create_empty`].
fn is_empty(root: &Path) -> io::Result<bool> {
    for mounted in MOUNT_POINTS.map(|dir| root.join(dir)) {
        let device = |path: &Path| path.symlink_metadata().map(|data| data.dev());
        match (device(&mounted), device(mounted.parent().unwrap_or(root))) {
            (Ok(inside), Ok(outside)) if inside == outside => {}
            (Err(error), _) if error.kind() == io::ErrorKind::NotFound => {}
            (Err(error), _) if error.kind() != io::ErrorKind::NotConnected => return Err(error),
            _ => return Ok(false),
        }
    }
    for dir in SKELETON_DIRS {
        let entries = match root.join(dir).read_dir() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            entries => entries?,
        };
        for entry in entries {
            let path = entry?.path();
            let relative = path.strip_prefix(root).unwrap_or(&path);
            let known = SKELETON_DIRS.iter().chain(SKELETON_FILES.iter().map(|(file, _)| file));
            if !known.into_iter().any(|known| relative == Path::new(known)) {
                return Ok(false);
            }
        }
    }
    for (file, content) in SKELETON_FILES {
        // The content of lock files changes with each writer.
        if content.is_empty() {
            continue;
        }
        match fs::read_to_string(root.join(file)) {
            Ok(text) if matches!(text.trim(), "" | EMPTY_LIST) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Ok(_) => return Ok(false),
            Err(error) => return Err(error),
        }
    }
    Ok(true)
}

fn ignore_missing(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn empty_store_is_complete_and_private() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("a/root");
        create_empty(&root).unwrap();
        for dir in SKELETON_DIRS {
            assert_eq!(root.join(dir).metadata().unwrap().mode() & 0o777, 0o700, "{dir}");
        }
        for (file, content) in SKELETON_FILES {
            assert_eq!(fs::read_to_string(root.join(file)).unwrap(), content);
            let mode = root.join(file).metadata().unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o600, "{file}");
        }
        assert_eq!(root.join("store/overlay-layers").read_dir().unwrap().count(), 2);
        assert_eq!(missing_part(&root).unwrap(), None);
        fs::remove_dir(root.join(LAYERS_DIR)).unwrap();
        assert_eq!(missing_part(&root).unwrap(), Some(root.join(LAYERS_DIR)));
        assert!(missing_part(&dir.path().join("b")).unwrap().is_some());
    }

    #[test]
    fn existing_records_are_kept() {
        let dir = tempfile::tempdir().unwrap();
        let json = dir.path().join("store/overlay-layers/layers.json");
        fs::create_dir_all(json.parent().unwrap()).unwrap();
        fs::write(&json, "[{}]").unwrap();
        create_empty(dir.path()).unwrap();
        create_empty(dir.path()).unwrap();
        assert_eq!(fs::read_to_string(&json).unwrap(), "[{}]");
        assert!(!remove_empty(dir.path()).unwrap());
        assert!(dir.path().join("store/overlay-images/images.json").exists());
    }

    #[test]
    fn only_an_empty_store_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("root");
        for (path, content) in [
            ("store/overlay/l/ABC", ""),
            ("store/overlay-images/id/manifest", "{}"),
            ("layers/other", ""),
        ] {
            create_empty(&root).unwrap();
            let foreign = root.join(path);
            fs::create_dir_all(foreign.parent().unwrap()).unwrap();
            fs::write(&foreign, content).unwrap();
            assert!(!remove_empty(&root).unwrap(), "{path}");
            fs::remove_file(&foreign).unwrap();
            fs::remove_dir(foreign.parent().unwrap()).unwrap_or_default();
        }
        create_empty(&root).unwrap();
        fs::write(root.join("store/overlay-layers/layers.lock"), "x").unwrap();
        assert!(remove_empty(&root).unwrap());
        assert!(!root.exists());
        assert!(remove_empty(&root).unwrap());
        // A directory of an earlier version; other content of the root is kept.
        fs::create_dir_all(root.join("store")).unwrap();
        fs::write(root.join("lock"), "").unwrap();
        assert!(remove_empty(&root).unwrap());
        assert!(root.join("lock").exists() && !root.join("store").exists());
    }
}
