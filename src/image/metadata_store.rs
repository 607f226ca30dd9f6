//! Metadata of images on disk: manifests, configurations and bootstrap layers by digest, and the manifests that each
//! reference has named. With it, a known image is served without a request to a registry.

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use super::reference::Reference;
use crate::{
    atomic_file,
    digest::Digest,
    disk_usage::{self, StoredFile},
};

/// Maximum number of remembered manifests of a reference. Older ones are kept because tags move while containers of
/// older images live on.
const MAX_NAMED_MANIFESTS: usize = 16;
/// Accuracy of the recorded time of a use.
const USE_RESOLUTION: Duration = Duration::from_secs(60);
/// Largest content that may be a manifest, in bytes.
const MAX_MANIFEST_BYTES: u64 = 8 << 20;

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

    /// All content. Its age is the time since it was last used, to about a minute.
    pub fn content(&self) -> io::Result<Vec<StoredFile>> {
        disk_usage::stored_files(&self.content, "")
    }

    /// The content with this digest, as [`Self::get`] returns it, if it is no longer than a manifest. This is no use.
    pub fn peek(&self, digest: &Digest) -> Option<Bytes> {
        let file = self.path(digest);
        let is_short = fs::metadata(&file).ok()?.len() <= MAX_MANIFEST_BYTES;
        let bytes = fs::read(&file).ok().filter(|_| is_short)?;
        (Digest::of(&bytes) == *digest).then(|| bytes.into())
    }

    /// The content with this digest, if it is present and intact.
    pub fn get(&self, digest: &Digest) -> Option<Bytes> {
        use_file(&File::open(self.path(digest)).ok()?);
        let bytes = fs::read(self.path(digest)).ok()?;
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
        File::open(self.path(digest)).inspect(use_file)
    }

    /// Removes the content with this digest.
    pub fn remove(&self, digest: &Digest) -> io::Result<()> {
        let _guard = self.write_lock.lock();
        match fs::remove_file(self.path(digest)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    /// Forgets which manifests references have named, but for those that `is_kept` selects. Returns the disk space of
    /// the files that this removes, in bytes. With `dry_run`, changes nothing.
    pub fn retain_named(&self, is_kept: impl Fn(&NamedManifest) -> bool, dry_run: bool) -> io::Result<u64> {
        let _guard = self.write_lock.lock();
        let mut bytes = 0;
        for (reference, mut images) in self.all()?.references {
            let (before, path) = (images.len(), self.reference_path(&reference));
            images.retain(&is_kept);
            if images.is_empty() {
                bytes += disk_usage::of_file(&fs::metadata(&path)?);
            }
            match images.len() {
                _ if dry_run => {}
                0 => fs::remove_file(&path)?,
                len if len < before => self.write_named(&reference, images)?,
                _ => {}
            }
        }
        Ok(bytes)
    }

    /// Removes unfinished files that were not written to for that time.
    pub fn remove_unfinished_since(&self, age: Duration) -> io::Result<()> {
        atomic_file::remove_unfinished_since(&self.content, age)?;
        atomic_file::remove_unfinished_since(&self.references, age)
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
        self.write_named(reference, images)
    }

    fn write_named(&self, reference: &Reference, images: Vec<NamedManifest>) -> io::Result<()> {
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

/// Notes that a file is used now: in the time of its last change, which costs no write to it.
fn use_file(file: &File) {
    if file
        .metadata()
        .is_ok_and(|metadata| disk_usage::age(&metadata) > USE_RESOLUTION)
    {
        // Without it, the file is removed too early, and fetched again.
        file.set_modified(SystemTime::now()).ok();
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

    #[test]
    fn use_makes_content_young() {
        let dir = tempfile::tempdir().unwrap();
        let store = MetadataStore::open(dir.path()).unwrap();
        let digest = Digest::of(b"bytes");
        store.put(&digest, b"bytes").unwrap();
        let age = || store.content().unwrap()[0].age;
        let make_old = || {
            let long_ago = SystemTime::now() - Duration::from_secs(3600);
            store.file(&digest).unwrap().set_modified(long_ago).unwrap();
        };
        make_old();
        assert_eq!(store.peek(&digest).as_deref(), Some(&b"bytes"[..]));
        assert!(age() >= Duration::from_secs(3600));
        store.get(&digest).unwrap();
        assert!(age() < Duration::from_secs(600));
        make_old();
        store.file(&digest).unwrap();
        assert!(age() < Duration::from_secs(600));
        store.remove(&digest).unwrap();
        store.remove(&digest).unwrap();
        assert!(store.content().unwrap().is_empty() && store.peek(&digest).is_none());
    }

    #[test]
    fn references_forget_removed_manifests() {
        let dir = tempfile::tempdir().unwrap();
        let store = MetadataStore::open(dir.path()).unwrap();
        let [a, b]: [Reference; 2] = ["registry.example/a", "registry.example/b"].map(|name| name.parse().unwrap());
        let [old, new] = [&b"old"[..], b"new"].map(|name| NamedManifest {
            manifest: Digest::of(name),
            top: Digest::of(name),
        });
        store.record(&a, old).unwrap();
        store.record(&a, new).unwrap();
        store.record(&b, old).unwrap();
        let kept = |dry_run| store.retain_named(|named| *named == new, dry_run).unwrap();
        let freed = kept(true);
        assert_eq!((store.named(&b), kept(false)), (vec![old], freed));
        assert_eq!((store.named(&a), store.named(&b)), (vec![new], vec![]));
        assert_eq!(fs::read_dir(&store.references).unwrap().count(), 1);
    }
}
