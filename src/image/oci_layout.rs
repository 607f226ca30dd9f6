//! Reads images from an OCI image layout, in a directory or in a tar as written by `skopeo copy … oci-archive:FILE`.
//!
//! The layout follows the [OCI image
//! specification](https://github.com/opencontainers/image-spec/blob/main/image-layout.md): `index.json` lists
//! manifests, named by the annotation `org.opencontainers.image.ref.name`, and `blobs/sha256/<hex>` holds the content.

use std::{
    collections::HashMap,
    fs::{File, OpenOptions},
    io::{self, Read as _},
    os::unix::fs::{FileExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    sync::Arc,
};

use bytes::Bytes;

use super::descriptor::{Descriptor, IndexJson};
use crate::{
    blob::source::{Pending, Source, SourceError, SourcedBytes},
    digest::Digest,
};

/// Annotation with the name of an image.
const REF_NAME_ANNOTATION: &str = "org.opencontainers.image.ref.name";
/// Largest `index.json`, in bytes.
const MAX_INDEX_BYTES: u64 = 8 << 20;

/// Maximum number of names in an error message.
const MAX_NAMES_IN_ERROR: usize = 20;
/// Maximum total length of an archive's headers in bytes: 512 for each file, more for some.
const MAX_HEADER_BYTES: u64 = 16 << 20;

/// Why an OCI layout cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum LayoutError {
    /// A file cannot be read.
    #[error("cannot read {path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The tar is compressed.
    #[error("{0} is compressed, so it cannot be read at random; decompress it first")]
    Compressed(PathBuf),
    /// `index.json` is missing or malformed.
    #[error("{path} is not an OCI layout: {reason}")]
    NotALayout {
        /// The directory or archive.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The layout has no image with this name.
    #[error("{path} has no image named `{name}`; it has {available}")]
    NoSuchName {
        /// The directory or archive.
        path: PathBuf,
        /// The requested name.
        name: String,
        /// Description of the available images.
        available: String,
    },
    /// The layout has several images, and no name was given.
    #[error("{path} has several images; append a colon and one of {available}")]
    Several {
        /// The directory or archive.
        path: PathBuf,
        /// Description of the available images.
        available: String,
    },
    /// A blob is missing.
    #[error("no blob {digest} in {path}")]
    MissingBlob {
        /// The directory or archive.
        path: PathBuf,
        /// Digest of the missing blob.
        digest: Digest,
    },
    /// The digest of a blob is wrong, or the blob is longer than allowed.
    #[error("{digest} in {path} is damaged")]
    Damaged {
        /// The directory or archive.
        path: PathBuf,
        /// Digest of the blob.
        digest: Digest,
    },
}

/// An open OCI layout.
pub struct OciLayout {
    path: PathBuf,
    files: LayoutFiles,
    index: IndexJson,
}

enum LayoutFiles {
    Dir,
    /// An archive, with the offset and length of each file in it.
    Archive(Arc<File>, HashMap<PathBuf, (u64, u64)>),
}

/// A file or a range of a file.
#[derive(Clone)]
pub struct FilePart {
    path: PathBuf,
    file: Arc<File>,
    start: u64,
    len: u64,
}

impl OciLayout {
    /// Opens a directory. Blocks.
    pub fn open_dir(path: &Path) -> Result<Self, LayoutError> {
        Self::new(path, LayoutFiles::Dir)
    }

    /// Opens an archive and indexes its files. Blocks.
    pub fn open_archive(path: &Path) -> Result<Self, LayoutError> {
        let failed = |source| LayoutError::Io {
            path: path.to_owned(),
            source,
        };
        let file = Arc::new(open_file(path).map_err(failed)?);
        let mut start = [0; 4];
        let read = file.read_at(&mut start, 0).map_err(failed)?;
        if matches!(
            start[..read],
            [0x1f, 0x8b, ..] | [0x28, 0xb5, 0x2f, 0xfd] | [b'B', b'Z', b'h', _]
        ) {
            return Err(LayoutError::Compressed(path.to_owned()));
        }
        let files = find_files(&file).map_err(failed)?;
        Self::new(path, LayoutFiles::Archive(file, files))
    }

    fn new(path: &Path, files: LayoutFiles) -> Result<Self, LayoutError> {
        let not = |reason: String| LayoutError::NotALayout {
            path: path.to_owned(),
            reason,
        };
        let mut layout = Self {
            path: path.to_owned(),
            files,
            index: IndexJson::default(),
        };
        let index = layout
            .part(Path::new("index.json"))
            .map_err(|error| not(format!("cannot read index.json ({error})")))?;
        let bytes = index.read_whole(MAX_INDEX_BYTES);
        let bytes = bytes.map_err(|error| not(format!("cannot read index.json ({error})")))?;
        layout.index =
            serde_json::from_slice(&bytes).map_err(|error| not(format!("malformed index.json ({error})")))?;
        Ok(layout)
    }

    /// Digest of the manifest or index with this name (or of the only one), and its name.
    pub fn find(&self, name: Option<&str>) -> Result<(Digest, Option<String>), LayoutError> {
        let all = self.index.manifests.as_deref().unwrap_or_default();
        let named = |descriptor: &Descriptor| descriptor.annotation(REF_NAME_ANNOTATION).map(str::to_owned);
        let available = || {
            let names = all.iter().filter_map(named).take(MAX_NAMES_IN_ERROR);
            let names: Vec<_> = names.map(|name| format!("`{}`", printable(&name))).collect();
            if names.is_empty() {
                format!("{} without a name", all.len())
            } else {
                names.join(", ")
            }
        };
        let path = self.path.clone();
        let found = match (name, all) {
            (None, [only]) => Some(only),
            (None, []) => {
                let reason = "no image".to_owned();
                return Err(LayoutError::NotALayout { path, reason });
            }
            (None, _) => {
                let available = available();
                return Err(LayoutError::Several { path, available });
            }
            (Some(name), _) => all.iter().find(|descriptor| named(descriptor).as_deref() == Some(name)),
        };
        let Some(found) = found else {
            return Err(LayoutError::NoSuchName {
                path,
                name: printable(name.unwrap_or_default()),
                available: available(),
            });
        };
        let digest = found.digest().map_err(|error| LayoutError::NotALayout {
            path: self.path.clone(),
            reason: format!("malformed index.json ({error})"),
        })?;
        Ok((digest, named(found)))
    }

    /// Reads and verifies a blob of at most `limit` bytes. Blocks.
    pub fn read(&self, digest: &Digest, limit: u64) -> Result<Bytes, LayoutError> {
        let bytes = self.blob(digest)?.read_whole(limit).map_err(|source| LayoutError::Io {
            path: self.path.clone(),
            source,
        })?;
        if Digest::of(&bytes) == *digest {
            return Ok(bytes);
        }
        Err(LayoutError::Damaged {
            path: self.path.clone(),
            digest: *digest,
        })
    }

    /// Opens a blob.
    pub fn blob(&self, digest: &Digest) -> Result<FilePart, LayoutError> {
        let path = self.path.clone();
        self.part(&Path::new("blobs/sha256").join(digest.hex()))
            .map_err(|source| match source.kind() {
                io::ErrorKind::NotFound => LayoutError::MissingBlob { path, digest: *digest },
                _ => LayoutError::Io { path, source },
            })
    }

    fn part(&self, name: &Path) -> io::Result<FilePart> {
        match &self.files {
            LayoutFiles::Dir => FilePart::open(&self.path.join(name)),
            LayoutFiles::Archive(file, files) => {
                let (start, len) = *files.get(name).ok_or(io::ErrorKind::NotFound)?;
                Ok(FilePart {
                    path: self.path.join(name),
                    file: Arc::clone(file),
                    start,
                    len,
                })
            }
        }
    }
}

impl FilePart {
    /// Opens a whole file.
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = open_file(path)?;
        Ok(Self {
            path: path.to_owned(),
            start: 0,
            len: file.metadata()?.len(),
            file: Arc::new(file),
        })
    }

    /// Length in bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether the length is 0.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Reads `len` bytes at `offset`. Blocks.
    pub fn read_exact(&self, offset: u64, len: usize) -> io::Result<Bytes> {
        if offset.checked_add(len as u64).is_none_or(|end| end > self.len) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        // Appends to an empty vector, so that the buffer need not be zeroed first.
        let mut bytes = Vec::with_capacity(len);
        let mut from = PositionedReader(&self.file, self.start + offset);
        from.by_ref().take(len as u64).read_to_end(&mut bytes)?;
        if bytes.len() < len {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(bytes.into())
    }

    fn read_whole(&self, limit: u64) -> io::Result<Bytes> {
        match usize::try_from(self.len) {
            Ok(len) if self.len <= limit => self.read_exact(0, len),
            _ => Err(io::Error::other(format!("longer than {limit} bytes"))),
        }
    }
}

/// Opens a regular file. Other kinds are rejected, because reading a pipe or device may block.
fn open_file(path: &Path) -> io::Result<File> {
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)?;
    match file.metadata()?.is_file() {
        true => Ok(file),
        false => Err(io::Error::other("not a regular file")),
    }
}

