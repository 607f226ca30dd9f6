//! File system of `<root>/layers`: an additional *layer* store in which a look-up announces a pull.
//!
//! Podman up to 5.0 and CRI-O up to 1.30 run no helper at a pull. They look up each layer at `<reference in
//! base64>/<layer digest>/diff`. The look-up publishes the image in the image store and then fails with ENOENT. After
//! that, the pull reads the image store again and finds the layers there.

use std::{collections::HashMap, sync::Arc, time::Duration};

use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use parking_lot::Mutex;

use super::announcer::Announcer;
use crate::{
    digest::Digest,
    image::reference::Reference,
    vfs::{Answer, Attr, DirEntry, Entry, Errno, FileSystem, FsStat, NodeId, ROOT, ReadAnswer},
};

/// How long the kernel may cache the root's attributes. containers/storage does not start without a directory there.
/// With this TTL, `stat` succeeds even after this program died.
const ROOT_TTL: Duration = Duration::from_secs(100 * 365 * 24 * 3600);

/// File system that announces pulls: a directory for each reference.
pub struct LayerStoreFs {
    announcer: Arc<Announcer>,
    dirs: Mutex<ReferenceDirs>,
}

/// Directories of references that the kernel has looked up.
#[derive(Default)]
struct ReferenceDirs {
    last_node: NodeId,
    by_name: HashMap<Vec<u8>, NodeId>,
    by_node: HashMap<NodeId, ReferenceDir>,
}

struct ReferenceDir {
    name: Vec<u8>,
    reference: Reference,
    lookups: u64,
}

impl LayerStoreFs {
    /// Reports pulls to `announcer`.
    pub fn new(announcer: Arc<Announcer>) -> Self {
        Self {
            announcer,
            dirs: Mutex::default(),
        }
    }

    fn lookup_reference(&self, name: &[u8]) -> Result<Entry, Errno> {
        let text = BASE64.decode(name).ok().and_then(|text| String::from_utf8(text).ok());
        let reference: Reference = text.and_then(|text| text.parse().ok()).ok_or(Errno::NOENT)?;
        Ok(Entry {
            attr: Some(directory(self.dirs.lock().add_lookup(name, reference))),
            ttl: Duration::ZERO,
        })
    }

    fn lookup_layer(&self, dir: NodeId, name: &[u8]) -> Answer<Entry> {
        let digest = std::str::from_utf8(name)
            .ok()
            .and_then(|name| name.parse::<Digest>().ok());
        let reference = self.dirs.lock().by_node.get(&dir).map(|dir| dir.reference.clone());
        // An earlier process has passed the directory to the kernel, which looks it up again after this error.
        let Some(reference) = reference else {
            return Answer::Ready(Err(Errno::STALE));
        };
        let Some(digest) = digest else {
            return Answer::Ready(Err(Errno::NOENT));
        };
        if self.announcer.is_ordinary(&reference, &digest) {
            return Answer::Ready(Err(Errno::NOENT));
        }
        let announcer = Arc::clone(&self.announcer);
        Answer::Pending(Box::pin(async move {
            // The look-up fails in any case: the layer is in the image store or in the registry. The announcer logs.
            announcer.announce(&reference).await.ok();
            Err(Errno::NOENT)
        }))
    }
}

impl ReferenceDirs {
    /// Adds a look-up of the directory `name` and returns its node.
    fn add_lookup(&mut self, name: &[u8], reference: Reference) -> NodeId {
        if let Some(node) = self.by_name.get(name)
            && let Some(dir) = self.by_node.get_mut(node)
        {
            dir.lookups += 1;
            return *node;
        }
        self.last_node = self.last_node.max(ROOT) + 1;
        let name = name.to_owned();
        self.by_name.insert(name.clone(), self.last_node);
        let lookups = 1;
        self.by_node.insert(
            self.last_node,
            ReferenceDir {
                name,
                reference,
                lookups,
            },
        );
        self.last_node
    }

    fn forget(&mut self, node: NodeId, count: u64) {
        let Some(dir) = self.by_node.get_mut(&node) else {
            return;
        };
        dir.lookups = dir.lookups.saturating_sub(count);
        if dir.lookups == 0
            && let Some(dir) = self.by_node.remove(&node)
        {
            self.by_name.remove(&dir.name);
        }
    }
}

fn directory(node: NodeId) -> Attr {
    Attr {
        node,
        mode: libc::S_IFDIR | 0o700,
        uid: 0,
        gid: 0,
        nlink: 2,
        size: 0,
        rdev: 0,
        mtime: 0,
        mtime_nsec: 0,
    }
}

impl FileSystem for LayerStoreFs {
    fn lookup(&self, parent: NodeId, name: &[u8]) -> Answer<Entry> {
        if parent == ROOT {
            return Answer::Ready(self.lookup_reference(name));
        }
        self.lookup_layer(parent, name)
    }

    fn forget(&self, node: NodeId, count: u64) {
        self.dirs.lock().forget(node, count);
    }

    fn attr(&self, node: NodeId) -> Result<(Attr, Duration), Errno> {
        match node {
            ROOT => Ok((directory(ROOT), ROOT_TTL)),
            other if self.dirs.lock().by_node.contains_key(&other) => Ok((directory(other), Duration::ZERO)),
            _ => Err(Errno::STALE),
        }
    }

    fn readlink(&self, _: NodeId) -> Result<Vec<u8>, Errno> {
        Err(Errno::INVAL)
    }

    fn list(&self, _: NodeId, _: u64, _: &mut dyn FnMut(DirEntry<'_>) -> bool) -> Result<(), Errno> {
        // Directories come into being when they are looked up.
        Ok(())
    }

    fn read(&self, _: NodeId, _: u64, _: &mut [u8]) -> ReadAnswer {
        ReadAnswer::Ready(Err(Errno::ISDIR))
    }

    fn xattr(&self, _: NodeId, _: &[u8]) -> Result<Vec<u8>, Errno> {
        Err(Errno::NODATA)
    }

    fn xattrs(&self, _: NodeId) -> Result<Vec<u8>, Errno> {
        Ok(Vec::new())
    }

    fn statfs(&self) -> FsStat {
        FsStat::default()
    }
}
