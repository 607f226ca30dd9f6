//! Published layers and images.
//!
//! A change is first made durable in the [`database`](super::database). Additions are visible through FUSE before the
//! [`records`](super::records) announce them to containers/storage; removals happen in the opposite order.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use parking_lot::{Mutex, RwLock};
use sha2::{Digest as _, Sha256};

use super::{
    database::{Database, ImageRow, LayerRow, Published, TreeRow},
    error::StoreError,
    graph_roots::{GraphRoots, RequiredLayers},
    layer_index::{LayerIndex, PublishedLayer},
    layout::{self, StoreLayout},
    node_ids::{self, LAYER_NODES},
    records,
    reserve::DiskReserve,
};
use crate::{digest::Digest, error_chain::ErrorChain};

/// Maximum number of references that are remembered as sources of a tree.
const MAX_SOURCES: usize = 16;
/// Time after an announcement during which the layer is not withdrawn, because the pull may still be running.
pub const PULL_GRACE: Duration = Duration::from_secs(600);
/// Accuracy of the recorded time of an announcement.
const ANNOUNCED_RESOLUTION_SECONDS: i64 = 60;

/// Everything published below a root.
pub struct ImageStore {
    layout: StoreLayout,
    database: Database,
    reserve: DiskReserve,
    graph_roots: GraphRoots,
    index: RwLock<LayerIndex>,
    /// Locked for the whole of a change.
    writer: Mutex<WriterState>,
}

struct WriterState {
    /// Content of the database. FUSE may show another state while the records cannot be written.
    durable: Published,
    /// This process may have used all node ids below.
    next_node: u32,
    /// Whether the records may differ from `durable`, because writing them failed.
    are_records_stale: bool,
}

/// A layer to be published.
#[derive(Debug, Clone)]
pub struct NewLayer {
    /// Digest of the layer as stored in the registry.
    pub digest: Digest,
    /// Length of the layer as stored in the registry, in bytes.
    pub size: u64,
    /// Digest of the uncompressed layer.
    pub diff_id: Digest,
    /// Length of the uncompressed layer, in bytes.
    pub diff_size: u64,
    /// Compression in containers/storage's numbering (`archive.Compression`): 0 none, 2 gzip, 4 zstd.
    pub compression: u8,
}

/// The layers of an image to be published. The last one shows the image's tree, the others are empty.
#[derive(Debug, Clone)]
pub struct Publication {
    /// The layers, lowest first.
    pub layers: Vec<NewLayer>,
    /// Digest of the image's manifest.
    pub manifest: Digest,
    /// Number of inodes in the image's tree.
    pub inodes: u32,
    /// A reference whose registry has the image.
    pub source: String,
}

/// An image to be published by name.
#[derive(Debug, Clone)]
pub struct NewImage {
    /// Names of the image: complete references.
    pub names: Vec<String>,
    /// Manifest for containers/storage, with ordinary media types.
    pub ordinary_manifest: String,
    /// Configuration of the image.
    pub config: String,
    /// Manifest as stored in the registry.
    pub registry_manifest: String,
    /// Whether the cache must keep all of the image.
    pub is_pinned: bool,
}

/// Layer ids for these diff IDs, both lowest first. containers/image computes them in the same way (`layerID` in
/// `storage/storage_dest.go`).
pub fn layer_ids(diff_ids: impl IntoIterator<Item = Digest>) -> Vec<String> {
    let mut parent: Option<String> = None;
    let id = |diff_id: Digest| {
        let id = match &parent {
            None => diff_id.hex(),
            Some(parent) => hex::encode(Sha256::digest(format!("{parent}+{}", diff_id.hex()))),
        };
        parent = Some(id.clone());
        id
    };
    diff_ids.into_iter().map(id).collect()
}

