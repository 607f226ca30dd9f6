//! The names of the store and the nodes behind them.
//!
//! A node id is an *instance* in its upper half and a number within it in the lower. Instance 0 is the name space:
//! number 1 is the root; references and layers get numbers in steps of four, so that the things of a layer (its
//! directory, `info` and `blob`) are one number apart. Every other
//! instance is the tree of an image shown as the `diff` of one layer, and its numbers are the tree's inodes plus one.
//!
//! Things live as long as somebody counts on them: Podman (uses) or the kernel (nodes it has not forgotten).

use std::{
    collections::HashMap,
    sync::{Arc, atomic::AtomicUsize},
};

use super::view::View;
use crate::{
    digest::Digest,
    image::{loaded::LoadedImage, reference::Reference},
    vfs::NodeId,
};

const STEP: u64 = 4;
const INSTANCE_SHIFT: u32 = 32;

/// Which of the things of a layer, or a reference's directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Facet {
    /// The directory `<store>/<reference>` or `<store>/<reference>/<digest>`.
    Dir = 0,
    /// The layer's `info`.
    Info = 1,
    /// The layer's `blob`.
    Blob = 2,
}

/// What a node id stands for.
pub enum Node {
    /// The root of the store.
    Root,
    /// A reference's directory.
    Reference(Arc<ReferenceDir>),
    /// A thing of a layer.
    Layer(Arc<LayerDir>, Facet),
    /// A node of an image's tree.
    Image(Arc<View>),
    /// The `diff` of a layer without files.
    EmptyDir,
}

/// `<store>/<reference>`.
pub struct ReferenceDir {
    /// Its node.
    pub node: NodeId,
    /// Its name: the reference in base64.
    pub name: Vec<u8>,
    /// The reference.
    pub reference: Reference,
    /// Look-ups in this directory that are under way, during which the kernel holds it.
    pub resolving: AtomicUsize,
}

/// `<store>/<reference>/<digest>`.
pub struct LayerDir {
    /// Its node; those of its other facets follow.
    pub node: NodeId,
    /// The directory it is in.
    pub parent: Arc<ReferenceDir>,
    /// What it is looked up by: the layer's digest, or its TOC digest. A layer may be here under both.
    pub digest: Digest,
    /// The image that has the layer.
    pub image: Arc<LoadedImage>,
    /// Which of the image's layers.
    pub position: usize,
    /// The content of `info`.
    pub info: Vec<u8>,
    /// The image's tree, where this layer's `diff` shows it.
    pub diff: Option<Arc<View>>,
}

/// Who counts on a thing.
struct Counted<T> {
    thing: T,
    /// Nodes that the kernel has not forgotten.
    known: u64,
    /// Of a layer: uses that Podman has announced and not taken back. Of a reference: its layers.
    uses: u64,
}

/// All names in use.
#[derive(Default)]
pub struct Names {
    next: u64,
    next_instance: u64,
    references: HashMap<NodeId, Counted<Arc<ReferenceDir>>>,
    layers: HashMap<NodeId, Counted<Arc<LayerDir>>>,
    /// Instance → the layer that shows it.
    instances: HashMap<u64, NodeId>,
    reference_names: HashMap<Vec<u8>, NodeId>,
    layer_names: HashMap<(NodeId, Digest), NodeId>,
}

fn owner(node: NodeId) -> NodeId {
    node - node % STEP
}

impl LayerDir {
    /// The node of one of the layer's things.
    pub fn facet(&self, facet: Facet) -> NodeId {
        self.node + facet as u64
    }
}

impl Names {
    /// What `node` stands for; `None` if it is gone.
    pub fn node(&self, node: NodeId) -> Option<Node> {
        let instance = node >> INSTANCE_SHIFT;
        if instance != 0 {
            let layer = self.layers.get(self.instances.get(&instance)?)?;
            return layer.thing.diff.clone().map(Node::Image);
        }
        if node == crate::vfs::ROOT {
            return Some(Node::Root);
        }
        if let Some(reference) = self.references.get(&node) {
            return Some(Node::Reference(Arc::clone(&reference.thing)));
        }
        let layer = Arc::clone(&self.layers.get(&owner(node))?.thing);
        let facet = match node % STEP {
            0 => Facet::Dir,
            1 => Facet::Info,
            2 => Facet::Blob,
            _ => return None,
        };
        Some(Node::Layer(layer, facet))
    }

    /// The directory of that name, made if it is new.
    pub fn reference(&mut self, name: &[u8], reference: Reference) -> Arc<ReferenceDir> {
        if let Some(dir) = self
            .reference_names
            .get(name)
            .and_then(|node| self.references.get(node))
        {
            return Arc::clone(&dir.thing);
        }
        let dir = Arc::new(ReferenceDir {
            node: self.number(),
            name: name.to_owned(),
            reference,
            resolving: AtomicUsize::new(0),
        });
        self.reference_names.insert(name.to_owned(), dir.node);
        self.references.insert(
            dir.node,
            Counted {
                thing: Arc::clone(&dir),
                known: 0,
                uses: 0,
            },
        );
        dir
    }

