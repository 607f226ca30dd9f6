//! Published layers and images in a transactional database: the truth from which containers/storage's files are
//! written.
//!
//! redb is an embedded store in one file: a change is on disk as a whole or not at all, also after a power cut. SQLite
//! would do the same with a C library, and nothing here needs queries.

use std::{
    collections::BTreeMap,
    fs::{self, OpenOptions},
    io,
    path::{Path, PathBuf},
};

use parking_lot::Mutex;
use redb::{ReadableDatabase as _, ReadableTable as _, StorageBackend as _, TableDefinition};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use super::error::StoreError;
use crate::{atomic_file, digest::Digest};

/// Rows as JSON by id.
type Table = TableDefinition<'static, &'static str, &'static [u8]>;

const FORMAT: TableDefinition<'_, &str, u32> = TableDefinition::new("format");
const LAYERS: Table = TableDefinition::new("layers");
const IMAGES: Table = TableDefinition::new("images");
/// Version of the row format.
const VERSION: u32 = 1;

/// A published layer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerRow {
    /// Id of the layer below.
    pub parent: Option<String>,
    /// Digest of the layer as stored in the registry.
    pub digest: Digest,
    /// Length of the layer as stored in the registry, in bytes.
    pub size: u64,
    /// Digest of the uncompressed layer.
    pub diff_id: Digest,
    /// Length of the uncompressed layer in bytes; an estimate where only a fetch would tell it.
    pub diff_size: u64,
    /// Compression in containers/storage's numbering (`archive.Compression`): 0 none, 2 gzip, 4 zstd.
    pub compression: u8,
    /// Time of publication, in seconds since 1970.
    pub created: i64,
    /// First node id of the layer.
    pub first_node: u32,
    /// The tree that `diff` shows; `None` means that `diff` is an empty directory.
    pub tree: Option<TreeRow>,
}

/// The file tree that a layer shows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TreeRow {
    /// Digest of the manifest of the image that the tree belongs to.
    pub manifest: Digest,
    /// Number of inodes in the tree.
    pub inodes: u32,
    /// References under which the image was published, newest last. The image is read from their registries.
    pub sources: Vec<String>,
    /// Start of the last pull, in seconds since 1970; accurate to about a minute.
    pub announced: i64,
}

/// An image registered by name, without a pull.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageRow {
    /// Names of the image: complete references.
    pub names: Vec<String>,
    /// Digest of the image's manifest in the registry.
    pub manifest: Digest,
    /// Id of the topmost layer.
    pub layer: String,
    /// Manifest that containers/storage sees, with ordinary media types.
    pub ordinary_manifest: String,
    /// Configuration of the image.
    pub config: String,
    /// Manifest as stored in the registry.
    pub registry_manifest: String,
    /// Time of publication, in seconds since 1970.
    pub created: i64,
    /// Sum of the layers' lengths in the registry, in bytes.
    pub size: u64,
    /// Whether the cache must keep all of the image.
    pub is_pinned: bool,
}

/// All published layers and images, by id.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Published {
    /// Layers.
    pub layers: BTreeMap<String, LayerRow>,
    /// Image records.
    pub images: BTreeMap<String, ImageRow>,
}

/// The file that stores [`Published`].
pub struct Database {
    path: PathBuf,
    /// `None` after an error, until the file is opened again: after one failed write, redb fails for good.
    open: Mutex<Option<Open>>,
}

/// An open database.
struct Open {
    database: redb::Database,
    /// Whether it is a copy in memory, of a file that cannot be written to.
    is_copy: bool,
}

