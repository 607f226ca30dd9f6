//! Writes what is published in the form that containers/storage reads: `layers.json`, `images.json` and the images'
//! data.
//!
//! A file is replaced by a rename, so a reader sees either the old or the new one. The lock file beside it follows
//! containers/storage's protocol (`pkg/lockfile`). Readers hold it shared (fcntl). A process that has read the records
//! before reads them again when the content of the lock file differs from what it remembers.

use std::{
    collections::BTreeMap,
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::FileExt as _,
    path::Path,
    thread,
    time::{Duration, Instant, SystemTime},
};

use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use rustix::{
    fs::{FlockOperation, fcntl_lock},
    io::Errno,
};
use serde::Serialize;

use super::{
    database::{ImageRow, LayerRow, Published},
    error::StoreError,
    layout::StoreLayout,
};
use crate::{atomic_file, digest::Digest};

/// How long to wait for readers. Podman holds the lock while it reads a whole layer (`push`, `save`), which may take
/// minutes. Giving up is harmless to readers, because a rename is atomic. The wait is short because pulls queue behind
/// it.
const LOCK_WAIT: Duration = Duration::from_millis(100);
/// Length of a lock file's content (`lastWriterIDSize` in containers/storage), in bytes.
const LAST_WRITER_ID_LEN: usize = 64;

/// A layer in `layers.json` (`Layer` in containers/storage's `layers.go`).
#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct LayerRecord<'a> {
    id: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    parent: Option<&'a str>,
    created: String,
    compressed_diff_digest: Digest,
    compressed_size: u64,
    diff_digest: Digest,
    /// Always present: containers/storage does not open an image that has a layer of unknown size.
    diff_size: u64,
    #[serde(skip_serializing_if = "is_zero")]
    compression: u8,
}

/// An image in `images.json` (`Image` in containers/storage's `images.go`).
#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct ImageRecord<'a> {
    id: &'a str,
    digest: Digest,
    names: &'a [String],
    layer: &'a str,
    metadata: &'static str,
    big_data_names: Vec<&'a str>,
    big_data_sizes: BTreeMap<&'a str, usize>,
    big_data_digests: BTreeMap<&'a str, Digest>,
    created: String,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes a reference")]
fn is_zero(value: &u8) -> bool {
    *value == 0
}

/// Removes unfinished files of a process that was killed.
pub fn remove_unfinished(layout: &StoreLayout) -> Result<(), StoreError> {
    let (layers, images) = (layout.layers_json(), layout.image_dirs());
    let entries = fs::read_dir(&images).map_err(write_error(&images))?.flatten();
    let mut dirs: Vec<_> = entries.map(|entry| entry.path()).filter(|path| path.is_dir()).collect();
    dirs.extend(layers.parent().map(Path::to_owned));
    dirs.push(images);
    for dir in dirs {
        atomic_file::remove_unfinished(&dir).map_err(write_error(&dir))?;
    }
    Ok(())
}

/// Writes `layers.json`, if its content differs or `is_forced` is set.
pub fn write_layers(layout: &StoreLayout, published: &Published, is_forced: bool) -> Result<(), StoreError> {
    let records: Vec<_> = published.layers.iter().map(|(id, row)| layer_record(id, row)).collect();
    replace(&layout.layers_json(), &layout.layers_lock(), &records, is_forced)
}

/// Writes the images' data and `images.json` in the same way, then removes the data of removed images.
pub fn write_images(layout: &StoreLayout, published: &Published, is_forced: bool) -> Result<(), StoreError> {
    for (id, row) in &published.images {
        let dir = layout.image_dirs().join(id);
        if !dir.is_dir() {
            atomic_file::make_private_dir(&dir).map_err(write_error(&dir))?;
        }
        for (key, text) in big_data(row) {
            let path = dir.join(file_name(&key));
            if fs::read(&path).ok().as_deref() != Some(text.as_bytes()) {
                atomic_file::write_atomically(&path, text.as_bytes()).map_err(write_error(&path))?;
            }
        }
    }
    let keyed: Vec<_> = published
        .images
        .iter()
        .map(|(id, row)| (id, row, big_data(row)))
        .collect();
    let records: Vec<_> = keyed
        .iter()
        .map(|(id, row, data)| image_record(id, row, data))
        .collect();
    replace(&layout.images_json(), &layout.images_lock(), &records, is_forced)?;
    remove_stale_dirs(layout, published)
}

fn layer_record<'a>(id: &'a str, row: &'a LayerRow) -> LayerRecord<'a> {
    LayerRecord {
        id,
        parent: row.parent.as_deref(),
        created: rfc3339(row.created),
        compressed_diff_digest: row.digest,
        compressed_size: clamp_to_i64(row.size),
        diff_digest: row.diff_id,
        diff_size: clamp_to_i64(row.diff_size),
        compression: row.compression,
    }
}

/// containers/storage reads sizes as signed numbers; a larger one would make the whole file unreadable.
fn clamp_to_i64(size: u64) -> u64 {
    size.min(i64::MAX as u64)
}

