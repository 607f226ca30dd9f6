//! Credentials from the files that `podman login` and `docker login` write
//! ([containers-auth.json(5)](https://github.com/containers/image/blob/main/docs/containers-auth.json.5.md)).

use std::{
    collections::HashMap,
    ffi::OsString,
    fmt,
    path::{Path, PathBuf},
};

use base64::{Engine, prelude::BASE64_STANDARD};
use serde::Deserialize;
use tracing::warn;

use super::Repository;

/// What proves who we are to one registry.
#[derive(Clone, PartialEq, Eq)]
pub(super) enum Credentials {
    Password {
        user: String,
        password: String,
    },
    /// A refresh token for the registry's token server.
    IdentityToken(String),
}

impl fmt::Debug for Credentials {
    /// Says which kind they are and no more.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Password { .. } => "Password(…)",
            Self::IdentityToken(_) => "IdentityToken(…)",
        })
    }
}

/// Credentials and where they were found.
#[derive(Debug)]
pub(super) struct Found {
    pub(super) credentials: Credentials,
    pub(super) file: PathBuf,
}

/// An auth file; what else is in it is not ours.
#[derive(Deserialize)]
struct AuthFile {
    #[serde(default)]
    auths: HashMap<String, Entry>,
}

#[derive(Deserialize)]
struct Entry {
    #[serde(default)]
    auth: Option<String>,
    #[serde(default, rename = "identitytoken")]
    identity_token: Option<String>,
}

/// The credentials for `repository`. The files are read anew each time: that is once per token, and people log in
/// while the daemon runs.
pub(super) async fn find(files: &[PathBuf], repository: &Repository) -> Option<Found> {
    for file in files {
        let bytes = match tokio::fs::read(file).await {
            Ok(bytes) => bytes,
            Err(error) => {
                if error.kind() != std::io::ErrorKind::NotFound {
                    warn!(file = %file.display(), %error, "auth file left out: cannot read it");
                }
                continue;
            }
        };
        if let Some(credentials) = find_in(file, &bytes, repository) {
            return Some(Found {
                credentials,
                file: file.clone(),
            });
        }
    }
    None
}

/// The credentials for `repository` in one auth file.
fn find_in(file: &Path, bytes: &[u8], repository: &Repository) -> Option<Credentials> {
    let AuthFile { auths } = match serde_json::from_slice(bytes) {
        Ok(parsed) => parsed,
        Err(error) => {
            // Only where it is: serde_json's own words would quote the file.
            let (line, column) = (error.line(), error.column());
            warn!(file = %file.display(), line, column, "auth file left out: it is malformed");
            return None;
        }
    };
    for wanted in keys(repository) {
        // A key written exactly so beats those that merely mean the same.
        let exact = auths.get_key_value(&wanted);
        let alike = auths
            .iter()
            .filter(|(key, _)| **key != wanted && normalize(key) == wanted);
        for (key, entry) in exact.into_iter().chain(alike) {
            match entry.credentials() {
                Ok(Some(credentials)) => return Some(credentials),
                Ok(None) => {}
                Err(detail) => warn!(file = %file.display(), key, "auth file entry left out: {detail}"),
            }
        }
    }
    None
}

