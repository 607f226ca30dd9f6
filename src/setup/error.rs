//! Errors of the set-up.

use std::{io, path::PathBuf};

use crate::registries_conf::RegistriesConfError;

/// The set-up failed. Only [`SetupError::Write`] and [`SetupError::ConcurrentChange`] may leave some files written.
#[derive(Debug, thiserror::Error)]
pub enum SetupError {
    /// An existing file cannot be read.
    #[error("cannot read {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// A file cannot be written.
    #[error("cannot write {path}: {source}")]
    Write {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// Another process changed a file after it was read.
    #[error("another process changed {path} during setup: run setup again")]
    ConcurrentChange {
        /// The file.
        path: PathBuf,
    },
    /// A symbolic link leads to a missing file.
    #[error("{path} is a link to a missing file; nothing was changed; remove the link, or create the file")]
    DanglingLink {
        /// The link.
        path: PathBuf,
    },
    /// The store cannot be removed from storage.conf without a change to other settings.
    #[error("{path}: cannot separate the store's entry from other settings; nothing was changed; remove it by hand")]
    Entangled {
        /// The file.
        path: PathBuf,
    },
    /// A symbolic link in the sysroot leads out of it.
    #[error("{path} leads to {target}, outside the sysroot: replace the link by a relative one, or by the file")]
    OutsideSysroot {
        /// The path.
        path: PathBuf,
        /// The link's target.
        target: PathBuf,
    },
    /// A storage.conf is not TOML.
    #[error("{path}: {}\nnothing was changed; fix the file and run setup again", source.to_string().trim_end())]
    Storage {
        /// The file.
        path: PathBuf,
        /// The cause, with line and column.
        source: Box<toml_edit::TomlError>,
    },
    /// A registries.conf is not TOML, or has values that Podman rejects.
    #[error("{path}: {}\nnothing was changed; fix the file and run setup again", source.to_string().trim_end())]
    Registries {
        /// The file.
        path: PathBuf,
        /// The cause, with line and column.
        source: Box<toml::de::Error>,
    },
    /// A value in storage.conf has the wrong type.
    #[error("{path}, line {line}: `{key}` must be {expected}; nothing was changed")]
    WrongType {
        /// The file.
        path: PathBuf,
        /// The line of the value.
        line: usize,
        /// The key, with its tables.
        key: &'static str,
        /// The expected type.
        expected: &'static str,
    },
    /// The storage driver cannot use the store.
    #[error(
        "{path}, line {line}: the storage driver is {driver:?}, but the store requires \"overlay\". \
         Images and containers of one driver are invisible to another; `podman system reset` deletes them and allows \
         the change to overlay"
    )]
    Driver {
        /// The file.
        path: PathBuf,
        /// The line of the driver.
        line: usize,
        /// The driver.
        driver: String,
    },
    /// storage.conf cannot express the store's path.
    #[error("storage.conf cannot express the path {path}: choose a --root of UTF-8 text without `:`, `,` and newlines")]
    StorePath {
        /// The path.
        path: PathBuf,
    },
    /// Another program or person wrote a file at the path of one of setup's own files.
    #[error("{path} was not written by setup: rename it if it is needed, otherwise delete it")]
    NotOurs {
        /// The file.
        path: PathBuf,
    },
    /// A file system is mounted on the store's directory, as by an earlier version.
    #[error(
        "{path} is a mount point of an earlier version of nydus-store: run `systemctl stop nydus-store`, then setup \
         again"
    )]
    Mounted {
        /// The directory.
        path: PathBuf,
    },
    /// A file of CRI-O's configuration is not TOML.
    #[error("{path}: {}", source.to_string().trim_end())]
    Crio {
        /// The file.
        path: PathBuf,
        /// The cause, with line and column.
        source: Box<toml::de::Error>,
    },
}

impl From<RegistriesConfError> for SetupError {
    fn from(error: RegistriesConfError) -> Self {
        match error {
            RegistriesConfError::Read { path, source } => Self::Read { path, source },
            RegistriesConfError::Parse { path, source } => Self::Registries { path, source },
        }
    }
}