impl ImageStore {
    /// Opens what is published below `root`, and writes the records to match. Blocks.
    pub fn open(root: &Path, graph_roots: &[PathBuf]) -> Result<Self, StoreError> {
        let layout = StoreLayout::new(root);
        layout::create_empty(root).map_err(|source| StoreError::Write {
            path: layout.store(),
            source,
        })?;
        let reserve = DiskReserve::open(&layout.reserve());
        let database = open_database(&layout.database(), &reserve)?;
        let published = database.load()?;
        records::remove_unfinished(&layout)?;
        // Forced, because an earlier process may have died before it changed the lock's content.
        let written = reserve.with(|| records::write_layers(&layout, &published, true));
        let written = written.and_then(|()| reserve.with(|| records::write_images(&layout, &published, true)));
        let are_records_stale = match written {
            Err(error) if error.is_unwritable() => {
                tracing::warn!(error = %ErrorChain(&error), "failed to write records of published images");
                true
            }
            written => written.map(|()| false)?,
        };
        let writer = WriterState {
            next_node: published.layers.values().map(end_node).max().unwrap_or(0),
            durable: published.clone(),
            are_records_stale,
        };
        Ok(Self {
            layout,
            database,
            reserve,
            graph_roots: GraphRoots::new(graph_roots),
            index: RwLock::new(LayerIndex::of(published)),
            writer: Mutex::new(writer),
        })
    }

    /// Paths of the store.
    pub fn layout(&self) -> &StoreLayout {
        &self.layout
    }

    /// Everything that is published now.
    pub fn published(&self) -> Published {
        self.index.read().published.clone()
    }

    /// The layer with this id.
    pub fn layer(&self, id: &str) -> Option<Arc<PublishedLayer>> {
        self.index.read().layers.get(id).cloned()
    }

    /// The layer with this name in `l/`.
    pub fn layer_of_link(&self, link: &str) -> Option<Arc<PublishedLayer>> {
        self.index.read().links.get(link).cloned()
    }

    /// The layer whose range contains the node id.
    pub fn layer_of_node(&self, node: u32) -> Option<Arc<PublishedLayer>> {
        let index = self.index.read();
        let (_, layer) = index.nodes.range(..=node).next_back()?;
        (node - layer.first_node < layer.node_count()).then(|| Arc::clone(layer))
    }

    /// All layers, in the order of their node ids.
    pub fn layers(&self) -> Vec<Arc<PublishedLayer>> {
        self.index.read().nodes.values().cloned().collect()
    }

    /// Publishes again an image whose topmost layer is published already, and adds `source` as a source of the layer.
    /// Returns `false` if the layer is not published. Blocks.
    pub fn republish(&self, top: &str, source: &str) -> Result<bool, StoreError> {
        let mut writer = self.writer.lock();
        let mut after = writer.durable.clone();
        let Some(tree) = after.layers.get_mut(top).and_then(|row| row.tree.as_mut()) else {
            return Ok(false);
        };
        tree.add_source(source);
        tree.announce();
        self.add(&mut writer, after)?;
        Ok(true)
    }

    /// Publishes layers for a pull that begins. Returns the id of the topmost layer. Blocks.
    pub fn publish(&self, publication: &Publication) -> Result<String, StoreError> {
        let mut writer = self.writer.lock();
        let mut after = writer.durable.clone();
        let top = add_layers(&mut after, publication, writer.next_node)?;
        if let Some(tree) = after.layers.get_mut(&top).and_then(|row| row.tree.as_mut()) {
            tree.announce();
        }
        self.add(&mut writer, after)?;
        Ok(top)
    }

