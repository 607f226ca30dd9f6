//! File system of `<root>/store/overlay`: the layers of containers/storage's overlay driver.
//!
//! | path | content |
//! | --- | --- |
//! | `<id>/diff` | the image's tree for its topmost layer, an empty directory for the data blobs below |
//! | `<id>/link`, `<id>/lower` | the layer's name in `l/`, and that of the layer below it |
//! | `l/<link>` | symbolic link `../<id>/diff` |
//!
//! **An ordinary layer cannot be stacked on a data blob.** The `diff` of a data blob is empty, because the files are in
//! the tree of the topmost layer. If that layer were missing, containers/storage would unpack the bootstrap as an
//! ordinary layer, and the container would see only `/image/image.boot`. Therefore `link` and `lower` of data blobs
//! fail with EIO. The overlay driver reads both files of a parent layer and of a layer that it copies, so the pull
//! fails. A container reads only those of the topmost layer.
//!
//! A tree is loaded when its `diff` or one of its nodes is used, and dropped when it has not been used for a while. The
//! kernel may still know nodes of it then, and also of trees that an earlier process has loaded.

use std::{
    collections::{BTreeMap, VecDeque},
    fmt,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use parking_lot::{Mutex, RwLock};

use super::{
    image_store::ImageStore,
    image_view::ImageView,
    layer_index::PublishedLayer,
    node_ids::{LAYER_NODES, LINKS_DIR, LayerNode},
};
use crate::{
    error_chain::ErrorChain,
    image::{loaded::LoadedImage, resolve::Images},
    memory,
    registry::Repository,
    ttl_cache::TtlCache,
    vfs::{Answer, Attr, DirEntry, Entry, Errno, FileSystem, FsStat, NodeId, PendingResult, ROOT, ReadAnswer},
};

/// How long the tree of an announced image stays loaded, for the container that is likely to follow.
const HOLD_TIME: Duration = Duration::from_secs(60);
/// Maximum number of images that stay loaded in this way.
const MAX_HELD: usize = 8;

/// How long an unused tree stays loaded. Loading it again takes reading it from disk.
const IDLE_TIME: Duration = Duration::from_secs(300);
/// Interval at which unused trees are dropped.
const SWEEP_INTERVAL: Duration = Duration::from_secs(30);

/// Minimum interval between logged failures to load the tree of one layer: a program may try again and again.
const ERROR_LOG_INTERVAL: Duration = Duration::from_secs(60);
/// Number of layers for which [`ERROR_LOG_INTERVAL`] is kept.
const MAX_LOGGED: usize = 4096;

/// File system of the published layers.
pub struct OverlayFs {
    state: Arc<OverlayState>,
}

struct OverlayState {
    store: Arc<ImageStore>,
    images: Arc<Images>,
    /// Loaded trees by the first node id of their layer.
    trees: RwLock<BTreeMap<u32, Arc<LoadedTree>>>,
    /// Recently announced images, newest first.
    held: Mutex<VecDeque<(Instant, Arc<LoadedImage>)>>,
    /// First node ids of layers whose trees could not be loaded, which was logged.
    logged: TtlCache<u32, ()>,
}

/// A loaded tree.
struct LoadedTree {
    image: Arc<LoadedImage>,
    view: Arc<ImageView>,
    /// One past the last node id of the layer.
    end: u32,
    /// Whether the tree was used since the last sweep.
    is_used: AtomicBool,
    /// Number of sweeps that found the tree unused.
    idle_sweeps: AtomicU32,
}

/// The object behind a node id.
enum OverlayNode {
    Root,
    Links,
    Layer(Arc<PublishedLayer>, LayerNode),
    Tree(Arc<LoadedTree>),
}

impl OverlayFs {
    /// Serves what `store` has published, with the trees of `images`.
    pub fn new(store: Arc<ImageStore>, images: Arc<Images>) -> Self {
        Self {
            state: Arc::new(OverlayState {
                store,
                images,
                trees: RwLock::default(),
                held: Mutex::default(),
                logged: TtlCache::new(MAX_LOGGED, ERROR_LOG_INTERVAL),
            }),
        }
    }

    /// Keeps an image loaded for a while, because a container of it is likely to start. Must be called within a
    /// runtime.
    pub fn hold(&self, image: Arc<LoadedImage>) {
        let mut held = self.state.held.lock();
        held.retain(|(since, known)| since.elapsed() < HOLD_TIME && !Arc::ptr_eq(known, &image));
        held.truncate(MAX_HELD - 1);
        held.push_front((Instant::now(), image));
        let state = Arc::downgrade(&self.state);
        tokio::spawn(async move {
            tokio::time::sleep(HOLD_TIME).await;
            if let Some(state) = state.upgrade() {
                state.held.lock().retain(|(since, _)| since.elapsed() < HOLD_TIME);
            }
        });
    }

    /// Adds a repository from which the image of `layer` can be read too.
    pub fn add_repository(&self, layer: &str, repository: Repository) {
        let Some(layer) = self.state.store.layer(layer) else {
            return;
        };
        if let Some(tree) = self.state.trees.read().get(&layer.first_node) {
            tree.image.add_repositories([repository]);
        }
    }

    /// Drops trees that are not used any more, from time to time. Must be called within a runtime.
    pub fn drop_unused_trees(&self) {
        let state = Arc::downgrade(&self.state);
        tokio::spawn(async move {
            loop {
                tokio::time::sleep(SWEEP_INTERVAL).await;
                let Some(state) = state.upgrade() else { return };
                tokio::task::spawn_blocking(move || state.sweep());
            }
        });
    }

    fn node(&self, node: NodeId) -> Result<OverlayNode, Errno> {
        let node = u32::try_from(node).map_err(|_| Errno::STALE)?;
        if let Some(tree) = self.state.tree(node) {
            return Ok(OverlayNode::Tree(tree));
        }
        if u64::from(node) == ROOT {
            return Ok(OverlayNode::Root);
        }
        if node == LINKS_DIR {
            return Ok(OverlayNode::Links);
        }
        let layer = self.state.store.layer_of_node(node).ok_or(Errno::STALE)?;
        let kind = LayerNode::at(node - layer.first_node).ok_or(Errno::STALE)?;
        Ok(OverlayNode::Layer(layer, kind))
    }

    fn lookup_in_root(&self, name: &[u8]) -> Result<Attr, Errno> {
        if name == b"l" {
            return Ok(directory(LINKS_DIR));
        }
        let id = std::str::from_utf8(name).map_err(|_| Errno::NOENT)?;
        let layer = self.state.store.layer(id).ok_or(Errno::NOENT)?;
        Ok(layer_attr(&layer, LayerNode::Dir))
    }

    fn lookup_link(&self, name: &[u8]) -> Result<Attr, Errno> {
        let link = std::str::from_utf8(name).map_err(|_| Errno::NOENT)?;
        let layer = self.state.store.layer_of_link(link).ok_or(Errno::NOENT)?;
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
        Answer::Ready(Ok(uncached(layer_attr(&layer, node))))
    }

    fn lookup_tree(&self, layer: Arc<PublishedLayer>) -> Answer<Entry> {
        if let Some(root) = self.state.root(&layer) {
            return Answer::Ready(root);
        }
        let state = Arc::clone(&self.state);
        Answer::Pending(Box::pin(async move { state.load(layer).await }))
    }

    fn list_layer(&self, layer: &PublishedLayer, add: &mut ListingCursor<'_>) {
        add.entry(b"diff", layer_attr(layer, LayerNode::EmptyDiff));
        add.entry(b"link", layer_attr(layer, LayerNode::Link));
        if layer.has_lower() {
            add.entry(b"lower", layer_attr(layer, LayerNode::Lower));
        }
    }
}

impl OverlayState {
    /// The loaded tree that contains the node.
    fn tree(&self, node: u32) -> Option<Arc<LoadedTree>> {
        let trees = self.trees.read();
        let (first, tree) = trees.range(..=node).next_back()?;
        if node - first < LAYER_NODES || node >= tree.end {
            return None;
        }
        tree.touch();
        Some(Arc::clone(tree))
    }

    /// The root of a layer's tree, if it is loaded.
    fn root(&self, layer: &PublishedLayer) -> Option<Result<Entry, Errno>> {
        self.trees.read().get(&layer.first_node).map(|tree| tree.root())
    }

    /// Loads the layer's tree, from disk if possible, and returns its root.
    async fn load(&self, layer: Arc<PublishedLayer>) -> Result<Entry, Errno> {
        let row = layer.tree.as_ref().ok_or(Errno::STALE)?;
        let failed = |error: &dyn fmt::Display| {
            if self.logged.get(&layer.first_node).is_none() {
                self.logged.insert(layer.first_node, ());
                let image = row.sources.last().map_or("", String::as_str);
                tracing::error!(image, layer = %layer.id, manifest = %row.manifest, %error, "failed to load layer tree");
            }
            Errno::IO
        };
        let image = match self.images.load_manifest(row.manifest, &row.sources).await {
            Ok(image) => image,
            Err(error) => return Err(failed(&ErrorChain(&error))),
        };
        if image.contents.tree.len() != row.inodes {
            return Err(failed(&"number of inodes differs from the published one"));
        }
        self.logged.remove(&layer.first_node);
        image.prepare().await;
        let name = row.sources.last().cloned().unwrap_or_default();
        let base = NodeId::from(layer.first_node + LAYER_NODES - 1);
        let tree = || {
            Arc::new(LoadedTree {
                image: Arc::clone(&image),
                view: ImageView::new(Arc::clone(&image.contents), name, base),
                end: layer.first_node.saturating_add(layer.node_count()),
                is_used: AtomicBool::new(true),
                idle_sweeps: AtomicU32::new(0),
            })
        };
        self.trees.write().entry(layer.first_node).or_insert_with(tree).root()
    }

    /// Drops the trees that have not been used for [`IDLE_TIME`].
    fn sweep(&self) {
        let is_idle = |tree: &LoadedTree| {
            if tree.is_used.swap(false, Ordering::Relaxed) {
                tree.idle_sweeps.store(0, Ordering::Relaxed);
                return false;
            }
            let sweeps = tree.idle_sweeps.fetch_add(1, Ordering::Relaxed) + 1;
            SWEEP_INTERVAL * sweeps >= IDLE_TIME
        };
        let mut trees = self.trees.write();
        let dropped: Vec<_> = trees.extract_if(.., |_, tree| is_idle(tree)).collect();
        drop(trees);
        for (_, tree) in &dropped {
            tree.image.save_trace();
        }
        if !dropped.is_empty() {
            // Freed outside the lock, because this takes time and other requests wait for the lock.
            drop(dropped);
            memory::return_free_memory();
        }
    }
}

impl LoadedTree {
    fn root(&self) -> Result<Entry, Errno> {
        self.view.root().map(uncached)
    }

    /// Records that the tree is in use.
    fn touch(&self) {
        // Mostly read, so that threads do not contend for the cache line.
        if !self.is_used.load(Ordering::Relaxed) {
            self.is_used.store(true, Ordering::Relaxed);
        }
    }
}

impl PublishedLayer {
    /// Whether the layer is a data blob, whose files are in the tree of a layer above.
    fn is_data_blob(&self) -> bool {
        self.tree.is_none()
    }

    /// Whether `lower` exists. A data blob always has one, which cannot be read.
    fn has_lower(&self) -> bool {
        self.is_data_blob() || self.lower.is_some()
    }

    fn content(&self, node: LayerNode) -> &str {
        match node {
            LayerNode::Link => &self.link,
            // Not empty: the kernel would not send a READ for an empty file, so the error would not be seen.
            LayerNode::Lower => self.lower.as_deref().unwrap_or("-"),
            _ => "",
        }
    }
}

/// Passes entries to a directory listing, from an offset on.
struct ListingCursor<'a> {
    add: &'a mut dyn FnMut(DirEntry<'_>) -> bool,
    skip: u64,
    next: u64,
    full: bool,
}

