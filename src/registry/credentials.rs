//! Credentials, found where Podman finds them
//! ([containers-auth.json(5)](https://github.com/containers/image/blob/main/docs/containers-auth.json.5.md)), or pushed
//! by Podman itself. [`Keyring`] looks them up.
//!
//! - [`lookup_paths`]: the auth files in order, and the helpers of registries.conf;
//! - [`auth_file`]: the entries of one file for a repository;
//! - [`helper`]: programs that keep passwords;
//! - [`pushed_credentials`]: what Podman has pushed, in memory only.

use std::{fmt, path::PathBuf};

use serde::{Deserialize, Serialize};
use tokio::sync::Semaphore;
use tracing::{debug, warn};

use super::Repository;
use crate::registries_conf::watcher::RegistriesConfPaths;

mod auth_file;
mod helper;
mod lookup_paths;
mod pushed_credentials;

use auth_file::{AuthFile, AuthFileMatch};
use lookup_paths::{CredentialSource, credential_sources};
use pushed_credentials::PushedCredentials;

#[cfg(any(test, feature = "fuzzing"))]
pub(crate) use auth_file::fuzz as fuzz_auth_file;
use lookup_paths::default_auth_files;

/// Most helpers running at a time.
const MAX_HELPERS: usize = 4;

/// Credentials for one registry. Their serial form is for the memory file that the next process inherits, and nothing
/// else.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Credentials {
    /// A password, or an access token in its place.
    Password {
        /// The user name.
        user: String,
        /// The secret.
        password: String,
    },
    /// A refresh token for the registry's token server.
    IdentityToken {
        /// The user name, if known.
        user: Option<String>,
        /// The secret.
        token: String,
    },
}

impl fmt::Debug for Credentials {
    /// Shows the kind only.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Password { .. } => "Password(…)",
            Self::IdentityToken { .. } => "IdentityToken(…)",
        })
    }
}

/// Credentials and their origin.
#[derive(Debug, Clone)]
pub(super) struct FoundCredentials {
    pub(super) credentials: Credentials,
    pub(super) origin: CredentialOrigin,
    /// Whether the registry has refused them before, and no others were found.
    pub(super) is_rejected: bool,
}

/// Where credentials were found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum CredentialOrigin {
    /// Podman has pushed them for a pull.
    Pushed,
    File(PathBuf),
    /// Named without `docker-credential-`.
    Helper(String),
}

impl fmt::Display for CredentialOrigin {
    /// `the credentials …`
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pushed => f.write_str("the credentials pushed by Podman"),
            Self::File(file) => write!(f, "the credentials of {}", file.display()),
            Self::Helper(name) => write!(f, "the credentials of docker-credential-{name}"),
        }
    }
}

/// The result of a look-up.
#[derive(Debug, Default)]
pub(super) struct CredentialLookup {
    pub(super) found: Option<FoundCredentials>,
    /// Files and helpers that failed, for messages.
    pub(super) problems: Vec<String>,
}

impl CredentialLookup {
    /// Describes the credentials in messages.
    pub(super) fn who(&self) -> String {
        match (&self.found, self.problems.is_empty()) {
            (Some(found), _) => found.origin.to_string(),
            (None, true) => "anonymous access (no credentials were found)".to_owned(),
            (None, false) => format!(
                "anonymous access (no credentials were found: {})",
                self.problems.join("; ")
            ),
        }
    }
}

/// Looks up credentials.
pub(super) struct Keyring {
    auth_files: Vec<PathBuf>,
    /// Names the helpers; `None` stands for auth files only.
    registries_conf: Option<RegistriesConfPaths>,
    pushed: PushedCredentials,
    helpers: Semaphore,
}

impl Keyring {
    /// Uses `auth_files` only. `None` stands for the auth files of containers/image and the helpers of
    /// `registries_conf`.
    pub(super) fn new(auth_files: Option<Vec<PathBuf>>, registries_conf: RegistriesConfPaths) -> Self {
        let default = || default_auth_files(|name| std::env::var_os(name), rustix::process::getuid().as_raw());
        Self {
            registries_conf: auth_files.is_none().then_some(registries_conf),
            auth_files: auth_files.unwrap_or_else(default),
            pushed: PushedCredentials::default(),
            helpers: Semaphore::new(MAX_HELPERS),
        }
    }

    /// Keeps credentials that Podman has pushed for `repository`. Returns whether they are new.
    pub(super) fn push_credentials(&self, repository: &Repository, credentials: Credentials) -> bool {
        self.pushed.put(repository, credentials)
    }

