//! registries.conf and its drop-ins, read as containers/image reads them
//! ([containers-registries.conf(5)](https://github.com/containers/image/blob/main/docs/containers-registries.conf.5.md)).
//!
//! [`Registries`] holds the effective entries; [`watcher`] reads the files of this host again when they change.

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
const MAX_FILE_SIZE: u64 = 4 << 20;
/// Keeps `open` of a pipe from blocking.
const NONBLOCK: i32 = OFlags::NONBLOCK.bits().cast_signed();

/// A file is unusable.
#[derive(Debug, thiserror::Error)]
pub enum RegistriesConfError {
    /// It is unreadable.
    #[error("cannot read {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// It is not TOML, or has values that Podman does not accept.
    #[error("{path}: {}", source.to_string().trim_end())]
    Parse {
        /// The file.
        path: PathBuf,
        /// The cause, with line and column.
        source: Box<toml::de::Error>,
    },
}

/// A `[[registry]]` entry.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
pub struct RegistryEntry {
    /// The start of the image names that it applies to: a registry, perhaps with a path, or `*.domain`.
    pub prefix: String,
    /// What replaces the prefix at the registry; empty with `*.domain`, which keeps the name.
    pub location: String,
    /// Whether plain HTTP and unverified certificates are allowed.
    pub insecure: bool,
    /// Whether pulls are forbidden.
    pub blocked: bool,
    /// Whether mirrors serve digests only.
    pub mirror_by_digest_only: bool,
    /// Asked before the registry, in this order.
    #[serde(rename = "mirror")]
    pub mirrors: Vec<MirrorEntry>,
}

/// A `[[registry.mirror]]` entry.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
pub struct MirrorEntry {
    /// What replaces the prefix at the mirror.
    pub location: String,
    /// Whether plain HTTP and unverified certificates are allowed.
    pub insecure: bool,
    /// Which pulls it serves: `all`, `digest-only` or `tag-only`.
    pub pull_from_mirror: Option<String>,
}

/// The parts of a file that concern registries.
#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
struct RegistriesFile {
    registry: Vec<RegistryEntry>,
    /// Version 1 of the format.
    registries: V1Registries,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct V1Registries {
    insecure: V1List,
    block: V1List,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct V1List {
    registries: Vec<String>,
}

/// An entry with its file.
#[derive(Debug, Clone, PartialEq)]
pub struct SourcedEntry {
    /// The entry.
    pub entry: RegistryEntry,
    /// The file.
    pub file: PathBuf,
}

/// The effective entries of all files.
#[derive(Debug, Default)]
pub struct Registries {
    /// By prefix.
    entries: BTreeMap<String, SourcedEntry>,
    auth_helpers: Vec<AuthHelper>,
    unreadable: Option<(PathBuf, String)>,
}

/// The `additional-layer-store-auth-helper` of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AuthHelper {
    /// The program.
    pub program: String,
    /// The file.
    pub file: PathBuf,
    /// Whether the file is read after nydus-store's drop-in.
    pub is_after_ours: bool,
}

impl Registries {
    /// Reads registries.conf and the drop-ins except `ours`, nydus-store's own.
    pub fn read(main: &Path, drop_ins: &Path, ours: &Path) -> Result<Self, RegistriesConfError> {
        let mut files = list_drop_ins(drop_ins)?;
        files.retain(|file| file != ours);
        let mut registries = Self::default();
        for file in std::iter::once(main).chain(files.iter().map(PathBuf::as_path)) {
            if let Some(text) = read(file)? {
                let is_after_ours = file != main && file > ours;
                registries.add(parse_entries(file, &text)?, file);
                registries
                    .auth_helpers
                    .extend(parse_auth_helper(file, &text)?.map(|program| AuthHelper {
                        program,
                        file: file.to_owned(),
                        is_after_ours,
                    }));
            }
        }
        Ok(registries)
    }

    /// A file, or a directory of drop-ins, that has never been readable, with the reason. What it blocks is unknown.
    pub fn unreadable(&self) -> Option<(&Path, &str)> {
        let (path, reason) = self.unreadable.as_ref()?;
        Some((path, reason))
    }

    /// Adds the entries of a file. They replace earlier files' entries of the same prefix.
    fn add(&mut self, entries: Vec<RegistryEntry>, file: &Path) {
        let mut in_file = BTreeMap::new();
        for entry in entries {
            let entry = SourcedEntry {
                file: file.to_owned(),
                entry,
            };
            // Of two entries for one prefix in a file, the first counts.
            in_file.entry(entry.entry.prefix.clone()).or_insert(entry);
        }
        self.entries.extend(in_file);
    }

    /// The entry that Podman uses for `name`, a registry or a longer part of an image name, and the length of the match
    /// in bytes.
    pub fn entry_for(&self, name: &str) -> Option<(&SourcedEntry, usize)> {
        let matches = |known: &'_ &SourcedEntry| match_prefix(name, &known.entry.prefix).is_some();
        // Of two prefixes of equal length, Podman uses the first in order; `max_by_key` returns the last.
        let best = self
            .entries
            .values()
            .rev()
            .filter(matches)
            .max_by_key(|known| known.entry.prefix.len())?;
        Some((best, match_prefix(name, &best.entry.prefix)?))
    }

