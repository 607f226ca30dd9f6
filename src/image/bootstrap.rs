//! Unpacks a bootstrap layer: a tar with `image/image.boot` and optional `image/<blob>.blob.meta` files. Old converters
//! wrote the bootstrap as `image.boot`, and some write absolute names.

use std::{
    collections::HashMap,
    fs::{self, File, OpenOptions, Permissions},
    io::{self, BufRead as _, BufReader, Read},
    os::{
        fd::AsRawFd as _,
        unix::fs::{OpenOptionsExt as _, PermissionsExt as _},
    },
    path::{Component, Path, PathBuf},
};

use sha2::{Digest as _, Sha256};
use tempfile::TempDir;

use crate::{atomic_file::is_unwritable, digest::Digest};

/// Maximum number of tar entries. Converters write one for each blob, and an image has at most 255 blobs.
const MAX_ENTRIES: usize = 4096;

/// Why a bootstrap layer cannot be unpacked.
#[derive(Debug, thiserror::Error)]
pub enum UnpackError {
    /// The layer cannot be decompressed, is not a tar, or cannot be written out.
    #[error("cannot unpack as a tar archive: {0}")]
    Io(#[from] io::Error),
    /// The layer contains no bootstrap.
    #[error("no entry image/image.boot")]
    NoBootstrap,
    /// The layer decompresses to more than the limit.
    #[error("unpacks to more than {0} bytes; if the image is trusted, raise `max_bootstrap_size`")]
    TooLarge(u64),
    /// The layer has too many entries.
    #[error("more than {MAX_ENTRIES} entries")]
    TooManyEntries,
    /// The uncompressed digest differs from the diff ID in the image's configuration.
    #[error("uncompressed digest is {actual}, but the configuration says {expected}")]
    DiffId {
        /// The diff ID in the configuration.
        expected: Digest,
        /// The actual digest.
        actual: Digest,
    },
}

impl UnpackError {
    /// Whether the layer can be unpacked in memory only: the disk is full or read-only, or the directory is missing.
    pub fn is_of_disk(&self) -> bool {
        matches!(self, Self::Io(error) if is_unwritable(error) || error.kind() == io::ErrorKind::NotFound)
    }

    /// Whether the bytes are at fault, and not the disk that they were to be written to.
    pub fn is_damage(&self) -> bool {
        !matches!(self, Self::Io(error) if error.raw_os_error().is_some())
    }
}

/// An unpacked bootstrap layer. Dropping it deletes the files.
#[derive(Debug)]
pub struct Unpacked {
    target: Target,
    /// The bootstrap.
    pub bootstrap: PathBuf,
    /// Blob id → blob meta file.
    pub metas: HashMap<String, PathBuf>,
    /// Length of the uncompressed layer, in bytes.
    pub size: u64,
}

impl Unpacked {
    /// Deletes the bootstrap file, which is read only once. Returns the rest if there are blob metas.
    pub fn without_bootstrap(self) -> Option<Self> {
        if let Err(error) = self.target.remove(&self.bootstrap) {
            tracing::warn!(file = %self.bootstrap.display(), %error, "failed to delete unpacked bootstrap");
        }
        (!self.metas.is_empty()).then_some(self)
    }
}

/// Where a layer is unpacked.
#[derive(Debug)]
enum Target {
    Dir(TempDir),
    /// Files in memory (memfd_create(2)), which have paths as long as they are open.
    Memory(Vec<File>),
}

impl Target {
    /// Creates a file, or truncates the one of that name.
    fn create(&mut self, name: &str) -> io::Result<(File, PathBuf)> {
        match self {
            Self::Dir(dir) => {
                let path = dir.path().join(name);
                let mut options = OpenOptions::new();
                options.write(true).create(true).truncate(true).mode(0o600);
                Ok((options.open(&path)?, path))
            }
            Self::Memory(files) => {
                let file = File::from(rustix::fs::memfd_create(name, rustix::fs::MemfdFlags::CLOEXEC)?);
                let path = Path::new("/proc/self/fd").join(file.as_raw_fd().to_string());
                let writer = file.try_clone()?;
                files.push(file);
                Ok((writer, path))
            }
        }
    }

