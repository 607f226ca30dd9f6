//! One auth file, and the credentials or helper it has for a repository.

use std::{collections::HashMap, path::Path};

use base64::{Engine, prelude::BASE64_STANDARD};
use serde::Deserialize;

use super::{Credentials, Repository};

/// Docker Hub's name in Docker's files and for its helpers.
const DOCKER_HUB: &str = "https://index.docker.io/v1/";

/// The parts of an auth file that matter here.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct AuthFile {
    #[serde(default)]
    auths: HashMap<String, AuthFileEntry>,
    /// Helpers by registry.
    #[serde(default)]
    cred_helpers: HashMap<String, String>,
    /// The helper for all other registries.
    #[serde(default)]
    creds_store: Option<String>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct AuthFileEntry {
    auth: Option<String>,
    #[serde(rename = "identitytoken")]
    identity_token: Option<String>,
}

/// A malformed file or entry. Quotes no text of the file, which may be secret.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum AuthFileError {
    #[error("malformed in line {line}, column {column}")]
    File { line: usize, column: usize },
    #[error("malformed entry for {key}: {detail}")]
    Entry { key: String, detail: &'static str },
}

/// The match of a repository in a file.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum AuthFileMatch {
    Credentials(Credentials),
    /// A helper has the credentials.
    Helper {
        name: String,
        /// The helper's name for the registry.
        server: String,
    },
    Nothing,
}

impl AuthFile {
    /// Parses the file at `path`. As in containers/image, its name decides its form: `.dockercfg` has entries only.
    pub(super) fn parse(path: &Path, bytes: &[u8]) -> Result<Self, AuthFileError> {
        let parsed = match path.file_name() {
            Some(name) if name == ".dockercfg" => serde_json::from_slice(bytes).map(|auths| Self {
                auths,
                cred_helpers: HashMap::new(),
                creds_store: None,
            }),
            _ => serde_json::from_slice(bytes),
        };
        parsed.map_err(|error| AuthFileError::File {
            line: error.line(),
            column: error.column(),
        })
    }

    /// Looks up `repository`. A registry's helper takes precedence over entries, and the most specific entry decides,
    /// as in containers/image. An entry without a secret means the default helper, as in Docker.
    pub(super) fn look_up(&self, repository: &Repository) -> Result<AuthFileMatch, AuthFileError> {
        let registry = normalize(&repository.registry);
        if let Some((server, name)) = best_match(&self.cred_helpers, &registry) {
            return Ok(helper(name, server));
        }
        for key in keys(repository) {
            let Some((key, entry)) = best_match(&self.auths, &key) else {
                continue;
            };
            match entry.credentials() {
                Ok(Some(credentials)) => return Ok(AuthFileMatch::Credentials(credentials)),
                Ok(None) => break,
                Err(detail) => {
                    let key = key.clone();
                    return Err(AuthFileError::Entry { key, detail });
                }
            }
        }
        Ok(match self.creds_store.as_deref() {
            None | Some("") => AuthFileMatch::Nothing,
            Some(name) if registry == "docker.io" => helper(name, DOCKER_HUB),
            Some(name) => helper(name, &repository.registry),
        })
    }
}

fn helper(name: &str, server: &str) -> AuthFileMatch {
    AuthFileMatch::Helper {
        name: name.to_owned(),
        server: server.to_owned(),
    }
}

/// The entry whose key is `wanted`, or else one whose normalized key is.
fn best_match<'a, T>(map: &'a HashMap<String, T>, wanted: &str) -> Option<(&'a String, &'a T)> {
    let equivalent = || {
        let equivalent = map.iter().filter(|(key, _)| normalize(key) == wanted);
        equivalent.min_by_key(|(key, _)| *key)
    };
    map.get_key_value(wanted).or_else(equivalent)
}

