//! Images in files: an OCI image layout, in a directory or in a tar as `skopeo copy … oci-archive:FILE` writes it.
//!
//! The layout is that of the
//! [OCI image specification](https://github.com/opencontainers/image-spec/blob/main/image-layout.md): `index.json` lists
//! manifests, by the annotation `org.opencontainers.image.ref.name` with names, and `blobs/sha256/<hex>` holds the rest.

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

/// What names an image in a layout.
const REF_NAME: &str = "org.opencontainers.image.ref.name";
/// Largest `index.json`, in bytes.
const MAX_INDEX: u64 = 8 << 20;

/// How many names are told in an error.
const TOLD: usize = 20;
/// Bytes of headers that an archive may have: 512 for each file, and longer ones for some.
const MAX_HEADERS: u64 = 16 << 20;

/// An OCI layout cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum LayoutError {
    /// It cannot be read.
    #[error("cannot read {path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// It is a tar, but compressed.
    #[error("{0} is compressed, and so cannot be read from the middle: decompress it first")]
    Compressed(PathBuf),
    /// There is no `index.json` in it, or one that is none.
    #[error("{path} is not an OCI layout: {reason}")]
    NotALayout {
        /// The directory or archive.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// It has no image of that name.
    #[error("{path} has no image named `{name}`, but {available}")]
    NoSuchName {
        /// The directory or archive.
        path: PathBuf,
        /// What was asked for.
        name: String,
        /// What there is.
        available: String,
    },
    /// It has several images, and none was named.
    #[error("{path} has several images: name one of {available} after a colon")]
    Several {
        /// The directory or archive.
        path: PathBuf,
        /// What there is.
        available: String,
    },
    /// A blob is missing.
    #[error("{path} lacks {digest}")]
    Lacks {
        /// The directory or archive.
        path: PathBuf,
        /// What is missing.
        digest: Digest,
    },
    /// A blob is not what its name says, or longer than allowed.
    #[error("{digest} in {path} is damaged")]
    Damaged {
        /// The directory or archive.
        path: PathBuf,
        /// Which.
        digest: Digest,
    },
}

/// An OCI layout that is open.
pub struct OciLayout {
    path: PathBuf,
    place: Place,
    index: IndexJson,
}

enum Place {
    Dir,
    /// The archive, and where in it each file starts and how long it is.
    Archive(Arc<File>, HashMap<PathBuf, (u64, u64)>),
}

/// A file, or a part of one.
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
        Self::new(path, Place::Dir)
    }

    /// Opens an archive, and looks for what is where in it. Blocks.
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
        Self::new(path, Place::Archive(file, files))
    }

    fn new(path: &Path, place: Place) -> Result<Self, LayoutError> {
        let not = |reason: String| LayoutError::NotALayout {
            path: path.to_owned(),
            reason,
        };
        let mut layout = Self {
            path: path.to_owned(),
            place,
            index: IndexJson::default(),
        };
        let index = layout
            .part(Path::new("index.json"))
            .map_err(|error| not(format!("its index.json cannot be read ({error})")))?;
        let bytes = index.read_whole(MAX_INDEX);
        let bytes = bytes.map_err(|error| not(format!("its index.json cannot be read ({error})")))?;
        layout.index =
            serde_json::from_slice(&bytes).map_err(|error| not(format!("its index.json is malformed ({error})")))?;
        Ok(layout)
    }

    /// The manifest or index of the image of that name, or of the only one; and its name.
    pub fn find(&self, name: Option<&str>) -> Result<(Digest, Option<String>), LayoutError> {
        let all = self.index.manifests.as_deref().unwrap_or_default();
        let named = |descriptor: &Descriptor| descriptor.annotation(REF_NAME).map(str::to_owned);
        let available = || {
            let names = all.iter().filter_map(named).take(TOLD);
            let names: Vec<_> = names.map(|name| format!("`{}`", printable(&name))).collect();
            if names.is_empty() {
                format!("{} without names", all.len())
            } else {
                names.join(", ")
            }
        };
        let path = self.path.clone();
        let found = match (name, all) {
            (None, [only]) => Some(only),
            (None, []) => {
                let reason = "it holds no image".to_owned();
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
            reason: format!("its index.json is malformed ({error})"),
        })?;
        Ok((digest, named(found)))
    }

    /// A whole blob of at most `limit` bytes, verified. Blocks.
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

    /// A blob, to read from.
    pub fn blob(&self, digest: &Digest) -> Result<FilePart, LayoutError> {
        let path = self.path.clone();
        self.part(&Path::new("blobs/sha256").join(digest.hex()))
            .map_err(|source| match source.kind() {
                io::ErrorKind::NotFound => LayoutError::Lacks { path, digest: *digest },
                _ => LayoutError::Io { path, source },
            })
    }

    fn part(&self, name: &Path) -> io::Result<FilePart> {
        match &self.place {
            Place::Dir => FilePart::open(&self.path.join(name)),
            Place::Archive(file, files) => {
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
    /// The whole of a file.
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = open_file(path)?;
        Ok(Self {
            path: path.to_owned(),
            start: 0,
            len: file.metadata()?.len(),
            file: Arc::new(file),
        })
    }

    /// Its length, in bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether there is nothing in it.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// `len` bytes from `offset` on. Blocks.
    pub fn read_exact(&self, offset: u64, len: usize) -> io::Result<Bytes> {
        if offset.checked_add(len as u64).is_none_or(|end| end > self.len) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        // Nothing is zeroed only to be overwritten.
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
            _ => Err(io::Error::other(format!("it is longer than {limit} bytes"))),
        }
    }
}

/// Opens a regular file; others might keep whoever reads them waiting.
fn open_file(path: &Path) -> io::Result<File> {
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)?;
    match file.metadata()?.is_file() {
        true => Ok(file),
        false => Err(io::Error::other("it is not a regular file")),
    }
}

/// Where in an archive each file of a layout starts, and how long it is.
fn find_files(file: &File) -> io::Result<HashMap<PathBuf, (u64, u64)>> {
    let mut files = HashMap::new();
    let headers = Headers {
        file,
        left: MAX_HEADERS,
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

/// A name from outside, fit to be shown.
fn printable(name: &str) -> String {
    name.chars().take(200).flat_map(char::escape_debug).collect()
}

/// An archive of which only headers are read. Some kinds of headers are of any length, and read into memory whole.
struct Headers<'a> {
    file: &'a File,
    left: u64,
}

impl io::Read for Headers<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.file.read(buffer)?;
        let left = self.left.checked_sub(read as u64);
        self.left = left.ok_or_else(|| io::Error::other("its headers are too long for an image"))?;
        Ok(read)
    }
}

impl io::Seek for Headers<'_> {
    fn seek(&mut self, to: io::SeekFrom) -> io::Result<u64> {
        self.file.seek(to)
    }
}

/// Reads a file from a place of its own.
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
