//! The drop-in for registries.conf, in which each registry has the mirror.

use std::{
    collections::BTreeSet,
    net::SocketAddr,
    path::{Path, PathBuf},
};

use serde::Serialize;

use super::{Error, names::Pattern};
use crate::{
    mirror,
    registries_conf::{Entry, Known, Mirror, Registries, auth_helper_in, entries_in},
};

const HEADER: &str = "\
# Written by nydus-store setup, anew each time it runs: settings of your own belong in another file.
# These registries have the mirror, by which Podman 5.1 and later find Nydus layers in the store. All else that is said
# of them here is what the other files say of them. An additional-layer-store-auth-helper hands the credentials of a pull
# over to nydus-store.
";

/// Why a registry cannot have the mirror.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The person wants nothing from there.
    #[error("{file} blocks it, and it stays blocked")]
    Blocked {
        /// Where it says so.
        file: PathBuf,
    },
    /// Podman would take another entry.
    #[error(
        "Podman takes the entry {prefix} of {file} for it, since that is no shorter; add the mirror's lines to it by hand, \
         if this is the domain's only registry"
    )]
    Hidden {
        /// Where that is.
        file: PathBuf,
        /// Its prefix.
        prefix: String,
    },
}

/// The file's text.
#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct File<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    additional_layer_store_auth_helper: Option<&'a str>,
    #[serde(skip_serializing_if = "<[Entry]>::is_empty")]
    registry: &'a [Entry],
}

/// The text that gives the mirror to these entries, and has Podman start `auth_helper`; nothing if there are none.
pub fn text(entries: &[Entry], auth_helper: Option<&str>) -> Option<String> {
    if entries.is_empty() && auth_helper.is_none() {
        return None;
    }
    // What was read as TOML can be written as TOML.
    let tables = toml::to_string(&File {
        additional_layer_store_auth_helper: auth_helper,
        registry: entries,
    })
    .ok()?;
    Some(format!("{HEADER}\n{tables}"))
}

/// What a drop-in that setup has written says.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Ours {
    /// The registries that have the mirror.
    pub registries: BTreeSet<String>,
    /// Whether credentials are handed over.
    pub auth_helper: bool,
}

/// Reads a drop-in that setup has written.
pub fn ours(path: &Path, text: &str) -> Result<Ours, Error> {
    let first = HEADER.lines().next().unwrap_or_default();
    if !text.starts_with(first) {
        let path = path.to_owned();
        return Err(Error::NotOurs { path });
    }
    let (entries, _) = entries_in(path, text)?;
    let host = |entry: &Entry| entry.prefix.split('/').next().unwrap_or_default().to_owned();
    Ok(Ours {
        registries: entries.iter().map(host).collect(),
        auth_helper: auth_helper_in(path, text)?.is_some(),
    })
}

/// What is set for `prefix`, with the mirror before all.
pub fn entry(prefix: &str, registries: &Registries, listen: SocketAddr) -> Result<Entry, Refusal> {
    let location = mirror::location(listen, prefix);
    let ours = Mirror {
        location: location.clone(),
        insecure: true,
        ..Mirror::default()
    };
    let mut entry = match registries.in_force(prefix) {
        Some((known, matched)) => narrowed(known, prefix, matched)?,
        None => Entry {
            prefix: prefix.to_owned(),
            location: prefix.to_owned(),
            ..Entry::default()
        },
    };
    if entry.mirror_by_digest_only {
        // Another way to say it, as ours is not for digests only.
        entry.mirror_by_digest_only = false;
        let digests = Some("digest-only".to_owned());
        entry
            .mirrors
            .iter_mut()
            .for_each(|mirror| mirror.pull_from_mirror.clone_from(&digests));
    }
    entry.mirrors.retain(|mirror| mirror.location != location);
    entry.mirrors.insert(0, ours);
    Ok(entry)
}

/// An entry made to fit a prefix of which its own stands for the first `matched` bytes.
fn narrowed(known: &Known, prefix: &str, matched: usize) -> Result<Entry, Refusal> {
    let Known { entry, file, .. } = known;
    let file = file.clone();
    if entry.blocked {
        return Err(Refusal::Blocked { file });
    }
    let mut new = entry.clone();
    let wide = std::mem::replace(&mut new.prefix, prefix.to_owned());
    if wide != prefix && wide.len() >= prefix.len() {
        return Err(Refusal::Hidden { file, prefix: wide });
    }
    let rest = &prefix[matched..];
    new.mirrors.iter_mut().for_each(|mirror| mirror.location.push_str(rest));
    // With `*.domain`, none means that the name stays as it is.
    if new.location.is_empty() {
        new.location = prefix.to_owned();
    } else {
        new.location.push_str(rest);
    }
    Ok(new)
}

