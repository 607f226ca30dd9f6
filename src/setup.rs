//! What Podman and CRI-O must be told, so that they find the store and announce their pulls.
//!
//! [`Setup::add`] names the image store, where the installed programs read it, and has registries.conf name the program
//! that announces pulls. All is planned before anything is written, and what the person has set stays in force.
//!
//! - [`layout`]: which files; [`change`]: what is done to one; [`programs`]: which programs read which of them;
//! - [`storage`]: the entries in storage.conf; [`drop_in`]: the files of setup's own;
//! - [`auth_helper`]: the script that announces pulls;
//! - [`update`]: the same once more when the daemon starts, after an upgrade of Podman or of this program.

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

use change::{Change, Kind};
pub use error::Error;
use layout::Layout;
use programs::{Place, Programs};
use storage::{Named, Stores};

/// What is to be done.
#[derive(Debug, Default)]
pub struct Plan {
    /// The files, in this order.
    pub changes: Vec<Change>,
    /// Directories that are missing: Podman does not start without them.
    pub new_dirs: Vec<PathBuf>,
    /// Where to make a store that has nothing in it, unless there is one.
    create: Option<PathBuf>,
    /// Where to remove the store, unless there is something in it.
    remove: Option<PathBuf>,
    /// Directories of drop-ins, to be removed if they are empty.
    old_dirs: Vec<PathBuf>,
    /// What the person should know.
    pub notes: Vec<String>,
}

impl Plan {
    /// Does it.
    pub fn apply(&self) -> Result<(), Error> {
        let write = |root: &Path, done: io::Result<()>| {
            done.map_err(|source| Error::Write {
                path: root.to_owned(),
                source,
            })
        };
        // A store that is named and missing ends every Podman command, so that it is made first and removed last.
        if let Some(root) = &self.create {
            write(root, skeleton::create_empty(root))?;
        }
        self.changes.iter().try_for_each(Change::apply)?;
        for dir in &self.old_dirs {
            fs::remove_dir(dir).unwrap_or_else(|error| tracing::debug!(dir = %dir.display(), %error, "kept"));
        }
        if let Some(root) = &self.remove {
            write(root, skeleton::remove_empty(root).map(drop))?;
        }
        Ok(())
    }

    /// Whether a file is changed.
    fn touches(&self, path: &Path) -> bool {
        let mut changes = self.changes.iter();
        changes.any(|change| change.path == path && change.kind() != Kind::Unchanged)
    }
}

/// How a host is set up: where its files are, and where it has the store.
#[derive(Debug)]
pub struct Setup {
    /// The files.
    pub layout: Layout,
    /// The stores.
    pub stores: Stores,
    root: PathBuf,
}

impl Setup {
    /// For the store of `root`.
    pub fn new(layout: Layout, root: &Path) -> Result<Self, Error> {
        let root = std::path::absolute(root).unwrap_or_else(|_| root.to_owned());
        let dir = |name: &str| match root.join(name).to_str() {
            Some(dir) if !dir.contains([':', ',', '\n']) => Ok(dir.to_owned()),
            _ => Err(Error::StorePath { path: root.join(name) }),
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

    /// A file that is to be written, as it is.
    fn file(&self, path: PathBuf) -> Result<Change, Error> {
        self.layout.check(&path)?;
        Change::none(path)
    }

    /// The same of a file of setup's own.
    fn own_file(&self, path: PathBuf) -> Result<Change, Error> {
        let change = self.file(path)?;
        if let Some(text) = &change.before {
            drop_in::check(&change.path, text)?;
        }
        Ok(change)
    }

    /// Where the root is found from here.
    fn root_from_here(&self) -> Result<PathBuf, Error> {
        let root = self.layout.at(&self.root);
        self.layout.check(&root.join(STORE_DIR))?;
        Ok(root)
    }

    /// Plans to name the stores, and the program that announces pulls.
    pub fn add(&self) -> Result<Plan, Error> {
        let programs = Programs::find(&self.layout)?;
        let place = self.place(&programs);
        let root = self.root_from_here()?;
        let store = root.join(STORE_DIR);
        if self.layout.is_host() && mountpoint::mounted_on(&store).is_ok_and(|kind| kind.as_deref() == Some(FS_TYPE)) {
            return Err(Error::Mounted { path: store });
        }
        let mut notes = Vec::new();
        let (helper, registries) = self.helper_files(&mut notes)?;
        let mut changes = vec![helper, registries];
        if programs.has_crio {
            let mut crio = self.own_file(self.layout.ours_crio())?;
            crio.after = Some(drop_in::crio(place.crio.then_some(&self.stores)));
            changes.push(crio);
        }
        changes.extend(self.entries(place, &mut notes)?);
        let mut plan = Plan {
            changes,
            new_dirs: missing(&root),
            create: Some(root),
            notes,
            ..Plan::default()
        };
        plan.notes.extend(self.crio_note(&programs, place, &plan));
        Ok(plan)
    }

    /// Plans to take out all that [`Self::add`] of this and of earlier versions has put in.
    pub fn remove(&self) -> Result<Plan, Error> {
        let mut changes = vec![self.without_entries()?];
        let rootful = self.layout.ours_rootful();
        let ours = [self.layout.ours(), self.layout.ours_crio()];
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
            remove: Some(self.root_from_here()?),
            ..Plan::default()
        })
    }

