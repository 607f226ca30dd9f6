//! What is published, kept transactionally: the truth from which containers/storage's files are written.
//!
//! redb is an embedded store in one file: a change is on disk whole or not at all, also after a power cut. SQLite would do
//! the same with a C library; nothing here needs queries.

use std::{
    collections::BTreeMap,
    fs::OpenOptions,
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
};

use parking_lot::Mutex;
use redb::{ReadableDatabase as _, ReadableTable as _, TableDefinition};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use super::error::StoreError;
use crate::digest::Digest;

/// Rows as JSON by their ids.
type Table = TableDefinition<'static, &'static str, &'static [u8]>;

const FORMAT: TableDefinition<'_, &str, u32> = TableDefinition::new("format");
const LAYERS: Table = TableDefinition::new("layers");
const IMAGES: Table = TableDefinition::new("images");
/// The version of the rows below.
const VERSION: u32 = 1;

/// A published layer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerRow {
    /// The layer below, by its id.
    pub parent: Option<String>,
    /// Digest of the layer as it is in the registry.
    pub digest: Digest,
    /// Its length there, in bytes.
    pub size: u64,
    /// Digest of the uncompressed layer.
    pub diff_id: Digest,
    /// Length of the uncompressed layer, in bytes, as far as it is known without fetching it.
    pub diff_size: u64,
    /// containers/storage's numbering (`archive.Compression`): 0 none, 2 gzip, 4 zstd.
    pub compression: u8,
    /// When it was published, in seconds since 1970.
    pub created: i64,
    /// First of its node numbers.
    pub first_node: u32,
    /// The tree that its `diff` shows; without one, `diff` is an empty directory.
    pub tree: Option<TreeRow>,
}

/// The tree of files that a layer shows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TreeRow {
    /// Digest of the manifest of the image whose tree it is.
    pub manifest: Digest,
    /// How many inodes the tree has.
    pub inodes: u32,
    /// References under which the image was published; it is read from where these are. Newest last.
    pub sources: Vec<String>,
    /// When a pull of it began last, to about a minute, in seconds since 1970.
    pub announced: i64,
}

/// An image that is known by name without a pull.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageRow {
    /// Its names, complete references.
    pub names: Vec<String>,
    /// Digest of the image's manifest in the registry.
    pub manifest: Digest,
    /// The topmost layer, by its id.
    pub layer: String,
    /// The manifest that containers/storage is given, with ordinary media types.
    pub ordinary_manifest: String,
    /// The image's configuration.
    pub config: String,
    /// The manifest as it is in the registry.
    pub registry_manifest: String,
    /// When it was published, in seconds since 1970.
    pub created: i64,
    /// Sum of the layers' lengths in the registry, in bytes.
    pub size: u64,
    /// Whether the cache is to keep all of it.
    pub is_pinned: bool,
}

/// All that is published, by id.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Published {
    /// Layers.
    pub layers: BTreeMap<String, LayerRow>,
    /// Image records.
    pub images: BTreeMap<String, ImageRow>,
}

/// The file that holds [`Published`].
pub struct Database {
    path: PathBuf,
    /// `None` after an error, until it is opened again: redb fails for good when a write has failed once.
    open: Mutex<Option<redb::Database>>,
}

