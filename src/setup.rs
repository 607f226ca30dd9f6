//! What containers/storage and containers/image must be told, so that Podman and CRI-O find the store: an entry in
//! storage.conf, and a drop-in for registries.conf in which registries have the mirror.
//!
//! All is planned before anything is written, and what the person has set stays in force.
//!
//! - [`layout`]: which files; [`change`]: what is done to one;
//! - [`storage`]: the entry in storage.conf;
//! - [`auth_helper`]: the script that hands credentials over;
//! - [`names`]: registries on the command line; [`drop_in`]: what [`registries_conf`] has of them, with the mirror.

use std::{
    collections::BTreeSet,
    fs::{self, DirBuilder},
    io,
    os::unix::fs::DirBuilderExt as _,
    path::{Path, PathBuf},
};

use crate::{
    config::Config,
    mirror,
    registries_conf::{self, Registries},
    registry,
};

pub mod auth_helper;
pub mod change;
pub mod drop_in;
mod error;
pub mod layout;
pub mod names;
pub mod storage;

use change::Change;
pub use error::Error;
use layout::Layout;
use names::Pattern;

/// What is to be done.
#[derive(Debug, Default)]
pub struct Plan {
    /// The files.
    pub changes: Vec<Change>,
    /// The directory of the store, if it is missing: Podman does not start without it.
    pub new_dir: Option<PathBuf>,
    /// The directory of the store, if it is to go, as long as there is nothing in it.
    pub old_dir: Option<PathBuf>,
    /// What the person should know.
    pub notes: Vec<String>,
}

impl Plan {
    /// Does it.
    pub fn apply(&self) -> Result<(), Error> {
        if let Some(dir) = &self.new_dir {
            let made = DirBuilder::new().recursive(true).mode(0o700).create(dir);
            made.map_err(|source| Error::Write {
                path: dir.clone(),
                source,
            })?;
        }
        self.changes.iter().try_for_each(Change::apply)?;
        if let Some(dir) = &self.old_dir {
            // One that is in use, or has something in it, stays.
            let gone = fs::remove_dir(dir).and_then(|()| dir.parent().map_or(Ok(()), fs::remove_dir));
            gone.unwrap_or_else(|error| tracing::debug!(dir = %dir.display(), %error, "left"));
        }
        Ok(())
    }
}

/// How a host is set up: where its files are, and where it has the store.
#[derive(Debug)]
pub struct Setup {
    /// The files.
    pub layout: Layout,
    root: PathBuf,
    store: String,
}

impl Setup {
    /// For the store of `root`.
    pub fn new(layout: Layout, root: &Path) -> Result<Self, Error> {
        let root = std::path::absolute(root).unwrap_or_else(|_| root.to_owned());
        let path = root.join("store");
        match path.to_str() {
            Some(store) if !store.contains([':', ',', '\n']) => Ok(Self {
                store: store.to_owned(),
                root,
                layout,
            }),
            _ => Err(Error::StorePath { path }),
        }
    }

    /// The store's directory, as storage.conf names it.
    pub fn store(&self) -> &str {
        &self.store
    }

    /// A file that is to be written, as it is.
    fn file(&self, path: PathBuf) -> Result<Change, Error> {
        self.layout.check(&path)?;
        Change::none(path)
    }

    /// Plans to add the store, and the mirror to the registries of `patterns` and to those that have it already; and, with
    /// `auth_helper`, to have credentials handed over.
    pub fn add(&self, patterns: &[Pattern], auth_helper: bool, config: &Config) -> Result<Plan, Error> {
        let mut notes = Vec::new();
        let storage = self.storage_with()?;
        let (registries, helper) = self.drop_in(patterns, &[], auth_helper, config, &mut notes)?;
        let dir = self.layout.at(Path::new(&self.store));
        self.layout.check(&dir)?;
        let missing = matches!(dir.symlink_metadata(), Err(error) if error.kind() == io::ErrorKind::NotFound);
        Ok(Plan {
            changes: vec![storage, helper, registries],
            new_dir: missing.then_some(dir),
            notes,
            ..Plan::default()
        })
    }

