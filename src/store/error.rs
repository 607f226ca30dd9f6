//! Why the image store cannot be read or changed.

use std::{io, path::PathBuf};

use crate::digest::Digest;

/// Why the image store cannot be read or changed.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The database cannot be opened.
    #[error(
        "cannot open {path}: {source}; if the file is damaged, move it away: images are published anew when they are pulled"
    )]
    Database {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: Box<redb::Error>,
    },
    /// The database was written by another version of this program.
    #[error(
        "{path} has format {version}, which this version of nydus-store does not know; use the version that wrote it"
    )]
    Version {
        /// The file.
        path: PathBuf,
        /// The format's number.
        version: u32,
    },
    /// The database cannot be read or written.
    #[error("cannot access the database of what is published: {0}; see whether there is room below the root")]
    Access(#[source] Box<redb::Error>),
    /// A row is not what this program writes.
    #[error("malformed row {id} in the database of what is published: {source}; move published.redb away")]
    Row {
        /// The row's key.
        id: String,
        /// The cause.
        source: serde_json::Error,
    },
    /// A file of the store cannot be written.
    #[error("cannot write {path}: {source}")]
    Write {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// There are no node numbers left.
    #[error("no {0} node numbers are left; withdraw layers: remove images from Podman and with `nydus-store rm`")]
    NodesUsedUp(u32),
    /// A layer below the bootstrap is no Nydus data blob.
    #[error("layer {0} is no Nydus data blob: its diff ID is another digest")]
    NoDataBlob(Digest),
    /// A layer is the tree of a published image, and here a data blob.
    #[error("layer {0} cannot be a data blob: another image has it as its bootstrap")]
    Conflict(Digest),
    /// The image is not known by that name.
    #[error("no image is known by the name {0}; `nydus-store images` lists what is")]
    UnknownName(String),
    /// A container's file system is made of the image's layers.
    #[error("{name} is in use by container layer {layer} in {graph_root}; remove the container first")]
    InUse {
        /// The image.
        name: String,
        /// The container's layer.
        layer: String,
        /// Where that layer is.
        graph_root: PathBuf,
    },
    /// What Podman's or CRI-O's storage needs cannot be found out.
    #[error(
        "cannot tell what Podman's or CRI-O's storage needs: {path}: {source}; see `store.graph_roots` in the configuration"
    )]
    GraphRoot {
        /// The file that cannot be read.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
}

impl StoreError {
    pub(super) fn access(source: redb::Error) -> Self {
        Self::Access(Box::new(source))
    }
}