impl Entry {
    /// `None` for an entry that holds nothing, as Docker writes where a helper keeps the secret.
    fn credentials(&self) -> Result<Option<Credentials>, &'static str> {
        if let Some(token) = self.identity_token.as_deref().filter(|token| !token.is_empty()) {
            return Ok(Some(Credentials::IdentityToken(token.to_owned())));
        }
        let Some(auth) = self.auth.as_deref().filter(|auth| !auth.is_empty()) else {
            return Ok(None);
        };
        let bytes = BASE64_STANDARD
            .decode(auth.trim())
            .map_err(|_| "`auth` is not base64")?;
        let text = String::from_utf8(bytes).map_err(|_| "`auth` is not UTF-8")?;
        let (user, password) = text.split_once(':').ok_or("`auth` is not `user:password`")?;
        // Docker pads passwords with NULs and takes them off again.
        let password = password.trim_matches('\0').to_owned();
        Ok(Some(Credentials::Password {
            user: user.to_owned(),
            password,
        }))
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

/// One spelling for all keys of a host: Docker's legacy keys are URLs (`https://index.docker.io/v1/`), and Docker Hub
/// has several names.
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

/// The registries that an auth file has credentials for; none if it cannot be read.
pub fn hosts_in(file: &Path) -> Vec<String> {
    let parsed = std::fs::read(file)
        .ok()
        .and_then(|bytes| serde_json::from_slice::<AuthFile>(&bytes).ok());
    let keys = parsed.into_iter().flat_map(|AuthFile { auths }| auths.into_keys());
    let host = |key: String| normalize(&key).split('/').next().unwrap_or_default().to_owned();
    keys.map(host).collect()
}

/// Where containers/image looks for auth files, first to last. `$REGISTRY_AUTH_FILE` replaces all others, as there.
pub fn usual_files(env: impl Fn(&str) -> Option<OsString>, uid: u32) -> Vec<PathBuf> {
    let dir = |name| env(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    if let Some(file) = dir("REGISTRY_AUTH_FILE") {
        return vec![file];
    }
    let home = dir("HOME");
    let config = dir("XDG_CONFIG_HOME").or_else(|| home.as_ref().map(|home| home.join(".config")));
    let mut files: Vec<_> = dir("XDG_RUNTIME_DIR")
        .map(|run| run.join("containers/auth.json"))
        .into_iter()
        .collect();
    files.push(format!("/run/containers/{uid}/auth.json").into());
    files.extend(config.map(|config| config.join("containers/auth.json")));
    files.extend(home.map(|home| home.join(".docker/config.json")));
    files
}

#[cfg(test)]
mod tests {
    use super::*;

    fn user_for(json: &str, registry: &str, name: &str) -> Option<String> {
        match find_in(
            Path::new("auth.json"),
            json.as_bytes(),
            &Repository::new(registry, name),
        ) {
            Some(Credentials::Password { user, .. }) => Some(user),
            _ => None,
        }
    }

    /// `{"auths": {key: user `key`'s name…}}`
    fn auths(entries: &[(&str, &str)]) -> String {
        let entry = |(key, user): &(&str, &str)| {
            let auth = BASE64_STANDARD.encode(format!("{user}:secret"));
            (key.to_string(), serde_json::json!({ "auth": auth }))
        };
        serde_json::json!({ "auths": entries.iter().map(entry).collect::<HashMap<_, _>>() }).to_string()
    }

    #[test]
    fn the_most_specific_key_wins() {
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
    fn legacy_docker_keys_mean_docker_hub() {
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
    fn useless_entries_and_files_are_left_out() {
        assert_eq!(user_for("{", "a", "b"), None);
        assert_eq!(user_for(r#"{"auths":{"a":"secret"}}"#, "a", "b"), None);
        assert_eq!(user_for(r#"{"auths":{"a":{}},"credsStore":"x"}"#, "a", "b"), None);
        assert_eq!(user_for(r#"{"auths":{"a":{"auth":"%"}}}"#, "a", "b"), None);
        assert_eq!(user_for("{}", "a", "b"), None);
    }

    #[test]
    fn usual_files_follow_the_environment() {
        let env = |name: &str| match name {
            "XDG_RUNTIME_DIR" => Some("/r".into()),
            "HOME" => Some("/h".into()),
            _ => None,
        };
        let expected = [
            "/r/containers/auth.json",
            "/run/containers/7/auth.json",
            "/h/.config/containers/auth.json",
        ];
        assert_eq!(usual_files(env, 7)[..3], expected.map(PathBuf::from));
        assert_eq!(usual_files(env, 7)[3], PathBuf::from("/h/.docker/config.json"));
        let own = |name: &str| (name == "REGISTRY_AUTH_FILE").then(|| "/own".into());
        assert_eq!(usual_files(own, 7), [PathBuf::from("/own")]);
    }
}
