//! What is published: layers, and images that are known by name.
//!
//! A change is made durable in the [`database`](super::database) first. What is added is then shown by FUSE before the
//! [`records`](super::records) tell containers/storage of it; what is removed goes the other way round.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    path::{Path, PathBuf},
    sync::Arc,
};

use parking_lot::{Mutex, RwLock};
use sha2::{Digest as _, Sha256};

use super::{
    database::{Database, ImageRow, LayerRow, Published, TreeRow},
    error::StoreError,
    graph_roots::{GraphRoots, Needs},
    layout::{self, StoreLayout},
    node_ids::{self, NAMES},
    records,
};
use crate::{digest::Digest, error_chain::ErrorChain};

/// Most references that are remembered as sources of a tree.
const MAX_SOURCES: usize = 16;
/// For how many seconds an announced layer is not withdrawn, because the pull may not have ended.
const PULL_TIME: i64 = 600;
/// To how many seconds it is noted when a layer was announced.
const ANNOUNCED_STEP: i64 = 60;
/// Letters and digits of a link's name.
const LINK_LEN: usize = 26;

/// Everything that is published below a root.
pub struct ImageStore {
    layout: StoreLayout,
    database: Database,
    graph_roots: GraphRoots,
    state: RwLock<State>,
    /// Held during a change.
    changing: Mutex<Changing>,
}

struct Changing {
    /// What is in the database. FUSE may show another state while the records cannot be written.
    durable: Published,
    /// Node numbers below have been in use by this process.
    next_node: u32,
    /// Whether the records may differ from what is durable, because they could not be written.
    is_unwritten: bool,
}

#[derive(Default)]
struct State {
    published: Published,
    layers: HashMap<String, Arc<PublishedLayer>>,
    links: HashMap<String, Arc<PublishedLayer>>,
    nodes: BTreeMap<u32, Arc<PublishedLayer>>,
}

/// A layer as `overlay/` shows it.
#[derive(Debug, PartialEq, Eq)]
pub struct PublishedLayer {
    /// Its id, as containers/image computes it.
    pub id: String,
    /// First of its node numbers.
    pub first_node: u32,
    /// What its `diff` shows; without, that is an empty directory.
    pub tree: Option<TreeRow>,
    /// Content of `link`: its name in `l/`.
    pub link: String,
    /// Content of `lower`: the link of the layer below.
    pub lower: Option<String>,
}

/// A layer to be published.
#[derive(Debug, Clone)]
pub struct NewLayer {
    /// Digest of the layer as it is in the registry.
    pub digest: Digest,
    /// Its length there, in bytes.
    pub size: u64,
    /// Digest of the uncompressed layer.
    pub diff_id: Digest,
    /// Length of the uncompressed layer, in bytes.
    pub diff_size: u64,
    /// containers/storage's numbering (`archive.Compression`): 0 none, 2 gzip, 4 zstd.
    pub compression: u8,
}

/// The layers of an image to be published: the last one shows its tree, the others are empty.
#[derive(Debug, Clone)]
pub struct Publication {
    /// Lowest first.
    pub layers: Vec<NewLayer>,
    /// Digest of the image's manifest.
    pub manifest: Digest,
    /// How many inodes its tree has.
    pub inodes: u32,
    /// The reference whose registry has the image.
    pub source: String,
}

/// An image to be known by name.
#[derive(Debug, Clone)]
pub struct NewImage {
    /// Complete references.
    pub names: Vec<String>,
    /// The manifest for containers/storage, with ordinary media types.
    pub ordinary_manifest: String,
    /// The configuration.
    pub config: String,
    /// The manifest as it is in the registry.
    pub registry_manifest: String,
    /// Whether the cache is to keep all of it.
    pub is_pinned: bool,
}

/// Ids of layers with these diff IDs, lowest first, as containers/image computes them (`layerID` in its
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

/// The name of a layer in `l/`: capital letters and digits, as containers/storage has it, computed from the layer's id.
fn link_name(id: &str) -> String {
    const LETTERS: &[u8; 32] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZ234567";
    let hash = Sha256::digest(format!("nydus-store link {id}"));
    let letter = |byte: &u8| char::from(LETTERS[usize::from(byte % 32)]);
    hash.iter().take(LINK_LEN).map(letter).collect()
}