fn image_record<'a>(id: &'a str, row: &'a ImageRow, data: &'a [(String, &'a str)]) -> ImageRecord<'a> {
    ImageRecord {
        id,
        digest: row.manifest,
        names: &row.names,
        layer: &row.layer,
        metadata: "{}",
        big_data_names: data.iter().map(|(key, _)| key.as_str()).collect(),
        big_data_sizes: data.iter().map(|(key, text)| (key.as_str(), text.len())).collect(),
        big_data_digests: data
            .iter()
            .map(|(key, text)| (key.as_str(), Digest::of(text.as_bytes())))
            .collect(),
        created: rfc3339(row.created),
    }
}

/// The data that containers/image keeps with an image, by key: the manifest in use, the manifest under the registry's
/// digest (by which the image can be named), and the configuration.
fn big_data(row: &ImageRow) -> Vec<(String, &str)> {
    let ordinary = Digest::of(row.ordinary_manifest.as_bytes());
    let config = Digest::of(row.config.as_bytes());
    vec![
        ("manifest".to_owned(), &row.ordinary_manifest),
        (format!("manifest-{ordinary}"), &row.ordinary_manifest),
        (format!("manifest-{}", row.manifest), &row.registry_manifest),
        (config.to_string(), &row.config),
    ]
}

/// File name of a key: `makeBigDataBaseName` in containers/storage's `images.go`.
fn file_name(key: &str) -> String {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'.';
    if key.bytes().all(is_plain) {
        key.to_owned()
    } else {
        format!("={}", BASE64.encode(key))
    }
}

fn remove_stale_dirs(layout: &StoreLayout, published: &Published) -> Result<(), StoreError> {
    let dirs = layout.image_dirs();
    for entry in fs::read_dir(&dirs).map_err(write_error(&dirs))?.flatten() {
        let name = entry.file_name();
        let is_image = entry.file_type().is_ok_and(|kind| kind.is_dir());
        if is_image && name.to_str().is_none_or(|name| !published.images.contains_key(name)) {
            let path = entry.path();
            fs::remove_dir_all(&path).map_err(write_error(&path))?;
        }
    }
    Ok(())
}

/// Replaces the file at `path` by `records` as JSON, under the lock file `lock`, if the content differs.
///
/// The lock's content changes before and after the file. A reader in between reads the file once more than necessary.
/// If this process is killed in between, the next one forces the change, so no reader keeps the old content for good.
fn replace(path: &Path, lock: &Path, records: &[impl Serialize], is_forced: bool) -> Result<(), StoreError> {
    // Structures of numbers and strings always have a JSON form.
    let text = serde_json::to_vec(records).unwrap_or_default();
    let is_same = fs::read(path).is_ok_and(|current| current == text);
    if is_same && !is_forced {
        return Ok(());
    }
    let lock_file = OpenOptions::new()
        .read(true)
        .write(true)
        .open(lock)
        .map_err(write_error(lock))?;
    lock_exclusively(&lock_file, lock).map_err(write_error(lock))?;
    let change = || lock_file.write_all_at(&last_writer_id(), 0).map_err(write_error(lock));
    change()?;
    if !is_same {
        atomic_file::write_atomically(path, &text).map_err(write_error(path))?;
        change()?;
    }
    Ok(())
}

/// Takes the lock exclusively; closing the file releases it. Continues without it if readers hold it for too long.
fn lock_exclusively(file: &File, path: &Path) -> io::Result<()> {
    let start = Instant::now();
    loop {
        match fcntl_lock(file, FlockOperation::NonBlockingLockExclusive) {
            Err(Errno::AGAIN | Errno::ACCESS) if start.elapsed() < LOCK_WAIT => {
                thread::sleep(Duration::from_millis(5));
            }
            Err(Errno::AGAIN | Errno::ACCESS) => {
                tracing::debug!(file = %path.display(), "replacing file without lock: readers hold it");
                return Ok(());
            }
            taken => return taken.map_err(io::Error::from),
        }
    }
}

/// New, unique content of a lock file: time, process id and random bytes, like containers/storage's.
fn last_writer_id() -> [u8; LAST_WRITER_ID_LEN] {
    let mut bytes = [0; LAST_WRITER_ID_LEN];
    let now = SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default().as_nanos() as u64;
    bytes[..8].copy_from_slice(&now.to_le_bytes());
    bytes[16..20].copy_from_slice(&std::process::id().to_le_bytes());
    fastrand::fill(&mut bytes[20..]);
    bytes
}

/// A time in RFC 3339, which Go parses.
fn rfc3339(seconds: i64) -> String {
    jiff::Timestamp::from_second(seconds)
        .unwrap_or(jiff::Timestamp::UNIX_EPOCH)
        .to_string()
}

fn write_error(path: &Path) -> impl FnOnce(io::Error) -> StoreError {
    move |source| StoreError::Write {
        path: path.to_owned(),
        source,
    }
}
