//! Credentials that Podman was given for a pull and has handed over. They are in memory and nowhere else.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use parking_lot::Mutex;

use super::{Credentials, Repository};

/// Most repositories of which credentials are kept; the one that was used longest ago makes room.
const MAX_REPOSITORIES: usize = 1024;
/// For how long credentials are kept that nobody uses: containers read what they have not read yet days after the pull.
const LIFETIME: Duration = Duration::from_secs(7 * 24 * 3600);

/// Credentials by repository. They serve what is below it too.
#[derive(Default)]
pub(super) struct PushedCredentials(Mutex<HashMap<Repository, Entry>>);

struct Entry {
    credentials: Credentials,
    /// When they were handed over, or last taken by the registry.
    used: Instant,
    refused: bool,
}

impl PushedCredentials {
    /// Keeps `credentials`, the newest for `repository`. Whether they are others than those before.
    pub(super) fn put(&self, repository: &Repository, credentials: Credentials) -> bool {
        let mut entries = self.0.lock();
        entries.retain(|_, entry| entry.used.elapsed() < LIFETIME);
        let new = Entry {
            credentials,
            used: Instant::now(),
            refused: false,
        };
        let old = entries.get(repository);
        let other = old.is_none_or(|old| old.refused || old.credentials != new.credentials);
        if old.is_none() && entries.len() >= MAX_REPOSITORIES {
            let oldest = entries.iter().min_by_key(|(_, entry)| entry.used);
            if let Some(oldest) = oldest.map(|(repository, _)| repository.clone()) {
                entries.remove(&oldest);
            }
        }
        entries.insert(repository.clone(), new);
        other
    }

    /// The credentials of `repository` or of what it is below, and whether they have been refused.
    pub(super) fn find(&self, repository: &Repository) -> Option<(Credentials, bool)> {
        let entries = self.0.lock();
        with_parents(repository).find_map(|candidate| {
            let entry = entries.get(&candidate)?;
            if entry.used.elapsed() >= LIFETIME {
                return None;
            }
            Some((entry.credentials.clone(), entry.refused))
        })
    }

    /// Notes that the registry takes `credentials`.
    pub(super) fn touch(&self, repository: &Repository, credentials: &Credentials) {
        let mut entries = self.0.lock();
        for candidate in with_parents(repository) {
            if let Some(entry) = entries
                .get_mut(&candidate)
                .filter(|entry| entry.credentials == *credentials)
            {
                entry.used = Instant::now();
                return;
            }
        }
    }

    /// Notes that the registry refuses `credentials`. Whether that is news.
    pub(super) fn refuse(&self, repository: &Repository, credentials: &Credentials) -> bool {
        let mut entries = self.0.lock();
        let mut news = false;
        for candidate in with_parents(repository) {
            if let Some(entry) = entries.get_mut(&candidate)
                && entry.credentials == *credentials
            {
                news |= !entry.refused;
                entry.refused = true;
            }
        }
        news
    }
}

/// `org/team/app`, `org/team`, `org` of one registry.
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
    fn they_serve_their_repository_and_what_is_below() {
        let handed = PushedCredentials::default();
        assert!(handed.put(&repository("org/app"), password("a")));
        assert_eq!(handed.find(&repository("org/app")), Some((password("a"), false)));
        assert_eq!(handed.find(&repository("org/app/part")), Some((password("a"), false)));
        assert_eq!(handed.find(&repository("org")), None);
        assert_eq!(handed.find(&repository("org/app2")), None);
        assert_eq!(handed.find(&Repository::new("r.example:5000", "org/app")), None);
    }

    #[test]
    fn the_newest_count_and_refusals_are_of_those_refused() {
        let handed = PushedCredentials::default();
        let app = repository("app");
        assert!(handed.put(&app, password("a")));
        assert!(!handed.put(&app, password("a")));
        assert!(handed.refuse(&app, &password("a")) && !handed.refuse(&app, &password("a")));
        assert_eq!(handed.find(&app), Some((password("a"), true)));
        // What is handed over again is tried again.
        assert!(handed.put(&app, password("a")));
        assert!(handed.put(&app, password("b")));
        assert!(!handed.refuse(&app, &password("a")));
        assert_eq!(handed.find(&app), Some((password("b"), false)));
    }

    #[test]
    fn there_are_so_many_at_most() {
        let handed = PushedCredentials::default();
        for i in 0..MAX_REPOSITORIES {
            handed.put(&repository(&format!("a{i}")), password("a"));
        }
        handed.find(&repository("a1"));
        handed.touch(&repository("a0/part"), &password("a"));
        handed.put(&repository("new"), password("a"));
        assert_eq!(handed.0.lock().len(), MAX_REPOSITORIES);
        assert!(handed.find(&repository("a0")).is_some() && handed.find(&repository("new")).is_some());
        assert!(handed.find(&repository("a1")).is_none());
    }
}
