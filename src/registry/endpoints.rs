//! Where a repository is served: its mirrors in order, then its registry, from registries.conf.
//!
//! An endpoint is a repository of its own, so that the credentials, tokens and limits of its own host apply.

use std::sync::Arc;

use super::{Error, Repository};
use crate::registries_conf::{
    Registries, SourcedEntry,
    watcher::{RegistriesConfPaths, RegistriesConfWatcher},
};

/// A mirror or the registry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Endpoint {
    /// The repository's name there.
    pub(super) repository: Repository,
    /// Whether plain HTTP and unverified certificates are allowed.
    pub(super) insecure: bool,
    /// Whether another endpoint is asked if this one fails.
    pub(super) is_mirror: bool,
}

/// Finds the endpoints of repositories.
pub(super) struct Endpoints {
    registries_conf: Arc<RegistriesConfWatcher>,
}

impl Endpoints {
    pub(super) fn new(paths: RegistriesConfPaths) -> Self {
        let registries_conf = Arc::new(RegistriesConfWatcher::new(paths));
        Self { registries_conf }
    }

    /// The endpoints of `repository` in order; the last one is the registry. `by_digest` is false for manifests named
    /// by a tag.
    pub(super) async fn of(&self, repository: &Repository, by_digest: bool) -> Result<Vec<Endpoint>, Error> {
        let registries = self.registries_conf.current_async().await;
        endpoints_in(&registries, repository, by_digest)
    }
}

fn endpoints_in(registries: &Registries, repository: &Repository, by_digest: bool) -> Result<Vec<Endpoint>, Error> {
    repository.validate()?;
    let name = repository.to_string();
    if let Some((path, detail)) = registries.unreadable() {
        return Err(Error::RegistriesConf {
            name,
            path: path.to_owned(),
            detail: detail.to_owned(),
        });
    }
    let Some((SourcedEntry { entry, file }, prefix_len)) = registries.entry_for(&name) else {
        return Ok(vec![Endpoint::registry(repository.clone(), false)]);
    };
    if entry.blocked {
        let (prefix, file) = (entry.prefix.clone(), file.clone());
        return Err(Error::Blocked { name, prefix, file });
    }
    let rest = &name[prefix_len..];
    let applies = |pull_from_mirror: Option<&str>| match pull_from_mirror {
        Some("digest-only") => by_digest,
        Some("tag-only") => !by_digest,
        _ => by_digest || !entry.mirror_by_digest_only,
    };
    let mut endpoints = Vec::new();
    for mirror in entry
        .mirrors
        .iter()
        .filter(|mirror| applies(mirror.pull_from_mirror.as_deref()))
    {
        match repository_at(&mirror.location, rest) {
            Ok(repository) => endpoints.push(Endpoint {
                repository,
                insecure: mirror.insecure,
                is_mirror: true,
            }),
            Err(error) => tracing::debug!(location = mirror.location, %error, "ignoring invalid mirror"),
        }
    }
    let there = match entry.location.as_str() {
        // A `*.domain` entry without location keeps the name.
        "" => repository.clone(),
        location => repository_at(location, rest)?,
    };
    endpoints.push(Endpoint::registry(there, entry.insecure));
    Ok(endpoints)
}

impl Endpoint {
    fn registry(repository: Repository, insecure: bool) -> Self {
        Self {
            repository,
            insecure,
            is_mirror: false,
        }
    }
}

