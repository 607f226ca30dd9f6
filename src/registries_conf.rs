//! What the person has set for registries in registries.conf and its drop-ins, read as containers/image reads it.
//!
//! - [`follow`]: the files of this host, read again when they change.

use std::{
    collections::BTreeMap,
    fs,
    io::{self, Read as _},
    os::unix::fs::{FileTypeExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
};

use rustix::fs::OFlags;
use serde::Deserialize;

pub mod watcher;

/// Most bytes of a file.
const MAX_FILE: u64 = 4 << 20;
/// Opening waits for nobody. The flags of `open` are positive.
const NONBLOCK: i32 = OFlags::NONBLOCK.bits().cast_signed();

/// A file that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It cannot be read.
    #[error("cannot read {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// It is not TOML, or has values that Podman does not take.
    #[error("{path}: {}", source.to_string().trim_end())]
    Parse {
        /// The file.
        path: PathBuf,
        /// The cause, with line and column.
        source: Box<toml::de::Error>,
    },
}

/// A `[[registry]]`.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
pub struct Entry {
    /// What the names of images begin with that it is for: a registry, a path in one, or `*.domain`.
    pub prefix: String,
    /// What stands for the prefix at the registry; nothing with `*.domain`.
    pub location: String,
    /// Whether plain HTTP and certificates that cannot be verified will do.
    pub insecure: bool,
    /// Whether nothing may be pulled.
    pub blocked: bool,
    /// Whether mirrors are asked for digests only.
    pub mirror_by_digest_only: bool,
    /// What is asked before the registry, in this order.
    #[serde(rename = "mirror")]
    pub mirrors: Vec<Mirror>,
}

/// A `[[registry.mirror]]`.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
pub struct Mirror {
    /// What stands for the prefix at the mirror.
    pub location: String,
    /// Whether plain HTTP and certificates that cannot be verified will do.
    pub insecure: bool,
    /// What it is asked for: `all`, `digest-only` or `tag-only`.
    pub pull_from_mirror: Option<String>,
}

/// A file, as far as it concerns registries.
#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
struct File {
    registry: Vec<Entry>,
    /// The form of old.
    registries: Old,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Old {
    insecure: OldList,
    block: OldList,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct OldList {
    registries: Vec<String>,
}

/// An entry and where it is from.
#[derive(Debug, Clone, PartialEq)]
pub struct Known {
    /// The entry.
    pub entry: Entry,
    /// The file.
    pub file: PathBuf,
}

/// The entries in force, by prefix.
#[derive(Debug, Default)]
pub struct Registries {
    known: BTreeMap<String, Known>,
    auth_helpers: Vec<AuthHelper>,
    unknown: Option<(PathBuf, String)>,
}

/// Which program a file has credentials handed to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AuthHelper {
    /// The program.
    pub program: String,
    /// The file.
    pub file: PathBuf,
    /// Whether the file is read after ours.
    pub later: bool,
}

impl Registries {
    /// Reads registries.conf and the drop-ins but `ours`.
    pub fn read(main: &Path, drop_ins: &Path, ours: &Path) -> Result<Self, Error> {
        let mut files = drop_ins_in(drop_ins)?;
        files.retain(|file| file != ours);
        let mut registries = Self::default();
        for file in std::iter::once(main).chain(files.iter().map(PathBuf::as_path)) {
            if let Some(text) = read(file)? {
                let later = file != main && file > ours;
                registries.add(entries_in(file, &text)?, file);
                registries
                    .auth_helpers
                    .extend(auth_helper_in(file, &text)?.map(|program| AuthHelper {
                        program,
                        file: file.to_owned(),
                        later,
                    }));
            }
        }
        Ok(registries)
    }

    /// A file, or a directory of them, that has never been read since it is there, and why: nobody knows what it forbids.
    pub fn unknown(&self) -> Option<(&Path, &str)> {
        let (path, why) = self.unknown.as_ref()?;
        Some((path, why))
    }

    /// What a file has for a prefix replaces what earlier files have.
    fn add(&mut self, entries: Vec<Entry>, file: &Path) {
        let mut in_file = BTreeMap::new();
        for entry in entries {
            let known = Known {
                file: file.to_owned(),
                entry,
            };
            // Of two in one file the first counts.
            in_file.entry(known.entry.prefix.clone()).or_insert(known);
        }
        self.known.extend(in_file);
    }

    /// The entry that Podman takes for `name`, which may be a registry or more of an image's name, and how much of the
    /// name its prefix stands for.
    pub fn in_force(&self, name: &str) -> Option<(&Known, usize)> {
        let matches = |known: &'_ &Known| matched(name, &known.entry.prefix).is_some();
        // Of two of one length Podman takes the first.
        let best = self
            .known
            .values()
            .rev()
            .filter(matches)
            .max_by_key(|known| known.entry.prefix.len())?;
        Some((best, matched(name, &best.entry.prefix)?))
    }

