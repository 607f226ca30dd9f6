//! The file system on `<root>/store/overlay`: the layers of containers/storage's overlay driver.
//!
//! | path | content |
//! | --- | --- |
//! | `<id>/diff` | the image's tree for its topmost layer, an empty directory for the data blobs below |
//! | `<id>/link`, `<id>/lower` | the layer's name in `l/`, and that of the layer below it |
//! | `l/<link>` | symbolic link `../<id>/diff` |
//!
//! **No ordinary layer can be put on a data blob.** A data blob's `diff` is empty, because the files are in the tree of the
//! topmost layer. Were that layer missing, containers/storage would unpack the bootstrap as an ordinary layer, and the
//! container would see `/image/image.boot` and nothing else. So `link` and `lower` of data blobs give EIO: the overlay
//! driver reads both of a layer's parent, and of a layer that it copies, and the pull fails. A container reads only those
//! of the topmost layer.
//!
//! Trees are loaded when their `diff` is looked up, and dropped when the kernel has forgotten all of their nodes.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use parking_lot::{Mutex, RwLock};

use super::{
    image_store::{ImageStore, PublishedLayer},
    node_ids::{LINKS, LayerNode, NAMES},
    view::View,
};
use crate::{
    error_chain::ErrorChain,
    image::{loaded::LoadedImage, resolve::Images},
    registry::Repository,
    vfs::{Answer, Attr, DirEntry, Entry, Errno, FileSystem, FsStat, NodeId, ROOT, ReadAnswer},
};

/// For how long the tree of an announced image is held, so that the container that follows finds it.
const HOLD: Duration = Duration::from_secs(60);
/// Most images that are held so.
const MAX_HELD: usize = 8;

/// The file system of the published layers.
pub struct OverlayFs {
    inner: Arc<Inner>,
}

struct Inner {
    store: Arc<ImageStore>,
    images: Arc<Images>,
    /// Loaded trees by the first node number of their layer.
    trees: RwLock<BTreeMap<u32, Arc<Tree>>>,
    /// Images that were announced a moment ago.
    held: Mutex<VecDeque<(Instant, Arc<LoadedImage>)>>,
}

/// A tree that the kernel knows nodes of.
struct Tree {
    image: Arc<LoadedImage>,
    view: Arc<View>,
    /// One past the last of the layer's node numbers.
    end: u32,
    /// Look-ups that the kernel has not forgotten.
    known: AtomicU64,
}

/// What a node stands for.
enum Node {
    Root,
    Links,
    Layer(Arc<PublishedLayer>, LayerNode),
    Tree(Arc<Tree>),
}

impl OverlayFs {
    /// Shows what `store` has published, with the trees of `images`.
    pub fn new(store: Arc<ImageStore>, images: Arc<Images>) -> Self {
        Self {
            inner: Arc::new(Inner {
                store,
                images,
                trees: RwLock::default(),
                held: Mutex::default(),
            }),
        }
    }

    /// Holds an image for a while, because a container of it is likely to start. Within a runtime.
    pub fn hold(&self, image: Arc<LoadedImage>) {
        let mut held = self.inner.held.lock();
        held.retain(|(since, known)| since.elapsed() < HOLD && !Arc::ptr_eq(known, &image));
        held.truncate(MAX_HELD - 1);
        held.push_front((Instant::now(), image));
        let inner = Arc::downgrade(&self.inner);
        tokio::spawn(async move {
            tokio::time::sleep(HOLD).await;
            if let Some(inner) = inner.upgrade() {
                inner.held.lock().retain(|(since, _)| since.elapsed() < HOLD);
            }
        });
    }

    /// The image of a layer can be read from another repository too.
    pub fn add_repository(&self, layer: &str, repository: Repository) {
        let Some(layer) = self.inner.store.layer(layer) else {
            return;
        };
        if let Some(tree) = self.inner.trees.read().get(&layer.first_node) {
            tree.image.add_repositories([repository]);
        }
    }