impl AuthFileEntry {
    /// `None` for an empty entry, which Docker writes where a helper keeps the secret.
    fn credentials(&self) -> Result<Option<Credentials>, &'static str> {
        let login = self.login()?;
        if let Some(token) = self.identity_token.as_deref().filter(|token| !token.is_empty()) {
            return Ok(Some(Credentials::IdentityToken {
                user: login.map(|(user, _)| user),
                token: token.to_owned(),
            }));
        }
        Ok(login.map(|(user, password)| Credentials::Password { user, password }))
    }

    /// User name and password.
    fn login(&self) -> Result<Option<(String, String)>, &'static str> {
        let Some(auth) = self.auth.as_deref().filter(|auth| !auth.is_empty()) else {
            return Ok(None);
        };
        let bytes = BASE64_STANDARD
            .decode(auth.trim())
            .map_err(|_| "`auth` is not base64")?;
        let text = String::from_utf8(bytes).map_err(|_| "`auth` is not UTF-8")?;
        let (user, password) = text.split_once(':').ok_or("`auth` is not `user:password`")?;
        // Docker pads passwords with NULs.
        Ok(Some((user.to_owned(), password.trim_matches('\0').to_owned())))
    }
}

/// The keys that apply to `repository`, most specific first: `quay.io/org/repo`, `quay.io/org`, `quay.io`.
fn keys(repository: &Repository) -> Vec<String> {
    let mut key = normalize(&repository.to_string());
    let mut keys = vec![key.clone()];
    while let Some(slash) = key.rfind('/') {
        key.truncate(slash);
        keys.push(key.clone());
    }
    keys
}

/// The canonical form of a key. Docker's legacy keys are URLs (`https://index.docker.io/v1/`), and Docker Hub has
/// several names.
fn normalize(key: &str) -> String {
    let bare = key.strip_prefix("https://").or_else(|| key.strip_prefix("http://"));
    let legacy = bare.is_some() || key.ends_with("/v1/") || key.ends_with("/v2/");
    let (host, path) = match bare.unwrap_or(key).split_once('/') {
        Some((host, path)) if !legacy => (host, Some(path)),
        Some((host, _)) => (host, None),
        None => (bare.unwrap_or(key), None),
    };
    let host = match host.to_ascii_lowercase().as_str() {
        "index.docker.io" | "registry-1.docker.io" => "docker.io".to_owned(),
        other => other.to_owned(),
    };
    path.map_or(host.clone(), |path| format!("{host}/{path}"))
}

