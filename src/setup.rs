//! Configures Podman and CRI-O to use the image store and to announce their pulls.
//!
//! [`Setup::add`] adds the store to the file that the installed programs read, and the auth helper to
//! registries.conf.d. It plans all changes before writing the first file ([`Plan`]), and keeps the administrator's
//! settings.
//!
//! - [`layout`]: paths of the files; [`change`]: a change to one file; [`programs`]: which files the programs read;
//! - [`storage`]: the entries in storage.conf; [`drop_in`]: files that setup owns;
//! - [`auth_helper`]: the script that announces pulls;
//! - [`update`]: repeats the set-up when the daemon starts, after an upgrade of Podman or of this program.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use crate::{
    fuse::mountpoint::{self, FS_TYPE},
    registries_conf::Registries,
    store::layout::{self as skeleton, LAYERS_DIR, STORE_DIR},
};

pub mod auth_helper;
pub mod change;
pub mod drop_in;
mod error;
pub mod layout;
pub mod programs;
pub mod storage;
pub mod update;

use change::{Change, ChangeKind};
pub use error::SetupError;
use layout::Layout;
use programs::{Programs, StorePlacement};
use storage::{NamedStores, Stores};

/// Planned changes to the host.
#[derive(Debug, Default)]
pub struct Plan {
    /// Changes to files, in the order in which they are applied.
    pub changes: Vec<Change>,
    /// The store's missing directories. Podman does not start without them.
    pub new_dirs: Vec<PathBuf>,
    /// Root in which to create an empty store, unless it has one.
    create: Option<PathBuf>,
    /// Root whose store is removed if it is empty.
    remove: Option<PathBuf>,
    /// Drop-in directories to remove if they are empty.
    old_dirs: Vec<PathBuf>,
    /// Hints for the administrator.
    pub notes: Vec<String>,
}

impl Plan {
    /// Applies the changes.
    pub fn apply(&self) -> Result<(), SetupError> {
        let write = |root: &Path, done: io::Result<()>| {
            done.map_err(|source| SetupError::Write {
                path: root.to_owned(),
                source,
            })
        };
        // Every Podman command fails if storage.conf names a missing store. So the store is created first and removed
        // last.
        if let Some(root) = &self.create {
            write(root, skeleton::create_empty(root))?;
        }
        self.changes.iter().try_for_each(Change::apply)?;
        for dir in &self.old_dirs {
            fs::remove_dir(dir).unwrap_or_else(|error| tracing::debug!(dir = %dir.display(), %error, "kept directory"));
        }
        if let Some(root) = &self.remove {
            write(root, skeleton::remove_empty(root).map(drop))?;
        }
        Ok(())
    }

    /// Whether the plan changes the file `path`.
    fn touches(&self, path: &Path) -> bool {
        let mut changes = self.changes.iter();
        changes.any(|change| change.path == path && change.kind() != ChangeKind::Unchanged)
    }
}

/// The set-up of one host, or of a root file system.
#[derive(Debug)]
pub struct Setup {
    /// Paths of the configuration files.
    pub layout: Layout,
    /// Directories of the image store and the layer store.
    pub stores: Stores,
    root: PathBuf,
}

impl Setup {
    /// Prepares the set-up for the store of the daemon's `root`.
    ///
    /// # Errors
    /// If the path contains `:`, `,`, a line break or invalid UTF-8, which storage.conf cannot express.
    pub fn new(layout: Layout, root: &Path) -> Result<Self, SetupError> {
        let root = std::path::absolute(root).unwrap_or_else(|_| root.to_owned());
        let dir = |name: &str| match root.join(name).to_str() {
            Some(dir) if !dir.contains([':', ',', '\n']) => Ok(dir.to_owned()),
            _ => Err(SetupError::StorePath { path: root.join(name) }),
        };
        Ok(Self {
            stores: Stores {
                images: dir(STORE_DIR)?,
                layers: dir(LAYERS_DIR)?,
            },
            root,
            layout,
        })
    }

    /// Reads a file that setup may change.
    fn file(&self, path: PathBuf) -> Result<Change, SetupError> {
        self.layout.ensure_inside_sysroot(&path)?;
        Change::unchanged(path)
    }