/// The repository at `location` (a registry, perhaps with a path) followed by `rest` of the name.
fn repository_at(location: &str, rest: &str) -> Result<Repository, Error> {
    let full_name = format!("{location}{rest}");
    let (registry, name) = full_name.split_once('/').unwrap_or((&full_name, ""));
    let repository = Repository::new(registry, name);
    repository.validate().map(|()| repository)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn endpoints(text: &str) -> (tempfile::TempDir, Endpoints) {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("registries.conf"), text).unwrap();
        let endpoints = Endpoints::new(RegistriesConfPaths::in_dir(dir.path()));
        (dir, endpoints)
    }

    fn of(endpoints: &Endpoints, repository: &Repository, by_digest: bool) -> Result<Vec<Endpoint>, Error> {
        endpoints_in(&endpoints.registries_conf.current(), repository, by_digest)
    }

    /// The endpoints as `registry/name`, with `!` after insecure ones.
    fn names(text: &str, (registry, name): (&str, &str), by_digest: bool) -> Vec<String> {
        let (_dir, endpoints) = endpoints(text);
        let found = of(&endpoints, &Repository::new(registry, name), by_digest).unwrap();
        assert!(!found.last().unwrap().is_mirror && found.iter().rev().skip(1).all(|endpoint| endpoint.is_mirror));
        let shown =
            |endpoint: &Endpoint| format!("{}{}", endpoint.repository, if endpoint.insecure { "!" } else { "" });
        found.iter().map(shown).collect()
    }

    const APP: (&str, &str) = ("r.example", "team/app");

    #[test]
    fn locations_replace_prefixes() {
        assert_eq!(names("", APP, true), ["r.example/team/app"]);
        let moved = "[[registry]]\nprefix = \"r.example/team\"\nlocation = \"other.example:5000/x\"\ninsecure = true\n";
        assert_eq!(names(moved, APP, true), ["other.example:5000/x/app!"]);
        assert_eq!(names(moved, ("r.example", "teams/app"), true), ["r.example/teams/app"]);
        let domain =
            "[[registry]]\nprefix = \"*.example\"\ninsecure = true\n[[registry.mirror]]\nlocation = \"m.test/d\"\n";
        assert_eq!(names(domain, APP, true), ["m.test/d/team/app", "r.example/team/app!"]);
    }

    #[test]
    fn mirrors_are_selected_by_tag_or_digest() {
        let text = "[[registry]]\nlocation = \"r.example\"\n\
                    [[registry.mirror]]\nlocation = \"any.test\"\ninsecure = true\n\
                    [[registry.mirror]]\nlocation = \"digest.test/d\"\npull-from-mirror = \"digest-only\"\n\
                    [[registry.mirror]]\nlocation = \"tag.test\"\npull-from-mirror = \"tag-only\"\n\
                    [[registry.mirror]]\nlocation = \"not a name\"\n";
        let by_digest = ["any.test/team/app!", "digest.test/d/team/app", "r.example/team/app"];
        assert_eq!(names(text, APP, true), by_digest);
        let by_tag = ["any.test/team/app!", "tag.test/team/app", "r.example/team/app"];
        assert_eq!(names(text, APP, false), by_tag);
        let text = "[[registry]]\nlocation = \"r.example\"\nmirror-by-digest-only = true\n\
                    [[registry.mirror]]\nlocation = \"any.test\"\n";
        assert_eq!(names(text, APP, false), ["r.example/team/app"]);
        assert_eq!(names(text, APP, true).len(), 2);
    }

    #[test]
    fn unreadable_file_refuses_all_repositories() {
        let (dir, endpoints) = endpoints("[[registry]\nlocation = \"r.example\"\nblocked = true\n");
        let error = of(&endpoints, &Repository::new(APP.0, APP.1), true).unwrap_err();
        let file = dir.path().join("registries.conf").display().to_string();
        assert!(error.to_string().contains(&file), "{error}");
    }

    #[test]
    fn error_of_blocked_repository_names_the_file() {
        let (dir, endpoints) = endpoints("[[registry]]\nlocation = \"r.example/team\"\nblocked = true\n");
        let error = of(&endpoints, &Repository::new(APP.0, APP.1), true).unwrap_err();
        let file = dir.path().join("registries.conf").display().to_string();
        assert!(error.to_string().contains(&file), "{error}");
        assert!(of(&endpoints, &Repository::new("r.example", "app"), true).is_ok());
    }
}
