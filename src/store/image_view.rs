//! The nodes of one image: translates its tree to the types of [`crate::vfs`].

use std::{sync::Arc, time::Duration};

use crate::{
    error_chain::ErrorChain,
    image::contents::Contents,
    log_limit::LogLimit,
    rafs::Ino,
    vfs::{Attr, DirEntry, Entry, Errno, NodeId, PendingResult, ReadAnswer},
};

/// TTL of entries and attributes: an image never changes.
const IMMUTABLE_TTL: Duration = Duration::from_secs(365 * 24 * 3600);
/// Minimum interval between logged read errors of one image.
const ERROR_LOG_INTERVAL: Duration = Duration::from_secs(10);

/// The nodes of one image within a mount.
pub struct ImageView {
    /// The image's files.
    pub image: Arc<Contents>,
    /// Name of the image, for log messages.
    name: String,
    /// Node id of inode `n` is `base + n + 1`.
    base: NodeId,
    error_log: LogLimit,
}

/// Mode to show for the root directory. A widespread converter writes 0750, with which only root could use the image.
fn root_mode(mode: u32) -> u32 {
    if mode & 0o7777 == 0o750 { mode | 0o005 } else { mode }
}

impl ImageView {
    /// Maps the inodes of `image` to node ids from `base` + 1 on; the first one is the root. `name` appears in log
    /// messages.
    pub fn new(image: Arc<Contents>, name: String, base: NodeId) -> Arc<Self> {
        Arc::new(Self {
            image,
            name,
            base,
            error_log: LogLimit::new(ERROR_LOG_INTERVAL),
        })
    }

    fn node(&self, ino: Ino) -> NodeId {
        self.base + u64::from(ino) + 1
    }

    fn ino(&self, node: NodeId) -> Result<Ino, Errno> {
        node.checked_sub(self.base + 1)
            .and_then(|ino| Ino::try_from(ino).ok())
            .ok_or(Errno::STALE)
    }

    fn attr_of(&self, ino: Ino) -> Result<Attr, Errno> {
        let inode = self.image.tree.inode(ino).ok_or(Errno::STALE)?;
        Ok(Attr {
            node: self.node(ino),
            mode: if ino == 0 { root_mode(inode.mode) } else { inode.mode },
            uid: inode.uid,
            gid: inode.gid,
            nlink: inode.nlink,
            size: inode.size,
            rdev: inode.rdev,
            mtime: inode.mtime,
            mtime_nsec: inode.mtime_nsec,
        })
    }

    /// The root's attributes.
    pub fn root(&self) -> Result<Attr, Errno> {
        self.attr_of(0)
    }

    /// Looks up a name. The kernel may cache the absence of a name too.
    pub fn lookup(&self, parent: NodeId, name: &[u8]) -> Result<Entry, Errno> {
        let found = self.image.tree.lookup(self.ino(parent)?, name);
        Ok(Entry {
            attr: found.map(|ino| self.attr_of(ino)).transpose()?,
            ttl: IMMUTABLE_TTL,
        })
    }

    /// Attributes of a node.
    pub fn attr(&self, node: NodeId) -> Result<(Attr, Duration), Errno> {
        Ok((self.attr_of(self.ino(node)?)?, IMMUTABLE_TTL))
    }

    /// The target of a symbolic link.
    pub fn readlink(&self, node: NodeId) -> Result<Vec<u8>, Errno> {
        self.image
            .tree
            .target(self.ino(node)?)
            .map(<[u8]>::to_vec)
            .ok_or(Errno::INVAL)
    }

    /// Lists a directory: `.` and `..` at offsets 0 and 1, then the entries in order of their names.
    pub fn list(&self, dir: NodeId, offset: u64, add: &mut dyn FnMut(DirEntry<'_>) -> bool) -> Result<(), Errno> {
        let tree = &self.image.tree;
        let dir = self.ino(dir)?;
        if !tree.inode(dir).ok_or(Errno::STALE)?.is_dir() {
            return Err(Errno::NOTDIR);
        }
        let dots = [(&b"."[..], dir), (&b".."[..], tree.parent(dir))];
        let entries = tree.entries(dir).iter().map(|entry| (tree.name(entry), entry.ino));
        let skip = usize::try_from(offset).map_err(|_| Errno::INVAL)?;
        for (position, (name, ino)) in dots.into_iter().chain(entries).enumerate().skip(skip) {
            let entry = DirEntry {
                name,
                attr: self.attr_of(ino)?,
                next: position as u64 + 1,
                ttl: IMMUTABLE_TTL,
            };
            if !add(entry) {
                break;
            }
        }
        Ok(())
    }

    /// Reads part of a regular file.
    pub fn read(self: &Arc<Self>, file: NodeId, offset: u64, into: &mut [u8]) -> ReadAnswer {
        let range = self.ino(file).and_then(|ino| {
            let inode = self.image.tree.inode(ino).ok_or(Errno::STALE)?;
            let left = inode.size.saturating_sub(offset);
            Ok((
                ino,
                usize::try_from(left).map_or(into.len(), |left| left.min(into.len())),
            ))
        });
        let (ino, len) = match range {
            Ok(range) => range,
            Err(error) => return ReadAnswer::Ready(Err(error)),
        };
        if self.image.read_ready(ino, offset, &mut into[..len]) {
            return ReadAnswer::Ready(Ok(len));
        }
        ReadAnswer::Pending(self.fetch(ino, offset, len))
    }

    fn fetch(self: &Arc<Self>, ino: Ino, offset: u64, len: usize) -> PendingResult<Vec<u8>> {
        let view = Arc::clone(self);
        Box::pin(async move {
            let mut data = vec![0; len];
            match view.image.read(ino, offset, &mut data).await {
                Ok(()) => Ok(data),
                Err(error) => {
                    view.log_error(&error);
                    Err(Errno::IO)
                }
            }
        })
    }

    /// Logs a read error with the image's name, at most once per [`ERROR_LOG_INTERVAL`].
    pub fn log_error(&self, error: &dyn std::error::Error) {
        if let Some(suppressed) = self.error_log.permit() {
            tracing::error!(image = %self.name, suppressed, error = %ErrorChain(error), "failed to read file");
        }
    }

    /// Value of an extended attribute.
    pub fn xattr(&self, node: NodeId, name: &[u8]) -> Result<Vec<u8>, Errno> {
        self.image
            .tree
            .xattr(self.ino(node)?, name)
            .map(<[u8]>::to_vec)
            .ok_or(Errno::NODATA)
    }

    /// Names of all extended attributes, each terminated by a NUL.
    pub fn xattrs(&self, node: NodeId) -> Result<Vec<u8>, Errno> {
        let names = self.image.tree.xattrs(self.ino(node)?);
        Ok(names.flat_map(|(name, _)| [name, b"\0"].concat()).collect())
    }
}
