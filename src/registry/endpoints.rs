//! Where a repository is: its mirrors in order and then its registry, as registries.conf has them.
//!
//! An endpoint is another repository, so that credentials, tokens and limits are those of its own registry.

use std::sync::Arc;

use super::{Error, Repository};
use crate::registries_conf::{
    Known, Registries,
    watcher::{Files, RegistriesConfWatcher},
};

/// One place to ask.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Endpoint {
    /// What to ask for there.
    pub(super) repository: Repository,
    /// Whether plain HTTP and certificates that cannot be verified will do.
    pub(super) insecure: bool,
    /// Whether another one is asked if this one fails.
    pub(super) is_mirror: bool,
}

/// All endpoints.
pub(super) struct Endpoints {
    followed: Arc<RegistriesConfWatcher>,
}

impl Endpoints {
    pub(super) fn new(files: Files) -> Self {
        let followed = Arc::new(RegistriesConfWatcher::new(files));
        Self { followed }
    }

    /// Where to ask for something of `repository`, in this order; there is one at least. `by_digest` tells manifests
    /// that a tag names from all else.
    pub(super) async fn of(&self, repository: &Repository, by_digest: bool) -> Result<Vec<Endpoint>, Error> {
        let registries = self.followed.current_for_task().await;
        self.among(&registries, repository, by_digest)
    }

    fn among(&self, registries: &Registries, repository: &Repository, by_digest: bool) -> Result<Vec<Endpoint>, Error> {
        repository.validate()?;
        let name = repository.to_string();
        if let Some((path, detail)) = registries.unknown() {
            return Err(Error::Registries {
                name,
                path: path.to_owned(),
                detail: detail.to_owned(),
            });
        }
        let Some((known, matched)) = registries.in_force(&name) else {
            return Ok(vec![Endpoint::primary(repository.clone(), false)]);
        };
        let Known { entry, file, .. } = known;
        if entry.blocked {
            let (prefix, file) = (entry.prefix.clone(), file.clone());
            return Err(Error::Blocked { name, prefix, file });
        }
        let rest = &name[matched..];
        let wanted = |only: Option<&str>| match only {
            Some("digest-only") => by_digest,
            Some("tag-only") => !by_digest,
            _ => by_digest || !entry.mirror_by_digest_only,
        };
        let mut endpoints = Vec::new();
        for mirror in entry
            .mirrors
            .iter()
            .filter(|mirror| wanted(mirror.pull_from_mirror.as_deref()))
        {
            match located(&mirror.location, rest) {
                Ok(there) => endpoints.push(Endpoint {
                    repository: there,
                    insecure: mirror.insecure,
                    is_mirror: true,
                }),
                Err(error) => tracing::debug!(location = mirror.location, %error, "a mirror is left out"),
            }
        }
        // With `*.domain`, none means that the name stays as it is.
        let there = match entry.location.as_str() {
            "" => repository.clone(),
            location => located(location, rest)?,
        };
        endpoints.push(Endpoint::primary(there, entry.insecure));
        Ok(endpoints)
    }
}

impl Endpoint {
    fn primary(repository: Repository, insecure: bool) -> Self {
        Self {
            repository,
            insecure,
            is_mirror: false,
        }
    }
}

/// The repository at `location`, a registry and perhaps a path in it, with `rest` of the name.
fn located(location: &str, rest: &str) -> Result<Repository, Error> {
    let place = format!("{location}{rest}");
    let (registry, name) = place.split_once('/').unwrap_or((&place, ""));
    let there = Repository::new(registry, name);
    there.validate().map(|()| there)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn endpoints(text: &str) -> (tempfile::TempDir, Endpoints) {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("registries.conf"), text).unwrap();
        let endpoints = Endpoints::new(Files::below(dir.path()));
        (dir, endpoints)
    }

    fn of(endpoints: &Endpoints, repository: &Repository, by_digest: bool) -> Result<Vec<Endpoint>, Error> {
        endpoints.among(&endpoints.followed.current(), repository, by_digest)
    }

    /// `registry/name`, with `!` for what is insecure.
    fn places(text: &str, (registry, name): (&str, &str), by_digest: bool) -> Vec<String> {
        let (_dir, endpoints) = endpoints(text);
        let found = of(&endpoints, &Repository::new(registry, name), by_digest).unwrap();
        assert!(!found.last().unwrap().is_mirror && found.iter().rev().skip(1).all(|endpoint| endpoint.is_mirror));
        let shown =
            |endpoint: &Endpoint| format!("{}{}", endpoint.repository, if endpoint.insecure { "!" } else { "" });
        found.iter().map(shown).collect()
    }

    const APP: (&str, &str) = ("r.example", "team/app");

    #[test]
    fn nothing_said_and_other_places() {
        assert_eq!(places("", APP, true), ["r.example/team/app"]);
        let moved = "[[registry]]\nprefix = \"r.example/team\"\nlocation = \"other.example:5000/x\"\ninsecure = true\n";
        assert_eq!(places(moved, APP, true), ["other.example:5000/x/app!"]);
        assert_eq!(places(moved, ("r.example", "teams/app"), true), ["r.example/teams/app"]);
        let domain =
            "[[registry]]\nprefix = \"*.example\"\ninsecure = true\n[[registry.mirror]]\nlocation = \"m.test/d\"\n";
        assert_eq!(places(domain, APP, true), ["m.test/d/team/app", "r.example/team/app!"]);
    }

    #[test]
    fn mirrors_by_tag_and_by_digest() {
        let text = "[[registry]]\nlocation = \"r.example\"\n\
                    [[registry.mirror]]\nlocation = \"any.test\"\ninsecure = true\n\
                    [[registry.mirror]]\nlocation = \"digest.test/d\"\npull-from-mirror = \"digest-only\"\n\
                    [[registry.mirror]]\nlocation = \"tag.test\"\npull-from-mirror = \"tag-only\"\n\
                    [[registry.mirror]]\nlocation = \"not a name\"\n";
        let by_digest = ["any.test/team/app!", "digest.test/d/team/app", "r.example/team/app"];
        assert_eq!(places(text, APP, true), by_digest);
        let by_tag = ["any.test/team/app!", "tag.test/team/app", "r.example/team/app"];
        assert_eq!(places(text, APP, false), by_tag);
        let text = "[[registry]]\nlocation = \"r.example\"\nmirror-by-digest-only = true\n\
                    [[registry.mirror]]\nlocation = \"any.test\"\n";
        assert_eq!(places(text, APP, false), ["r.example/team/app"]);
        assert_eq!(places(text, APP, true).len(), 2);
    }

    #[test]
    fn nothing_is_asked_while_nobody_knows_what_is_blocked() {
        let (dir, endpoints) = endpoints("[[registry]\nlocation = \"r.example\"\nblocked = true\n");
        let error = of(&endpoints, &Repository::new(APP.0, APP.1), true).unwrap_err();
        let file = dir.path().join("registries.conf").display().to_string();
        assert!(error.to_string().contains(&file), "{error}");
    }

    #[test]
    fn what_is_blocked_is_told_with_the_file() {
        let (dir, endpoints) = endpoints("[[registry]]\nlocation = \"r.example/team\"\nblocked = true\n");
        let error = of(&endpoints, &Repository::new(APP.0, APP.1), true).unwrap_err();
        let file = dir.path().join("registries.conf").display().to_string();
        assert!(error.to_string().contains(&file), "{error}");
        assert!(of(&endpoints, &Repository::new("r.example", "app"), true).is_ok());
    }
}