    /// Where the installed programs read the image store.
    pub fn place(&self, programs: &Programs) -> Place {
        match self.layout.rootful_drop_ins {
            Some(_) => programs.place(),
            // All read the storage.conf that a variable names.
            None => Place {
                rootful: false,
                crio: false,
            },
        }
    }

    /// The files that name the stores to Podman. The new place comes first, so that no program misses the store
    /// meanwhile.
    fn entries(&self, place: Place, notes: &mut Vec<String>) -> Result<Vec<Change>, Error> {
        let Some(rootful) = self.layout.ours_rootful() else {
            return Ok(vec![self.with_entries(notes)?]);
        };
        let mut rootful = self.own_file(rootful)?;
        rootful.after = place.rootful.then(|| drop_in::storage(&self.stores));
        Ok(if place.rootful {
            vec![rootful, self.without_entries()?]
        } else {
            vec![self.with_entries(notes)?, rootful]
        })
    }

    /// storage.conf with the stores.
    fn with_entries(&self, notes: &mut Vec<String>) -> Result<Change, Error> {
        let Layout {
            storage: path,
            vendor_storage: vendor,
            ..
        } = &self.layout;
        let mut change = self.file(path.clone())?;
        let with = |path, text: &str| storage::File { path, text }.with(&self.stores);
        let after = match (&change.before, layout::read(vendor)?) {
            (Some(text), _) => with(path, text)?,
            // Only one of the two files is read.
            (None, Some(text)) => copied(&with(vendor, &text)?),
            (None, None) => with(path, storage::SKELETON)?,
        };
        let others = storage::File { path, text: &after }.other_layer_stores(&self.stores)?;
        if let Some(other) = others.first() {
            notes.push(format!(
                "{} has {other} as an additional layer store too, which comes after nydus-store's: Podman 4 looks for \
                 layers in the first one only",
                path.display()
            ));
        }
        change.after = Some(after);
        Ok(change)
    }

    /// storage.conf without the stores.
    fn without_entries(&self) -> Result<Change, Error> {
        let mut change = self.file(self.layout.storage.clone())?;
        let Some(text) = &change.before else {
            return Ok(change);
        };
        let path = &change.path;
        let rest = storage::File { path, text }.without(&self.stores)?;
        let vendor = layout::read(&self.layout.vendor_storage)?;
        // There would be no file had setup not made it.
        let made = rest == storage::SKELETON || vendor.is_some_and(|vendor| rest == copied(&vendor));
        change.after = (!made).then_some(rest);
        Ok(change)
    }

    /// Which of the stores storage.conf names.
    pub fn named(&self) -> Result<Named, Error> {
        let path = &self.layout.storage;
        let text = layout::read(path)?.unwrap_or_default();
        storage::File { path, text: &text }.names(&self.stores)
    }

    /// The script that announces pulls, as it is.
    fn helper(&self) -> Result<Change, Error> {
        let change = self.file(self.layout.at(Path::new(self.layout.auth_helper())))?;
        if let Some(text) = &change.before {
            auth_helper::check(&change.path, text)?;
        }
        Ok(change)
    }

    /// The script that announces pulls, and the drop-in that names it.
    fn helper_files(&self, notes: &mut Vec<String>) -> Result<(Change, Change), Error> {
        let mut drop_in = self.own_file(self.layout.ours())?;
        let mut helper = self.helper()?;
        helper.after = Some(auth_helper::script(&self.layout.program(), &self.root));
        drop_in.after = Some(drop_in::registries(self.layout.auth_helper()));
        let Layout {
            registries, drop_ins, ..
        } = &self.layout;
        let registries = Registries::read(registries, drop_ins, &drop_in.path)?;
        notes.extend(self.helper_note(&registries));
        Ok((helper, drop_in))
    }

    /// Podman starts one helper only.
    fn helper_note(&self, registries: &Registries) -> Option<String> {
        let other = registries.auth_helper()?;
        let (file, program, ours) = (other.file.display(), &other.program, self.layout.ours());
        Some(if other.is_after_ours {
            format!(
                "{file} is read after {} and has Podman run {program} at each pull, so that nydus-store learns of \
                 none: give it an earlier name",
                ours.display()
            )
        } else {
            format!(
                "{file} has Podman run {program} at each pull, which is not run any more: Podman runs one helper only"
            )
        })
    }

    fn crio_note(&self, programs: &Programs, place: Place, plan: &Plan) -> Option<String> {
        let read = if place.crio {
            self.layout.ours_crio()
        } else {
            let rootful = self.layout.ours_rootful().filter(|_| place.rootful);
            rootful.unwrap_or_else(|| self.layout.storage.clone())
        };
        let changed = plan.touches(&read) || plan.touches(&self.layout.ours_crio());
        (programs.has_crio && changed).then(|| {
            format!(
                "CRI-O reads {} only when it starts: `systemctl restart crio`. A SIGHUP makes it read registries.conf \
                 again, and no more",
                read.display()
            )
        })
    }
}

/// Those directories of the stores that are missing.
fn missing(root: &Path) -> Vec<PathBuf> {
    let dirs = [STORE_DIR, LAYERS_DIR].map(|dir| root.join(dir));
    let is_missing =
        |dir: &PathBuf| matches!(dir.symlink_metadata(), Err(error) if error.kind() == io::ErrorKind::NotFound);
    dirs.into_iter().filter(is_missing).collect()
}

/// The vendor's storage.conf as setup copies it.
fn copied(vendor: &str) -> String {
    format!(
        "# Copied by nydus-store setup from {}, which is not read where there is this file.\n{vendor}",
        layout::VENDOR_STORAGE
    )
}