    /// Publishes an image by name, with its layers. Returns the image's id. Blocks.
    pub fn publish_image(&self, publication: &Publication, image: NewImage) -> Result<String, StoreError> {
        let mut writer = self.writer.lock();
        let mut after = writer.durable.clone();
        let layer = add_layers(&mut after, publication, writer.next_node)?;
        let id = Digest::of(image.config.as_bytes()).hex();
        for row in after.images.values_mut() {
            row.names.retain(|name| !image.names.contains(name));
        }
        let known = after.images.get(&id);
        let mut names = image.names;
        names.extend(known.into_iter().flat_map(|known| known.names.clone()));
        let sizes = publication.layers.iter().map(|layer| layer.size);
        let row = ImageRow {
            names,
            manifest: publication.manifest,
            layer,
            ordinary_manifest: image.ordinary_manifest,
            registry_manifest: image.registry_manifest,
            config: image.config,
            created: known.map_or_else(now, |known| known.created),
            size: sizes.fold(0, u64::saturating_add),
            is_pinned: image.is_pinned || known.is_some_and(|known| known.is_pinned),
        };
        after.images.insert(id.clone(), row);
        self.add(&mut writer, after)?;
        // Removes the image that had the name before, unless a container still requires it.
        if let Err(error) = self.remove_unnamed(&mut writer) {
            tracing::warn!(error = %ErrorChain(&error), "failed to remove unnamed images");
        }
        Ok(id)
    }

    /// Sets whether the cache must keep all of the image of that name. Returns its id. Blocks.
    pub fn set_pinned(&self, name: &str, is_pinned: bool) -> Result<String, StoreError> {
        let mut writer = self.writer.lock();
        let mut after = writer.durable.clone();
        let mut rows = after.images.iter_mut();
        let named = rows.find(|(_, row)| row.names.iter().any(|known| known == name));
        let (id, row) = named.ok_or_else(|| StoreError::UnknownName(name.to_owned()))?;
        row.is_pinned = is_pinned;
        let id = id.clone();
        self.add(&mut writer, after)?;
        Ok(id)
    }

    /// Removes a name. With its last name, an image loses its record and the layers that nothing else requires. Blocks.
    pub fn remove_name(&self, name: &str) -> Result<(), StoreError> {
        let mut writer = self.writer.lock();
        let mut after = writer.durable.clone();
        let named = |row: &&mut ImageRow| row.names.iter().any(|known| known == name);
        let row = after.images.values_mut().find(named);
        let row = row.ok_or_else(|| StoreError::UnknownName(name.to_owned()))?;
        row.names.retain(|known| known != name);
        if row.names.is_empty()
            && let Some((container, graph_root)) = self.required_layers()?.container_on(&row.layer)
        {
            return Err(StoreError::InUse {
                name: name.to_owned(),
                layer: container.clone(),
                graph_root: graph_root.clone(),
            });
        }
        self.remove(&mut writer, after)?;
        self.remove_unnamed(&mut writer)
    }

    /// Removes the nameless records that no container requires, then the layers that nothing requires any more. The
    /// graph roots are read again in between, because a container may have been created before the record was removed.
    fn remove_unnamed(&self, writer: &mut WriterState) -> Result<(), StoreError> {
        if writer.durable.images.values().all(|row| !row.names.is_empty()) {
            return Ok(());
        }
        let required = self.required_layers()?;
        let mut after = writer.durable.clone();
        let mut layers = Vec::new();
        after.images.retain(|_, row| {
            let stays = !row.names.is_empty() || required.container_on(&row.layer).is_some();
            if !stays {
                layers.push(row.layer.clone());
            }
            stays
        });
        self.remove(writer, after)?;
        let required = self.required_layers()?;
        let mut after = writer.durable.clone();
        for layer in layers {
            withdraw(&mut after, &layer, &required);
        }
        self.remove(writer, after)
    }

    /// Withdraws all layers that no image record, graph root or pull of the last `min_age` needs, except those whose
    /// tree `is_spared` selects. Returns their number and what is published then. With `dry_run`, changes nothing.
    /// Blocks.
    pub fn withdraw_unneeded(
        &self,
        min_age: Duration,
        is_spared: impl Fn(&TreeRow) -> bool,
        dry_run: bool,
    ) -> Result<(usize, Published), StoreError> {
        let mut writer = self.writer.lock();
        let required = self.required_layers()?;
        let mut after = writer.durable.clone();
        let mut needed = needed_layers(&after, &required, min_age);
        let spared = after
            .layers
            .iter()
            .filter(|(_, row)| row.tree.as_ref().is_some_and(&is_spared));
        needed.extend(spared.flat_map(|(id, _)| layer_chain(&after.layers, id)));
        after.layers.retain(|id, _| needed.contains(id));
        let withdrawn = writer.durable.layers.len() - after.layers.len();
        if !dry_run && withdrawn > 0 {
            self.remove(&mut writer, after.clone())?;
        }
        Ok((withdrawn, after))
    }