    /// The pushed credentials by repository.
    pub(super) fn pushed(&self) -> Vec<(Repository, Credentials)> {
        self.pushed.all()
    }

    /// Records that the registry refuses pushed credentials, so that others take precedence. Returns whether that is
    /// new; false for credentials of other origins.
    pub(super) fn reject(&self, repository: &Repository, found: &FoundCredentials) -> bool {
        found.origin == CredentialOrigin::Pushed && self.pushed.reject(repository, &found.credentials)
    }

    /// Records that the registry accepts these, which extends the lifetime of pushed ones.
    pub(super) fn touch(&self, repository: &Repository, found: &FoundCredentials) {
        if found.origin == CredentialOrigin::Pushed {
            self.pushed.touch(repository, &found.credentials);
        }
    }

    /// The credentials for `repository`. Pushed ones take precedence unless the registry has refused them. Reads all
    /// files each time: that is once per token, and users log in while the daemon runs.
    pub(super) async fn find(&self, repository: &Repository) -> CredentialLookup {
        let pushed = self.pushed.find(repository);
        let is_rejected = pushed.as_ref().is_some_and(|(_, is_rejected)| *is_rejected);
        let pushed = pushed.map(|(credentials, _)| FoundCredentials {
            credentials,
            origin: CredentialOrigin::Pushed,
            is_rejected,
        });
        if pushed.is_some() && !is_rejected {
            let found = pushed;
            return CredentialLookup {
                found,
                problems: Vec::new(),
            };
        }
        let mut look_up = self.find_configured(repository).await;
        look_up.found = look_up.found.or(pushed);
        look_up
    }

    /// Looks in auth files and helpers.
    async fn find_configured(&self, repository: &Repository) -> CredentialLookup {
        let mut look_up = CredentialLookup::default();
        for source in self.sources().await {
            let found = match source {
                CredentialSource::AuthFiles => self.find_in_files(repository, &mut look_up.problems).await,
                CredentialSource::Helper(name) => {
                    self.ask_helper(name, &repository.registry, &mut look_up.problems).await
                }
            };
            if found.is_some() {
                look_up.found = found;
                break;
            }
        }
        look_up
    }

    async fn sources(&self) -> Vec<CredentialSource> {
        let sources = match self.registries_conf.clone() {
            Some(paths) => tokio::task::spawn_blocking(move || credential_sources(&paths))
                .await
                .ok(),
            None => None,
        };
        sources.unwrap_or_else(|| vec![CredentialSource::AuthFiles])
    }

    /// The credentials of the first file that has any. Skips unusable files.
    async fn find_in_files(&self, repository: &Repository, problems: &mut Vec<String>) -> Option<FoundCredentials> {
        for file in &self.auth_files {
            let bytes = match tokio::fs::read(file).await {
                Ok(bytes) => bytes,
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
                Err(error) => {
                    record_problem(problems, format!("cannot read {}: {error}", file.display()));
                    continue;
                }
            };
            let matched = AuthFile::parse(file, &bytes).and_then(|parsed| parsed.look_up(repository));
            let found = match matched {
                Ok(AuthFileMatch::Credentials(credentials)) => Some(FoundCredentials {
                    credentials,
                    origin: CredentialOrigin::File(file.clone()),
                    is_rejected: false,
                }),
                Ok(AuthFileMatch::Helper { name, server }) => self.ask_helper(name, &server, problems).await,
                Ok(AuthFileMatch::Nothing) => None,
                Err(error) => {
                    record_problem(problems, format!("ignoring {}: {error}", file.display()));
                    None
                }
            };
            if found.is_some() {
                return found;
            }
        }
        None
    }

    /// The credentials that a helper has for `server`.
    async fn ask_helper(&self, name: String, server: &str, problems: &mut Vec<String>) -> Option<FoundCredentials> {
        // The semaphore is never closed, so that this always gets a permit.
        let _permit = self.helpers.acquire().await.ok();
        debug!(helper = name, server, "asking credential helper");
        match helper::get(&name, server).await {
            Ok(credentials) => credentials.map(|credentials| FoundCredentials {
                credentials,
                origin: CredentialOrigin::Helper(name),
                is_rejected: false,
            }),
            Err(error) => {
                record_problem(problems, error.to_string());
                None
            }
        }
    }
}

fn record_problem(problems: &mut Vec<String>, what: String) {
    warn!(error = what, "failed to look up credentials");
    problems.push(what);
}