impl ImageStore {
    /// Opens what is published below `root`, and sees to it that the records tell the same. Blocks.
    pub fn open(root: &Path, graph_roots: &[PathBuf]) -> Result<Self, StoreError> {
        let layout = StoreLayout::new(root);
        layout::create_empty(root).map_err(|source| StoreError::Write {
            path: layout.store(),
            source,
        })?;
        let database = Database::open(&layout.database())?;
        let published = database.load()?;
        records::remove_unfinished(&layout)?;
        // Also what is the same: an earlier process may have ended before it told so by the lock.
        records::write_layers(&layout, &published, true)?;
        records::write_images(&layout, &published, true)?;
        let changing = Changing {
            next_node: published.layers.values().map(end).max().unwrap_or(0),
            durable: published.clone(),
            is_unwritten: false,
        };
        Ok(Self {
            layout,
            database,
            graph_roots: GraphRoots::new(graph_roots),
            state: RwLock::new(State::of(published)),
            changing: Mutex::new(changing),
        })
    }

    /// Where its files are.
    pub fn layout(&self) -> &StoreLayout {
        &self.layout
    }

    /// All that is published now.
    pub fn published(&self) -> Published {
        self.state.read().published.clone()
    }

    /// The layer of that id.
    pub fn layer(&self, id: &str) -> Option<Arc<PublishedLayer>> {
        self.state.read().layers.get(id).cloned()
    }

    /// The layer of that name in `l/`.
    pub fn layer_of_link(&self, link: &str) -> Option<Arc<PublishedLayer>> {
        self.state.read().links.get(link).cloned()
    }

    /// The layer whose range has the node.
    pub fn layer_of_node(&self, node: u32) -> Option<Arc<PublishedLayer>> {
        let state = self.state.read();
        let (_, layer) = state.nodes.range(..=node).next_back()?;
        (node - layer.first_node < layer.nodes()).then(|| Arc::clone(layer))
    }

    /// All layers, in the order of their node numbers.
    pub fn layers(&self) -> Vec<Arc<PublishedLayer>> {
        self.state.read().nodes.values().cloned().collect()
    }

    /// Publishes an image anew of which the topmost layer is published already: the layer is read from `source` too. Tells
    /// whether it is published. Blocks.
    pub fn publish_again(&self, top: &str, source: &str) -> Result<bool, StoreError> {
        let mut changing = self.changing.lock();
        let mut after = changing.durable.clone();
        let Some(tree) = after.layers.get_mut(top).and_then(|row| row.tree.as_mut()) else {
            return Ok(false);
        };
        tree.add_source(source);
        tree.announce();
        self.add(&mut changing, after)?;
        Ok(true)
    }

    /// Publishes layers for a pull that begins; the id of the topmost. Blocks.
    pub fn publish(&self, publication: &Publication) -> Result<String, StoreError> {
        let mut changing = self.changing.lock();
        let mut after = changing.durable.clone();
        let top = add_layers(&mut after, publication, changing.next_node)?;
        if let Some(tree) = after.layers.get_mut(&top).and_then(|row| row.tree.as_mut()) {
            tree.announce();
        }
        self.add(&mut changing, after)?;
        Ok(top)
    }

    /// Makes an image known by name, and publishes its layers; the image's id. Blocks.
    pub fn publish_image(&self, publication: &Publication, image: NewImage) -> Result<String, StoreError> {
        let mut changing = self.changing.lock();
        let mut after = changing.durable.clone();
        let layer = add_layers(&mut after, publication, changing.next_node)?;
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
        self.add(&mut changing, after)?;
        // What a name has stood for before goes, unless a container still needs it.
        if let Err(error) = self.remove_nameless(&mut changing) {
            tracing::warn!("failed to remove images without a name: {}", ErrorChain(&error));
        }
        Ok(id)
    }

