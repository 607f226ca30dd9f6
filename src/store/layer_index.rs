//! The published layers as `overlay/` shows them, with look-ups by id, link and node id.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use sha2::{Digest as _, Sha256};

use super::{
    database::{LayerRow, Published, TreeRow},
    node_ids::LAYER_NODES,
};

/// Length of a link's name, in characters.
const LINK_LEN: usize = 26;

/// Everything published, with look-ups.
#[derive(Default)]
pub(super) struct LayerIndex {
    pub(super) published: Published,
    pub(super) layers: HashMap<String, Arc<PublishedLayer>>,
    pub(super) links: HashMap<String, Arc<PublishedLayer>>,
    /// By the first node id.
    pub(super) nodes: BTreeMap<u32, Arc<PublishedLayer>>,
}

/// A layer as `overlay/` shows it.
#[derive(Debug, PartialEq, Eq)]
pub struct PublishedLayer {
    /// Id as containers/image computes it.
    pub id: String,
    /// First node id of the layer.
    pub first_node: u32,
    /// The tree that `diff` shows; `None` means that `diff` is an empty directory.
    pub tree: Option<TreeRow>,
    /// Content of `link`: the layer's name in `l/`.
    pub link: String,
    /// Content of `lower`: the link of the layer below.
    pub lower: Option<String>,
}

/// Name of a layer in `l/`, derived from its id. Consists of capital letters and digits, like containers/storage's.
fn link_name(id: &str) -> String {
    const LETTERS: &[u8; 32] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZ234567";
    let hash = Sha256::digest(format!("nydus-store link {id}"));
    let letter = |byte: &u8| char::from(LETTERS[usize::from(byte % 32)]);
    hash.iter().take(LINK_LEN).map(letter).collect()
}

impl PublishedLayer {
    fn new(id: &str, row: &LayerRow, layers: &BTreeMap<String, LayerRow>) -> Self {
        // Lists only the parent, from which the overlay driver derives the chain. A container mounts what is listed
        // here, and all layers below the topmost one are empty.
        let parent = row.parent.as_deref().filter(|parent| layers.contains_key(*parent));
        Self {
            id: id.to_owned(),
            first_node: row.first_node,
            tree: row.tree.clone(),
            link: link_name(id),
            lower: parent.map(|parent| format!("l/{}", link_name(parent))),
        }
    }

    /// Number of node ids of the layer.
    pub fn node_count(&self) -> u32 {
        LAYER_NODES.saturating_add(self.tree.as_ref().map_or(0, |tree| tree.inodes))
    }
}

impl LayerIndex {
    pub(super) fn of(published: Published) -> Self {
        let mut index = Self::default();
        for (id, row) in &published.layers {
            let layer = Arc::new(PublishedLayer::new(id, row, &published.layers));
            index.links.insert(layer.link.clone(), Arc::clone(&layer));
            index.nodes.insert(layer.first_node, Arc::clone(&layer));
            index.layers.insert(id.clone(), layer);
        }
        index.published = published;
        index
    }
}