    /// Reads a file that setup owns. Fails if another program wrote it.
    fn own_file(&self, path: PathBuf) -> Result<Change, SetupError> {
        let change = self.file(path)?;
        if let Some(text) = &change.before {
            drop_in::check(&change.path, text)?;
        }
        Ok(change)
    }

    /// The root's path, below the sysroot if there is one.
    fn root_in_sysroot(&self) -> Result<PathBuf, SetupError> {
        let root = self.layout.in_sysroot(&self.root);
        self.layout.ensure_inside_sysroot(&root.join(STORE_DIR))?;
        Ok(root)
    }

    /// Plans to add the stores and the auth helper.
    pub fn add(&self) -> Result<Plan, SetupError> {
        let programs = Programs::find(&self.layout)?;
        let placement = self.placement(&programs);
        let root = self.root_in_sysroot()?;
        let store = root.join(STORE_DIR);
        if self.layout.is_host() && mountpoint::mounted_on(&store).is_ok_and(|kind| kind.as_deref() == Some(FS_TYPE)) {
            return Err(SetupError::Mounted { path: store });
        }
        let mut notes = Vec::new();
        let (helper, registries) = self.helper_files(&mut notes)?;
        let mut changes = vec![helper, registries];
        if programs.has_crio {
            let mut crio = self.own_file(self.layout.crio_drop_in())?;
            crio.after = Some(drop_in::crio(placement.crio.then_some(&self.stores)));
            changes.push(crio);
        }
        changes.extend(self.entries(placement, &mut notes)?);
        let mut plan = Plan {
            changes,
            new_dirs: missing(&root),
            create: Some(root),
            notes,
            ..Plan::default()
        };
        plan.notes.extend(self.crio_note(&programs, placement, &plan));
        Ok(plan)
    }

    /// Plans to remove everything that [`Self::add`] added, in this version or an earlier one.
    pub fn remove(&self) -> Result<Plan, SetupError> {
        let mut changes = vec![self.without_entries()?];
        let rootful = self.layout.rootful_drop_in();
        let ours = [self.layout.registries_drop_in(), self.layout.crio_drop_in()];
        for path in ours.into_iter().chain(rootful) {
            changes.push(Change {
                after: None,
                ..self.own_file(path)?
            });
        }
        changes.push(Change {
            after: None,
            ..self.helper()?
        });
        let mut old_dirs: Vec<_> = self.layout.rootful_drop_ins.iter().cloned().collect();
        old_dirs.extend([self.layout.crio_drop_ins(), self.layout.crio.clone()]);
        Ok(Plan {
            changes,
            old_dirs,
            remove: Some(self.root_in_sysroot()?),
            ..Plan::default()
        })
    }

    /// The files from which the installed programs read the image store.
    pub fn placement(&self, programs: &Programs) -> StorePlacement {
        match self.layout.rootful_drop_ins {
            Some(_) => programs.placement(),
            // With $CONTAINERS_STORAGE_CONF, all programs read that file alone.
            None => StorePlacement {
                rootful: false,
                crio: false,
            },
        }
    }

    /// Plans Podman's entries. Adds the new entry before it removes the old one, so that the store is always
    /// configured.
    fn entries(&self, placement: StorePlacement, notes: &mut Vec<String>) -> Result<Vec<Change>, SetupError> {
        let Some(rootful) = self.layout.rootful_drop_in() else {
            return Ok(vec![self.with_entries(notes)?]);
        };
        let mut rootful = self.own_file(rootful)?;
        rootful.after = placement.rootful.then(|| drop_in::storage(&self.stores));
        Ok(if placement.rootful {
            vec![rootful, self.without_entries()?]
        } else {
            vec![self.with_entries(notes)?, rootful]
        })
    }

    /// Plans to add the stores to storage.conf.
    fn with_entries(&self, notes: &mut Vec<String>) -> Result<Change, SetupError> {
        let Layout {
            storage: path,
            vendor_storage: vendor,
            ..
        } = &self.layout;
        let mut change = self.file(path.clone())?;
        let with = |path, text: &str| storage::StorageConf { path, text }.with_stores(&self.stores);
        let after = match (&change.before, layout::read_optional(vendor)?) {
            (Some(text), _) => with(path, text)?,
            // storage.conf replaces the vendor's file, so it starts as a copy.
            (None, Some(text)) => copied(&with(vendor, &text)?),
            (None, None) => with(path, storage::SKELETON)?,
        };
        let others = storage::StorageConf { path, text: &after }.other_layer_stores(&self.stores)?;
        if let Some(other) = others.first() {
            notes.push(format!(
                "{} also lists the additional layer store {other}, now after nydus-store's; Podman 4 uses the first \
                 one only",
                path.display()
            ));
        }
        change.after = Some(after);
        Ok(change)
    }

