//! Credentials, found where Podman finds them
//! ([containers-auth.json(5)](https://github.com/containers/image/blob/main/docs/containers-auth.json.5.md)), or handed
//! over by Podman itself.
//!
//! - [`places`]: the files, first to last, and the helpers of registries.conf;
//! - [`auth_file`]: what one file says of a repository;
//! - [`helper`]: programs that keep passwords;
//! - [`handed`]: what Podman has handed over, which is in memory only.

use std::{fmt, path::PathBuf};

use tokio::sync::Semaphore;
use tracing::{debug, warn};

use super::{Repository, repository::printable};
use crate::registries_conf::watcher::Files;

mod auth_file;
mod helper;
mod lookup_paths;
mod pushed_credentials;

use auth_file::{Answer, AuthFile};
use lookup_paths::{Source, sources};
use pushed_credentials::PushedCredentials;

pub use lookup_paths::usual_files;

/// Most helpers that run at a time.
const MAX_HELPERS: usize = 4;

/// What proves who we are to one registry.
#[derive(Clone, PartialEq, Eq)]
pub enum Credentials {
    /// A user's password, or what stands for one.
    Password {
        /// The user's name.
        user: String,
        /// The secret.
        password: String,
    },
    /// A refresh token for the registry's token server.
    IdentityToken {
        /// The user's name, where it is known.
        user: Option<String>,
        /// The secret.
        token: String,
    },
}

impl fmt::Debug for Credentials {
    /// Says which kind they are and no more.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Password { .. } => "Password(…)",
            Self::IdentityToken { .. } => "IdentityToken(…)",
        })
    }
}

/// Credentials and where they were found.
#[derive(Debug, Clone)]
pub(super) struct Found {
    pub(super) credentials: Credentials,
    pub(super) origin: Origin,
    /// Whether the registry had refused them already, and there was nothing else.
    pub(super) refused: bool,
}

/// Where credentials were found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Origin {
    PushedCredentials,
    File(PathBuf),
    /// By its name without `docker-credential-`.
    Helper(String),
}

impl fmt::Display for Origin {
    /// `the credentials …`
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PushedCredentials => f.write_str("the credentials that Podman has handed over"),
            Self::File(file) => write!(f, "the credentials of {}", file.display()),
            Self::Helper(name) => write!(f, "the credentials of docker-credential-{name}"),
        }
    }
}

/// What came of looking for credentials.
#[derive(Debug, Default)]
pub(super) struct LookUp {
    pub(super) found: Option<Found>,
    /// What could not be asked, for messages.
    pub(super) troubles: Vec<String>,
}

impl LookUp {
    /// Whose credentials these are, for messages.
    pub(super) fn who(&self) -> String {
        match (&self.found, self.troubles.is_empty()) {
            (Some(found), _) => found.origin.to_string(),
            (None, true) => "anonymous access (no credentials were found)".to_owned(),
            (None, false) => format!(
                "anonymous access (no credentials were found: {})",
                self.troubles.join("; ")
            ),
        }
    }
}

/// All places with credentials.
pub(super) struct Keyring {
    files: Vec<PathBuf>,
    /// `None`: the files alone.
    registries: Option<Files>,
    handed: PushedCredentials,
    helpers: Semaphore,
}

impl Keyring {
    /// The auth files `files` alone; or else all the places where containers/image looks, with the helpers of `registries`.
    pub(super) fn new(files: Option<Vec<PathBuf>>, registries: Files) -> Self {
        let usual = || usual_files(|name| std::env::var_os(name), rustix::process::getuid().as_raw());
        Self {
            registries: files.is_none().then_some(registries),
            files: files.unwrap_or_else(usual),
            handed: PushedCredentials::default(),
            helpers: Semaphore::new(MAX_HELPERS),
        }
    }

    /// Keeps credentials that Podman has handed over for `repository`. Whether they are new.
    pub(super) fn push_credentials(&self, repository: &Repository, credentials: Credentials) -> bool {
        self.handed.put(repository, credentials)
    }