/// Offset and length of each file of a layout in an archive.
fn find_files(file: &File) -> io::Result<HashMap<PathBuf, (u64, u64)>> {
    let mut files = HashMap::new();
    let headers = HeaderReader {
        file,
        left: MAX_HEADER_BYTES,
    };
    let mut archive = tar::Archive::new(headers);
    for entry in archive.entries_with_seek()? {
        let entry = entry?;
        let name = entry.path()?;
        let name = name.strip_prefix(".").unwrap_or(&name);
        if entry.header().entry_type().is_file() && is_of_layout(name) {
            files.insert(name.to_owned(), (entry.raw_file_position(), entry.size()));
        }
    }
    Ok(files)
}

fn is_of_layout(name: &Path) -> bool {
    let blob = name.strip_prefix("blobs/sha256").ok().and_then(Path::to_str);
    name == Path::new("index.json") || blob.is_some_and(|hex| Digest::from_hex(hex).is_ok())
}

/// Escapes and shortens an untrusted name for display.
fn printable(name: &str) -> String {
    name.chars().take(200).flat_map(char::escape_debug).collect()
}

/// Reads the headers of an archive, up to a total length. Some headers have any length and are read into memory as a
/// whole.
struct HeaderReader<'a> {
    file: &'a File,
    left: u64,
}

impl io::Read for HeaderReader<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.file.read(buffer)?;
        let left = self.left.checked_sub(read as u64);
        self.left = left.ok_or_else(|| io::Error::other("headers are too long for an image"))?;
        Ok(read)
    }
}

impl io::Seek for HeaderReader<'_> {
    fn seek(&mut self, to: io::SeekFrom) -> io::Result<u64> {
        self.file.seek(to)
    }
}

/// Reads a file at its own position, which other readers do not share.
struct PositionedReader<'a>(&'a File, u64);

impl io::Read for PositionedReader<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.0.read_at(buffer, self.1)?;
        self.1 += read as u64;
        Ok(read)
    }
}

impl Source for FilePart {
    fn read(&self, offset: u64, len: usize) -> Pending {
        let part = self.clone();
        Box::pin(async move {
            let path = part.path.display().to_string();
            let read = tokio::task::spawn_blocking(move || part.read_exact(offset, len));
            let read = read.await.unwrap_or_else(|error| Err(io::Error::other(error)));
            read.map(SourcedBytes::from)
                .map_err(|error| SourceError::range_failed(io::Error::new(error.kind(), format!("{path}: {error}"))))
        })
    }
}