    /// Forgets a name; with its last name, the image's record goes, and layers that nothing needs. Blocks.
    pub fn forget(&self, name: &str) -> Result<(), StoreError> {
        let mut changing = self.changing.lock();
        let mut after = changing.durable.clone();
        let named = |row: &&mut ImageRow| row.names.iter().any(|known| known == name);
        let row = after.images.values_mut().find(named);
        let row = row.ok_or_else(|| StoreError::UnknownName(name.to_owned()))?;
        row.names.retain(|known| known != name);
        if row.names.is_empty()
            && let Some((container, graph_root)) = self.needs()?.container_on(&row.layer)
        {
            return Err(StoreError::InUse {
                name: name.to_owned(),
                layer: container.clone(),
                graph_root: graph_root.clone(),
            });
        }
        self.remove(&mut changing, after)?;
        self.remove_nameless(&mut changing)
    }

    /// Removes the records without a name that no container needs, and then the layers that nothing needs any more. Only a
    /// container that was made before the record went can need them, so that this is looked up in between.
    fn remove_nameless(&self, changing: &mut Changing) -> Result<(), StoreError> {
        if changing.durable.images.values().all(|row| !row.names.is_empty()) {
            return Ok(());
        }
        let needs = self.needs()?;
        let mut after = changing.durable.clone();
        let mut layers = Vec::new();
        after.images.retain(|_, row| {
            let stays = !row.names.is_empty() || needs.container_on(&row.layer).is_some();
            if !stays {
                layers.push(row.layer.clone());
            }
            stays
        });
        self.remove(changing, after)?;
        let needs = self.needs()?;
        let mut after = changing.durable.clone();
        for layer in layers {
            withdraw(&mut after, &layer, &needs);
        }
        self.remove(changing, after)
    }

    /// What the graph roots of this host need of what is published. Blocks.
    pub fn needs(&self) -> Result<Needs, StoreError> {
        // Not under the lock: FUSE waits for that.
        let published = self.published();
        self.graph_roots.needs(&published.layers)
    }

    fn add(&self, changing: &mut Changing, after: Published) -> Result<(), StoreError> {
        let Some(is_forced) = self.commit(changing, after)? else {
            return Ok(());
        };
        *self.state.write() = State::of(changing.durable.clone());
        records::write_layers(&self.layout, &changing.durable, is_forced)?;
        records::write_images(&self.layout, &changing.durable, is_forced)?;
        changing.is_unwritten = false;
        Ok(())
    }

    fn remove(&self, changing: &mut Changing, after: Published) -> Result<(), StoreError> {
        let Some(is_forced) = self.commit(changing, after)? else {
            return Ok(());
        };
        records::write_images(&self.layout, &changing.durable, is_forced)?;
        records::write_layers(&self.layout, &changing.durable, is_forced)?;
        *self.state.write() = State::of(changing.durable.clone());
        changing.is_unwritten = false;
        Ok(())
    }

    /// Makes a change durable. `None` if there is nothing to write; otherwise whether the records are to be written even if
    /// they seem to be right, because that failed before.
    fn commit(&self, changing: &mut Changing, after: Published) -> Result<Option<bool>, StoreError> {
        let was_unwritten = changing.is_unwritten;
        if changing.durable != after {
            self.database.commit(&changing.durable, &after)?;
            changing.next_node = after
                .layers
                .values()
                .map(end)
                .max()
                .unwrap_or(0)
                .max(changing.next_node);
            changing.durable = after;
        } else if !was_unwritten {
            return Ok(None);
        }
        changing.is_unwritten = true;
        Ok(Some(was_unwritten))
    }
}

fn now() -> i64 {
    jiff::Timestamp::now().as_second()
}