    /// The published layers that the graph roots of this host require. Blocks.
    pub fn required_layers(&self) -> Result<RequiredLayers, StoreError> {
        // Reads a copy: FUSE requests wait for the lock of the index.
        let published = self.published();
        self.graph_roots.required_layers(&published.layers)
    }

    fn add(&self, writer: &mut WriterState, after: Published) -> Result<(), StoreError> {
        let Some(is_forced) = self.commit(writer, after)? else {
            return Ok(());
        };
        *self.index.write() = LayerIndex::of(writer.durable.clone());
        self.write_layers(writer, is_forced)?;
        self.write_images(writer, is_forced)?;
        writer.are_records_stale = false;
        self.reserve.refill();
        Ok(())
    }

    fn remove(&self, writer: &mut WriterState, after: Published) -> Result<(), StoreError> {
        let Some(is_forced) = self.commit(writer, after)? else {
            return Ok(());
        };
        self.write_images(writer, is_forced)?;
        self.write_layers(writer, is_forced)?;
        *self.index.write() = LayerIndex::of(writer.durable.clone());
        writer.are_records_stale = false;
        self.reserve.refill();
        Ok(())
    }

    fn write_layers(&self, writer: &WriterState, is_forced: bool) -> Result<(), StoreError> {
        let write = || records::write_layers(&self.layout, &writer.durable, is_forced);
        self.reserve.with(write)
    }

    fn write_images(&self, writer: &WriterState, is_forced: bool) -> Result<(), StoreError> {
        let write = || records::write_images(&self.layout, &writer.durable, is_forced);
        self.reserve.with(write)
    }

    /// Makes a change durable. Returns `None` if there is nothing to write. Otherwise returns whether to write the
    /// records even if they look up to date, because an earlier write failed.
    fn commit(&self, writer: &mut WriterState, after: Published) -> Result<Option<bool>, StoreError> {
        let were_records_stale = writer.are_records_stale;
        if writer.durable != after {
            self.reserve.with(|| self.database.commit(&writer.durable, &after))?;
            writer.next_node = after
                .layers
                .values()
                .map(end_node)
                .max()
                .unwrap_or(0)
                .max(writer.next_node);
            writer.durable = after;
        } else if !were_records_stale {
            return Ok(None);
        }
        writer.are_records_stale = true;
        Ok(Some(were_records_stale))
    }
}

/// Opens the database, or a copy in memory if it cannot be written to.
fn open_database(path: &Path, reserve: &DiskReserve) -> Result<Database, StoreError> {
    match reserve.with(|| Database::open(path)) {
        Err(error) if error.is_unwritable() && path.exists() => {
            tracing::warn!(
                error = %ErrorChain(&error),
                "failed to open database for writing; publishing no images until the root can be written to"
            );
            Database::open_copy(path)
        }
        opened => opened,
    }
}

fn now() -> i64 {
    jiff::Timestamp::now().as_second()
}

