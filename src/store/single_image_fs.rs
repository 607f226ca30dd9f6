//! File system of a single image, for `nydus-store mount`.

use std::{sync::Arc, time::Duration};

use super::image_view::ImageView;
use crate::{
    image::contents::Contents,
    vfs::{Answer, Attr, DirEntry, Entry, Errno, FileSystem, FsStat, NodeId, ReadAnswer},
};

/// File system of a single image.
pub struct SingleImageFs(Arc<ImageView>);

impl SingleImageFs {
    /// Serves `image`; `name` appears in log messages.
    pub fn new(image: Arc<Contents>, name: String) -> Self {
        // Inode 0 becomes node 1, the root of the mount.
        Self(ImageView::new(image, name, 0))
    }
}

impl FileSystem for SingleImageFs {
    fn lookup(&self, parent: NodeId, name: &[u8]) -> Answer<Entry> {
        Answer::Ready(self.0.lookup(parent, name))
    }

    fn attr(&self, node: NodeId) -> Result<(Attr, Duration), Errno> {
        self.0.attr(node)
    }

    fn readlink(&self, node: NodeId) -> Result<Vec<u8>, Errno> {
        self.0.readlink(node)
    }

    fn list(&self, dir: NodeId, offset: u64, add: &mut dyn FnMut(DirEntry<'_>) -> bool) -> Result<(), Errno> {
        self.0.list(dir, offset, add)
    }

    fn read(&self, file: NodeId, offset: u64, into: &mut [u8]) -> ReadAnswer {
        self.0.read(file, offset, into)
    }

    fn xattr(&self, node: NodeId, name: &[u8]) -> Result<Vec<u8>, Errno> {
        self.0.xattr(node, name)
    }

    fn xattrs(&self, node: NodeId) -> Result<Vec<u8>, Errno> {
        self.0.xattrs(node)
    }

    fn statfs(&self) -> FsStat {
        let tree = &self.0.image.tree;
        FsStat {
            bytes: tree.total_bytes(),
            files: tree.total_files(),
        }
    }
}