impl Database {
    /// Opens the file, and creates it if it is missing.
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        Ok(Self {
            path: path.to_owned(),
            open: Mutex::new(Some(open(path)?)),
        })
    }

    /// Reads the file, which cannot be written to. A commit fails until it can.
    pub fn open_copy(path: &Path) -> Result<Self, StoreError> {
        Ok(Self {
            path: path.to_owned(),
            open: Mutex::new(Some(open_copy(path)?)),
        })
    }

    /// Reads all rows.
    pub fn load(&self) -> Result<Published, StoreError> {
        self.with_retry(|database| {
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

    /// Makes the difference between `before` and `after` durable, atomically.
    pub fn commit(&self, before: &Published, after: &Published) -> Result<(), StoreError> {
        self.replace_copy()?;
        self.with_retry(|database| {
            let transaction = database.begin_write()?;
            for (table, diff_rows) in [
                (LAYERS, diff_rows(&before.layers, &after.layers)),
                (IMAGES, diff_rows(&before.images, &after.images)),
            ] {
                let mut table = transaction.open_table(table)?;
                for (id, row) in diff_rows {
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

    /// Runs `work` on the database. After an error, reopens the database and retries once. The retry is safe even if a
    /// failed commit took effect: the same commit leads to the same rows.
    fn with_retry<T>(&self, work: impl Fn(&redb::Database) -> Result<T, redb::Error>) -> Result<T, StoreError> {
        let mut slot = self.open.lock();
        if let Some(Ok(done)) = slot.as_ref().map(|open| work(&open.database)) {
            return Ok(done);
        }
        // redb locks the file while it is open.
        *slot = None;
        let open = slot.insert(open(&self.path)?);
        work(&open.database).map_err(StoreError::access)
    }

    /// Replaces a copy by the file itself, which can be written to by now, or else fails.
    fn replace_copy(&self) -> Result<(), StoreError> {
        let mut slot = self.open.lock();
        if slot.as_ref().is_some_and(|open| open.is_copy) {
            *slot = Some(open(&self.path)?);
        }
        Ok(())
    }
}

fn open(path: &Path) -> Result<Open, StoreError> {
    let failed = open_error(path);
    if is_missing_or_empty(path) {
        create(path).map_err(&failed)?;
    }
    let file = OpenOptions::new().read(true).write(true).open(path);
    let file = file.map_err(|error| failed(redb::Error::Io(error)))?;
    let backend = redb::backends::FileBackend::new(file).map_err(|error| failed(error.into()))?;
    open_backend(path, backend, false)
}

fn open_copy(path: &Path) -> Result<Open, StoreError> {
    let failed = |error: io::Error| open_error(path)(redb::Error::Io(error));
    let bytes = fs::read(path).map_err(failed)?;
    let backend = redb::backends::InMemoryBackend::new();
    let copied = backend
        .set_len(bytes.len() as u64)
        .and_then(|()| backend.write(0, &bytes));
    copied.map_err(failed)?;
    open_backend(path, backend, true)
}

fn open_error(path: &Path) -> impl Fn(redb::Error) -> StoreError {
    |source| StoreError::Database {
        path: path.to_owned(),
        source: Box::new(source),
    }
}

fn open_backend(path: &Path, backend: impl redb::StorageBackend, is_copy: bool) -> Result<Open, StoreError> {
    let failed = open_error(path);
    let database = redb::Builder::new().create_with_backend(backend);
    let database = database.map_err(|error| failed(error.into()))?;
    match create_tables(&database).map_err(failed)? {
        VERSION => Ok(Open { database, is_copy }),
        version => Err(StoreError::Version {
            path: path.to_owned(),
            version,
        }),
    }
}

fn is_missing_or_empty(path: &Path) -> bool {
    match fs::metadata(path) {
        Ok(metadata) => metadata.len() == 0,
        Err(error) => error.kind() == io::ErrorKind::NotFound,
    }
}

/// Creates an empty database under another name, and renames it when it is complete: redb does not open a file whose
/// creation was interrupted.
fn create(path: &Path) -> Result<(), redb::Error> {
    let dir = path.parent().unwrap_or(Path::new("."));
    atomic_file::remove_unfinished(dir)?;
    let file = atomic_file::new_beside(dir)?;
    let backend = redb::backends::FileBackend::new(file.as_file().try_clone()?)?;
    create_tables(&redb::Builder::new().create_with_backend(backend)?)?;
    Ok(atomic_file::persist(file, path)?)
}

/// Creates the tables and returns the version of the rows.
fn create_tables(database: &redb::Database) -> Result<u32, redb::Error> {
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

/// Rows that differ; `None` for a removed row.
fn diff_rows<'a, T: PartialEq + Serialize>(
    before: &'a BTreeMap<String, T>,
    after: &'a BTreeMap<String, T>,
) -> Vec<(&'a str, Option<Vec<u8>>)> {
    let removed = before.keys().filter(|id| !after.contains_key(*id));
    let changed = after.iter().filter(|(id, row)| before.get(*id) != Some(row));
    // Structures of numbers and strings always have a JSON form.
    let encode = |row: &T| serde_json::to_vec(row).unwrap_or_default();
    removed
        .map(|id| (id.as_str(), None))
        .chain(changed.map(|(id, row)| (id.as_str(), Some(encode(row)))))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interrupted_creation_is_repeated() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("published.redb");
        fs::write(dir.path().join(".new-interrupted"), [0; 4096]).unwrap();
        fs::write(&path, "").unwrap();
        assert_eq!(Database::open(&path).unwrap().load().unwrap(), Published::default());
        let left = fs::read_dir(dir.path()).unwrap();
        let left: Vec<_> = left.map(|entry| entry.unwrap().path()).collect();
        assert_eq!(left, [path]);
    }
}
