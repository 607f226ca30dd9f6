//! The additional layer store: the file system in which containers/storage looks for layers.
//!
//! Every layer is asked for by path, `<store>/<reference in base64>/<layer digest>/{diff,info,blob,use}`; see
//! `docs/ARCHITECTURE.md` for the protocol. [`names`] holds which names and nodes there are, [`view`] shows an image's
//! tree, and this file is the protocol.

use std::{
    io,
    sync::{Arc, OnceLock, atomic::Ordering},
    time::Duration,
};

use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use parking_lot::Mutex;

use crate::{
    digest::Digest,
    image::{error::ImageError, reference::Reference, resolve::Images},
    report::Report,
    vfs::{Answer, Attr, DirEntry, Entry, Errno, FileSystem, FsStat, Later, NodeId, ReadAnswer},
};

pub mod empty;
pub mod letting_go;
pub mod names;
pub mod redirect;
pub mod single;
pub mod view;

use empty::{EmptyDirs, is_empty_dir};
use letting_go::{Forgetful, LettingGo};
use names::{Facet, LayerDir, Names, Node, ReferenceDir};
use redirect::{IdMaps, Link, TREE};

/// Creating this file announces a use of the layer. The error it gives means success.
const USE: &[u8] = b"use";

/// The additional layer store.
pub struct Store {
    inner: Arc<Inner>,
}

struct Inner {
    images: Arc<Images>,
    names: Mutex<Names>,
    letting_go: OnceLock<LettingGo>,
    id_maps: OnceLock<Box<dyn IdMaps>>,
    empty_dirs: EmptyDirs,
}

impl Store {
    /// A store of `images`.
    pub fn new(images: Arc<Images>) -> Self {
        Self {
            inner: Arc::new(Inner {
                images,
                names: Mutex::default(),
                letting_go: OnceLock::new(),
                id_maps: OnceLock::new(),
                empty_dirs: EmptyDirs::default(),
            }),
        }
    }

    /// Sets who makes the kernel drop names. Without, memory is freed when the kernel forgets by itself.
    pub fn set_forgetful(&self, forgetful: Box<dyn Forgetful>) -> io::Result<()> {
        self.inner.letting_go.set(LettingGo::start(forgetful)?).ok();
        Ok(())
    }

    /// Sets who makes id-mapped copies of the store. Without, containers in user namespaces see nobody's files.
    pub fn set_id_maps(&self, id_maps: Box<dyn IdMaps>) {
        self.inner.id_maps.set(id_maps).ok();
    }

    /// Takes the copies away, which hold the mount.
    pub fn close_id_maps(&self) {
        if let Some(maps) = self.inner.id_maps.get() {
            maps.close();
        }
    }

    /// How many layers are held, and how many uses of them Podman has announced.
    pub fn counts(&self) -> (usize, u64) {
        self.inner.names.lock().counts()
    }

    fn node(&self, node: NodeId) -> Result<Node, Errno> {
        if is_empty_dir(node) {
            return Ok(Node::EmptyDir);
        }
        self.inner.names.lock().node(node).ok_or(Errno::STALE)
    }

    fn lookup_reference(&self, name: &[u8]) -> Result<Entry, Errno> {
        let reference = decode(name).ok_or(Errno::NOENT)?;
        let mut names = self.inner.names.lock();
        let dir = names.reference(name, reference);
        names.retain(dir.node);
        Ok(fresh(directory(dir.node, 0o700)))
    }

    fn lookup_layer(&self, parent: Arc<ReferenceDir>, name: &[u8]) -> Answer<Entry> {
        let Some(digest) = std::str::from_utf8(name)
            .ok()
            .and_then(|text| text.parse::<Digest>().ok())
        else {
            return Answer::Now(Err(Errno::NOENT));
        };
        let mut names = self.inner.names.lock();
        if let Some(layer) = names.layer(&parent, &digest) {
            names.retain(layer.node);
            return Answer::Now(Ok(fresh(directory(layer.node, 0o700))));
        }
        drop(names);
        parent.resolving.fetch_add(1, Ordering::AcqRel);
        let resolving = Resolving(Arc::clone(&parent));
        Answer::Later(Inner::resolve(Arc::clone(&self.inner), resolving, digest))
    }

    fn lookup_in_layer(&self, layer: Arc<LayerDir>, name: &[u8], caller: u32) -> Answer<Entry> {
        let attr = match name {
            b"diff" => match self.inner.id_maps.get().map(|maps| maps.copy_for(caller)) {
                Some(copy) => return Answer::Later(Inner::redirect(Arc::clone(&self.inner), layer, copy)),
                None => self.inner.diff_attr(&layer),
            },
            TREE => self.inner.diff_attr(&layer),
            b"info" => Ok(info_attr(&layer)),
            b"blob" => Ok(blob_attr(&layer)),
            _ => Err(Errno::NOENT),
        };
        Answer::Now(attr.map(|attr| self.inner.give(attr)))
    }

