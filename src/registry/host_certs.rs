//! Certificates of single hosts, where Podman and Docker keep them: CA certificates, and client certificates with their
//! keys ([containers-certs.d(5)][1]).
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
use crate::registries_conf::watcher::home_dir;

/// Shortest time between two looks at a directory.
const CHECK_INTERVAL: Duration = Duration::from_secs(1);
/// Most hosts whose directories are remembered.
const MAX_HOSTS: usize = 1024;

/// The directories of Podman and Docker, highest precedence first. `env` looks up environment variables.
pub(super) fn default_dirs(env: impl Fn(&str) -> Option<OsString>) -> Vec<PathBuf> {
    let user = home_dir(env, rustix::process::getuid().as_raw()).map(|home| home.join(".config/containers/certs.d"));
    let system = ["/etc/containers/certs.d", "/etc/docker/certs.d"].map(PathBuf::from);
    user.into_iter().chain(system).collect()
}

/// The state of a host's directory. A change means that connections must be made anew.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct CertDir {
    pub(super) path: PathBuf,
    /// Path, modification time, size and inode of each file.
    files: Vec<(PathBuf, SystemTime, u64, u64)>,
}

/// The certificate directories of all hosts.
pub(super) struct CertDirs {
    dirs: Vec<PathBuf>,
    /// Never held during disk I/O.
    seen: Mutex<HashMap<String, (Instant, Option<CertDir>)>>,
}

/// The certificates of a directory.
pub(super) struct HostCerts {
    /// CA certificates, besides the system's.
    pub(super) authorities: Vec<Certificate>,
    /// The client's certificate and key.
    pub(super) identity: Option<Identity>,
}

impl CertDirs {
    pub(super) fn new(dirs: Vec<PathBuf>) -> Self {
        let seen = Mutex::default();
        Self { dirs, seen }
    }

    /// The directory of `host[:port]`, looked at once a second at most. As in Podman, the first existing one counts.
    /// Blocks.
    pub(super) fn get(&self, host: &str) -> Option<CertDir> {
        if let Some(found) = self.cached(host) {
            return found;
        }
        // Refuses names that would escape the directory.
        let is_plain = !host.starts_with('.') && !host.contains('/');
        let found = self
            .dirs
            .iter()
            .filter(|_| is_plain)
            .find_map(|dir| CertDir::scan(dir.join(host)));
        let mut seen = self.seen.lock();
        if seen.len() >= MAX_HOSTS {
            seen.clear();
        }
        seen.insert(host.to_owned(), (Instant::now(), found.clone()));
        found
    }

    /// The result of [`Self::get`], if it is recent enough. Does not block.
    pub(super) fn cached(&self, host: &str) -> Option<Option<CertDir>> {
        let seen = self.seen.lock();
        let (at, found) = seen.get(host)?;
        (at.elapsed() < CHECK_INTERVAL).then(|| found.clone())
    }
}

impl CertDir {
    fn scan(path: PathBuf) -> Option<Self> {
        let entries = fs::read_dir(&path).ok()?;
        let file = |entry: fs::DirEntry| {
            let path = entry.path();
            // Follows symbolic links.
            let meta = fs::metadata(&path).ok()?;
            Some((path, meta.modified().ok()?, meta.len(), meta.ino()))
        };
        let mut files: Vec<_> = entries.flatten().filter_map(file).collect();
        files.sort();
        Some(Self { path, files })
    }

    fn files_with_extension<'a>(&'a self, extension: &'a str) -> impl Iterator<Item = &'a Path> {
        let paths = self.files.iter().map(|(path, ..)| path.as_path());
        paths.filter(move |path| path.extension().is_some_and(|found| found == extension))
    }

    /// Reads the CA certificates (`*.crt`) and, if `with_identity`, the client certificate (`*.cert` with its `*.key`).
    pub(super) fn load(&self, with_identity: bool) -> Result<HostCerts, Error> {
        let mut authorities = Vec::new();
        for file in self.files_with_extension("crt") {
            let found = Certificate::from_pem_bundle(&read(file)?).unwrap_or_default();
            if found.is_empty() {
                return Err(unusable(file, "no certificate in PEM form".to_owned()));
            }
            authorities.extend(found);
        }
        let identity = if with_identity { self.identity()? } else { None };
        Ok(HostCerts { authorities, identity })
    }

    fn identity(&self) -> Result<Option<Identity>, Error> {
        let without_cert = self
            .files_with_extension("key")
            .find(|key| !key.with_extension("cert").exists());
        if let Some(key) = without_cert {
            return Err(unusable(
                key,
                "certificate of the same name with extension .cert is missing".to_owned(),
            ));
        }
        let mut certificates = self.files_with_extension("cert");
        let Some(certificate) = certificates.next() else {
            return Ok(None);
        };
        if let Some(other) = certificates.next() {
            tracing::debug!(
                file = %certificate.display(),
                ignored = %other.display(),
                "using first of several client certificates"
            );
        }
        let key = certificate.with_extension("key");
        if !key.exists() {
            let detail =
                "key of the same name with extension .key is missing; a CA certificate needs the extension .crt";
            return Err(unusable(certificate, detail.to_owned()));
        }
        let pem = [read(certificate)?, b"\n".to_vec(), read(&key)?].concat();
        let identity = Identity::from_pem(&pem);
        identity
            .map(Some)
            .map_err(|_| unusable(certificate, "not a certificate and key in PEM form".to_owned()))
    }
}

fn read(file: &Path) -> Result<Vec<u8>, Error> {
    fs::read(file).map_err(|error: io::Error| unusable(file, error.to_string()))
}

/// The error about an unusable certificate file or directory.
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
        let host_dir = dir.path().join("r.example:5000");
        fs::create_dir(&host_dir).unwrap();
        for (name, text) in files {
            fs::write(host_dir.join(name), text).unwrap();
        }
        let certs = CertDirs::new(vec![dir.path().join("none"), dir.path().to_owned()]);
        assert!(certs.get("r.example").is_none() && certs.get("..").is_none());
        let loaded = certs.get("r.example:5000").unwrap().load(true);
        loaded.err().map(|error| error.to_string()).unwrap_or_default()
    }

    #[test]
    fn errors_name_the_file() {
        assert_eq!(error(&[("notes.txt", "any")]), "");
        for (files, expected) in [
            (&[("ca.crt", "no PEM")][..], "ca.crt: no certificate"),
            (&[("me.cert", "x")], "me.cert: key"),
            (&[("me.key", "x")], "me.key: certificate"),
            (&[("me.cert", "x"), ("me.key", "x")], "not a certificate and key"),
        ] {
            let message = error(files);
            assert!(message.contains(expected), "{message}");
        }
    }
}
