//! Certificates for single hosts, where Podman and Docker keep them: authorities that prove who the host is, and what
//! proves to the host who we are ([containers-certs.d(5)][1]).
//!
//! [1]: https://github.com/containers/image/blob/main/docs/containers-certs.d.5.md

use std::{
    collections::HashMap,
    ffi::OsString,
    fs, io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    time::{Duration, Instant, SystemTime},
};

use parking_lot::Mutex;
use reqwest::{Certificate, Identity};

use super::Error;
use crate::registries_conf::watcher::home;

/// How long a directory is taken to be as it was.
const INTERVAL: Duration = Duration::from_secs(1);
/// Most hosts of which it is remembered whether they have a directory.
const MOST: usize = 1024;

/// The usual places, the one that goes before others first; `env` gives variables.
pub(super) fn usual_dirs(env: impl Fn(&str) -> Option<OsString>) -> Vec<PathBuf> {
    let own = home(env, rustix::process::getuid().as_raw()).map(|home| home.join(".config/containers/certs.d"));
    let system = ["/etc/containers/certs.d", "/etc/docker/certs.d"].map(PathBuf::from);
    own.into_iter().chain(system).collect()
}

/// A host's directory as it is now: another one means that connections are to be made anew.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct CertDir {
    pub(super) path: PathBuf,
    files: Vec<(PathBuf, SystemTime, u64, u64)>,
}

/// The directories of all hosts.
pub(super) struct Certs {
    dirs: Vec<PathBuf>,
    /// Never held while a disk is waited for.
    seen: Mutex<HashMap<String, (Instant, Option<CertDir>)>>,
}

/// What a directory holds.
pub(super) struct Material {
    /// Authorities, beside the system's.
    pub(super) authorities: Vec<Certificate>,
    /// The client's certificate and key.
    pub(super) identity: Option<Identity>,
}

impl Certs {
    pub(super) fn new(dirs: Vec<PathBuf>) -> Self {
        let seen = Mutex::default();
        Self { dirs, seen }
    }

    /// The directory of `host[:port]`, looked at once a second at most. As for Podman, the first one that is there counts.
    /// Blocks.
    pub(super) fn of(&self, host: &str) -> Option<CertDir> {
        if let Some(found) = self.fresh(host) {
            return found;
        }
        // A name that would lead elsewhere.
        let plain = !host.starts_with('.') && !host.contains('/');
        let found = self
            .dirs
            .iter()
            .filter(|_| plain)
            .find_map(|dir| CertDir::look(dir.join(host)));
        let mut seen = self.seen.lock();
        if seen.len() >= MOST {
            seen.clear();
        }
        seen.insert(host.to_owned(), (Instant::now(), found.clone()));
        found
    }

    /// What [`Self::of`] gives, if it need not look for it; does not block.
    pub(super) fn fresh(&self, host: &str) -> Option<Option<CertDir>> {
        let seen = self.seen.lock();
        let (at, found) = seen.get(host)?;
        (at.elapsed() < INTERVAL).then(|| found.clone())
    }
}

impl CertDir {
    fn look(path: PathBuf) -> Option<Self> {
        let entries = fs::read_dir(&path).ok()?;
        let file = |entry: fs::DirEntry| {
            let path = entry.path();
            // What a link leads to is what counts.
            let meta = fs::metadata(&path).ok()?;
            Some((path, meta.modified().ok()?, meta.len(), meta.ino()))
        };
        let mut files: Vec<_> = entries.flatten().filter_map(file).collect();
        files.sort();
        Some(Self { path, files })
    }

    fn with_ending<'a>(&'a self, ending: &'a str) -> impl Iterator<Item = &'a Path> {
        let paths = self.files.iter().map(|(path, ..)| path.as_path());
        paths.filter(move |path| path.extension().is_some_and(|end| end == ending))
    }

    /// Reads `*.crt`, and `*.cert` with its `*.key` if `with_identity`.
    pub(super) fn load(&self, with_identity: bool) -> Result<Material, Error> {
        let mut authorities = Vec::new();
        for file in self.with_ending("crt") {
            let found = Certificate::from_pem_bundle(&read(file)?).unwrap_or_default();
            if found.is_empty() {
                return Err(unusable(file, "there is no certificate in PEM form in it".to_owned()));
            }
            authorities.extend(found);
        }
        let identity = if with_identity { self.identity()? } else { None };
        Ok(Material { authorities, identity })
    }

    fn identity(&self) -> Result<Option<Identity>, Error> {
        let lonely = self.with_ending("key").find(|key| !key.with_extension("cert").exists());
        if let Some(key) = lonely {
            return Err(unusable(
                key,
                "its certificate, of the same name with .cert, is missing".to_owned(),
            ));
        }
        let mut certificates = self.with_ending("cert");
        let Some(certificate) = certificates.next() else {
            return Ok(None);
        };
        if let Some(other) = certificates.next() {
            tracing::debug!(used = %certificate.display(), unused = %other.display(), "one client certificate is used");
        }
        let key = certificate.with_extension("key");
        if !key.exists() {
            let detail =
                "its key, of the same name with .key, is missing; an authority's certificate is to end in .crt";
            return Err(unusable(certificate, detail.to_owned()));
        }
        let pem = [read(certificate)?, b"\n".to_vec(), read(&key)?].concat();
        let identity = Identity::from_pem(&pem);
        identity.map(Some).map_err(|_| {
            unusable(
                certificate,
                "it and its key are no certificate and key in PEM form".to_owned(),
            )
        })
    }
}

fn read(file: &Path) -> Result<Vec<u8>, Error> {
    fs::read(file).map_err(|error: io::Error| unusable(file, error.to_string()))
}

/// A file, or a directory, of certificates that cannot be used.
pub(super) fn unusable(path: &Path, detail: String) -> Error {
    Error::Certificates {
        path: path.to_owned(),
        detail,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(files: &[(&str, &str)]) -> String {
        let dir = tempfile::tempdir().unwrap();
        let place = dir.path().join("r.example:5000");
        fs::create_dir(&place).unwrap();
        for (name, text) in files {
            fs::write(place.join(name), text).unwrap();
        }
        let certs = Certs::new(vec![dir.path().join("none"), dir.path().to_owned()]);
        assert!(certs.of("r.example").is_none() && certs.of("..").is_none());
        let loaded = certs.of("r.example:5000").unwrap().load(true);
        loaded.err().map(|error| error.to_string()).unwrap_or_default()
    }

    #[test]
    fn what_is_wrong_is_told_with_the_file() {
        assert_eq!(error(&[("notes.txt", "any")]), "");
        for (files, expected) in [
            (&[("ca.crt", "no PEM")][..], "ca.crt cannot be used"),
            (&[("me.cert", "x")], "me.cert cannot be used"),
            (&[("me.key", "x")], "me.key cannot be used"),
            (&[("me.cert", "x"), ("me.key", "x")], "no certificate and key"),
        ] {
            let message = error(files);
            assert!(message.contains(expected), "{message}");
        }
    }
}