    fn node(&self, node: NodeId) -> Result<Node, Errno> {
        let node = u32::try_from(node).map_err(|_| Errno::STALE)?;
        if let Some(tree) = self.inner.tree(node) {
            return Ok(Node::Tree(tree));
        }
        if u64::from(node) == ROOT {
            return Ok(Node::Root);
        }
        if node == LINKS {
            return Ok(Node::Links);
        }
        let layer = self.inner.store.layer_of_node(node).ok_or(Errno::STALE)?;
        let kind = LayerNode::at(node - layer.first_node).ok_or(Errno::STALE)?;
        Ok(Node::Layer(layer, kind))
    }

    fn lookup_in_root(&self, name: &[u8]) -> Result<Attr, Errno> {
        if name == b"l" {
            return Ok(directory(LINKS));
        }
        let id = std::str::from_utf8(name).map_err(|_| Errno::NOENT)?;
        let layer = self.inner.store.layer(id).ok_or(Errno::NOENT)?;
        Ok(layer_attr(&layer, LayerNode::Dir))
    }

    fn lookup_link(&self, name: &[u8]) -> Result<Attr, Errno> {
        let link = std::str::from_utf8(name).map_err(|_| Errno::NOENT)?;
        let layer = self.inner.store.layer_of_link(link).ok_or(Errno::NOENT)?;
        Ok(layer_attr(&layer, LayerNode::Symlink))
    }

    fn lookup_in_layer(&self, layer: Arc<PublishedLayer>, name: &[u8]) -> Answer<Entry> {
        let node = match name {
            b"diff" if layer.tree.is_some() => return self.lookup_tree(layer),
            b"diff" => LayerNode::EmptyDiff,
            b"link" => LayerNode::Link,
            b"lower" if layer.has_lower() => LayerNode::Lower,
            _ => return Answer::Ready(Err(Errno::NOENT)),
        };
        Answer::Ready(Ok(fresh(layer_attr(&layer, node))))
    }

    fn lookup_tree(&self, layer: Arc<PublishedLayer>) -> Answer<Entry> {
        if let Some(root) = self.inner.root(&layer) {
            return Answer::Ready(root);
        }
        let inner = Arc::clone(&self.inner);
        Answer::Pending(Box::pin(async move { inner.load(layer).await }))
    }

    fn list_layer(&self, layer: &PublishedLayer, add: &mut Adder<'_>) {
        add.entry(b"diff", layer_attr(layer, LayerNode::EmptyDiff));
        add.entry(b"link", layer_attr(layer, LayerNode::Link));
        if layer.has_lower() {
            add.entry(b"lower", layer_attr(layer, LayerNode::Lower));
        }
    }
}

impl Inner {
    /// The loaded tree that has the node.
    fn tree(&self, node: u32) -> Option<Arc<Tree>> {
        let trees = self.trees.read();
        let (first, tree) = trees.range(..=node).next_back()?;
        (node - first >= NAMES && node < tree.end).then(|| Arc::clone(tree))
    }

    /// The root of a layer's tree, if it is loaded; the kernel gets to know it. Counted under the lock, so that the tree is
    /// not dropped meanwhile.
    fn root(&self, layer: &PublishedLayer) -> Option<Result<Entry, Errno>> {
        self.trees.read().get(&layer.first_node).map(|tree| tree.known_root())
    }

    /// Loads the layer's tree, from disk where it is there; its root, which the kernel gets to know.
    async fn load(&self, layer: Arc<PublishedLayer>) -> Result<Entry, Errno> {
        let row = layer.tree.as_ref().ok_or(Errno::STALE)?;
        let image = match self.images.load_known(row.manifest, &row.sources).await {
            Ok(image) => image,
            Err(error) => {
                tracing::error!(layer = layer.id, manifest = %row.manifest, "failed to load tree: {}", ErrorChain(&error));
                return Err(Errno::IO);
            }
        };
        if image.contents.tree.len() != row.inodes {
            tracing::error!(layer = layer.id, manifest = %row.manifest, "failed to load tree: not the published one");
            return Err(Errno::IO);
        }
        image.prepare().await;
        let name = row.sources.last().cloned().unwrap_or_default();
        let base = NodeId::from(layer.first_node + NAMES - 1);
        let tree = || {
            Arc::new(Tree {
                image: Arc::clone(&image),
                view: View::new(Arc::clone(&image.contents), name, base),
                end: layer.first_node.saturating_add(layer.nodes()),
                known: AtomicU64::new(0),
            })
        };
        self.trees
            .write()
            .entry(layer.first_node)
            .or_insert_with(tree)
            .known_root()
    }

