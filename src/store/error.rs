//! Errors of the image store.

use std::{io, path::PathBuf};

use crate::{
    atomic_file::{is_full, is_unwritable},
    digest::Digest,
};

/// Why the image store cannot be read or changed.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The database cannot be opened.
    #[error("cannot open {path}: {source}; if the file is damaged, move it away: each pull publishes its image again")]
    Database {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: Box<redb::Error>,
    },
    /// The database was written by a version of this program that uses another row format.
    #[error("unknown format {version} of {path}; use the version of nydus-store that wrote it")]
    Version {
        /// The file.
        path: PathBuf,
        /// Number of the format.
        version: u32,
    },
    /// The database cannot be read or written.
    #[error("cannot access the database of published images: {0}; check the free space of the root's file system")]
    Access(#[source] Box<redb::Error>),
    /// A row does not have the form that this program writes.
    #[error("malformed row {id} in the database of published images: {source}; move published.redb away")]
    Row {
        /// Key of the row.
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
    /// No range of free node ids is long enough.
    #[error("no {0} consecutive node ids are free; remove images from Podman and with `nydus-store rm`")]
    NodeIdsExhausted(u32),
    /// A layer below the bootstrap is not a Nydus data blob.
    #[error("layer {0} is not a Nydus data blob: its diff ID differs from its digest")]
    NotDataBlob(Digest),
    /// A layer is a data blob of this image and the bootstrap of a published one.
    #[error("layer {0} cannot be a data blob: it is the bootstrap of another image")]
    Conflict(Digest),
    /// No image has that name.
    #[error("no image is named {0}; `nydus-store images` lists the known names")]
    UnknownName(String),
    /// A container uses the image's layers.
    #[error("{name} is in use by container layer {layer} in {graph_root}; remove the container first")]
    InUse {
        /// Name of the image.
        name: String,
        /// Layer of the container.
        layer: String,
        /// Graph root that has this layer.
        graph_root: PathBuf,
    },
    /// The layers that Podman's or CRI-O's storage requires cannot be determined.
    #[error(
        "cannot determine which layers Podman or CRI-O needs: {path}: {source}; see `store.graph_roots` in the configuration"
    )]
    GraphRoot {
        /// The file that cannot be read.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
}

impl StoreError {
    /// Whether the disk is full.
    pub(super) fn is_disk_full(&self) -> bool {
        self.io_error().is_some_and(is_full)
    }

    /// Whether nothing can be written to the disk at present.
    pub(super) fn is_unwritable(&self) -> bool {
        self.io_error().is_some_and(is_unwritable)
    }

    fn io_error(&self) -> Option<&io::Error> {
        match self {
            Self::Write { source, .. } => Some(source),
            Self::Database { source, .. } | Self::Access(source) => match &**source {
                redb::Error::Io(error) => Some(error),
                _ => None,
            },
            _ => None,
        }
    }

    pub(super) fn access(source: redb::Error) -> Self {
        Self::Access(Box::new(source))
    }
}
