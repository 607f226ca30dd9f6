//! Where containers/image looks for credentials, and in which order.

use std::{
    ffi::OsString,
    path::{Path, PathBuf},
};

use serde::Deserialize;
use tracing::warn;

use crate::registries_conf::{
    self,
    watcher::{Files, home},
};

/// What stands for the auth files among the helpers of registries.conf.
const AUTH_FILES: &str = "containers-auth.json";

fn dir(env: &impl Fn(&str) -> Option<OsString>, name: &str) -> Option<PathBuf> {
    env(name).filter(|value| !value.is_empty()).map(PathBuf::from)
}

/// Where containers/image looks for auth files, first to last. `$REGISTRY_AUTH_FILE` replaces all others, as there.
///
/// Which of the first places `podman login` writes to depends on whether the session has `$XDG_RUNTIME_DIR`, and the daemon
/// has another session: so both are looked at, that of a session of this user first.
pub fn usual_files(env: impl Fn(&str) -> Option<OsString>, uid: u32) -> Vec<PathBuf> {
    if let Some(file) = dir(&env, "REGISTRY_AUTH_FILE") {
        return vec![file];
    }
    let home = home(&env, uid);
    let below_home = |path: &str| home.as_ref().map(|home| home.join(path));
    let run = dir(&env, "XDG_RUNTIME_DIR").unwrap_or_else(|| format!("/run/user/{uid}").into());
    let config = dir(&env, "XDG_CONFIG_HOME").or_else(|| below_home(".config"));
    let docker = dir(&env, "DOCKER_CONFIG").or_else(|| below_home(".docker"));
    let mut files = vec![
        run.join("containers/auth.json"),
        format!("/run/containers/{uid}/auth.json").into(),
    ];
    files.extend(config.map(|config| config.join("containers/auth.json")));
    files.extend(docker.map(|docker| docker.join("config.json")));
    files.extend(below_home(".dockercfg"));
    files
}

/// Where something may be had.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Source {
    AuthFiles,
    /// A credential helper, by its name without `docker-credential-`.
    Helper(String),
}

/// Where to look for credentials, first to last, by `credential-helpers` in registries.conf: the auth files alone, unless it
/// says otherwise.
pub(super) fn sources(registries: &Files) -> Vec<Source> {
    let files = registries.list();
    // The last list counts.
    let said = files.iter().rev().find_map(|file| helpers_in(file)).unwrap_or_default();
    if said.is_empty() {
        return vec![Source::AuthFiles];
    }
    let source = |name: String| match name.as_str() {
        AUTH_FILES => Source::AuthFiles,
        _ => Source::Helper(name),
    };
    said.into_iter().map(source).collect()
}

/// What one file says, if anything.
fn helpers_in(file: &Path) -> Option<Vec<String>> {
    #[derive(Deserialize)]
    struct File {
        #[serde(rename = "credential-helpers")]
        helpers: Option<Vec<String>>,
    }
    let text = registries_conf::read(file).ok().flatten()?;
    match toml::from_str::<File>(&text) {
        Ok(File { helpers }) => helpers,
        Err(error) => {
            let detail = error.message();
            warn!(file = %file.display(), detail, "no credential helpers from here: it is malformed");
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
        let files = usual_files(env, uid).into_iter();
        files.map(|file| file.into_os_string().into_string().unwrap()).collect()
    }

    #[test]
    fn usual_files_follow_the_environment() {
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
        // A system service has none of them.
        let expected = [
            "/run/user/0/containers/auth.json",
            "/run/containers/0/auth.json",
            "/root/.config/containers/auth.json",
        ];
        assert_eq!(files(&[], 0)[..3], expected);
    }

    #[test]
    fn the_last_list_of_helpers_counts() {
        let dir = tempfile::tempdir().unwrap();
        let conf = Files::below(dir.path());
        fs::create_dir(dir.path().join("registries.conf.d")).unwrap();
        assert_eq!(sources(&conf), [Source::AuthFiles]);
        let write = |name: &str, text: &str| fs::write(dir.path().join(name), text).unwrap();
        write(
            "registries.conf",
            "credential-helpers = [\"one\"]\n[[registry]]\nlocation = \"x\"\n",
        );
        write("registries.conf.d/10.conf", "unqualified-search-registries = []\n");
        write("registries.conf.d/20.conf", "credential-helpers = \"malformed\"\n");
        write("registries.conf.d/30.txt", "credential-helpers = [\"none\"]\n");
        assert_eq!(sources(&conf), [Source::Helper("one".to_owned())]);
        write(
            "registries.conf.d/40.conf",
            "credential-helpers = [\"two\", \"containers-auth.json\"]\n",
        );
        assert_eq!(sources(&conf), [Source::Helper("two".to_owned()), Source::AuthFiles]);
    }
}