impl ListingCursor<'_> {
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

/// An entry without caching, because what is published may change.
fn uncached(attr: Attr) -> Entry {
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
        LayerNode::Symlink => attr(number, libc::S_IFLNK | 0o777, link_target(layer).len() as u64),
    }
}

/// Target of the layer's symbolic link in `l/`.
fn link_target(layer: &PublishedLayer) -> String {
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
    fn prepare(&self, node: NodeId) -> Option<PendingResult<()>> {
        let node = u32::try_from(node).ok()?;
        if node <= LINKS_DIR || self.state.tree(node).is_some() {
            return None;
        }
        let layer = self.state.store.layer_of_node(node)?;
        if node - layer.first_node < LAYER_NODES {
            return None;
        }
        let state = Arc::clone(&self.state);
        Some(Box::pin(async move { state.load(layer).await.map(drop) }))
    }

    fn lookup(&self, parent: NodeId, name: &[u8]) -> Answer<Entry> {
        let found = match self.node(parent) {
            Ok(OverlayNode::Root) => self.lookup_in_root(name).map(uncached),
            Ok(OverlayNode::Links) => self.lookup_link(name).map(uncached),
            Ok(OverlayNode::Layer(layer, LayerNode::Dir)) => return self.lookup_in_layer(layer, name),
            Ok(OverlayNode::Layer(..)) => Err(Errno::NOENT),
            Ok(OverlayNode::Tree(tree)) => tree.view.lookup(parent, name),
            Err(error) => Err(error),
        };
        Answer::Ready(found)
    }

    fn attr(&self, node: NodeId) -> Result<(Attr, Duration), Errno> {
        let attr = match self.node(node)? {
            OverlayNode::Root | OverlayNode::Links => {
                attr(u32::try_from(node).unwrap_or_default(), libc::S_IFDIR | 0o700, 0)
            }
            OverlayNode::Layer(layer, kind) => layer_attr(&layer, kind),
            OverlayNode::Tree(tree) => return tree.view.attr(node),
        };
        Ok((attr, Duration::ZERO))
    }

    fn readlink(&self, node: NodeId) -> Result<Vec<u8>, Errno> {
        match self.node(node)? {
            OverlayNode::Layer(layer, LayerNode::Symlink) => Ok(link_target(&layer).into_bytes()),
            OverlayNode::Tree(tree) => tree.view.readlink(node),
            _ => Err(Errno::INVAL),
        }
    }

    fn list(&self, dir: NodeId, offset: u64, add: &mut dyn FnMut(DirEntry<'_>) -> bool) -> Result<(), Errno> {
        let mut listing = ListingCursor {
            add,
            skip: offset,
            next: 0,
            full: false,
        };
        match self.node(dir)? {
            OverlayNode::Root => {
                listing.entry(b"l", directory(LINKS_DIR));
                for layer in self.state.store.layers() {
                    listing.entry(layer.id.as_bytes(), layer_attr(&layer, LayerNode::Dir));
                }
            }
            OverlayNode::Links => {
                for layer in self.state.store.layers() {
                    listing.entry(layer.link.as_bytes(), layer_attr(&layer, LayerNode::Symlink));
                }
            }
            OverlayNode::Layer(layer, LayerNode::Dir) => self.list_layer(&layer, &mut listing),
            OverlayNode::Layer(_, LayerNode::EmptyDiff) => {}
            OverlayNode::Layer(..) => return Err(Errno::NOTDIR),
            OverlayNode::Tree(tree) => return tree.view.list(dir, offset, listing.add),
        }
        Ok(())
    }

    fn read(&self, file: NodeId, offset: u64, into: &mut [u8]) -> ReadAnswer {
        let layer = match self.node(file) {
            Ok(OverlayNode::Tree(tree)) => return tree.view.read(file, offset, into),
            Ok(OverlayNode::Layer(layer, kind @ (LayerNode::Link | LayerNode::Lower))) if !layer.is_data_blob() => {
                Ok(read_bytes(layer.content(kind).as_bytes(), offset, into))
            }
            Ok(OverlayNode::Layer(layer, LayerNode::Link | LayerNode::Lower)) => {
                tracing::warn!(
                    layer = %layer.id,
                    "refused to stack a layer on a data blob: the image is unpublished or pulled as an ordinary one"
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
            OverlayNode::Tree(tree) => tree.view.xattr(node, name),
            _ => Err(Errno::NODATA),
        }
    }

    fn xattrs(&self, node: NodeId) -> Result<Vec<u8>, Errno> {
        match self.node(node)? {
            OverlayNode::Tree(tree) => tree.view.xattrs(node),
            _ => Ok(Vec::new()),
        }
    }

    fn statfs(&self) -> FsStat {
        FsStat::default()
    }
}