    /// Plans to take the mirror from the registries of `patterns`.
    pub fn remove_registries(&self, patterns: &[Pattern], config: &Config) -> Result<Plan, Error> {
        let mut notes = Vec::new();
        let (registries, helper) = self.drop_in(&[], patterns, false, config, &mut notes)?;
        Ok(Plan {
            changes: vec![helper, registries],
            notes,
            ..Plan::default()
        })
    }

    /// Plans to take out all that [`Self::add`] has put in.
    pub fn remove(&self) -> Result<Plan, Error> {
        let mut registries = self.file(self.layout.ours())?;
        if let Some(text) = &registries.before {
            drop_in::ours(&registries.path, text)?;
            registries.after = None;
        }
        let mut helper = self.helper()?;
        helper.after = None;
        let dir = self.layout.at(Path::new(&self.store));
        self.layout.check(&dir)?;
        Ok(Plan {
            changes: vec![self.storage_without()?, registries, helper],
            old_dir: Some(dir),
            ..Plan::default()
        })
    }

    fn storage_with(&self) -> Result<Change, Error> {
        let Layout {
            storage: path,
            vendor_storage: vendor,
            ..
        } = &self.layout;
        let mut change = self.file(path.clone())?;
        let with = |path, text: &str| storage::File { path, text }.with(&self.store);
        change.after = Some(match (&change.before, layout::read(vendor)?) {
            (Some(text), _) => with(path, text)?,
            // Only one of the two files is read.
            (None, Some(text)) => copied(&with(vendor, &text)?),
            (None, None) => with(path, storage::SKELETON)?,
        });
        Ok(change)
    }

    fn storage_without(&self) -> Result<Change, Error> {
        let mut change = self.file(self.layout.storage.clone())?;
        let Some(text) = &change.before else {
            return Ok(change);
        };
        let path = &change.path;
        let rest = storage::File { path, text }.without(&self.store)?;
        let vendor = layout::read(&self.layout.vendor_storage)?;
        // There would be no file had setup not made it.
        let made = rest == storage::SKELETON || vendor.is_some_and(|vendor| rest == copied(&vendor));
        change.after = (!made).then_some(rest);
        Ok(change)
    }

    /// The script that hands credentials over, as it is.
    fn helper(&self) -> Result<Change, Error> {
        let change = self.file(self.layout.at(Path::new(self.layout.auth_helper())))?;
        if let Some(text) = &change.before {
            auth_helper::check(&change.path, text)?;
        }
        Ok(change)
    }

    /// The drop-in with the registries that it has, those of `more`, and without those of `less`; and the script that hands
    /// credentials over, if it has one or is to have one.
    fn drop_in(
        &self,
        more: &[Pattern],
        less: &[Pattern],
        auth_helper: bool,
        config: &Config,
        notes: &mut Vec<String>,
    ) -> Result<(Change, Change), Error> {
        let mut change = self.file(self.layout.ours())?;
        let before = match &change.before {
            Some(text) => drop_in::ours(&change.path, text)?,
            None => drop_in::Ours::default(),
        };
        let mut names = before.registries;
        names.retain(|name| !less.iter().any(|pattern| pattern.matches(name)));
        let Layout {
            registries, drop_ins, ..
        } = &self.layout;
        let registries = Registries::read(registries, drop_ins, &change.path)?;
        let known = self.known(&registries, &names, config);
        let mut wanted = BTreeSet::new();
        for pattern in more {
            wanted.extend(drop_in::expand(pattern, &known)?);
        }
        names.extend(wanted.iter().cloned());
        notes.extend(known.iter().filter_map(|host| port_note(host, &names, &registries)));
        if !names.is_empty() {
            usable(config)?;
        }
        let mut entries = Vec::new();
        for name in &names {
            let refused = match drop_in::entry(name, &registries, config.mirror.listen) {
                Ok(_) => mirror::refusal(&config.mirror, name),
                Err(refusal) => Some(refusal.to_string()),
            };
            match refused {
                Some(reason) if wanted.contains(name) => {
                    let name = name.clone();
                    return Err(Error::Refused { name, reason });
                }
                Some(reason) => notes.push(format!("{name} no longer has the mirror: {reason}")),
                None => self.entries(name, &registries, config, &mut entries, notes),
            }
        }
        let mut helper = self.helper()?;
        if auth_helper || before.auth_helper {
            helper.after = Some(auth_helper::script(&self.layout.program(), &self.root));
            notes.extend(self.helper_note(&registries));
        }
        let program = helper.after.as_ref().map(|_| self.layout.auth_helper());
        change.after = drop_in::text(&entries, program);
        Ok((change, helper))
    }