    fn lookup_in_image(&self, view: &view::View, parent: NodeId, name: &[u8]) -> Result<Entry, Errno> {
        let entry = view.lookup(parent, name)?;
        if let Some(attr) = entry.attr {
            self.inner.names.lock().retain(attr.node);
        }
        Ok(entry)
    }

    fn read_blob(&self, layer: Arc<LayerDir>, offset: u64, len: usize) -> Later<Vec<u8>> {
        Box::pin(async move {
            let read = layer.image.read_layer(layer.position, offset, len).await;
            read.map(|bytes| bytes.to_vec()).map_err(|error| {
                tracing::error!(image = %layer.parent.reference, layer = %layer.digest, "cannot read the layer: {}", Report(&error));
                Errno::IO
            })
        })
    }
}

/// A look-up in a reference's directory, as long as it is under way.
struct Resolving(Arc<ReferenceDir>);

impl Drop for Resolving {
    fn drop(&mut self) {
        self.0.resolving.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Inner {
    /// The kernel gets to know the node, and asks again each time.
    fn give(&self, attr: Attr) -> Entry {
        self.names.lock().retain(attr.node);
        fresh(attr)
    }

    fn diff_attr(&self, layer: &LayerDir) -> Result<Attr, Errno> {
        match &layer.diff {
            Some(view) => view.root(),
            None => Ok(directory(self.empty_dirs.another(), 0o755)),
        }
    }

    /// The layer's `diff`, also for one who is about to mount it with other ids.
    fn redirect(self: Arc<Self>, layer: Arc<LayerDir>, copy: Later<Option<u32>>) -> Later<Entry> {
        Box::pin(async move {
            let link = copy.await.ok().flatten().and_then(|copy| Link::new(copy, &layer));
            match link {
                Some(link) => self.link_attr(link).map(fresh),
                None => self.diff_attr(&layer).map(|attr| self.give(attr)),
            }
        })
    }

    fn link_target(&self, link: Link) -> Result<Vec<u8>, Errno> {
        let maps = self.id_maps.get().ok_or(Errno::STALE)?;
        match self.names.lock().node(NodeId::from(link.layer)) {
            Some(Node::Layer(layer, Facet::Dir)) => Ok(redirect::target(maps.path(link.copy), &layer)),
            _ => Err(Errno::STALE),
        }
    }

    fn link_attr(&self, link: Link) -> Result<Attr, Errno> {
        let size = self.link_target(link)?.len() as u64;
        Ok(attr(link.node(), libc::S_IFLNK | 0o777, size))
    }

    fn resolve(self: Arc<Self>, resolving: Resolving, digest: Digest) -> Later<Entry> {
        Box::pin(async move {
            let parent = &resolving.0;
            match self.images.with_layer(&parent.reference, &digest).await {
                Ok(Some(image)) => {
                    let mut names = self.names.lock();
                    let layer = names.add_layer(parent, image, digest).ok_or(Errno::NOENT)?;
                    names.retain(layer.node);
                    Ok(fresh(directory(layer.node, 0o700)))
                }
                Ok(None) => Err(Errno::NOENT),
                Err(error) => {
                    log_unresolved(&parent.reference, &error);
                    Err(Errno::NOENT)
                }
            }
        })
    }
}

/// Podman falls back to an ordinary pull; whether that is worth a word depends on why.
fn log_unresolved(reference: &Reference, error: &ImageError) {
    if error.is_ordinary() {
        tracing::debug!(%reference, "not served: {}", Report(error));
    } else {
        tracing::warn!(%reference, "not served, so Podman will try an ordinary pull: {}", Report(error));
    }
}

/// The reference that a directory of the store is named after: standard base64 with padding.
fn decode(name: &[u8]) -> Option<Reference> {
    let text = String::from_utf8(BASE64.decode(name).ok()?).ok()?;
    text.parse()
        .inspect_err(|error| tracing::debug!(%error, "not served"))
        .ok()
}

/// What can change is looked up anew each time: only then does a use or a new image show at once.
fn fresh(attr: Attr) -> Entry {
    Entry {
        attr: Some(attr),
        ttl: Duration::ZERO,
    }
}

fn directory(node: NodeId, permissions: u32) -> Attr {
    attr(node, libc::S_IFDIR | permissions, 0)
}

fn info_attr(layer: &LayerDir) -> Attr {
    attr(layer.facet(Facet::Info), libc::S_IFREG | 0o400, layer.info.len() as u64)
}

fn blob_attr(layer: &LayerDir) -> Attr {
    attr(
        layer.facet(Facet::Blob),
        libc::S_IFREG | 0o400,
        layer.image.manifest.layers[layer.position].size,
    )
}

fn attr(node: NodeId, mode: u32, size: u64) -> Attr {
    let nlink = if mode & libc::S_IFMT == libc::S_IFDIR { 2 } else { 1 };
    Attr {
        node,
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

impl FileSystem for Store {
    fn lookup(&self, parent: NodeId, name: &[u8], caller: u32) -> Answer<Entry> {
        let found = match self.node(parent) {
            Ok(Node::Root) => self.lookup_reference(name),
            Ok(Node::Reference(dir)) => return self.lookup_layer(dir, name),
            Ok(Node::Layer(layer, Facet::Dir)) => return self.lookup_in_layer(layer, name, caller),
            Ok(Node::Layer(..) | Node::EmptyDir) => Err(Errno::NOENT),
            Ok(Node::Image(view)) => self.lookup_in_image(&view, parent, name),
            Err(error) => Err(error),
        };
        Answer::Now(found)
    }

    fn retain(&self, node: NodeId) {
        self.inner.names.lock().retain(node);
    }

    fn forget(&self, node: NodeId, count: u64) {
        // Freed after the statement's end, when the names are unlocked.
        let _gone = self.inner.names.lock().forget(node, count);
    }

    fn attr(&self, node: NodeId) -> Result<(Attr, Duration), Errno> {
        if let Some(link) = Link::of(node) {
            return Ok((self.inner.link_attr(link)?, Duration::ZERO));
        }
        let attr = match self.node(node)? {
            Node::Root | Node::Reference(_) | Node::Layer(_, Facet::Dir) => directory(node, 0o700),
            Node::EmptyDir => directory(node, 0o755),
            Node::Layer(layer, Facet::Info) => info_attr(&layer),
            Node::Layer(layer, Facet::Blob) => blob_attr(&layer),
            Node::Image(view) => return view.attr(node),
        };
        Ok((attr, Duration::ZERO))
    }

    fn readlink(&self, node: NodeId) -> Result<Vec<u8>, Errno> {
        if let Some(link) = Link::of(node) {
            return self.inner.link_target(link);
        }
        match self.node(node)? {
            Node::Image(view) => view.readlink(node),
            _ => Err(Errno::INVAL),
        }
    }

    fn list(&self, dir: NodeId, offset: u64, add: &mut dyn FnMut(DirEntry<'_>) -> bool) -> Result<(), Errno> {
        match self.node(dir)? {
            Node::Image(view) => view.list(dir, offset, add),
            Node::Layer(_, Facet::Info | Facet::Blob) => Err(Errno::NOTDIR),
            // Names are made by asking for them, so there is nothing to list.
            _ => Ok(()),
        }
    }

    fn read(&self, file: NodeId, offset: u64, into: &mut [u8]) -> ReadAnswer {
        match self.node(file) {
            Ok(Node::Image(view)) => view.read(file, offset, into),
            Ok(Node::Layer(layer, Facet::Info)) => ReadAnswer::Now(Ok(read_bytes(&layer.info, offset, into))),
            Ok(Node::Layer(layer, Facet::Blob)) => ReadAnswer::Later(self.read_blob(layer, offset, into.len())),
            Ok(_) => ReadAnswer::Now(Err(Errno::ISDIR)),
            Err(error) => ReadAnswer::Now(Err(error)),
        }
    }

    fn xattr(&self, node: NodeId, name: &[u8]) -> Result<Vec<u8>, Errno> {
        match self.node(node)? {
            Node::Image(view) => view.xattr(node, name),
            _ => Err(Errno::NODATA),
        }
    }

    fn xattrs(&self, node: NodeId) -> Result<Vec<u8>, Errno> {
        match self.node(node)? {
            Node::Image(view) => view.xattrs(node),
            _ => Ok(Vec::new()),
        }
    }

    fn statfs(&self) -> FsStat {
        FsStat::default()
    }

    fn create(&self, parent: NodeId, name: &[u8]) -> Errno {
        if let Ok(Node::Layer(layer, Facet::Dir)) = self.node(parent)
            && name == USE
        {
            let uses = self.inner.names.lock().add_use(&layer);
            tracing::debug!(image = %layer.parent.reference, layer = %layer.digest, uses, "layer is used");
            return Errno::NOENT;
        }
        Errno::ROFS
    }

    fn rmdir(&self, parent: NodeId, name: &[u8]) -> Errno {
        let digest = std::str::from_utf8(name)
            .ok()
            .and_then(|text| text.parse::<Digest>().ok());
        let (Ok(Node::Reference(dir)), Some(digest)) = (self.node(parent), digest) else {
            return Errno::ROFS;
        };
        let mut names = self.inner.names.lock();
        let Some(layer) = names.layer(&dir, &digest) else {
            return Errno::NOENT;
        };
        let uses = names.release(&layer);
        drop(names);
        tracing::debug!(image = %dir.reference, layer = %digest, uses, "layer is released");
        if uses == 0
            && let Some(letting_go) = self.inner.letting_go.get()
        {
            letting_go.let_go(layer);
        }
        Errno::NOENT
    }
}

#[cfg(test)]
mod tests;