    /// Frees the space of a file.
    fn remove(&self, path: &Path) -> io::Result<()> {
        match self {
            Self::Dir(_) => fs::remove_file(path),
            Self::Memory(_) => OpenOptions::new().write(true).truncate(true).open(path).map(drop),
        }
    }
}

/// Unpacks the layer (tar, or tar compressed by gzip or zstd) into a new directory in `parent`.
///
/// Reads at most `limit` uncompressed bytes. Writes only the kinds of files named above, under generated names, so no
/// entry can escape the directory.
pub fn unpack(layer: impl Read + 'static, diff_id: Digest, limit: u64, parent: &Path) -> Result<Unpacked, UnpackError> {
    let dir = tempfile::Builder::new()
        .prefix("bootstrap-")
        .permissions(Permissions::from_mode(0o700))
        .tempdir_in(parent)?;
    unpack_to(Target::Dir(dir), layer, diff_id, limit)
}

/// Like [`unpack`], into files in memory, for a disk that cannot be written to.
pub fn unpack_in_memory(layer: impl Read + 'static, diff_id: Digest, limit: u64) -> Result<Unpacked, UnpackError> {
    unpack_to(Target::Memory(Vec::new()), layer, diff_id, limit)
}

fn unpack_to(
    mut target: Target,
    layer: impl Read + 'static,
    diff_id: Digest,
    limit: u64,
) -> Result<Unpacked, UnpackError> {
    let mut reader = HashingReader {
        inner: decompressed(layer)?,
        hash: Sha256::new(),
        left: limit,
        exceeded: false,
    };
    let extracted = extract(&mut reader, &mut target).and_then(|extracted| {
        // The digest covers all bytes, also those after the end of the tar.
        io::copy(&mut reader, &mut io::sink())?;
        Ok(extracted)
    });
    let Extracted { bootstraps, metas } = match extracted {
        Err(UnpackError::Io(_)) if reader.exceeded => return Err(UnpackError::TooLarge(limit)),
        other => other?,
    };
    let actual = Digest::from_bytes(reader.hash.finalize().into());
    if actual != diff_id {
        return Err(UnpackError::DiffId {
            expected: diff_id,
            actual,
        });
    }
    Ok(Unpacked {
        bootstrap: bootstraps
            .into_iter()
            .flatten()
            .next()
            .ok_or(UnpackError::NoBootstrap)?,
        target,
        metas,
        size: limit - reader.left,
    })
}

fn decompressed(layer: impl Read + 'static) -> io::Result<Box<dyn Read>> {
    let mut file = BufReader::new(layer);
    Ok(match file.fill_buf()? {
        [0x1f, 0x8b, ..] => Box::new(flate2::bufread::MultiGzDecoder::new(file)),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => Box::new(zstd::Decoder::with_buffer(file)?),
        _ => Box::new(file),
    })
}

/// Files written by [`extract`].
#[derive(Default)]
struct Extracted {
    /// `image/image.boot` and `image.boot`, in order of precedence.
    bootstraps: [Option<PathBuf>; 2],
    metas: HashMap<String, PathBuf>,
}

/// A tar entry that is unpacked.
#[derive(Debug, PartialEq, Eq)]
enum BootstrapEntry {
    /// A bootstrap; the value is the position in [`Extracted::bootstraps`].
    Bootstrap(usize),
    /// The meta of the blob with this id.
    Meta(String),
}

fn extract(reader: &mut impl Read, target: &mut Target) -> Result<Extracted, UnpackError> {
    let mut extracted = Extracted::default();
    let mut archive = tar::Archive::new(reader);
    // Raw mode: extended headers would be read into memory as a whole, and the relevant names need none.
    for (count, entry) in archive.entries()?.raw(true).enumerate() {
        let mut entry = entry?;
        if count >= MAX_ENTRIES {
            return Err(UnpackError::TooManyEntries);
        }
        if !entry.header().entry_type().is_file() {
            continue;
        }
        let Some(kind) = classify(&entry.path()?) else { continue };
        // As in any tar, the last of several entries with the same name wins.
        let (mut file, path) = target.create(&match &kind {
            BootstrapEntry::Bootstrap(position) => format!("bootstrap-{position}"),
            BootstrapEntry::Meta(blob) => format!("{blob}.blob.meta"),
        })?;
        io::copy(&mut entry, &mut file)?;
        match kind {
            BootstrapEntry::Bootstrap(position) => extracted.bootstraps[position] = Some(path),
            BootstrapEntry::Meta(blob) => {
                extracted.metas.insert(blob, path);
            }
        }
    }
    Ok(extracted)
}

/// Classifies the entry at `path`; `None` for an entry that is not unpacked. Like Podman, takes absolute paths as
/// relative to the layer.
fn classify(path: &Path) -> Option<BootstrapEntry> {
    let mut parts = Vec::new();
    for part in path.components() {
        match part {
            Component::Normal(part) => parts.push(part.to_str()?),
            Component::RootDir | Component::CurDir => {}
            Component::ParentDir | Component::Prefix(_) => return None,
        }
    }
    match parts[..] {
        ["image", "image.boot"] => Some(BootstrapEntry::Bootstrap(0)),
        ["image.boot"] => Some(BootstrapEntry::Bootstrap(1)),
        ["image", name] => {
            let blob = name.strip_suffix(".blob.meta")?;
            Digest::from_hex(blob)
                .ok()
                .map(|_| BootstrapEntry::Meta(blob.to_owned()))
        }
        _ => None,
    }
}

/// Hashes and counts the bytes read, and fails beyond a limit.
struct HashingReader<R> {
    inner: R,
    hash: Sha256,
    left: u64,
    exceeded: bool,
}

impl<R: Read> Read for HashingReader<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let got = self.inner.read(buffer)?;
        let Some(left) = self.left.checked_sub(got as u64) else {
            self.exceeded = true;
            return Err(io::Error::other("too large"));
        };
        self.left = left;
        self.hash.update(&buffer[..got]);
        Ok(got)
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Seek as _, Write as _};

    use flate2::{Compression, write::GzEncoder};

    use super::*;

    fn layer(entries: &[(&str, &[u8])]) -> (File, Digest) {
        let mut archive = tar::Builder::new(Vec::new());
        for (name, content) in entries {
            let mut header = tar::Header::new_gnu();
            header.set_size(content.len() as u64);
            // Set directly, because `set_path` rejects hostile names.
            header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
            header.set_cksum();
            archive.append(&header, *content).unwrap();
        }
        gzipped(&archive.into_inner().unwrap())
    }

    fn gzipped(tar: &[u8]) -> (File, Digest) {
        let mut encoder = GzEncoder::new(tempfile::tempfile().unwrap(), Compression::fast());
        encoder.write_all(tar).unwrap();
        let mut file = encoder.finish().unwrap();
        file.rewind().unwrap();
        (file, Digest::of(tar))
    }

    #[test]
    fn layer_is_unpacked_in_memory() {
        let blob = "a".repeat(64);
        let meta = format!("image/{blob}.blob.meta");
        let (file, diff_id) = layer(&[("image/image.boot", b"boot"), (&meta, b"old"), (&meta, b"meta")]);
        let unpacked = unpack_in_memory(file, diff_id, 1 << 20).unwrap();
        assert_eq!(fs::read(&unpacked.bootstrap).unwrap(), b"boot");
        let bootstrap = unpacked.bootstrap.clone();
        let rest = unpacked.without_bootstrap().unwrap();
        assert_eq!(fs::read(&bootstrap).unwrap(), b"", "its memory is free");
        assert_eq!(fs::read(&rest.metas[&blob]).unwrap(), b"meta");
    }

    #[test]
    fn bootstrap_and_metas_are_unpacked_and_nothing_else() {
        let parent = tempfile::tempdir().unwrap();
        let blob = "a".repeat(64);
        let meta = format!("/image/{blob}.blob.meta");
        let entries: [(&str, &[u8]); 6] = [
            ("image/image.boot", b"boot"),
            (&meta, b"meta"),
            ("image/../../evil", b"x"),
            ("image/../image.boot", b"x"),
            ("other/image.boot", b"x"),
            ("image/short.blob.meta", b"y"),
        ];
        let (file, diff_id) = layer(&entries);
        let unpacked = unpack(file, diff_id, 1 << 20, parent.path()).unwrap();
        assert_eq!(fs::read(&unpacked.bootstrap).unwrap(), b"boot");
        assert_eq!(fs::read(&unpacked.metas[&blob]).unwrap(), b"meta");
        let files = |unpacked: &Unpacked| fs::read_dir(unpacked.bootstrap.parent().unwrap()).unwrap().count();
        assert_eq!(files(&unpacked), 2);
        let unpacked = unpacked.without_bootstrap().unwrap();
        assert_eq!(files(&unpacked), 1, "the blob meta is left");
        drop(unpacked);
        assert_eq!(fs::read_dir(parent.path()).unwrap().count(), 0, "nothing is left");
    }

    #[test]
    fn bootstrap_has_any_of_the_names_that_converters_write() {
        let parent = tempfile::tempdir().unwrap();
        for name in [
            "image.boot",
            "/image.boot",
            "./image/image.boot",
            "/image/image.boot",
            "/./image/./image.boot",
        ] {
            let (file, diff_id) = layer(&[(name, b"boot")]);
            let unpacked = unpack(file, diff_id, 1 << 20, parent.path()).unwrap();
            assert_eq!(fs::read(&unpacked.bootstrap).unwrap(), b"boot", "{name}");
            assert!(unpacked.without_bootstrap().is_none(), "no blob metas are there");
        }
        for name in [
            "../image.boot",
            "image/../image.boot",
            "/../image/image.boot",
            "image/image.boot/image.boot",
        ] {
            assert_eq!(classify(Path::new(name)), None, "{name}");
        }
        let entries: [(&str, &[u8]); 3] = [
            ("image.boot", b"old"),
            ("image/image.boot", b"new"),
            ("/image.boot", b"old"),
        ];
        for entries in [&entries[..2], &entries[1..]] {
            let (file, diff_id) = layer(entries);
            let unpacked = unpack(file, diff_id, 1 << 20, parent.path()).unwrap();
            assert_eq!(fs::read(&unpacked.bootstrap).unwrap(), b"new");
        }
    }

    #[test]
    fn decompression_bomb_is_stopped_at_the_limit() {
        let parent = tempfile::tempdir().unwrap();
        let (file, diff_id) = layer(&[("image/image.boot", &vec![0; 4 << 20])]);
        let error = unpack(file, diff_id, 1 << 20, parent.path()).unwrap_err();
        assert!(matches!(error, UnpackError::TooLarge(_)), "{error}");
    }

    #[test]
    fn damaged_layers_are_rejected() {
        let parent = tempfile::tempdir().unwrap();
        let (file, _) = layer(&[("image/image.boot", b"boot")]);
        let error = unpack(file, Digest::of(b"other"), 1 << 20, parent.path()).unwrap_err();
        assert!(matches!(error, UnpackError::DiffId { .. }), "{error}");
        let (file, diff_id) = layer(&[("image/other", b"boot")]);
        let error = unpack(file, diff_id, 1 << 20, parent.path()).unwrap_err();
        assert!(matches!(error, UnpackError::NoBootstrap), "{error}");
        let (file, diff_id) = gzipped(b"this is no tar archive");
        assert!(matches!(
            unpack(file, diff_id, 1 << 20, parent.path()),
            Err(UnpackError::Io(_) | UnpackError::NoBootstrap)
        ));
    }
}
