//! Unpacks a bootstrap layer: a tar with `image/image.boot` and perhaps `image/<blob>.blob.meta` files.

use std::{
    collections::HashMap,
    fs::{File, OpenOptions, Permissions},
    io::{self, BufRead as _, BufReader, Read},
    os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _},
    path::{Component, Path, PathBuf},
};

use sha2::{Digest as _, Sha256};
use tempfile::TempDir;

use crate::digest::Digest;

/// More entries than a converter writes: one for each blob, and there are at most 255 of these.
const MAX_ENTRIES: usize = 4096;

/// A bootstrap layer is not what it should be.
#[derive(Debug, thiserror::Error)]
pub enum UnpackError {
    /// It cannot be decompressed, is not a tar, or cannot be written out.
    #[error("cannot unpack it: {0}")]
    Io(#[from] io::Error),
    /// There is no bootstrap in it.
    #[error("it holds no image/image.boot")]
    NoBootstrap,
    /// It decompresses to more than is allowed.
    #[error("it unpacks to more than {0} bytes; if the image is trusted, raise `max_bootstrap_size`")]
    TooLarge(u64),
    /// It has more entries than a bootstrap layer can have.
    #[error("it has more than {MAX_ENTRIES} entries")]
    TooManyEntries,
    /// Its uncompressed bytes are not those the image's configuration names.
    #[error("its uncompressed digest is {actual}, but the configuration says {expected}")]
    DiffId {
        /// What the configuration says.
        expected: Digest,
        /// What it is.
        actual: Digest,
    },
}

impl UnpackError {
    /// Whether the bytes are to blame, and not the disk they were to be written to.
    pub fn is_damage(&self) -> bool {
        !matches!(self, Self::Io(error) if error.raw_os_error().is_some())
    }
}

/// An unpacked bootstrap layer; its files are deleted with it.
#[derive(Debug)]
pub struct Unpacked {
    dir: TempDir,
    /// Blob id → file of its blob meta.
    pub metas: HashMap<String, PathBuf>,
    /// Length of the uncompressed layer, in bytes.
    pub size: u64,
}

impl Unpacked {
    /// The bootstrap.
    pub fn bootstrap(&self) -> PathBuf {
        self.dir.path().join("image.boot")
    }
}

/// Unpacks the layer in `file` (tar, or tar compressed by gzip or zstd) into a new directory in `parent`.
///
/// Reads at most `limit` uncompressed bytes. Only the two kinds of files named above are written, under names made
/// here, so that no entry can lead elsewhere.
pub fn unpack(file: File, diff_id: Digest, limit: u64, parent: &Path) -> Result<Unpacked, UnpackError> {
    let dir = tempfile::Builder::new()
        .prefix("bootstrap-")
        .permissions(Permissions::from_mode(0o700))
        .tempdir_in(parent)?;
    let mut reader = Counting {
        inner: decompressed(file)?,
        hash: Sha256::new(),
        left: limit,
        exceeded: false,
    };
    let metas = extract(&mut reader, dir.path()).and_then(|metas| {
        // The digest is of all bytes, those after the tar's end too.
        io::copy(&mut reader, &mut io::sink())?;
        Ok(metas)
    });
    let metas = match metas {
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
    let unpacked = Unpacked {
        dir,
        metas,
        size: limit - reader.left,
    };
    if unpacked.bootstrap().is_file() {
        Ok(unpacked)
    } else {
        Err(UnpackError::NoBootstrap)
    }
}

fn decompressed(file: File) -> io::Result<Box<dyn Read>> {
    let mut file = BufReader::new(file);
    Ok(match file.fill_buf()? {
        [0x1f, 0x8b, ..] => Box::new(flate2::bufread::MultiGzDecoder::new(file)),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => Box::new(zstd::Decoder::with_buffer(file)?),
        _ => Box::new(file),
    })
}

fn extract(reader: &mut impl Read, dir: &Path) -> Result<HashMap<String, PathBuf>, UnpackError> {
    let mut metas = HashMap::new();
    let mut archive = tar::Archive::new(reader);
    // Raw: what extends a header would be read into memory whole, and the names that are wanted need none.
    for (count, entry) in archive.entries()?.raw(true).enumerate() {
        let mut entry = entry?;
        if count >= MAX_ENTRIES {
            return Err(UnpackError::TooManyEntries);
        }
        if !entry.header().entry_type().is_file() {
            continue;
        }
        let Some(name) = wanted(&entry.path()?) else { continue };
        let path = dir.join(&name);
        let mut file = OpenOptions::new();
        // The last of several entries of one name counts, as in any tar.
        file.write(true).create(true).truncate(true).mode(0o600);
        io::copy(&mut entry, &mut file.open(&path)?)?;
        if let Some(blob) = name.strip_suffix(".blob.meta") {
            metas.insert(blob.to_owned(), path);
        }
    }
    Ok(metas)
}

/// The file name of an entry to be unpacked.
fn wanted(path: &Path) -> Option<String> {
    let mut parts = path.components().filter(|part| *part != Component::CurDir);
    let (dir, name, end) = (parts.next()?, parts.next()?, parts.next());
    let name = name.as_os_str().to_str()?;
    let is_meta = name
        .strip_suffix(".blob.meta")
        .is_some_and(|blob| Digest::from_hex(blob).is_ok());
    let fits = dir.as_os_str() == "image" && end.is_none() && (name == "image.boot" || is_meta);
    fits.then(|| name.to_owned())
}

/// Hashes what is read and stops at a limit.
struct Counting<R> {
    inner: R,
    hash: Sha256,
    left: u64,
    exceeded: bool,
}

impl<R: Read> Read for Counting<R> {
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
            // `set_path` would refuse the hostile names.
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
    fn bootstrap_and_metas_are_unpacked_and_nothing_else() {
        let parent = tempfile::tempdir().unwrap();
        let blob = "a".repeat(64);
        let meta = format!("image/{blob}.blob.meta");
        let entries: [(&str, &[u8]); 5] = [
            ("image/image.boot", b"boot"),
            (&meta, b"meta"),
            ("image/../../evil", b"x"),
            ("/image/image.boot", b"absolute"),
            ("image/short.blob.meta", b"y"),
        ];
        let (file, diff_id) = layer(&entries);
        let unpacked = unpack(file, diff_id, 1 << 20, parent.path()).unwrap();
        assert_eq!(std::fs::read(unpacked.bootstrap()).unwrap(), b"boot");
        assert_eq!(std::fs::read(&unpacked.metas[&blob]).unwrap(), b"meta");
        assert_eq!(std::fs::read_dir(unpacked.dir.path()).unwrap().count(), 2);
        drop(unpacked);
        assert_eq!(std::fs::read_dir(parent.path()).unwrap().count(), 0, "nothing is left");
    }

    #[test]
    fn a_bomb_is_stopped_at_the_limit() {
        let parent = tempfile::tempdir().unwrap();
        let (file, diff_id) = layer(&[("image/image.boot", &vec![0; 4 << 20])]);
        let error = unpack(file, diff_id, 1 << 20, parent.path()).unwrap_err();
        assert!(matches!(error, UnpackError::TooLarge(_)), "{error}");
    }

    #[test]
    fn damage_is_told() {
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