    /// Podman starts one helper only.
    fn helper_note(&self, registries: &Registries) -> Option<String> {
        let other = registries.auth_helper()?;
        let (file, program, ours) = (other.file.display(), &other.program, self.layout.ours());
        Some(if other.later {
            format!(
                "{file} is read after {} and has Podman hand credentials to {program}, so that nydus-store gets none: give it \
                 an earlier name",
                ours.display()
            )
        } else {
            format!(
                "{file} has Podman hand credentials to {program}, which gets none any more: Podman starts one helper only"
            )
        })
    }

    /// All registries that are named on this host, those of the drop-in, `names`, among them.
    fn known(&self, registries: &Registries, names: &BTreeSet<String>, config: &Config) -> BTreeSet<String> {
        let logins = self.logins(config);
        let listed = logins.iter().chain(&config.mirror.registries).chain(names);
        registries
            .hosts()
            .chain(listed.map(String::as_str))
            .map(str::to_owned)
            .collect()
    }

    /// The entries of one registry: its own, and those that the person has for parts of it, which Podman would prefer.
    fn entries(
        &self,
        name: &str,
        registries: &Registries,
        config: &Config,
        entries: &mut Vec<registries_conf::Entry>,
        notes: &mut Vec<String>,
    ) {
        let parts = registries.within(name).map(|known| known.entry.prefix.as_str());
        for prefix in std::iter::once(name).chain(parts) {
            match drop_in::entry(prefix, registries, config.mirror.listen) {
                Ok(entry) => entries.push(entry),
                Err(refusal) => notes.push(format!("{prefix} has no mirror: {refusal}")),
            }
            match registries.in_force(prefix) {
                Some((known, _)) if known.later && known.entry.prefix == prefix => notes.push(format!(
                    "{} is read after {} and has {prefix} too, so that the mirror is not asked: give it an earlier name",
                    known.file.display(),
                    self.layout.ours().display()
                )),
                _ => {}
            }
        }
    }

    /// The registries that somebody has logged in to here.
    fn logins(&self, config: &Config) -> Vec<String> {
        let files = config.registry.auth_files.clone().unwrap_or_else(|| {
            let uid = rustix::process::geteuid().as_raw();
            registry::usual_files(|name| std::env::var_os(name), uid)
        });
        files
            .iter()
            .flat_map(|file| registry::hosts_in(&self.layout.at(file)))
            .collect()
    }
}

fn usable(config: &Config) -> Result<(), Error> {
    let listen = config.mirror.listen;
    match (config.mirror.enabled, listen.port()) {
        (false, _) => Err(Error::NoMirror),
        (true, 0) => Err(Error::AnyPort { listen }),
        _ if listen.is_ipv6() => Err(Error::Ipv6 { listen }),
        _ => Ok(()),
    }
}

/// Podman takes the entry of a host for all its ports that have none, which fails with any mirror: the port ends up in the
/// middle of the name that the mirror is asked for.
fn port_note(registry: &str, names: &BTreeSet<String>, registries: &Registries) -> Option<String> {
    let (host, _) = registry.split_once(':')?;
    let own = registries
        .in_force(registry)
        .is_some_and(|(known, _)| known.entry.prefix == registry);
    (names.contains(host) && !names.contains(registry) && !own).then(|| {
        format!("Podman takes what is set for {host} for {registry} too, and then fails: add --registry {registry}")
    })
}

/// The vendor's storage.conf as setup copies it.
fn copied(vendor: &str) -> String {
    format!(
        "# Copied by nydus-store setup from {}, which is not read where there is this file.\n{vendor}",
        layout::VENDOR_STORAGE
    )
}
