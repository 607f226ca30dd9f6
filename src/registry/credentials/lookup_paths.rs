//! Where containers/image looks for credentials, in order.

use std::{
    ffi::OsString,
    path::{Path, PathBuf},
};

use serde::Deserialize;
use tracing::warn;

use crate::registries_conf::{
    self,
    watcher::{RegistriesConfPaths, home_dir},
};

/// The entry in `credential-helpers` that stands for the auth files.
const AUTH_FILES_ENTRY: &str = "containers-auth.json";

fn path_variable(env: &impl Fn(&str) -> Option<OsString>, name: &str) -> Option<PathBuf> {
    env(name).filter(|value| !value.is_empty()).map(PathBuf::from)
}

/// The auth files of containers/image, highest precedence first. `$REGISTRY_AUTH_FILE` replaces all others.
///
/// `podman login` writes to one of the first two files, depending on `$XDG_RUNTIME_DIR` of its session. The daemon runs
/// in another session, so that it reads both, the one below the user's runtime directory first.
pub(super) fn default_auth_files(env: impl Fn(&str) -> Option<OsString>, uid: u32) -> Vec<PathBuf> {
    if let Some(file) = path_variable(&env, "REGISTRY_AUTH_FILE") {
        return vec![file];
    }
    let home = home_dir(&env, uid);
    let below_home = |path: &str| home.as_ref().map(|home| home.join(path));
    let run = path_variable(&env, "XDG_RUNTIME_DIR").unwrap_or_else(|| format!("/run/user/{uid}").into());
    let config = path_variable(&env, "XDG_CONFIG_HOME").or_else(|| below_home(".config"));
    let docker = path_variable(&env, "DOCKER_CONFIG").or_else(|| below_home(".docker"));
    let mut files = vec![
        run.join("containers/auth.json"),
        format!("/run/containers/{uid}/auth.json").into(),
    ];
    files.extend(config.map(|config| config.join("containers/auth.json")));
    files.extend(docker.map(|docker| docker.join("config.json")));
    files.extend(below_home(".dockercfg"));
    files
}

/// A place to look for credentials.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum CredentialSource {
    AuthFiles,
    /// A credential helper, named without `docker-credential-`.
    Helper(String),
}

/// The sources named by `credential-helpers` in registries.conf, in order. Without it, the auth files only.
pub(super) fn credential_sources(paths: &RegistriesConfPaths) -> Vec<CredentialSource> {
    let files = paths.list();
    // The last list counts.
    let helpers = files.iter().rev().find_map(|file| helpers_in(file)).unwrap_or_default();
    if helpers.is_empty() {
        return vec![CredentialSource::AuthFiles];
    }
    let source = |name: String| match name.as_str() {
        AUTH_FILES_ENTRY => CredentialSource::AuthFiles,
        _ => CredentialSource::Helper(name),
    };
    helpers.into_iter().map(source).collect()
}

/// The `credential-helpers` of one file, if it has any.
fn helpers_in(file: &Path) -> Option<Vec<String>> {
    #[derive(Deserialize)]
    struct HelpersFile {
        #[serde(rename = "credential-helpers")]
        helpers: Option<Vec<String>>,
    }
    let text = registries_conf::read(file).ok().flatten()?;
    match toml::from_str::<HelpersFile>(&text) {
        Ok(HelpersFile { helpers }) => helpers,
        Err(error) => {
            let error = error.message();
            warn!(file = %file.display(), error, "ignoring credential helpers of malformed file");
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn files(variables: &[(&str, &str)], uid: u32) -> Vec<String> {
        let env = |name: &str| {
            let found = variables.iter().find(|(key, _)| *key == name);
            found.map(|(_, value)| OsString::from(value))
        };
        let files = default_auth_files(env, uid).into_iter();
        files.map(|file| file.into_os_string().into_string().unwrap()).collect()
    }

    #[test]
    fn auth_files_follow_the_environment() {
        let user = [("XDG_RUNTIME_DIR", "/r"), ("HOME", "/h")];
        let expected = [
            "/r/containers/auth.json",
            "/run/containers/7/auth.json",
            "/h/.config/containers/auth.json",
            "/h/.docker/config.json",
            "/h/.dockercfg",
        ];
        assert_eq!(files(&user, 7), expected);
        let moved = [("XDG_CONFIG_HOME", "/c"), ("DOCKER_CONFIG", "/d"), ("HOME", "/h")];
        assert_eq!(files(&moved, 7)[2..4], ["/c/containers/auth.json", "/d/config.json"]);
        assert_eq!(files(&[("REGISTRY_AUTH_FILE", "/own"), ("HOME", "/h")], 7), ["/own"]);
        // A system service has none of these variables.
        let expected = [
            "/run/user/0/containers/auth.json",
            "/run/containers/0/auth.json",
            "/root/.config/containers/auth.json",
        ];
        assert_eq!(files(&[], 0)[..3], expected);
    }

    #[test]
    fn last_list_of_helpers_wins() {
        let dir = tempfile::tempdir().unwrap();
        let conf = RegistriesConfPaths::in_dir(dir.path());
        fs::create_dir(dir.path().join("registries.conf.d")).unwrap();
        assert_eq!(credential_sources(&conf), [CredentialSource::AuthFiles]);
        let write = |name: &str, text: &str| fs::write(dir.path().join(name), text).unwrap();
        write(
            "registries.conf",
            "credential-helpers = [\"one\"]\n[[registry]]\nlocation = \"x\"\n",
        );
        write("registries.conf.d/10.conf", "unqualified-search-registries = []\n");
        write("registries.conf.d/20.conf", "credential-helpers = \"malformed\"\n");
        write("registries.conf.d/30.txt", "credential-helpers = [\"none\"]\n");
        assert_eq!(credential_sources(&conf), [CredentialSource::Helper("one".to_owned())]);
        write(
            "registries.conf.d/40.conf",
            "credential-helpers = [\"two\", \"containers-auth.json\"]\n",
        );
        assert_eq!(
            credential_sources(&conf),
            [CredentialSource::Helper("two".to_owned()), CredentialSource::AuthFiles]
        );
    }
}
