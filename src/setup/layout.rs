//! Where containers/storage, containers/image and CRI-O keep their files.

use std::{
    ffi::OsString,
    fs, io,
    path::{Path, PathBuf},
};

use super::Error;

/// The vendor's storage.conf, as Fedora and Debian's containers-storage ship it. It is not read where there is another.
pub const VENDOR_STORAGE: &str = "/usr/share/containers/storage.conf";
/// Late in the order of names, in which the files are read: the last one's entry for a registry is in force.
const DROP_IN: &str = "zz-nydus-store.conf";
/// In directories in which a person's file may well be meant to come later.
const EARLY_DROP_IN: &str = "50-nydus-store.conf";

/// What Podman is to start at each pull: a name without arguments.
const AUTH_HELPER: &str = "/etc/containers/nydus-store-auth-helper";
/// Where this program is in trees of files.
const PROGRAMS: [&str; 2] = ["/usr/local/bin/nydus-store", "/usr/bin/nydus-store"];

/// The files of one host, or of a host's tree of files.
#[derive(Debug, Clone)]
pub struct Layout {
    /// The storage.conf that is read.
    pub storage: PathBuf,
    /// What is read in its place where it is missing.
    pub vendor_storage: PathBuf,
    /// The registries.conf that is read first.
    pub registries: PathBuf,
    /// What is read after it.
    pub drop_ins: PathBuf,
    /// What root's programs read after storage.conf, if they are new enough; none where a variable names a
    /// storage.conf, since drop-ins are not read then.
    pub rootful_drop_ins: Option<PathBuf>,
    /// CRI-O's configuration.
    pub crio: PathBuf,
    /// The policy that images must meet.
    pub policy: PathBuf,
    /// The tree, if it is not this host's.
    sysroot: Option<PathBuf>,
}

impl Layout {
    /// The files of this host, or of the tree at `sysroot`. `env` gives the variables that name others; a tree has
    /// none.
    pub fn new(sysroot: Option<&Path>, env: impl Fn(&str) -> Option<OsString>) -> Self {
        let named = |name: &str| env(name).filter(|value| !value.is_empty() && sysroot.is_none());
        let at = |path: &str| below(sysroot, Path::new(path));
        let file = |name, usual| named(name).map_or_else(|| at(usual), PathBuf::from);
        let storage = file("CONTAINERS_STORAGE_CONF", "/etc/containers/storage.conf");
        // No other is read instead of one that is named.
        let vendor_storage = match named("CONTAINERS_STORAGE_CONF") {
            Some(_) => storage.clone(),
            None => at(VENDOR_STORAGE),
        };
        Self {
            storage,
            vendor_storage,
            registries: file("CONTAINERS_REGISTRIES_CONF", "/etc/containers/registries.conf"),
            drop_ins: at("/etc/containers/registries.conf.d"),
            rootful_drop_ins: named("CONTAINERS_STORAGE_CONF")
                .is_none()
                .then(|| at("/etc/containers/storage.rootful.conf.d")),
            crio: at("/etc/crio"),
            policy: at("/etc/containers/policy.json"),
            sysroot: sysroot.map(Path::to_owned),
        }
    }

    /// The drop-in of registries.conf.d.
    pub fn ours(&self) -> PathBuf {
        self.drop_ins.join(DROP_IN)
    }

    /// The drop-in of storage.rootful.conf.d.
    pub fn ours_rootful(&self) -> Option<PathBuf> {
        let dir = self.rootful_drop_ins.as_ref()?;
        Some(dir.join(EARLY_DROP_IN))
    }

    /// The drop-ins of CRI-O.
    pub fn crio_drop_ins(&self) -> PathBuf {
        self.crio.join("crio.conf.d")
    }

    /// The drop-in for CRI-O.
    pub fn ours_crio(&self) -> PathBuf {
        self.crio_drop_ins().join(EARLY_DROP_IN)
    }

    /// Whether it is this host's, and not that of a tree.
    pub fn is_host(&self) -> bool {
        self.sysroot.is_none()
    }

    /// The script that hands credentials over, as Podman is told of it.
    pub fn auth_helper(&self) -> &'static str {
        AUTH_HELPER
    }

    /// Where this program is on the host that is set up.
    pub fn program(&self) -> PathBuf {
        let [usual, other] = PROGRAMS.map(PathBuf::from);
        match &self.sysroot {
            None => std::env::current_exe().unwrap_or(usual),
            Some(_) if !self.at(&usual).exists() && self.at(&other).exists() => other,
            Some(_) => usual,
        }
    }

    /// Makes sure that writing to `path` does not lead out of the tree, as a link does that is right only inside.
    pub fn check(&self, path: &Path) -> Result<(), Error> {
        let Some(root) = self.sysroot.as_deref().and_then(|root| root.canonicalize().ok()) else {
            return Ok(());
        };
        match path.ancestors().find_map(|there| there.canonicalize().ok()) {
            Some(target) if !target.starts_with(&root) => Err(Error::Outside {
                path: path.to_owned(),
                target,
            }),
            _ => Ok(()),
        }
    }

    /// Where a path of the host is found from here.
    pub fn at(&self, path: &Path) -> PathBuf {
        below(self.sysroot.as_deref(), path)
    }
}

fn below(sysroot: Option<&Path>, path: &Path) -> PathBuf {
    match sysroot {
        Some(root) => root.join(path.strip_prefix("/").unwrap_or(path)),
        None => path.to_owned(),
    }
}

/// The text of a file, if there is one.
pub fn read(path: &Path) -> Result<Option<String>, Error> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(Error::Read {
            path: path.to_owned(),
            source,
        }),
    }
}