    fn forget(&self, node: u32, count: u64) {
        let trees = self.trees.read();
        let Some((first, tree)) = trees.range(..=node).next_back() else {
            return;
        };
        if node - first < NAMES || node >= tree.end {
            return;
        }
        let first = *first;
        let before = tree.known.fetch_sub(count, Ordering::AcqRel);
        drop(trees);
        if before > count {
            return;
        }
        let mut trees = self.trees.write();
        let unknown = trees
            .get(&first)
            .is_some_and(|tree| tree.known.load(Ordering::Acquire) == 0);
        let gone = unknown.then(|| trees.remove(&first));
        drop(trees);
        // It takes time to free, and other requests wait for the lock.
        drop(gone);
    }
}

impl Tree {
    /// The root's attributes; the kernel gets to know it.
    fn known_root(&self) -> Result<Entry, Errno> {
        let root = self.view.root()?;
        self.known.fetch_add(1, Ordering::AcqRel);
        Ok(fresh(root))
    }
}

impl PublishedLayer {
    /// Whether its files are in the tree of a layer above.
    fn is_data(&self) -> bool {
        self.tree.is_none()
    }

    /// Whether there is a `lower`: also the lowest data blob has one, which cannot be read.
    fn has_lower(&self) -> bool {
        self.is_data() || self.lower.is_some()
    }

    fn content(&self, node: LayerNode) -> &str {
        match node {
            LayerNode::Link => &self.link,
            // Not empty: nothing would be read of a file without bytes, and no error seen.
            LayerNode::Lower => self.lower.as_deref().unwrap_or("-"),
            _ => "",
        }
    }
}

/// Adds entries to a listing, from an offset on.
struct Adder<'a> {
    add: &'a mut dyn FnMut(DirEntry<'_>) -> bool,
    skip: u64,
    next: u64,
    full: bool,
}

impl Adder<'_> {
    fn entry(&mut self, name: &[u8], attr: Attr) {
        self.next += 1;
        if self.full || self.next <= self.skip {
            return;
        }
        let entry = DirEntry {
            name,
            attr,
            next: self.next,
            ttl: Duration::ZERO,
        };
        self.full = !(self.add)(entry);
    }
}

/// What is published may change, so the kernel asks each time.
fn fresh(attr: Attr) -> Entry {
    Entry {
        attr: Some(attr),
        ttl: Duration::ZERO,
    }
}

fn directory(node: u32) -> Attr {
    attr(node, libc::S_IFDIR | 0o700, 0)
}

fn layer_attr(layer: &PublishedLayer, node: LayerNode) -> Attr {
    let number = layer.first_node + node as u32;
    match node {
        LayerNode::Dir => directory(number),
        LayerNode::EmptyDiff => attr(number, libc::S_IFDIR | 0o755, 0),
        LayerNode::Link | LayerNode::Lower => attr(number, libc::S_IFREG | 0o600, layer.content(node).len() as u64),
        LayerNode::Symlink => attr(number, libc::S_IFLNK | 0o777, target(layer).len() as u64),
    }
}

/// Where the layer's symbolic link in `l/` leads.
fn target(layer: &PublishedLayer) -> String {
    format!("../{}/diff", layer.id)
}

fn attr(node: u32, mode: u32, size: u64) -> Attr {
    let nlink = if mode & libc::S_IFMT == libc::S_IFDIR { 2 } else { 1 };
    Attr {
        node: node.into(),
        mode,
        uid: 0,
        gid: 0,
        nlink,
        size,
        rdev: 0,
        mtime: 0,
        mtime_nsec: 0,
    }
}

fn read_bytes(bytes: &[u8], offset: u64, into: &mut [u8]) -> usize {
    let rest = usize::try_from(offset)
        .ok()
        .and_then(|offset| bytes.get(offset..))
        .unwrap_or_default();
    let len = rest.len().min(into.len());
    into[..len].copy_from_slice(&rest[..len]);
    len
}

