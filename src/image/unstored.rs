//! Metadata that cannot be stored, because the disk is full, read-only or broken. It is kept in memory, so that new
//! images start all the same, and written once the disk can be written to again.

use std::collections::HashMap;

use bytes::Bytes;
use parking_lot::Mutex;

use super::{
    metadata_store::{MetadataStore, NamedManifest},
    reference::Reference,
};
use crate::digest::Digest;

/// Most bytes of content kept in memory.
const MAX_BYTES: usize = 256 << 20;
/// Most references kept in memory.
const MAX_REFERENCES: usize = 4096;

/// Content and references in memory.
#[derive(Default)]
pub(super) struct Unstored(Mutex<State>);

#[derive(Default)]
struct State {
    content: HashMap<Digest, Bytes>,
    references: HashMap<Reference, NamedManifest>,
    bytes: usize,
    /// Whether a task tries to store everything.
    is_retrying: bool,
}

impl Unstored {
    /// The content with this digest.
    pub(super) fn get(&self, digest: &Digest) -> Option<Bytes> {
        self.0.lock().content.get(digest).cloned()
    }

    /// The manifest that `reference` names.
    pub(super) fn named(&self, reference: &Reference) -> Option<NamedManifest> {
        self.0.lock().references.get(reference).copied()
    }

    /// Keeps content. Returns false if that would take too much memory.
    pub(super) fn keep(&self, digest: &Digest, bytes: &Bytes) -> bool {
        let mut state = self.0.lock();
        if state.content.contains_key(digest) {
            return true;
        }
        if state.bytes + bytes.len() > MAX_BYTES {
            return false;
        }
        state.bytes += bytes.len();
        state.content.insert(*digest, bytes.clone());
        true
    }

    /// Keeps the manifest that `reference` names. Returns false if that would take too much memory.
    pub(super) fn keep_name(&self, reference: &Reference, named: NamedManifest) -> bool {
        let mut state = self.0.lock();
        if state.references.len() >= MAX_REFERENCES && !state.references.contains_key(reference) {
            return false;
        }
        state.references.insert(reference.clone(), named);
        true
    }

    /// Whether the caller is to try to store everything from now on, because no task does yet.
    pub(super) fn begin_retries(&self) -> bool {
        !std::mem::replace(&mut self.0.lock().is_retrying, true)
    }

    /// Tries to store everything. Returns whether nothing is left; then no task retries any more. Blocks.
    pub(super) fn store_in(&self, store: &MetadataStore) -> bool {
        let (content, references) = {
            let state = self.0.lock();
            (state.content.clone(), state.references.clone())
        };
        // Content first: a reference must not name what is missing.
        for (digest, bytes) in content {
            if store.put(&digest, &bytes).is_err() {
                return false;
            }
            let mut state = self.0.lock();
            if let Some(stored) = state.content.remove(&digest) {
                state.bytes -= stored.len();
            }
        }
        for (reference, named) in references {
            if store.record(&reference, named).is_err() {
                return false;
            }
            let mut state = self.0.lock();
            if state.references.get(&reference) == Some(&named) {
                state.references.remove(&reference);
            }
        }
        let mut state = self.0.lock();
        state.is_retrying = !state.content.is_empty() || !state.references.is_empty();
        !state.is_retrying
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_is_stored_later() {
        let dir = tempfile::tempdir().unwrap();
        let store = MetadataStore::open(dir.path()).unwrap();
        let (unstored, bytes) = (Unstored::default(), Bytes::from_static(b"bytes"));
        let (digest, reference) = (Digest::of(&bytes), "r.example/a:1".parse::<Reference>().unwrap());
        let named = NamedManifest {
            manifest: digest,
            top: digest,
        };
        assert!(unstored.keep(&digest, &bytes) && unstored.keep_name(&reference, named));
        assert_eq!([unstored.begin_retries(), unstored.begin_retries()], [true, false]);
        assert_eq!(
            (unstored.get(&digest), unstored.named(&reference)),
            (Some(bytes.clone()), Some(named))
        );
        // A file in place of the directory stands for a broken disk.
        let content = dir.path().join("content");
        std::fs::remove_dir(&content).unwrap();
        std::fs::write(&content, "").unwrap();
        assert!(!unstored.store_in(&store));
        assert_eq!(unstored.get(&digest), Some(bytes.clone()));
        std::fs::remove_file(&content).unwrap();
        std::fs::create_dir(&content).unwrap();
        assert!(unstored.store_in(&store));
        assert_eq!((unstored.get(&digest), unstored.named(&reference)), (None, None));
        assert_eq!(
            (store.get(&digest), store.named(&reference)),
            (Some(bytes), vec![named])
        );
        assert!(unstored.begin_retries(), "the next failure begins anew");
    }
}