    /// The layer's directory, if there is one.
    pub fn layer(&self, parent: &ReferenceDir, digest: &Digest) -> Option<Arc<LayerDir>> {
        let node = self.layer_names.get(&(parent.node, *digest))?;
        self.layers.get(node).map(|layer| Arc::clone(&layer.thing))
    }

    /// The directory of the layer that is looked up by `digest`, made if it is new; `None` if the image has no such
    /// layer.
    pub fn add_layer(
        &mut self,
        parent: &Arc<ReferenceDir>,
        image: Arc<LoadedImage>,
        digest: Digest,
    ) -> Option<Arc<LayerDir>> {
        if let Some(layer) = self.layer(parent, &digest) {
            return Some(layer);
        }
        let (position, by) = image.manifest.find(&digest)?;
        let node = self.number();
        let diff = image.is_bootstrap(position).then(|| {
            self.next_instance += 1;
            self.instances.insert(self.next_instance, node);
            View::new(
                Arc::clone(&image.contents),
                parent.reference.to_string(),
                self.next_instance << INSTANCE_SHIFT,
            )
        });
        // A structure of numbers and texts always has a JSON form.
        let info = serde_json::to_vec(&image.info(position, by)).unwrap_or_default();
        let layer = Arc::new(LayerDir {
            node,
            parent: Arc::clone(parent),
            digest,
            image,
            position,
            info,
            diff,
        });
        self.layer_names.insert((parent.node, digest), node);
        // The kernel holds the parent of what it looks up, so the reference is there.
        if let Some(reference) = self.references.get_mut(&parent.node) {
            reference.uses += 1;
        }
        self.layers.insert(
            node,
            Counted {
                thing: Arc::clone(&layer),
                known: 0,
                uses: 0,
            },
        );
        Some(layer)
    }

    fn number(&mut self) -> u64 {
        self.next += STEP;
        self.next
    }

    /// The kernel knows the node once more.
    pub fn retain(&mut self, node: NodeId) {
        if let Some(known) = self.known(node) {
            *known += 1;
        }
    }

    /// The kernel has forgotten the node as often as `count`. Gives the layer that nobody counts on any more: what it
    /// holds takes time to free, and others wait for these names.
    #[must_use = "to be dropped when the lock on the names is released"]
    pub fn forget(&mut self, node: NodeId, count: u64) -> Option<Arc<LayerDir>> {
        if let Some(known) = self.known(node) {
            *known = known.saturating_sub(count);
        }
        match self.layer_of(node) {
            Some(layer) => self.take_layer_if_unused(layer),
            None => {
                self.drop_reference_if_unused(node);
                None
            }
        }
    }

    fn layer_of(&self, node: NodeId) -> Option<NodeId> {
        match node >> INSTANCE_SHIFT {
            0 => Some(owner(node)).filter(|layer| self.layers.contains_key(layer)),
            instance => self.instances.get(&instance).copied(),
        }
    }

    fn known(&mut self, node: NodeId) -> Option<&mut u64> {
        match self.layer_of(node) {
            Some(layer) => self.layers.get_mut(&layer).map(|layer| &mut layer.known),
            None => self.references.get_mut(&node).map(|reference| &mut reference.known),
        }
    }

    /// One use more of the layer.
    pub fn add_use(&mut self, layer: &LayerDir) -> u64 {
        let Some(counted) = self.layers.get_mut(&layer.node) else {
            return 0;
        };
        counted.uses += 1;
        counted.uses
    }

    /// One use less; the number that remains. A use that was announced to an earlier process is not known here.
    /// Whoever calls this holds the layer, so it is not freed here.
    pub fn release(&mut self, layer: &LayerDir) -> u64 {
        let Some(counted) = self.layers.get_mut(&layer.node) else {
            return 0;
        };
        counted.uses = counted.uses.saturating_sub(1);
        let left = counted.uses;
        self.take_layer_if_unused(layer.node);
        left
    }

    fn take_layer_if_unused(&mut self, node: NodeId) -> Option<Arc<LayerDir>> {
        self.layers
            .get(&node)
            .filter(|layer| layer.known == 0 && layer.uses == 0)?;
        let layer = self.layers.remove(&node)?.thing;
        self.layer_names.remove(&(layer.parent.node, layer.digest));
        self.instances.retain(|_, shown_by| *shown_by != node);
        if let Some(reference) = self.references.get_mut(&layer.parent.node) {
            reference.uses = reference.uses.saturating_sub(1);
        }
        self.drop_reference_if_unused(layer.parent.node);
        Some(layer)
    }

    fn drop_reference_if_unused(&mut self, node: NodeId) {
        let unused = |dir: &Counted<Arc<ReferenceDir>>| dir.known == 0 && dir.uses == 0;
        if self.references.get(&node).is_some_and(unused)
            && let Some(dir) = self.references.remove(&node)
        {
            self.reference_names.remove(&dir.thing.name);
        }
    }

    /// How many layers are held, by Podman or the kernel, and how many uses Podman has announced.
    pub fn counts(&self) -> (usize, u64) {
        (self.layers.len(), self.layers.values().map(|layer| layer.uses).sum())
    }

    /// All layers in use, with their number of uses.
    pub fn layers(&self) -> impl Iterator<Item = (&LayerDir, u64)> {
        self.layers.values().map(|layer| (&*layer.thing, layer.uses))
    }
}
