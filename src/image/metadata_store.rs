//! What is kept on disk of images: manifests, configurations and bootstrap layers by digest, and which manifests each
//! reference has named. With these an image that was seen before is served without asking a registry.

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
};

use bytes::Bytes;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use super::reference::Reference;
use crate::{atomic_file, digest::Digest};

/// How many of a reference's manifests are remembered; a tag moves, and containers of older images live on.
const REMEMBERED: usize = 16;

/// The directory of a root that holds images.
pub struct MetadataStore {
    content: PathBuf,
    references: PathBuf,
    /// Held while files are put or removed, so that nobody removes what somebody else has just put right.
    changing: Mutex<()>,
}

/// What there is of something that is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// It is there and right.
    Good,
    /// It is not there.
    Missing,
    /// It is not what it should be, or cannot be read.
    Damaged,
}

/// What [`MetadataStore::all`] gives.
#[derive(Debug, Default)]
pub struct Everything {
    /// References, and what each has named, newest first.
    pub references: Vec<(Reference, Vec<Named>)>,
    /// Files that cannot be read.
    pub damaged: Vec<PathBuf>,
}

/// The manifests that a reference has named on this host.
#[derive(Debug, Serialize, Deserialize)]
struct Known {
    reference: String,
    /// Newest first.
    images: Vec<Named>,
}

/// What a reference has named.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Named {
    /// Digest of an image's manifest.
    pub manifest: Digest,
    /// Digest of what the registry gave: the manifest, or the index that it was chosen from.
    pub top: Digest,
}

impl MetadataStore {
    /// Opens the library in `dir`, which is made if it is missing; only its owner can enter it.
    pub fn open(dir: &Path) -> io::Result<Self> {
        let library = Self {
            content: dir.join("content"),
            references: dir.join("references"),
            changing: Mutex::default(),
        };
        atomic_file::make_private_dir(&library.content)?;
        atomic_file::make_private_dir(&library.references)?;
        Ok(library)
    }

    /// Removes what a process that was killed has left half-written.
    pub fn remove_unfinished(&self) -> io::Result<()> {
        atomic_file::remove_unfinished(&self.content)?;
        atomic_file::remove_unfinished(&self.references)
    }

    /// The bytes of that digest, if they are here and undamaged.
    pub fn get(&self, digest: &Digest) -> Option<Bytes> {
        let path = self.path(digest);
        let bytes = fs::read(&path).ok()?;
        if Digest::of(&bytes) == *digest {
            return Some(bytes.into());
        }
        self.remove_damaged(digest).ok();
        None
    }

    /// Keeps `bytes`, whose digest the caller has verified.
    pub fn put(&self, digest: &Digest, bytes: &[u8]) -> io::Result<()> {
        let _changing = self.changing.lock();
        atomic_file::write_atomically(&self.path(digest), bytes)
    }

    /// Opens what [`Self::put`] kept.
    pub fn file(&self, digest: &Digest) -> io::Result<File> {
        File::open(self.path(digest))
    }

    fn path(&self, digest: &Digest) -> PathBuf {
        self.content.join(digest.hex())
    }

    /// Whether the bytes of that digest are here; they may be damaged.
    pub fn has(&self, digest: &Digest) -> bool {
        self.path(digest).is_file()
    }

    /// Whether the bytes of that digest are here and right. Reads them a little at a time.
    pub fn state(&self, digest: &Digest) -> State {
        match self.file(digest).and_then(Digest::of_reader) {
            Ok(actual) if actual == *digest => State::Good,
            Err(error) if error.kind() == io::ErrorKind::NotFound => State::Missing,
            _ => State::Damaged,
        }
    }

    /// Removes what is kept under that digest, if it is not what it should be; tells whether it was so.
    pub fn remove_damaged(&self, digest: &Digest) -> io::Result<bool> {
        let _changing = self.changing.lock();
        if self.state(digest) != State::Damaged {
            return Ok(false);
        }
        let path = self.path(digest);
        tracing::warn!(file = %path.display(), "a kept file is damaged; it is removed, to be fetched again");
        fs::remove_file(path).map(|()| true)
    }

    /// What `reference` has named, newest first.
    pub fn named(&self, reference: &Reference) -> Vec<Named> {
        self.known(reference).map(|known| known.images).unwrap_or_default()
    }

    /// Remembers what the reference names.
    pub fn remember(&self, reference: &Reference, named: Named) -> io::Result<()> {
        let _changing = self.changing.lock();
        let mut images = self.named(reference);
        if images.first() == Some(&named) {
            return Ok(());
        }
        images.retain(|known| known.manifest != named.manifest);
        images.insert(0, named);
        images.truncate(REMEMBERED);
        let known = Known {
            reference: reference.to_string(),
            images,
        };
        atomic_file::write_atomically(&self.reference_path(reference), &serde_json::to_vec_pretty(&known)?)
    }

    /// All that is known of references on this host.
    pub fn all(&self) -> io::Result<Everything> {
        let mut all = Everything::default();
        for entry in fs::read_dir(&self.references)? {
            let path = entry?.path();
            if path.extension().is_none_or(|extension| extension != "json") {
                continue;
            }
            let known = Self::read(&path).and_then(|known| Some((known.reference.parse().ok()?, known.images)));
            match known {
                Some(known) => all.references.push(known),
                None => all.damaged.push(path),
            }
        }
        all.references.sort_by_key(|(reference, _)| reference.to_string());
        Ok(all)
    }

    fn known(&self, reference: &Reference) -> Option<Known> {
        Self::read(&self.reference_path(reference))
    }

    fn read(path: &Path) -> Option<Known> {
        let bytes = fs::read(path).ok()?;
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
        let library = MetadataStore::open(dir.path()).unwrap();
        let digest = Digest::of(b"bytes");
        library.put(&digest, b"bytes").unwrap();
        assert_eq!(library.get(&digest).as_deref(), Some(&b"bytes"[..]));
        fs::write(library.path(&digest), b"bytez").unwrap();
        assert_eq!(library.get(&digest), None);
    }

    #[test]
    fn a_moved_tag_keeps_its_older_images() {
        let dir = tempfile::tempdir().unwrap();
        let library = MetadataStore::open(dir.path()).unwrap();
        let reference: Reference = "registry.example/a:latest".parse().unwrap();
        let named = |name: &[u8]| Named {
            manifest: Digest::of(name),
            top: Digest::of(name),
        };
        let (old, new) = (named(b"old"), named(b"new"));
        library.remember(&reference, old).unwrap();
        library.remember(&reference, new).unwrap();
        assert_eq!(library.named(&reference), [new, old]);
    }
}
