//! Credentials that Podman has pushed for a pull. They are kept in memory only.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use parking_lot::Mutex;

use super::{Credentials, Repository};

/// Most repositories with credentials. Beyond it, the least recently used one is evicted.
const MAX_REPOSITORIES: usize = 1024;
/// How long unused credentials are kept. Containers may read data for the first time days after the pull.
const LIFETIME: Duration = Duration::from_secs(7 * 24 * 3600);

/// Credentials by repository. They serve repositories below it too.
#[derive(Default)]
pub(super) struct PushedCredentials(Mutex<HashMap<Repository, PushedEntry>>);

struct PushedEntry {
    credentials: Credentials,
    /// When they were pushed or last accepted by the registry.
    last_used: Instant,
    is_rejected: bool,
}

impl PushedCredentials {
    /// Replaces the credentials of `repository`. Returns whether they are new, or known but rejected.
    pub(super) fn put(&self, repository: &Repository, credentials: Credentials) -> bool {
        let mut entries = self.0.lock();
        entries.retain(|_, entry| entry.last_used.elapsed() < LIFETIME);
        let new = PushedEntry {
            credentials,
            last_used: Instant::now(),
            is_rejected: false,
        };
        let old = entries.get(repository);
        let is_new = old.is_none_or(|old| old.is_rejected || old.credentials != new.credentials);
        if old.is_none() && entries.len() >= MAX_REPOSITORIES {
            let oldest = entries.iter().min_by_key(|(_, entry)| entry.last_used);
            if let Some(oldest) = oldest.map(|(repository, _)| repository.clone()) {
                entries.remove(&oldest);
            }
        }
        entries.insert(repository.clone(), new);
        is_new
    }

    /// All credentials that are in use, by repository.
    pub(super) fn all(&self) -> Vec<(Repository, Credentials)> {
        let entries = self.0.lock();
        let used = entries.iter().filter(|(_, entry)| entry.last_used.elapsed() < LIFETIME);
        used.map(|(repository, entry)| (repository.clone(), entry.credentials.clone()))
            .collect()
    }

    /// The credentials of `repository` or of one above it, and whether the registry has refused them.
    pub(super) fn find(&self, repository: &Repository) -> Option<(Credentials, bool)> {
        let entries = self.0.lock();
        with_parents(repository).find_map(|candidate| {
            let entry = entries.get(&candidate)?;
            if entry.last_used.elapsed() >= LIFETIME {
                return None;
            }
            Some((entry.credentials.clone(), entry.is_rejected))
        })
    }

    /// Records that the registry accepts `credentials`.
    pub(super) fn touch(&self, repository: &Repository, credentials: &Credentials) {
        let mut entries = self.0.lock();
        for candidate in with_parents(repository) {
            if let Some(entry) = entries
                .get_mut(&candidate)
                .filter(|entry| entry.credentials == *credentials)
            {
                entry.last_used = Instant::now();
                return;
            }
        }
    }

    /// Records that the registry refuses `credentials`. Returns whether that is new.
    pub(super) fn reject(&self, repository: &Repository, credentials: &Credentials) -> bool {
        let mut entries = self.0.lock();
        let mut is_new = false;
        for candidate in with_parents(repository) {
            if let Some(entry) = entries.get_mut(&candidate)
                && entry.credentials == *credentials
            {
                is_new |= !entry.is_rejected;
                entry.is_rejected = true;
            }
        }
        is_new
    }
}

/// `repository` and those above it: `org/team/app`, `org/team`, `org`.
fn with_parents(repository: &Repository) -> impl Iterator<Item = Repository> {
    let parent = |below: &Repository| {
        let (name, _) = below.name.rsplit_once('/')?;
        Some(Repository::new(&below.registry, name))
    };
    std::iter::successors(Some(repository.clone()), parent)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn password(user: &str) -> Credentials {
        Credentials::Password {
            user: user.to_owned(),
            password: "secret".to_owned(),
        }
    }

    fn repository(name: &str) -> Repository {
        Repository::new("r.example", name)
    }

    #[test]
    fn credentials_serve_their_repository_and_those_below() {
        let pushed = PushedCredentials::default();
        assert!(pushed.put(&repository("org/app"), password("a")));
        assert_eq!(pushed.find(&repository("org/app")), Some((password("a"), false)));
        assert_eq!(pushed.find(&repository("org/app/part")), Some((password("a"), false)));
        assert_eq!(pushed.find(&repository("org")), None);
        assert_eq!(pushed.find(&repository("org/app2")), None);
        assert_eq!(pushed.find(&Repository::new("r.example:5000", "org/app")), None);
    }

    #[test]
    fn newest_credentials_win_and_rejections_concern_the_rejected_ones() {
        let pushed = PushedCredentials::default();
        let app = repository("app");
        assert!(pushed.put(&app, password("a")));
        assert!(!pushed.put(&app, password("a")));
        assert!(pushed.reject(&app, &password("a")) && !pushed.reject(&app, &password("a")));
        assert_eq!(pushed.find(&app), Some((password("a"), true)));
        // Credentials that are pushed again are tried again.
        assert!(pushed.put(&app, password("a")));
        assert!(pushed.put(&app, password("b")));
        assert!(!pushed.reject(&app, &password("a")));
        assert_eq!(pushed.find(&app), Some((password("b"), false)));
    }

    #[test]
    fn least_recently_used_repository_is_evicted() {
        let pushed = PushedCredentials::default();
        for i in 0..MAX_REPOSITORIES {
            pushed.put(&repository(&format!("a{i}")), password("a"));
        }
        pushed.find(&repository("a1"));
        pushed.touch(&repository("a0/part"), &password("a"));
        pushed.put(&repository("new"), password("a"));
        assert_eq!(pushed.0.lock().len(), MAX_REPOSITORIES);
        assert!(pushed.find(&repository("a0")).is_some() && pushed.find(&repository("new")).is_some());
        assert!(pushed.find(&repository("a1")).is_none());
    }
}
