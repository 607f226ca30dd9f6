//! [`Layout`]: paths of the configuration files of containers/storage, containers/image and CRI-O.

use std::{
    ffi::OsString,
    fs, io,
    path::{Path, PathBuf},
};

use super::SetupError;

/// The vendor's storage.conf, shipped by Fedora and by Debian's containers-storage. /etc/containers/storage.conf
/// replaces it.
pub const VENDOR_STORAGE: &str = "/usr/share/containers/storage.conf";
/// Drop-in that sorts late: the last file's value is in force.
const LATE_DROP_IN: &str = "zz-nydus-store.conf";
/// Drop-in that an administrator's file can override by a later name.
const EARLY_DROP_IN: &str = "50-nydus-store.conf";

/// Path of the auth helper's script; registries.conf takes a path without arguments.
const AUTH_HELPER: &str = "/etc/containers/nydus-store-auth-helper";
/// Paths of this program in a sysroot.
const PROGRAM_PATHS: [&str; 2] = ["/usr/local/bin/nydus-store", "/usr/bin/nydus-store"];

/// Configuration files of this host, or of a root file system (sysroot).
#[derive(Debug, Clone)]
pub struct Layout {
    /// storage.conf.
    pub storage: PathBuf,
    /// The vendor's storage.conf, which applies if `storage` is missing.
    pub vendor_storage: PathBuf,
    /// registries.conf.
    pub registries: PathBuf,
    /// registries.conf.d, which is read after `registries`.
    pub registries_drop_ins: PathBuf,
    /// storage.rootful.conf.d, which root's programs read after storage.conf if they are new enough. `None` with
    /// $CONTAINERS_STORAGE_CONF, which disables drop-ins.
    pub rootful_drop_ins: Option<PathBuf>,
    /// CRI-O's configuration directory.
    pub crio: PathBuf,
    /// policy.json, the signature policy.
    pub policy: PathBuf,
    /// The root file system, if it is not this host's.
    sysroot: Option<PathBuf>,
}

impl Layout {
    /// The files of this host, or of `sysroot`. On this host, environment variables from `env` override paths.
    pub fn new(sysroot: Option<&Path>, env: impl Fn(&str) -> Option<OsString>) -> Self {
        let named = |name: &str| env(name).filter(|value| !value.is_empty() && sysroot.is_none());
        let at = |path: &str| below(sysroot, Path::new(path));
        let file = |name, usual| named(name).map_or_else(|| at(usual), PathBuf::from);
        let storage = file("CONTAINERS_STORAGE_CONF", "/etc/containers/storage.conf");
        // The variable's file has no fallback.
        let vendor_storage = match named("CONTAINERS_STORAGE_CONF") {
            Some(_) => storage.clone(),
            None => at(VENDOR_STORAGE),
        };
        Self {
            storage,
            vendor_storage,
            registries: file("CONTAINERS_REGISTRIES_CONF", "/etc/containers/registries.conf"),
            registries_drop_ins: at("/etc/containers/registries.conf.d"),
            rootful_drop_ins: named("CONTAINERS_STORAGE_CONF")
                .is_none()
                .then(|| at("/etc/containers/storage.rootful.conf.d")),
            crio: at("/etc/crio"),
            policy: at("/etc/containers/policy.json"),
            sysroot: sysroot.map(Path::to_owned),
        }
    }

    /// Setup's drop-in in registries.conf.d.
    pub fn registries_drop_in(&self) -> PathBuf {
        self.registries_drop_ins.join(LATE_DROP_IN)
    }

    /// Setup's drop-in in storage.rootful.conf.d.
    pub fn rootful_drop_in(&self) -> Option<PathBuf> {
        let dir = self.rootful_drop_ins.as_ref()?;
        Some(dir.join(EARLY_DROP_IN))
    }

    /// CRI-O's directory of drop-ins.
    pub fn crio_drop_ins(&self) -> PathBuf {
        self.crio.join("crio.conf.d")
    }

    /// Setup's drop-in for CRI-O.
    pub fn crio_drop_in(&self) -> PathBuf {
        self.crio_drop_ins().join(EARLY_DROP_IN)
    }

    /// Whether this is the running host, not a sysroot.
    pub fn is_host(&self) -> bool {
        self.sysroot.is_none()
    }

    /// Path of the auth helper's script, as in registries.conf.
    pub fn auth_helper(&self) -> &'static str {
        AUTH_HELPER
    }

    /// Path of this program on the host to set up.
    pub fn program(&self) -> PathBuf {
        let [usual, other] = PROGRAM_PATHS.map(PathBuf::from);
        match &self.sysroot {
            None => std::env::current_exe().unwrap_or(usual),
            Some(_) if !self.in_sysroot(&usual).exists() && self.in_sysroot(&other).exists() => other,
            Some(_) => usual,
        }
    }

    /// Fails if symbolic links lead `path` out of the sysroot. Absolute links are valid only inside it.
    pub fn ensure_inside_sysroot(&self, path: &Path) -> Result<(), SetupError> {
        let Some(root) = self.sysroot.as_deref().and_then(|root| root.canonicalize().ok()) else {
            return Ok(());
        };
        match path.ancestors().find_map(|there| there.canonicalize().ok()) {
            Some(target) if !target.starts_with(&root) => Err(SetupError::OutsideSysroot {
                path: path.to_owned(),
                target,
            }),
            _ => Ok(()),
        }
    }

    /// Prefixes an absolute path with the sysroot.
    pub fn in_sysroot(&self, path: &Path) -> PathBuf {
        below(self.sysroot.as_deref(), path)
    }
}

fn below(sysroot: Option<&Path>, path: &Path) -> PathBuf {
    match sysroot {
        Some(root) => root.join(path.strip_prefix("/").unwrap_or(path)),
        None => path.to_owned(),
    }
}

/// Reads a file; `None` if it is missing.
pub fn read_optional(path: &Path) -> Result<Option<String>, SetupError> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(SetupError::Read {
            path: path.to_owned(),
            source,
        }),
    }
}
