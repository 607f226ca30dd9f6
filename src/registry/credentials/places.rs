//! Where containers/image looks for credentials, and in which order.

use std::{
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
};

use serde::Deserialize;
use tracing::warn;

/// What stands for the auth files among the helpers of registries.conf.
const AUTH_FILES: &str = "containers-auth.json";

/// Gives the value of a variable of the environment.
pub(super) trait Env: Fn(&str) -> Option<OsString> {}

impl<T: Fn(&str) -> Option<OsString>> Env for T {}

fn dir(env: &impl Env, name: &str) -> Option<PathBuf> {
    env(name).filter(|value| !value.is_empty()).map(PathBuf::from)
}

/// The user's home directory. A system service has no variable for it.
fn home(env: &impl Env, uid: u32) -> Option<PathBuf> {
    dir(env, "HOME").or_else(|| (uid == 0).then(|| "/root".into()))
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

/// registries.conf, for its `credential-helpers`.
pub(super) struct RegistriesConf {
    main: PathBuf,
    /// The directories of drop-ins.
    drop_ins: Vec<PathBuf>,
}

impl RegistriesConf {
    /// Where it is for this user, as containers/image finds it.
    pub(super) fn usual(env: impl Env, uid: u32) -> Self {
        let own = home(&env, uid).map(|home| home.join(".config/containers"));
        let own_file = own.as_ref().map(|own| own.join("registries.conf"));
        let own_drop_ins = own.map(|own| own.join("registries.conf.d"));
        let named = dir(&env, "CONTAINERS_REGISTRIES_CONF");
        if named.is_none()
            && let Some(main) = own_file.filter(|file| file.exists())
        {
            let drop_ins = own_drop_ins.into_iter().collect();
            return Self { main, drop_ins };
        }
        let system = PathBuf::from("/etc/containers/registries.conf.d");
        Self {
            main: named.unwrap_or_else(|| "/etc/containers/registries.conf".into()),
            drop_ins: [Some(system), own_drop_ins].into_iter().flatten().collect(),
        }
    }

    /// Where to look for credentials, first to last: the auth files alone, unless it says otherwise.
    pub(super) fn sources(&self) -> Vec<Source> {
        let files = std::iter::once(self.main.clone()).chain(self.drop_ins.iter().flat_map(|dir| conf_files(dir)));
        let said = files
            .filter_map(|file| helpers_in(&file))
            .next_back()
            .unwrap_or_default();
        if said.is_empty() {
            return vec![Source::AuthFiles];
        }
        let source = |name: String| match name.as_str() {
            AUTH_FILES => Source::AuthFiles,
            _ => Source::Helper(name),
        };
        said.into_iter().map(source).collect()
    }
}

/// The drop-ins in a directory, in the order in which they count.
fn conf_files(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let mut files: Vec<_> = entries.map(|entry| entry.path()).collect();
    files.retain(|file| file.extension().is_some_and(|end| end == "conf") && file.is_file());
    files.sort();
    files
}

/// What one file says, if anything.
fn helpers_in(file: &Path) -> Option<Vec<String>> {
    #[derive(Deserialize)]
    struct File {
        #[serde(rename = "credential-helpers")]
        helpers: Option<Vec<String>>,
    }
    let text = fs::read_to_string(file).ok()?;
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
        let conf = RegistriesConf {
            main: dir.path().join("registries.conf"),
            drop_ins: vec![dir.path().join("d")],
        };
        fs::create_dir(&conf.drop_ins[0]).unwrap();
        assert_eq!(conf.sources(), [Source::AuthFiles]);
        let write = |name: &str, text: &str| fs::write(dir.path().join(name), text).unwrap();
        write(
            "registries.conf",
            "credential-helpers = [\"one\"]\n[[registry]]\nlocation = \"x\"\n",
        );
        write("d/10.conf", "unqualified-search-registries = []\n");
        write("d/20.conf", "credential-helpers = \"malformed\"\n");
        write("d/30.txt", "credential-helpers = [\"none\"]\n");
        assert_eq!(conf.sources(), [Source::Helper("one".to_owned())]);
        write(
            "d/40.conf",
            "credential-helpers = [\"two\", \"containers-auth.json\"]\n",
        );
        assert_eq!(conf.sources(), [Source::Helper("two".to_owned()), Source::AuthFiles]);
    }
}
