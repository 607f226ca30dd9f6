//! Metadata of images on disk: manifests, configurations and bootstrap layers by digest, and the manifests that each
//! reference has named. With it, a known image is served without a request to a registry.

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
};

use bytes::Bytes;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use super::reference::Reference;
use crate::{atomic_file, digest::Digest, disk_usage};

/// Maximum number of remembered manifests of a reference. Older ones are kept because tags move while containers of
/// older images live on.
const MAX_NAMED_MANIFESTS: usize = 16;

/// The directory of image metadata below a root.
pub struct MetadataStore {
    content: PathBuf,
    references: PathBuf,
    /// Locked while files are written or removed, so that no repaired file is removed.
    write_lock: Mutex<()>,
}

/// State of stored content.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ContentState {
    /// Present and intact.
    Intact,
    /// Not present.
    Missing,
    /// Its digest is wrong, or it cannot be read.
    Damaged,
}

/// Result of [`MetadataStore::all`].
#[derive(Debug, Default)]
pub struct RecordedReferences {
    /// References and the manifests that each has named, newest first.
    pub references: Vec<(Reference, Vec<NamedManifest>)>,
    /// Files that cannot be read.
    pub damaged: Vec<PathBuf>,
}

/// The manifests that a reference has named on this host.
#[derive(Debug, Serialize, Deserialize)]
struct ReferenceRecord {
    reference: String,
    /// Newest first.
    images: Vec<NamedManifest>,
}

/// A manifest that a reference has named.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct NamedManifest {
    /// Digest of the image's manifest.
    pub manifest: Digest,
    /// Digest of the document that the registry returned: the manifest, or the index it was selected from.
    pub top: Digest,
}

impl MetadataStore {
    /// Opens the store in `dir`, and creates the directory for its owner alone if it is missing.
    pub fn open(dir: &Path) -> io::Result<Self> {
        let store = Self {
            content: dir.join("content"),
            references: dir.join("references"),
            write_lock: Mutex::default(),
        };
        atomic_file::make_private_dir(&store.content)?;
        atomic_file::make_private_dir(&store.references)?;
        Ok(store)
    }

    /// Removes unfinished files of a process that was killed.
    pub fn remove_unfinished(&self) -> io::Result<()> {
        atomic_file::remove_unfinished(&self.content)?;
        atomic_file::remove_unfinished(&self.references)
    }

    /// Disk space of the store, in bytes.
    pub fn disk_usage(&self) -> io::Result<u64> {
        Ok(disk_usage::of_dir(&self.content)? + disk_usage::of_dir(&self.references)?)
    }

    /// The content with this digest, if it is present and intact.
    pub fn get(&self, digest: &Digest) -> Option<Bytes> {
        let path = self.path(digest);
        let bytes = fs::read(&path).ok()?;
        if Digest::of(&bytes) == *digest {
            return Some(bytes.into());
        }
        self.remove_damaged(digest).ok();
        None
    }

    /// Stores `bytes`, whose digest the caller has verified.
    pub fn put(&self, digest: &Digest, bytes: &[u8]) -> io::Result<()> {
        let _guard = self.write_lock.lock();
        atomic_file::write_atomically(&self.path(digest), bytes)
    }

    /// Opens the content with this digest.
    pub fn file(&self, digest: &Digest) -> io::Result<File> {
        File::open(self.path(digest))
    }

    fn path(&self, digest: &Digest) -> PathBuf {
        self.content.join(digest.hex())
    }

    /// Whether the content with this digest is present; it may be damaged.
    pub fn has(&self, digest: &Digest) -> bool {
        self.path(digest).is_file()
    }

    /// Hashes the content with this digest, without reading it into memory as a whole.
    pub fn state(&self, digest: &Digest) -> ContentState {
        match self.file(digest).and_then(Digest::of_reader) {
            Ok(actual) if actual == *digest => ContentState::Intact,
            Err(error) if error.kind() == io::ErrorKind::NotFound => ContentState::Missing,
            _ => ContentState::Damaged,
        }
    }

    /// Removes the content with this digest if it is damaged. Returns whether it was.
    pub fn remove_damaged(&self, digest: &Digest) -> io::Result<bool> {
        let _guard = self.write_lock.lock();
        if self.state(digest) != ContentState::Damaged {
            return Ok(false);
        }
        let path = self.path(digest);
        tracing::warn!(file = %path.display(), "removing damaged metadata file; it is fetched again at its next use");
        fs::remove_file(path).map(|()| true)
    }

    /// The manifests that `reference` has named, newest first.
    pub fn named(&self, reference: &Reference) -> Vec<NamedManifest> {
        self.known(reference).map(|known| known.images).unwrap_or_default()
    }

    /// Records the manifest that `reference` names now.
    pub fn record(&self, reference: &Reference, named: NamedManifest) -> io::Result<()> {
        let _guard = self.write_lock.lock();
        let mut images = self.named(reference);
        if images.first() == Some(&named) {
            return Ok(());
        }
        images.retain(|known| known.manifest != named.manifest);
        images.insert(0, named);
        images.truncate(MAX_NAMED_MANIFESTS);
        let known = ReferenceRecord {
            reference: reference.to_string(),
            images,
        };
        atomic_file::write_atomically(&self.reference_path(reference), &serde_json::to_vec_pretty(&known)?)
    }

    /// All recorded references.
    pub fn all(&self) -> io::Result<RecordedReferences> {
        let mut all = RecordedReferences::default();
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

    fn known(&self, reference: &Reference) -> Option<ReferenceRecord> {
        Self::read(&self.reference_path(reference))
    }

    fn read(path: &Path) -> Option<ReferenceRecord> {
        let bytes = fs::read(path).ok()?;
        serde_json::from_slice(&bytes)
            .inspect_err(|error| tracing::warn!(file = %path.display(), %error, "ignoring damaged reference record"))
            .ok()
    }

    /// Hashes the reference, because it may be longer than a file name and contains slashes.
    fn reference_path(&self, reference: &Reference) -> PathBuf {
        self.references
            .join(format!("{}.json", Digest::of(reference.to_string().as_bytes()).hex()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn damaged_content_is_not_returned() {
        let dir = tempfile::tempdir().unwrap();
        let store = MetadataStore::open(dir.path()).unwrap();
        let digest = Digest::of(b"bytes");
        store.put(&digest, b"bytes").unwrap();
        assert_eq!(store.get(&digest).as_deref(), Some(&b"bytes"[..]));
        fs::write(store.path(&digest), b"bytez").unwrap();
        assert_eq!(store.get(&digest), None);
    }

    #[test]
    fn moved_tag_keeps_its_older_manifests() {
        let dir = tempfile::tempdir().unwrap();
        let store = MetadataStore::open(dir.path()).unwrap();
        let reference: Reference = "registry.example/a:latest".parse().unwrap();
        let named = |name: &[u8]| NamedManifest {
            manifest: Digest::of(name),
            top: Digest::of(name),
        };
        let (old, new) = (named(b"old"), named(b"new"));
        store.record(&reference, old).unwrap();
        store.record(&reference, new).unwrap();
        assert_eq!(store.named(&reference), [new, old]);
    }
}
