//! Removes images from disk that nothing needs: metadata, traces and cached blobs.
//!
//! What is needed is decided by manifest. The caller knows which manifests are published; this module adds the images
//! that were used lately, and those that are being fetched. Everything that remains belongs to these.
//!
//! A pull looks an image's metadata up before it publishes the image, and each look-up counts as a use. So an image
//! that is about to be published is not removed, unless the minimum age is shorter than a pull. Whatever is removed can
//! be fetched again.

use std::{collections::HashSet, io, time::Duration};

use serde::{Deserialize, Serialize};

use super::{
    manifest::{Document, ImageManifest, Selection},
    resolve::Images,
};
use crate::{digest::Digest, disk_usage::StoredFile};

/// What is removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct GarbageOptions {
    /// Images and temporary files that were used since then are kept.
    pub min_age: Duration,
    /// Whether to remove nothing, and to return what would be removed.
    pub dry_run: bool,
}

/// What was removed.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Garbage {
    /// Number of published layers that were withdrawn.
    pub layers: usize,
    /// Manifests of the images whose metadata was removed.
    pub images: Vec<Digest>,
    /// Number of cached blobs.
    pub blobs: usize,
    /// Number of start-up traces.
    pub traces: usize,
    /// Disk space of all that, in bytes.
    pub bytes: u64,
}

impl Images {
    /// Removes all images from disk but `needed`, given by manifest. Blocks.
    pub fn remove_garbage(&self, needed: &HashSet<Digest>, options: GarbageOptions) -> io::Result<Garbage> {
        let mut garbage = Garbage::default();
        let kept = self.remove_metadata(needed, options, &mut garbage)?;
        self.remove_traces(&kept, options, &mut garbage)?;
        self.remove_blobs(&kept, options, &mut garbage)?;
        self.count_metadata()?;
        Ok(garbage)
    }

    /// Returns the manifests of the images that remain.
    fn remove_metadata(
        &self,
        needed: &HashSet<Digest>,
        options: GarbageOptions,
        garbage: &mut Garbage,
    ) -> io::Result<HashSet<Digest>> {
        let store = self.metadata.blocking();
        let content = store.content()?;
        let is_old = |content: &StoredFile| content.age >= options.min_age;
        let mut kept = needed | &self.kept.all();
        let references = store.all()?.references;
        let named = references.iter().flat_map(|(_, images)| images);
        let young: HashSet<_> = content
            .iter()
            .filter(|content| !is_old(content))
            .map(|content| content.digest)
            .collect();
        kept.extend(
            named
                .clone()
                .map(|named| named.manifest)
                .filter(|manifest| young.contains(manifest)),
        );
        let mut kept_content = &kept | &young;
        kept_content.extend(
            named
                .filter(|named| kept.contains(&named.manifest))
                .map(|named| named.top),
        );
        for manifest in kept.iter().filter_map(|digest| self.stored_manifest(digest)) {
            kept_content.insert(manifest.config);
            kept_content.extend(manifest.layers.iter().map(|layer| layer.digest));
        }
        garbage.bytes += store.retain_named(|named| kept.contains(&named.manifest), options.dry_run)?;
        if !options.dry_run {
            store.remove_unfinished_since(options.min_age)?;
        }
        for content in content.iter().filter(|content| !kept_content.contains(&content.digest)) {
            if self.stored_manifest(&content.digest).is_some() {
                garbage.images.push(content.digest);
            }
            garbage.bytes += content.bytes;
        }
        if !options.dry_run {
            // Their trees may be in memory for a while.
            garbage
                .images
                .iter()
                .for_each(|manifest| self.loader.forget_loaded(manifest));
            let unneeded = content.iter().filter(|content| !kept_content.contains(&content.digest));
            unneeded.clone().try_for_each(|content| store.remove(&content.digest))?;
        }
        Ok(kept)
    }

    fn remove_traces(&self, kept: &HashSet<Digest>, options: GarbageOptions, garbage: &mut Garbage) -> io::Result<()> {
        let traces = &self.loader.backing().traces;
        for trace in traces.files()? {
            if kept.contains(&trace.digest) || trace.age < options.min_age {
                continue;
            }
            garbage.traces += 1;
            garbage.bytes += trace.bytes;
            if !options.dry_run {
                traces.remove(&trace.digest)?;
            }
        }
        Ok(())
    }

    fn remove_blobs(&self, kept: &HashSet<Digest>, options: GarbageOptions, garbage: &mut Garbage) -> io::Result<()> {
        let manifests = kept.iter().filter_map(|digest| self.stored_manifest(digest));
        let layers = manifests.flat_map(|manifest| manifest.layers);
        let mut ids: HashSet<String> = layers.map(|layer| layer.digest.hex()).collect();
        // A blob may be missing in the manifest, and a manifest on disk.
        for image in self.loader.loaded().iter().filter(|image| kept.contains(&image.digest)) {
            ids.extend(image.contents.tree.blobs().iter().map(|blob| blob.id.clone()));
        }
        for (name, bytes) in self.cache().sizes() {
            let id = name.split('.').next().unwrap_or(&name);
            if ids.contains(id) || self.cache().is_pinned(&name) {
                continue;
            }
            if !options.dry_run {
                self.cache().clear(&name)?;
            }
            // An empty blob of an image that the kernel remembers is no news.
            if bytes > 0 {
                garbage.blobs += 1;
                garbage.bytes += bytes;
            }
        }
        Ok(())
    }

    /// The image manifest with this digest, if it is on disk. This is no use of the image.
    fn stored_manifest(&self, digest: &Digest) -> Option<ImageManifest> {
        let bytes = self.metadata.blocking().peek(digest)?;
        match Document::parse(&bytes, Selection::PreferNydus).ok()? {
            Document::Image(manifest) => Some(manifest),
            Document::Index(_) => None,
        }
    }
}

#[cfg(test)]
mod tests;