    /// The effective auth helper. It overrides nydus-store's own if its file is read after that one.
    pub fn auth_helper(&self) -> Option<&AuthHelper> {
        self.auth_helpers.last()
    }
}

/// The files of a drop-in directory, in reading order; none if there is no directory.
fn list_drop_ins(dir: &Path) -> Result<Vec<PathBuf>, RegistriesConfError> {
    let mut files: Vec<PathBuf> = match fs::read_dir(dir) {
        Ok(entries) => entries.flatten().map(|entry| entry.path()).collect(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
        Err(source) => {
            let path = dir.to_owned();
            return Err(RegistriesConfError::Read { path, source });
        }
    };
    files.retain(|file| file.extension().is_some_and(|end| end == "conf") && !file.is_dir());
    files.sort();
    Ok(files)
}

/// The text of a file of at most 4 MiB; `None` if there is no file. Refuses pipes, which could block.
pub(crate) fn read(path: &Path) -> Result<Option<String>, RegistriesConfError> {
    let text = || {
        let file = fs::File::options().read(true).custom_flags(NONBLOCK).open(path)?;
        let kind = file.metadata()?.file_type();
        // `/dev/null` stands for an empty file.
        if !kind.is_file() && !kind.is_char_device() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
        }
        let mut text = String::new();
        file.take(MAX_FILE_SIZE + 1).read_to_string(&mut text)?;
        if text.len() as u64 > MAX_FILE_SIZE {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        Ok(text)
    };
    match text() {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(RegistriesConfError::Read {
            path: path.to_owned(),
            source,
        }),
    }
}

/// The entries of one file. Each has a prefix.
pub fn parse_entries(path: &Path, text: &str) -> Result<Vec<RegistryEntry>, RegistriesConfError> {
    let parsed: Result<RegistriesFile, _> = toml::from_str(text);
    let RegistriesFile {
        registry: mut entries,
        registries: v1,
    } = parsed.map_err(|source| RegistriesConfError::Parse {
        path: path.to_owned(),
        source: Box::new(source),
    })?;
    let blocked = &v1.block.registries;
    entries.extend(blocked.iter().chain(&v1.insecure.registries).map(|name| RegistryEntry {
        prefix: name.clone(),
        location: name.clone(),
        insecure: v1.insecure.registries.contains(name),
        blocked: blocked.contains(name),
        ..RegistryEntry::default()
    }));
    for entry in &mut entries {
        trim_slashes(&mut entry.prefix);
        trim_slashes(&mut entry.location);
        let mirrors = entry.mirrors.iter_mut();
        mirrors.for_each(|mirror| trim_slashes(&mut mirror.location));
        if entry.prefix.is_empty() {
            entry.prefix.clone_from(&entry.location);
        }
    }
    Ok(entries)
}

/// The `additional-layer-store-auth-helper` of one file.
pub fn parse_auth_helper(path: &Path, text: &str) -> Result<Option<String>, RegistriesConfError> {
    #[derive(Deserialize)]
    #[serde(rename_all = "kebab-case")]
    struct AuthHelperFile {
        #[serde(default)]
        additional_layer_store_auth_helper: String,
    }
    let parsed: Result<AuthHelperFile, _> = toml::from_str(text);
    let program = parsed.map_err(|source| RegistriesConfError::Parse {
        path: path.to_owned(),
        source: Box::new(source),
    })?;
    Ok(Some(program.additional_layer_store_auth_helper).filter(|program| !program.is_empty()))
}

fn trim_slashes(name: &mut String) {
    name.truncate(name.trim_end_matches('/').len());
}

/// The bytes of `name` that `prefix` matches. A host matches itself with any port too.
fn match_prefix(name: &str, prefix: &str) -> Option<usize> {
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
            let entries = parse_entries(Path::new(name), text).unwrap();
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
            assert_eq!(match_prefix(name, prefix), expected, "{name} {prefix}");
        }
    }

    #[test]
    fn longest_prefix_of_the_last_file_wins() {
        let registries = read(&[
            (
                "a",
                "[[registry]]\nlocation = \"reg.example/\"\ninsecure = true\n[[registry]]\nprefix = \"reg.example\"\n\
                 location = \"first.test\"\n[[registry]]\nprefix = \"*.example\"\n",
            ),
            ("b", "[[registry]]\nlocation = \"reg.example/team\"\nblocked = true\n"),
            ("c", "[registries.insecure]\nregistries = [\"old.test\"]\n"),
        ]);
        let prefix = |name: &str| registries.entry_for(name).map(|(known, _)| known.entry.prefix.as_str());
        assert_eq!(prefix("reg.example"), Some("reg.example"));
        assert!(registries.entry_for("reg.example").unwrap().0.entry.insecure);
        assert_eq!(prefix("reg.example/team/app"), Some("reg.example/team"));
        assert_eq!(prefix("longereg.example"), Some("*.example"));
        // Podman, too, prefers the domain to a registry name of equal length.
        assert_eq!(registries.entry_for("r.example").unwrap().1, 9);
        assert!(registries.entry_for("old.test").unwrap().0.entry.insecure);
        assert_eq!(prefix("other"), None);
    }
}