    /// Prefers others to these, if they were handed over, because the registry refuses them. Whether that is news.
    pub(super) fn refuse(&self, repository: &Repository, found: &Found) -> bool {
        found.origin == Origin::PushedCredentials && self.handed.refuse(repository, &found.credentials)
    }

    /// Notes that the registry takes these, so that they are kept on if they were handed over.
    pub(super) fn touch(&self, repository: &Repository, found: &Found) {
        if found.origin == Origin::PushedCredentials {
            self.handed.touch(repository, &found.credentials);
        }
    }

    /// The credentials for `repository`. What Podman has just been given for a pull counts before what it would find
    /// elsewhere, unless the registry has refused it. All is read anew each time: that is once per token, and people log in
    /// while the daemon runs.
    pub(super) async fn find(&self, repository: &Repository) -> LookUp {
        let handed = self.handed.find(repository);
        let refused = handed.as_ref().is_some_and(|(_, refused)| *refused);
        let handed = handed.map(|(credentials, _)| Found {
            credentials,
            origin: Origin::PushedCredentials,
            refused,
        });
        if handed.is_some() && !refused {
            let found = handed;
            return LookUp {
                found,
                troubles: Vec::new(),
            };
        }
        let mut look_up = self.find_elsewhere(repository).await;
        look_up.found = look_up.found.or(handed);
        look_up
    }

    async fn find_elsewhere(&self, repository: &Repository) -> LookUp {
        let mut look_up = LookUp::default();
        for source in self.sources().await {
            let found = match source {
                Source::AuthFiles => self.in_files(repository, &mut look_up.troubles).await,
                Source::Helper(name) => self.ask(name, &repository.registry, &mut look_up.troubles).await,
            };
            if found.is_some() {
                look_up.found = found;
                break;
            }
        }
        look_up
    }

    async fn sources(&self) -> Vec<Source> {
        let read = match self.registries.clone() {
            Some(registries) => tokio::task::spawn_blocking(move || sources(&registries)).await.ok(),
            None => None,
        };
        read.unwrap_or_else(|| vec![Source::AuthFiles])
    }

    /// What the first file has that has anything. A file that cannot be used is left out.
    async fn in_files(&self, repository: &Repository, troubles: &mut Vec<String>) -> Option<Found> {
        for file in &self.files {
            let bytes = match tokio::fs::read(file).await {
                Ok(bytes) => bytes,
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
                Err(error) => {
                    trouble(troubles, format!("cannot read {}: {error}", file.display()));
                    continue;
                }
            };
            let answer = AuthFile::parse(file, &bytes).and_then(|parsed| parsed.look_up(repository));
            let found = match answer {
                Ok(Answer::Credentials(credentials)) => Some(Found {
                    credentials,
                    origin: Origin::File(file.clone()),
                    refused: false,
                }),
                Ok(Answer::Helper { name, server }) => self.ask(name, &server, troubles).await,
                Ok(Answer::Nothing) => None,
                Err(error) => {
                    trouble(troubles, format!("{} is left out: {error}", file.display()));
                    None
                }
            };
            if found.is_some() {
                return found;
            }
        }
        None
    }

    /// What a helper has for `server`.
    async fn ask(&self, name: String, server: &str, troubles: &mut Vec<String>) -> Option<Found> {
        // The semaphore is never closed, so there is always a permit.
        let _permit = self.helpers.acquire().await.ok();
        debug!(helper = name, server, "asking a credential helper");
        match helper::get(&name, server).await {
            Ok(credentials) => credentials.map(|credentials| Found {
                credentials,
                origin: Origin::Helper(name),
                refused: false,
            }),
            Err(error) => {
                trouble(troubles, error.to_string());
                None
            }
        }
    }
}

fn trouble(troubles: &mut Vec<String>, what: String) {
    warn!("credentials: {what}");
    troubles.push(what);
}