/// Fuzz target.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn fuzz(data: &[u8]) {
    for path in ["auth.json", ".dockercfg"] {
        if let Ok(file) = AuthFile::parse(Path::new(path), data) {
            for registry in ["docker.io", "r.example"] {
                file.look_up(&Repository::new(registry, "a/b")).ok();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn look_up_in(path: &str, json: &str, registry: &str, name: &str) -> Result<AuthFileMatch, AuthFileError> {
        AuthFile::parse(Path::new(path), json.as_bytes())?.look_up(&Repository::new(registry, name))
    }

    fn look_up(json: &str, registry: &str, name: &str) -> Result<AuthFileMatch, AuthFileError> {
        look_up_in("auth.json", json, registry, name)
    }

    fn user_for(json: &str, registry: &str, name: &str) -> Option<String> {
        match look_up(json, registry, name) {
            Ok(AuthFileMatch::Credentials(Credentials::Password { user, .. })) => Some(user),
            _ => None,
        }
    }

    fn entry(user: &str) -> serde_json::Value {
        serde_json::json!({ "auth": BASE64_STANDARD.encode(format!("{user}:secret")) })
    }

    /// An auth file with the given keys and user names.
    fn auths(entries: &[(&str, &str)]) -> String {
        let entry = |(key, user): &(&str, &str)| (key.to_string(), entry(user));
        serde_json::json!({ "auths": entries.iter().map(entry).collect::<HashMap<_, _>>() }).to_string()
    }

    #[test]
    fn most_specific_key_wins() {
        let file = auths(&[
            ("quay.io", "host"),
            ("quay.io/org", "org"),
            ("quay.io/org/repo", "repo"),
        ]);
        assert_eq!(user_for(&file, "quay.io", "org/repo").as_deref(), Some("repo"));
        assert_eq!(user_for(&file, "quay.io", "org/repo2").as_deref(), Some("org"));
        assert_eq!(user_for(&file, "quay.io", "organ/repo").as_deref(), Some("host"));
        assert_eq!(user_for(&file, "quay.io:443", "org/repo"), None);
    }

    #[test]
    fn legacy_keys_match_docker_hub() {
        let file = auths(&[("https://index.docker.io/v1/", "legacy")]);
        assert_eq!(
            user_for(&file, "docker.io", "library/alpine").as_deref(),
            Some("legacy")
        );
        let file = auths(&[("https://index.docker.io/v1/", "legacy"), ("docker.io", "exact")]);
        assert_eq!(user_for(&file, "docker.io", "library/alpine").as_deref(), Some("exact"));
        assert_eq!(
            user_for(&auths(&[("https://r.example:5000/v2/", "u")]), "r.example:5000", "a").as_deref(),
            Some("u")
        );
    }

    #[test]
    fn dockercfg_has_entries_only() {
        let file = serde_json::json!({ "https://r.example/v1/": entry("u") }).to_string();
        let found = look_up_in("/root/.dockercfg", &file, "r.example", "a").unwrap();
        assert!(matches!(found, AuthFileMatch::Credentials(_)), "{found:?}");
        assert_eq!(look_up(&file, "r.example", "a"), Ok(AuthFileMatch::Nothing));
    }

    #[test]
    fn helpers_precede_entries_and_the_default_helper_follows_them() {
        let file = serde_json::json!({
            "auths": { "a.example/org": entry("org"), "b.example": entry("b"), "c.example": {} },
            "credHelpers": { "a.example": "own", "https://index.docker.io/v1/": "hub" },
            "credsStore": "all",
        });
        for (registry, expected) in [
            ("a.example", helper("own", "a.example")),
            ("docker.io", helper("hub", DOCKER_HUB)),
            ("c.example", helper("all", "c.example")),
            ("d.example:5000", helper("all", "d.example:5000")),
        ] {
            assert_eq!(
                look_up(&file.to_string(), registry, "org/repo"),
                Ok(expected),
                "{registry}"
            );
        }
        assert_eq!(
            user_for(&file.to_string(), "b.example", "org/repo").as_deref(),
            Some("b")
        );
        let hub = look_up(r#"{"credsStore":"all"}"#, "docker.io", "library/alpine");
        assert_eq!(hub, Ok(helper("all", DOCKER_HUB)));
    }

    #[test]
    fn identity_token_has_the_user_of_its_entry() {
        let token = |user: Option<&str>| {
            Ok(AuthFileMatch::Credentials(Credentials::IdentityToken {
                user: user.map(str::to_owned),
                token: "t".to_owned(),
            }))
        };
        let both = serde_json::json!({ "auths": { "a": { "auth": "bWU6", "identitytoken": "t" } } });
        assert_eq!(look_up(&both.to_string(), "a", "b"), token(Some("me")));
        assert_eq!(
            look_up(r#"{"auths":{"a":{"identitytoken":"t"}}}"#, "a", "b"),
            token(None)
        );
    }

    #[test]
    fn malformed_files_fail_and_empty_entries_match_nothing() {
        assert_eq!(
            look_up("{\n{", "a", "b"),
            Err(AuthFileError::File { line: 2, column: 1 })
        );
        assert!(look_up(r#"{"auths":{"a":"secret"}}"#, "a", "b").is_err());
        let error = look_up(r#"{"auths":{"a":{"auth":"%"}}}"#, "a", "b").unwrap_err();
        assert!(error.to_string().contains("entry for a"), "{error}");
        for empty in [r#"{"auths":{"a":{}}}"#, r#"{"auths":{"a":{"auth":""}}}"#, "{}"] {
            assert_eq!(look_up(empty, "a", "b"), Ok(AuthFileMatch::Nothing), "{empty}");
        }
    }
}