/// Adds the missing layers and returns the id of the topmost one. New layers get node ids from `next_node` on.
fn add_layers(published: &mut Published, publication: &Publication, next_node: u32) -> Result<String, StoreError> {
    let ids = layer_ids(publication.layers.iter().map(|layer| layer.diff_id));
    for (position, (id, layer)) in ids.iter().zip(&publication.layers).enumerate() {
        let is_top = position + 1 == ids.len();
        // The only check of a data blob. It rejects layers of ordinary images.
        if !is_top && layer.digest != layer.diff_id {
            return Err(StoreError::NotDataBlob(layer.digest));
        }
        match published.layers.get_mut(id).map(|known| (&mut known.tree, is_top)) {
            Some((Some(tree), true)) => {
                tree.add_source(&publication.source);
                continue;
            }
            // A data blob of one image is the tree of another: one of the manifests is wrong.
            Some((Some(_), false)) => return Err(StoreError::Conflict(layer.digest)),
            Some((None, false)) => continue,
            // A presumed data blob turns out to be a bootstrap, whose digest was verified.
            Some((None, true)) | None => {}
        }
        let tree = is_top.then(|| TreeRow {
            manifest: publication.manifest,
            inodes: publication.inodes,
            sources: vec![publication.source.clone()],
            announced: 0,
        });
        let len = LAYER_NODES.saturating_add(tree.as_ref().map_or(0, |tree| tree.inodes));
        let taken = published
            .layers
            .values()
            .map(|row| (row.first_node, row_node_count(row)))
            .collect();
        let first_node = node_ids::allocate(&taken, next_node, len).ok_or(StoreError::NodeIdsExhausted(len))?;
        let row = LayerRow {
            parent: position.checked_sub(1).map(|below| ids[below].clone()),
            digest: layer.digest,
            size: layer.size,
            diff_id: layer.diff_id,
            diff_size: layer.diff_size,
            compression: layer.compression,
            created: now(),
            first_node,
            tree,
        };
        published.layers.insert(id.clone(), row);
    }
    // Images without layers are never published.
    Ok(ids.last().cloned().unwrap_or_default())
}

/// Removes the layer and those below it, unless an image record, a graph root or a running pull requires them.
fn withdraw(published: &mut Published, layer: &str, required: &RequiredLayers) {
    let needed = needed_layers(published, required, PULL_GRACE);
    for id in layer_chain(&published.layers, layer) {
        if !needed.contains(&id) && !published.layers.values().any(|row| row.parent.as_ref() == Some(&id)) {
            published.layers.remove(&id);
        }
    }
}

/// The layers that an image record, a graph root or a pull of the last `min_age` needs, with all layers below.
fn needed_layers(published: &Published, required: &RequiredLayers, min_age: Duration) -> BTreeSet<String> {
    let mut needed: BTreeSet<String> = required.layers.clone();
    let min_age = i64::try_from(min_age.as_secs()).unwrap_or(i64::MAX);
    let is_announced = |row: &LayerRow| row.tree.as_ref().is_some_and(|tree| now() - tree.announced < min_age);
    let announced = published.layers.iter().filter(|(_, row)| is_announced(row));
    let tops = published
        .images
        .values()
        .map(|row| &row.layer)
        .chain(announced.map(|(id, _)| id));
    for top in tops {
        needed.extend(layer_chain(&published.layers, top));
    }
    needed
}

/// The ids of the layer and of those below it, topmost first.
pub fn layer_chain(layers: &BTreeMap<String, LayerRow>, top: &str) -> Vec<String> {
    let parent = |id: &String| layers.get(id)?.parent.clone();
    let top = Some(top.to_owned()).filter(|top| layers.contains_key(top));
    std::iter::successors(top, parent).collect()
}

/// Number of node ids of a layer.
fn row_node_count(row: &LayerRow) -> u32 {
    LAYER_NODES.saturating_add(row.tree.as_ref().map_or(0, |tree| tree.inodes))
}

/// One past the last node id of a layer.
fn end_node(row: &LayerRow) -> u32 {
    row.first_node.saturating_add(row_node_count(row))
}

impl TreeRow {
    /// Records that a pull begins.
    fn announce(&mut self) {
        // Coarse, so that many pulls at once do not write each time.
        if (now() - self.announced).abs() > ANNOUNCED_RESOLUTION_SECONDS {
            self.announced = now();
        }
    }

    fn add_source(&mut self, source: &str) {
        if !self.sources.iter().any(|known| known == source) {
            self.sources.push(source.to_owned());
            let excess = self.sources.len().saturating_sub(MAX_SOURCES);
            self.sources.drain(..excess);
        }
    }
}

#[cfg(test)]
mod tests;