/// The registries that a pattern stands for: itself, or, of a domain's, those that are `known`.
pub fn expand(pattern: &Pattern, known: &BTreeSet<String>) -> Result<BTreeSet<String>, Error> {
    let Pattern::Domain(_) = pattern else {
        return Ok([pattern.to_string()].into());
    };
    let found: BTreeSet<String> = known.iter().filter(|name| pattern.matches(name)).cloned().collect();
    if found.is_empty() {
        let pattern = pattern.to_string();
        return Err(Error::NothingKnown { pattern });
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LISTEN: &str = "127.0.0.1:5055";

    fn registries(text: &str) -> Registries {
        let dir = tempfile::tempdir().unwrap();
        let main = dir.path().join("registries.conf");
        std::fs::write(&main, text).unwrap();
        Registries::read(&main, &dir.path().join("d"), &dir.path().join("d/ours")).unwrap()
    }

    fn made(prefix: &str, theirs: &str) -> Result<String, Refusal> {
        let entry = entry(prefix, &registries(theirs), LISTEN.parse().unwrap())?;
        Ok(toml::to_string(&entry).unwrap())
    }

    #[test]
    fn a_registry_of_which_nothing_is_said() {
        let expected = "prefix = \"r.example:5000\"\nlocation = \"r.example:5000\"\n\n[[mirror]]\n\
                        location = \"127.0.0.1:5055/r.example_5000\"\ninsecure = true\n";
        assert_eq!(made("r.example:5000", "").unwrap(), expected);
    }

    #[test]
    fn what_is_said_of_it_is_kept() {
        let theirs = "[[registry]]\nlocation = \"r.example\"\ninsecure = true\nmirror-by-digest-only = true\n\
                      [[registry.mirror]]\nlocation = \"near.example/r\"\n";
        let expected = "prefix = \"r.example\"\nlocation = \"r.example\"\ninsecure = true\n\n[[mirror]]\n\
                        location = \"127.0.0.1:5055/r.example\"\ninsecure = true\n\n\
                        [[mirror]]\nlocation = \"near.example/r\"\npull-from-mirror = \"digest-only\"\n";
        assert_eq!(made("r.example", theirs).unwrap(), expected);
    }

    #[test]
    fn what_is_said_of_its_domain_is_kept() {
        let theirs =
            "[[registry]]\nprefix = \"*.example\"\ninsecure = true\n[[registry.mirror]]\nlocation = \"near/x\"\n";
        let made = made("reg.example", theirs).unwrap();
        assert!(made.contains("location = \"reg.example\"\ninsecure = true\n"), "{made}");
        assert!(made.contains("location = \"near/x\"\n"), "{made}");
    }

    #[test]
    fn a_mirror_entry_made_by_hand_is_not_doubled() {
        let theirs =
            "[[registry]]\nlocation = \"r.example\"\n[[registry.mirror]]\nlocation = \"127.0.0.1:5055/r.example\"\n";
        let made = made("r.example", theirs).unwrap();
        assert_eq!(made.matches("5055").count(), 1, "{made}");
    }

    #[test]
    fn what_is_elsewhere_stays_there() {
        let theirs = "[[registry]]\nprefix = \"r.example\"\nlocation = \"other.example/r\"\n";
        let made = made("r.example/team", theirs).unwrap();
        assert!(made.contains("location = \"other.example/r/team\"\n"), "{made}");
        assert!(
            made.contains("location = \"127.0.0.1:5055/r.example/team\"\n"),
            "{made}"
        );
    }

    #[test]
    fn what_cannot_have_the_mirror() {
        let blocked = "[[registry]]\nlocation = \"r.example\"\nblocked = true\n";
        assert!(matches!(made("r.example", blocked), Err(Refusal::Blocked { .. })));
        assert!(matches!(made("r.example/team", blocked), Err(Refusal::Blocked { .. })));
        let hidden = "[[registry]]\nprefix = \"*.example\"\n";
        assert!(matches!(made("r.example", hidden), Err(Refusal::Hidden { .. })));
    }

    #[test]
    fn the_registries_of_a_domain() {
        let known = ["a.x.example", "b.x.example:5000", "x.example", "other"]
            .map(str::to_owned)
            .into();
        let expand = |pattern: &str| expand(&pattern.parse().unwrap(), &known);
        let found: Vec<_> = expand("*.x.example").unwrap().into_iter().collect();
        assert_eq!(found, ["a.x.example", "b.x.example:5000"]);
        assert_eq!(expand("new.example").unwrap().len(), 1);
        assert!(expand("*.none.example").is_err());
    }
}
