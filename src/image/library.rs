//! What is kept on disk of images: manifests, configurations and bootstrap layers by digest, and which manifests each
//! reference has named. With these an image that was seen before is served without asking a registry.

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
};

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::reference::Reference;
use crate::{digest::Digest, files};

/// How many of a reference's manifests are remembered; a tag moves, and containers of older images live on.
const REMEMBERED: usize = 16;

/// The directory of a root that holds images.
pub struct Library {
    content: PathBuf,
    references: PathBuf,
}

/// The manifests that a reference has named on this host.
#[derive(Debug, Serialize, Deserialize)]
struct Known {
    reference: String,
    /// Digests of image manifests (never of indexes), newest first.
    manifests: Vec<Digest>,
    /// What the registry gave for the reference: the manifest, or the index that it was chosen from.
    #[serde(default)]
    top: Option<Digest>,
}

impl Library {
    /// Opens the library in `dir`, which is made if it is missing; only its owner can enter it.
    pub fn open(dir: &Path) -> io::Result<Self> {
        let library = Self {
            content: dir.join("content"),
            references: dir.join("references"),
        };
        files::make_private_dir(&library.content)?;
        files::make_private_dir(&library.references)?;
        Ok(library)
    }

    /// The bytes of that digest, if they are here and undamaged.
    pub fn get(&self, digest: &Digest) -> Option<Bytes> {
        let path = self.path(digest);
        let bytes = fs::read(&path).ok()?;
        if Digest::of(&bytes) == *digest {
            return Some(bytes.into());
        }
        tracing::warn!(file = %path.display(), "a kept file is damaged; it is fetched again");
        fs::remove_file(path).ok();
        None
    }

    /// Keeps `bytes`, whose digest the caller has verified.
    pub fn put(&self, digest: &Digest, bytes: &[u8]) -> io::Result<()> {
        files::write_atomically(&self.path(digest), bytes)
    }

    /// Opens what [`Self::put`] kept.
    pub fn file(&self, digest: &Digest) -> io::Result<File> {
        File::open(self.path(digest))
    }

    fn path(&self, digest: &Digest) -> PathBuf {
        self.content.join(digest.hex())
    }

    /// The manifests that `reference` has named, newest first.
    pub fn manifests(&self, reference: &Reference) -> Vec<Digest> {
        self.known(reference).map(|known| known.manifests).unwrap_or_default()
    }

    /// What the registry last gave for `reference`, and the manifest chosen from it.
    pub fn last(&self, reference: &Reference) -> Option<(Digest, Digest)> {
        let known = self.known(reference)?;
        Some((known.top?, *known.manifests.first()?))
    }

    /// Remembers that the registry gave `top` for `reference`, from which `manifest` was chosen.
    pub fn remember(&self, reference: &Reference, top: Digest, manifest: Digest) -> io::Result<()> {
        let mut manifests = self.manifests(reference);
        if manifests.first() == Some(&manifest) && self.last(reference).is_some_and(|last| last.0 == top) {
            return Ok(());
        }
        manifests.retain(|known| *known != manifest);
        manifests.insert(0, manifest);
        manifests.truncate(REMEMBERED);
        let known = Known {
            reference: reference.to_string(),
            manifests,
            top: Some(top),
        };
        files::write_atomically(&self.reference_path(reference), &serde_json::to_vec_pretty(&known)?)
    }

    fn known(&self, reference: &Reference) -> Option<Known> {
        let path = self.reference_path(reference);
        let bytes = fs::read(&path).ok()?;
        serde_json::from_slice(&bytes)
            .inspect_err(|error| tracing::warn!(file = %path.display(), %error, "ignoring a damaged file"))
            .ok()
    }

    /// A reference may be longer than a file name, and holds slashes.
    fn reference_path(&self, reference: &Reference) -> PathBuf {
        self.references
            .join(format!("{}.json", Digest::of(reference.to_string().as_bytes()).hex()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn damaged_content_is_not_given() {
        let dir = tempfile::tempdir().unwrap();
        let library = Library::open(dir.path()).unwrap();
        let digest = Digest::of(b"bytes");
        library.put(&digest, b"bytes").unwrap();
        assert_eq!(library.get(&digest).as_deref(), Some(&b"bytes"[..]));
        fs::write(library.path(&digest), b"bytez").unwrap();
        assert_eq!(library.get(&digest), None);
    }

    #[test]
    fn a_moved_tag_keeps_its_older_images() {
        let dir = tempfile::tempdir().unwrap();
        let library = Library::open(dir.path()).unwrap();
        let reference: Reference = "registry.example/a:latest".parse().unwrap();
        let (old, new) = (Digest::of(b"old"), Digest::of(b"new"));
        library.remember(&reference, old, old).unwrap();
        library.remember(&reference, new, new).unwrap();
        assert_eq!(library.manifests(&reference), [new, old]);
        assert_eq!(library.last(&reference), Some((new, new)));
    }
}