impl Database {
    /// Opens the file, which is made if it is missing.
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        Ok(Self {
            path: path.to_owned(),
            open: Mutex::new(Some(open(path)?)),
        })
    }

    /// Reads everything.
    pub fn load(&self) -> Result<Published, StoreError> {
        self.with(|database| {
            let transaction = database.begin_read()?;
            let rows = |table: Table| -> Result<Vec<(String, Vec<u8>)>, redb::Error> {
                let table = transaction.open_table(table)?;
                let rows = table.iter()?.map(|row| {
                    let (key, value) = row?;
                    Ok((key.value().to_owned(), value.value().to_owned()))
                });
                rows.collect()
            };
            Ok((rows(LAYERS)?, rows(IMAGES)?))
        })
        .and_then(|(layers, images)| {
            Ok(Published {
                layers: parse(layers)?,
                images: parse(images)?,
            })
        })
    }

    /// Makes the difference between `before` and `after` durable, all of it or nothing.
    pub fn commit(&self, before: &Published, after: &Published) -> Result<(), StoreError> {
        self.with(|database| {
            let transaction = database.begin_write()?;
            for (table, changes) in [
                (LAYERS, changes(&before.layers, &after.layers)),
                (IMAGES, changes(&before.images, &after.images)),
            ] {
                let mut table = transaction.open_table(table)?;
                for (id, row) in changes {
                    match row {
                        Some(row) => _ = table.insert(id, row.as_slice())?,
                        None => _ = table.remove(id)?,
                    }
                }
            }
            transaction.commit()?;
            Ok(())
        })
    }

    /// Works on the database. After an error it is opened anew and tried once more: whether a commit that failed counts or
    /// not, the same commit leads to the same rows.
    fn with<T>(&self, work: impl Fn(&redb::Database) -> Result<T, redb::Error>) -> Result<T, StoreError> {
        let mut place = self.open.lock();
        if let Some(Ok(done)) = place.as_ref().map(&work) {
            return Ok(done);
        }
        // The file is locked while it is open.
        *place = None;
        let database = place.insert(open(&self.path)?);
        work(database).map_err(StoreError::access)
    }
}

fn open(path: &Path) -> Result<redb::Database, StoreError> {
    let failed = |source: redb::Error| StoreError::Database {
        path: path.to_owned(),
        source: Box::new(source),
    };
    // Only root reads what is published.
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false).mode(0o600);
    let file = options.open(path).map_err(|error| failed(redb::Error::Io(error)))?;
    let backend = redb::backends::FileBackend::new(file).map_err(|error| failed(error.into()))?;
    let database = redb::Builder::new().create_with_backend(backend);
    let database = database.map_err(|error| failed(error.into()))?;
    match prepare(&database).map_err(failed)? {
        VERSION => Ok(database),
        version => Err(StoreError::Version {
            path: path.to_owned(),
            version,
        }),
    }
}

/// Makes the tables, and tells the version of the rows.
fn prepare(database: &redb::Database) -> Result<u32, redb::Error> {
    let transaction = database.begin_write()?;
    let version = {
        let mut format = transaction.open_table(FORMAT)?;
        let known = format.get("version")?.map(|version| version.value());
        if known.is_none() {
            format.insert("version", VERSION)?;
        }
        known.unwrap_or(VERSION)
    };
    transaction.open_table(LAYERS)?;
    transaction.open_table(IMAGES)?;
    transaction.commit()?;
    Ok(version)
}

fn parse<T: DeserializeOwned>(rows: Vec<(String, Vec<u8>)>) -> Result<BTreeMap<String, T>, StoreError> {
    let parse = |(id, row): (String, Vec<u8>)| match serde_json::from_slice(&row) {
        Ok(parsed) => Ok((id, parsed)),
        Err(source) => Err(StoreError::Row { id, source }),
    };
    rows.into_iter().map(parse).collect()
}

/// The rows that differ; `None` for one that is gone.
fn changes<'a, T: PartialEq + Serialize>(
    before: &'a BTreeMap<String, T>,
    after: &'a BTreeMap<String, T>,
) -> Vec<(&'a str, Option<Vec<u8>>)> {
    let gone = before.keys().filter(|id| !after.contains_key(*id));
    let changed = after.iter().filter(|(id, row)| before.get(*id) != Some(row));
    // A structure of numbers and texts always has a JSON form.
    let encode = |row: &T| serde_json::to_vec(row).unwrap_or_default();
    gone.map(|id| (id.as_str(), None))
        .chain(changed.map(|(id, row)| (id.as_str(), Some(encode(row)))))
        .collect()
}