/// Adds what is missing of the layers; the id of the topmost. New ones get node numbers from `next_node` on.
fn add_layers(published: &mut Published, publication: &Publication, next_node: u32) -> Result<String, StoreError> {
    let ids = layer_ids(publication.layers.iter().map(|layer| layer.diff_id));
    for (position, (id, layer)) in ids.iter().zip(&publication.layers).enumerate() {
        let is_top = position + 1 == ids.len();
        // Nothing else is verified of a data blob, and a layer of an ordinary image must not be taken for one.
        if !is_top && layer.digest != layer.diff_id {
            return Err(StoreError::NoDataBlob(layer.digest));
        }
        match published.layers.get_mut(id).map(|known| (&mut known.tree, is_top)) {
            Some((Some(tree), true)) => {
                tree.add_source(&publication.source);
                continue;
            }
            // What is a data blob to one image is the tree of another: one of them lies.
            Some((Some(_), false)) => return Err(StoreError::Conflict(layer.digest)),
            Some((None, false)) => continue,
            // What was taken for a data blob turns out to be a bootstrap, whose digest was verified.
            Some((None, true)) | None => {}
        }
        let tree = is_top.then(|| TreeRow {
            manifest: publication.manifest,
            inodes: publication.inodes,
            sources: vec![publication.source.clone()],
            announced: 0,
        });
        let len = NAMES.saturating_add(tree.as_ref().map_or(0, |tree| tree.inodes));
        let taken = published
            .layers
            .values()
            .map(|row| (row.first_node, nodes(row)))
            .collect();
        let first_node = node_ids::allocate(&taken, next_node, len).ok_or(StoreError::NodesUsedUp(len))?;
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
    // Images without layers are not published.
    Ok(ids.last().cloned().unwrap_or_default())
}

/// Removes the layer and those below it, as far as no record, no image of a graph root and no pull under way needs them.
fn withdraw(published: &mut Published, layer: &str, needs: &Needs) {
    let mut needed: BTreeSet<String> = needs.layers.clone();
    let is_announced = |row: &LayerRow| row.tree.as_ref().is_some_and(|tree| now() - tree.announced < PULL_TIME);
    let announced = published.layers.iter().filter(|(_, row)| is_announced(row));
    let tops = published
        .images
        .values()
        .map(|row| &row.layer)
        .chain(announced.map(|(id, _)| id));
    for top in tops {
        needed.extend(chain(&published.layers, top));
    }
    for id in chain(&published.layers, layer) {
        if !needed.contains(&id) && !published.layers.values().any(|row| row.parent.as_ref() == Some(&id)) {
            published.layers.remove(&id);
        }
    }
}

/// The layer and those below it, topmost first.
pub fn chain(layers: &BTreeMap<String, LayerRow>, top: &str) -> Vec<String> {
    let parent = |id: &String| layers.get(id)?.parent.clone();
    let top = Some(top.to_owned()).filter(|top| layers.contains_key(top));
    std::iter::successors(top, parent).collect()
}

/// How many node numbers a layer has.
fn nodes(row: &LayerRow) -> u32 {
    NAMES.saturating_add(row.tree.as_ref().map_or(0, |tree| tree.inodes))
}

/// One past the last of a layer's node numbers.
fn end(row: &LayerRow) -> u32 {
    row.first_node.saturating_add(nodes(row))
}

impl TreeRow {
    /// A pull begins.
    fn announce(&mut self) {
        // Not at each of many pulls at once.
        if (now() - self.announced).abs() > ANNOUNCED_STEP {
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

impl PublishedLayer {
    fn new(id: &str, row: &LayerRow, layers: &BTreeMap<String, LayerRow>) -> Self {
        // The nearest is enough: all below the topmost layer are empty, and a container mounts what is listed here. It is
        // there because the overlay driver tells by it which layer is the parent.
        let parent = row.parent.as_deref().filter(|parent| layers.contains_key(*parent));
        Self {
            id: id.to_owned(),
            first_node: row.first_node,
            tree: row.tree.clone(),
            link: link_name(id),
            lower: parent.map(|parent| format!("l/{}", link_name(parent))),
        }
    }

    /// How many node numbers it has.
    pub fn nodes(&self) -> u32 {
        NAMES.saturating_add(self.tree.as_ref().map_or(0, |tree| tree.inodes))
    }
}

impl State {
    fn of(published: Published) -> Self {
        let mut state = Self::default();
        for (id, row) in &published.layers {
            let layer = Arc::new(PublishedLayer::new(id, row, &published.layers));
            state.links.insert(layer.link.clone(), Arc::clone(&layer));
            state.nodes.insert(layer.first_node, Arc::clone(&layer));
            state.layers.insert(id.clone(), layer);
        }
        state.published = published;
        state
    }
}

#[cfg(test)]
mod tests;
