//! What keeps the set-up from being written.

use std::{io, path::PathBuf};

use crate::registries_conf;

/// Nothing has been written, unless it is [`Error::Write`] or [`Error::Meanwhile`].
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file that is there cannot be read.
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
    /// A file is no longer what the plan was made for.
    #[error("{path} was changed by somebody else meanwhile, and stays so: run setup again")]
    Meanwhile {
        /// The file.
        path: PathBuf,
    },
    /// A link is where a file is to be written, and there is no file behind it.
    #[error("{path} is a link to a file that is missing: remove the link, or make the file; nothing was changed")]
    Dangling {
        /// The link.
        path: PathBuf,
    },
    /// The store cannot be taken out of a storage.conf without a change to what the person has set.
    #[error("{path}: the store's entry cannot be told from the rest: take it out by hand; nothing was changed")]
    Entangled {
        /// The file.
        path: PathBuf,
    },
    /// In the tree that is set up a link leads out of it.
    #[error(
        "{path} leads to {target}, out of the tree that is set up: replace the link by a relative one, or by the file"
    )]
    Outside {
        /// Where it is.
        path: PathBuf,
        /// Where it leads.
        target: PathBuf,
    },
    /// A storage.conf is not TOML.
    #[error("{path}: {}\nNothing was changed: mend the file and run setup again.", source.to_string().trim_end())]
    Storage {
        /// The file.
        path: PathBuf,
        /// The cause, with line and column.
        source: Box<toml_edit::TomlError>,
    },
    /// A registries.conf is not TOML, or has values that Podman does not take.
    #[error("{path}: {}\nNothing was changed: mend the file and run setup again.", source.to_string().trim_end())]
    Registries {
        /// The file.
        path: PathBuf,
        /// The cause, with line and column.
        source: Box<toml::de::Error>,
    },
    /// A value in storage.conf is of another kind than containers/storage takes.
    #[error("{path}, line {line}: `{key}` must be {expected}; nothing was changed")]
    Kind {
        /// The file.
        path: PathBuf,
        /// The line of the value.
        line: usize,
        /// The key, with its tables.
        key: &'static str,
        /// What it should be.
        expected: &'static str,
    },
    /// The storage driver cannot use the store.
    #[error(
        "{path}, line {line}: the storage driver is {driver:?}, but only \"overlay\" can use the store. \
         Images and containers of one driver are not seen by another: move to overlay (`podman system reset`), or \
         leave this host out"
    )]
    Driver {
        /// The file.
        path: PathBuf,
        /// The line of the driver.
        line: usize,
        /// The driver.
        driver: String,
    },
    /// The store's path cannot be written into storage.conf.
    #[error("{path} cannot be named in storage.conf: choose a --root without `:`, `,` and characters that are no text")]
    StorePath {
        /// The path.
        path: PathBuf,
    },
    /// There is a file of another making where ours is to be.
    #[error("{path} was not written by setup: move it away, under another name in the same directory if it is needed")]
    NotOurs {
        /// The file.
        path: PathBuf,
    },
    /// An earlier version serves where the store is to be.
    #[error(
        "{path} is mounted, as by an earlier version of nydus-store: stop that (`systemctl stop nydus-store`) and run \
         setup again"
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

impl From<registries_conf::Error> for Error {
    fn from(error: registries_conf::Error) -> Self {
        match error {
            registries_conf::Error::Read { path, source } => Self::Read { path, source },
            registries_conf::Error::Parse { path, source } => Self::Registries { path, source },
        }
    }
}