    /// Plans to remove the stores from storage.conf.
    fn without_entries(&self) -> Result<Change, SetupError> {
        let mut change = self.file(self.layout.storage.clone())?;
        let Some(text) = &change.before else {
            return Ok(change);
        };
        let path = &change.path;
        let rest = storage::StorageConf { path, text }.without_stores(&self.stores)?;
        let vendor = layout::read_optional(&self.layout.vendor_storage)?;
        // Deletes a file that setup created and nobody changed.
        let created_by_setup = rest == storage::SKELETON || vendor.is_some_and(|vendor| rest == copied(&vendor));
        change.after = (!created_by_setup).then_some(rest);
        Ok(change)
    }

    /// The stores that storage.conf names.
    pub fn named(&self) -> Result<NamedStores, SetupError> {
        let path = &self.layout.storage;
        let text = layout::read_optional(path)?.unwrap_or_default();
        storage::StorageConf { path, text: &text }.named_stores(&self.stores)
    }

    /// Reads the auth helper's script. Fails if setup did not write it.
    fn helper(&self) -> Result<Change, SetupError> {
        let change = self.file(self.layout.in_sysroot(Path::new(self.layout.auth_helper())))?;
        if let Some(text) = &change.before {
            auth_helper::check(&change.path, text)?;
        }
        Ok(change)
    }

    /// Plans the auth helper's script and the registries.conf drop-in that names it.
    fn helper_files(&self, notes: &mut Vec<String>) -> Result<(Change, Change), SetupError> {
        let mut drop_in = self.own_file(self.layout.registries_drop_in())?;
        let mut helper = self.helper()?;
        helper.after = Some(auth_helper::script(&self.layout.program(), &self.root));
        drop_in.after = Some(drop_in::registries(self.layout.auth_helper()));
        let Layout {
            registries,
            registries_drop_ins,
            ..
        } = &self.layout;
        let registries = Registries::read(registries, registries_drop_ins, &drop_in.path)?;
        notes.extend(self.helper_note(&registries));
        Ok((helper, drop_in))
    }

    /// Reports another configured auth helper; Podman runs a single one.
    fn helper_note(&self, registries: &Registries) -> Option<String> {
        let other = registries.auth_helper()?;
        let (file, program, ours) = (other.file.display(), &other.program, self.layout.registries_drop_in());
        Some(if other.is_after_ours {
            format!(
                "{file} overrides {} and configures the auth helper {program}, so pulls are not announced to \
                 nydus-store; rename {file} so that it sorts earlier",
                ours.display()
            )
        } else {
            format!(
                "{file} configures the auth helper {program}, which no longer runs: Podman runs a single auth helper"
            )
        })
    }

    fn crio_note(&self, programs: &Programs, placement: StorePlacement, plan: &Plan) -> Option<String> {
        let read = if placement.crio {
            self.layout.crio_drop_in()
        } else {
            let rootful = self.layout.rootful_drop_in().filter(|_| placement.rootful);
            rootful.unwrap_or_else(|| self.layout.storage.clone())
        };
        let changed = plan.touches(&read) || plan.touches(&self.layout.crio_drop_in());
        (programs.has_crio && changed).then(|| {
            format!(
                "CRI-O reads {} only at start; run `systemctl restart crio` (SIGHUP reloads registries.conf only)",
                read.display()
            )
        })
    }
}

/// The missing directories of the stores.
fn missing(root: &Path) -> Vec<PathBuf> {
    let dirs = [STORE_DIR, LAYERS_DIR].map(|dir| root.join(dir));
    let is_missing =
        |dir: &PathBuf| matches!(dir.symlink_metadata(), Err(error) if error.kind() == io::ErrorKind::NotFound);
    dirs.into_iter().filter(is_missing).collect()
}

/// The vendor's storage.conf with a comment that says where it is from.
fn copied(vendor: &str) -> String {
    format!(
        "# Copied by nydus-store setup from {}, which is not read where there is this file.\n{vendor}",
        layout::VENDOR_STORAGE
    )
}