impl FileSystem for OverlayFs {
    fn lookup(&self, parent: NodeId, name: &[u8]) -> Answer<Entry> {
        let found = match self.node(parent) {
            Ok(Node::Root) => self.lookup_in_root(name).map(fresh),
            Ok(Node::Links) => self.lookup_link(name).map(fresh),
            Ok(Node::Layer(layer, LayerNode::Dir)) => return self.lookup_in_layer(layer, name),
            Ok(Node::Layer(..)) => Err(Errno::NOENT),
            Ok(Node::Tree(tree)) => tree.view.lookup(parent, name).inspect(|entry| {
                if entry.attr.is_some() {
                    // The kernel knows the parent, so that the tree is not dropped.
                    tree.known.fetch_add(1, Ordering::AcqRel);
                }
            }),
            Err(error) => Err(error),
        };
        Answer::Ready(found)
    }

    fn retain(&self, node: NodeId) {
        if let Ok(Node::Tree(tree)) = self.node(node) {
            tree.known.fetch_add(1, Ordering::AcqRel);
        }
    }

    fn forget(&self, node: NodeId, count: u64) {
        if let Ok(node) = u32::try_from(node) {
            self.inner.forget(node, count);
        }
    }

    fn attr(&self, node: NodeId) -> Result<(Attr, Duration), Errno> {
        let attr = match self.node(node)? {
            Node::Root | Node::Links => attr(u32::try_from(node).unwrap_or_default(), libc::S_IFDIR | 0o700, 0),
            Node::Layer(layer, kind) => layer_attr(&layer, kind),
            Node::Tree(tree) => return tree.view.attr(node),
        };
        Ok((attr, Duration::ZERO))
    }

    fn readlink(&self, node: NodeId) -> Result<Vec<u8>, Errno> {
        match self.node(node)? {
            Node::Layer(layer, LayerNode::Symlink) => Ok(target(&layer).into_bytes()),
            Node::Tree(tree) => tree.view.readlink(node),
            _ => Err(Errno::INVAL),
        }
    }

    fn list(&self, dir: NodeId, offset: u64, add: &mut dyn FnMut(DirEntry<'_>) -> bool) -> Result<(), Errno> {
        let mut adder = Adder {
            add,
            skip: offset,
            next: 0,
            full: false,
        };
        match self.node(dir)? {
            Node::Root => {
                adder.entry(b"l", directory(LINKS));
                for layer in self.inner.store.layers() {
                    adder.entry(layer.id.as_bytes(), layer_attr(&layer, LayerNode::Dir));
                }
            }
            Node::Links => {
                for layer in self.inner.store.layers() {
                    adder.entry(layer.link.as_bytes(), layer_attr(&layer, LayerNode::Symlink));
                }
            }
            Node::Layer(layer, LayerNode::Dir) => self.list_layer(&layer, &mut adder),
            Node::Layer(_, LayerNode::EmptyDiff) => {}
            Node::Layer(..) => return Err(Errno::NOTDIR),
            Node::Tree(tree) => return tree.view.list(dir, offset, adder.add),
        }
        Ok(())
    }

    fn read(&self, file: NodeId, offset: u64, into: &mut [u8]) -> ReadAnswer {
        let layer = match self.node(file) {
            Ok(Node::Tree(tree)) => return tree.view.read(file, offset, into),
            Ok(Node::Layer(layer, kind @ (LayerNode::Link | LayerNode::Lower))) if !layer.is_data() => {
                Ok(read_bytes(layer.content(kind).as_bytes(), offset, into))
            }
            Ok(Node::Layer(layer, LayerNode::Link | LayerNode::Lower)) => {
                tracing::warn!(
                    layer = layer.id,
                    "refused to build upon a data blob: the image was not published, or is being read as an ordinary one"
                );
                Err(Errno::IO)
            }
            Ok(_) => Err(Errno::ISDIR),
            Err(error) => Err(error),
        };
        ReadAnswer::Ready(layer)
    }

    fn xattr(&self, node: NodeId, name: &[u8]) -> Result<Vec<u8>, Errno> {
        match self.node(node)? {
            Node::Tree(tree) => tree.view.xattr(node, name),
            _ => Err(Errno::NODATA),
        }
    }

    fn xattrs(&self, node: NodeId) -> Result<Vec<u8>, Errno> {
        match self.node(node)? {
            Node::Tree(tree) => tree.view.xattrs(node),
            _ => Ok(Vec::new()),
        }
    }

    fn statfs(&self) -> FsStat {
        FsStat::default()
    }
}
