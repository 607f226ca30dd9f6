//! Keeps the disk space of a root within its limit.

use std::{collections::HashSet, io};

use super::{loaded::Backing, metadata_store::MetadataStore, resolve::Images};
use crate::{blob::cache_dir::BlobCache, digest::Digest};

impl Images {
    /// The cached blobs.
    pub fn cache(&self) -> &BlobCache {
        self.loader.backing().cache.cache()
    }

    /// Sets the blobs that are never evicted.
    pub fn set_pinned(&self, blobs: &[Digest]) {
        let ids: HashSet<_> = blobs.iter().map(Digest::hex).collect();
        self.cache().set_pinned(ids);
    }

    /// Counts the disk space of metadata and traces, adapts to the free space of the disk, and evicts what exceeds the
    /// limit. To be called regularly. Blocks.
    pub fn maintain(&self) -> io::Result<()> {
        self.count_metadata()?;
        self.cache().maintain()
    }

    /// Counts the disk space of metadata and traces.
    pub(super) fn count_metadata(&self) -> io::Result<()> {
        count_metadata(self.metadata.blocking(), self.loader.backing())
    }
}

/// Counts the disk space of metadata and traces for the limit of the cache.
pub(super) fn count_metadata(metadata: &MetadataStore, backing: &Backing) -> io::Result<()> {
    let bytes = metadata.disk_usage()? + backing.traces.disk_usage()?;
    backing.cache.cache().set_other_usage(bytes);
    Ok(())
}