    /// The helper that is in force, and so is not ours if its file is read after ours.
    pub fn auth_helper(&self) -> Option<&AuthHelper> {
        self.auth_helpers.last()
    }
}

/// The files of a directory of drop-ins, in the order in which they are read; none if there is no directory.
fn drop_ins_in(dir: &Path) -> Result<Vec<PathBuf>, Error> {
    let mut files: Vec<PathBuf> = match fs::read_dir(dir) {
        Ok(entries) => entries.flatten().map(|entry| entry.path()).collect(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
        Err(source) => {
            let path = dir.to_owned();
            return Err(Error::Read { path, source });
        }
    };
    files.retain(|file| file.extension().is_some_and(|end| end == "conf") && !file.is_dir());
    files.sort();
    Ok(files)
}

/// The text of a file, if there is one: 4 MiB at most, and never of a pipe, which might have to be waited for.
pub(crate) fn read(path: &Path) -> Result<Option<String>, Error> {
    let text = || {
        let file = fs::File::options().read(true).custom_flags(NONBLOCK).open(path)?;
        let kind = file.metadata()?.file_type();
        // `/dev/null` stands for an empty one.
        if !kind.is_file() && !kind.is_char_device() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is not a regular file"));
        }
        let mut text = String::new();
        file.take(MAX_FILE + 1).read_to_string(&mut text)?;
        if text.len() as u64 > MAX_FILE {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        Ok(text)
    };
    match text() {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(Error::Read {
            path: path.to_owned(),
            source,
        }),
    }
}

/// The entries of one file, with their prefixes.
pub fn entries_in(path: &Path, text: &str) -> Result<Vec<Entry>, Error> {
    let parsed: Result<File, _> = toml::from_str(text);
    let File {
        registry: mut entries,
        registries: old,
    } = parsed.map_err(|source| Error::Parse {
        path: path.to_owned(),
        source: Box::new(source),
    })?;
    let blocked = &old.block.registries;
    entries.extend(blocked.iter().chain(&old.insecure.registries).map(|name| Entry {
        prefix: name.clone(),
        location: name.clone(),
        insecure: old.insecure.registries.contains(name),
        blocked: blocked.contains(name),
        ..Entry::default()
    }));
    for entry in &mut entries {
        trim(&mut entry.prefix);
        trim(&mut entry.location);
        entry.mirrors.iter_mut().for_each(|mirror| trim(&mut mirror.location));
        if entry.prefix.is_empty() {
            entry.prefix.clone_from(&entry.location);
        }
    }
    Ok(entries)
}

/// The `additional-layer-store-auth-helper` of one file.
pub fn auth_helper_in(path: &Path, text: &str) -> Result<Option<String>, Error> {
    #[derive(Deserialize)]
    #[serde(rename_all = "kebab-case")]
    struct File {
        #[serde(default)]
        additional_layer_store_auth_helper: String,
    }
    let parsed: Result<File, _> = toml::from_str(text);
    let program = parsed.map_err(|source| Error::Parse {
        path: path.to_owned(),
        source: Box::new(source),
    })?;
    Ok(Some(program.additional_layer_store_auth_helper).filter(|program| !program.is_empty()))
}

fn trim(name: &mut String) {
    name.truncate(name.trim_end_matches('/').len());
}

/// How much of `name` a prefix stands for, if it is one. A registry's prefix is also one of the same host with a port.
fn matched(name: &str, prefix: &str) -> Option<usize> {
    let end = match prefix.strip_prefix('*') {
        Some(domain) if domain.starts_with('.') => {
            let at = name.find(domain)?;
            if name[..at].contains('/') {
                return None;
            }
            at + domain.len()
        }
        _ => name.starts_with(prefix).then_some(prefix.len())?,
    };
    let rest = &name[end..];
    (rest.is_empty() || rest.starts_with(['/', ':', '@'])).then_some(end)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(files: &[(&str, &str)]) -> Registries {
        let mut registries = Registries::default();
        for (name, text) in files {
            let entries = entries_in(Path::new(name), text).unwrap();
            registries.add(entries, Path::new(name));
        }
        registries
    }

    #[test]
    fn prefixes_match_as_in_containers_image() {
        for (name, prefix, expected) in [
            ("r.example", "r.example", Some(9)),
            ("r.example:5000", "r.example", Some(9)),
            ("r.example/team", "r.example", Some(9)),
            ("r.example2", "r.example", None),
            ("r.example", "r.example/team", None),
            ("a.r.example", "*.r.example", Some(11)),
            ("a.b.r.example:5000", "*.r.example", Some(13)),
            ("r.example", "*.r.example", None),
            ("x/a.r.example", "*.r.example", None),
            ("foo.test", "*foo.test", None),
            ("a.foo.test", "*foo.test", None),
        ] {
            assert_eq!(matched(name, prefix), expected, "{name} {prefix}");
        }
    }

    #[test]
    fn the_entry_in_force_is_the_longest_of_the_last_file() {
        let registries = read(&[
            (
                "a",
                "[[registry]]\nlocation = \"reg.example/\"\ninsecure = true\n[[registry]]\nprefix = \"reg.example\"\n\
                 location = \"first.test\"\n[[registry]]\nprefix = \"*.example\"\n",
            ),
            ("b", "[[registry]]\nlocation = \"reg.example/team\"\nblocked = true\n"),
            ("c", "[registries.insecure]\nregistries = [\"old.test\"]\n"),
        ]);
        let prefix = |name: &str| registries.in_force(name).map(|(known, _)| known.entry.prefix.as_str());
        assert_eq!(prefix("reg.example"), Some("reg.example"));
        assert!(registries.in_force("reg.example").unwrap().0.entry.insecure);
        assert_eq!(prefix("reg.example/team/app"), Some("reg.example/team"));
        assert_eq!(prefix("longereg.example"), Some("*.example"));
        // Podman, too, prefers the domain to a registry whose name is no longer.
        assert_eq!(registries.in_force("r.example").unwrap().1, 9);
        assert!(registries.in_force("old.test").unwrap().0.entry.insecure);
        assert_eq!(prefix("other"), None);
    }
}
