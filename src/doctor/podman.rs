//! What Podman says of itself.

use std::{collections::BTreeMap, io, path::PathBuf, process::Command, time::Duration};

use serde::Deserialize;

use super::{Finding, command, door::Door, kernel};

/// A Podman that takes longer hangs, most likely at a file system that does not answer.
const PATIENCE: Duration = Duration::from_secs(20);
const NAME: &str = "podman";

/// A host's Podman.
#[derive(Debug)]
pub struct Podman {
    /// What `podman --version` says; an error if it says none.
    version: Result<String, Missing>,
    /// What `podman info` says; an error if it fails.
    pub info: Result<Info, String>,
}

/// Why there is no version.
#[derive(Debug)]
enum Missing {
    NotInstalled,
    Broken(String),
}

/// `podman info --format json`, as far as it matters here.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct Info {
    /// The storage.
    pub store: Store,
}

/// Podman's storage.
#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Store {
    /// The storage.conf that was read.
    pub config_file: PathBuf,
    /// The storage driver.
    pub graph_driver_name: String,
    /// Options by name, as `overlay.imagestore`; of several of one name, the last.
    graph_options: BTreeMap<String, serde_json::Value>,
}

/// Asks the host's Podman.
pub fn look() -> Podman {
    let podman = |arguments: &[&str]| command::run(Command::new("podman").args(arguments), PATIENCE);
    let version = match podman(&["--version"]) {
        Ok(printed) => match printed.stdout.split_whitespace().last() {
            Some(version) if printed.status.success() => Ok(version.to_owned()),
            _ => Err(Missing::Broken(printed.stderr)),
        },
        Err(error) if error.kind() == io::ErrorKind::NotFound => Err(Missing::NotInstalled),
        Err(error) => Err(Missing::Broken(error.to_string())),
    };
    let info = match &version {
        Ok(_) => match podman(&["info", "--format", "json"]) {
            Ok(printed) if printed.status.success() => Info::parse(&printed.stdout),
            // The last line is the error; warnings may come before it.
            Ok(printed) => Err(printed.stderr.lines().last().unwrap_or_default().to_owned()),
            Err(error) => Err(error.to_string()),
        },
        Err(_) => Err("there is no Podman".to_owned()),
    };
    Podman { version, info }
}

impl Podman {
    /// Whether there is one.
    pub fn is_installed(&self) -> bool {
        !matches!(self.version, Err(Missing::NotInstalled))
    }

    /// How it announces pulls; nothing if that cannot be told.
    pub fn door(&self) -> Option<Door> {
        let version = self.version.as_ref().ok()?;
        Some(Door::of_podman(kernel::number(version)?))
    }

    /// About its version. `has_crio`: whether this is a host for CRI-O.
    pub fn finding(&self, has_crio: bool) -> Finding {
        match (&self.version, self.door()) {
            (Ok(version), Some(Door::None)) => Finding::fail(
                NAME,
                format!("{version}: {}, which every other version can", Door::None.words()),
                "upgrade Podman to 5.2 or later. Images that `nydus-store preseed` has brought run as they are",
            ),
            (Ok(version), Some(door)) => Finding::ok(NAME, format!("{version}: {}", door.words())),
            (Ok(version), None) => Finding::warn(
                NAME,
                format!("`podman --version` gives no version, but {version:?}"),
                "nydus-store is tested with Podman 4.3, 5.4 and 5.8",
            ),
            (Err(Missing::NotInstalled), _) if has_crio => Finding::ok(NAME, "not installed: this host runs CRI-O"),
            (Err(Missing::NotInstalled), _) => Finding::warn(
                NAME,
                "there is neither `podman` in PATH nor CRI-O, so that only the files can be looked at",
                "install one of them",
            ),
            (Err(Missing::Broken(message)), _) => Finding::fail(
                NAME,
                format!("`podman --version` fails: {message}"),
                "mend or reinstall Podman",
            ),
        }
    }
}

impl Info {
    fn parse(json: &str) -> Result<Self, String> {
        serde_json::from_str(json).map_err(|error| format!("`podman info` printed what cannot be read: {error}"))
    }

    /// The additional image store in force; the last one, if there are several.
    pub fn image_store(&self) -> Option<&str> {
        // The driver's name before it may be left out, in whole or in part.
        let is_it = |name: &str| name.rsplit('.').next() == Some("imagestore");
        let mut options = self.store.graph_options.iter();
        options
            .find(|(name, _)| is_it(name))
            .and_then(|(_, value)| value.as_str())
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use crate::doctor::Status;

    /// A Podman that says so.
    pub fn says(version: &str, info: Result<serde_json::Value, &str>) -> Podman {
        Podman {
            version: Ok(version.to_owned()),
            info: info
                .map(|info| Info::parse(&info.to_string()).unwrap())
                .map_err(str::to_owned),
        }
    }

    /// No Podman.
    pub fn none() -> Podman {
        Podman {
            version: Err(Missing::NotInstalled),
            info: Err(String::new()),
        }
    }

    #[test]
    fn version_tells_the_door() {
        for (version, status, words) in [
            ("4.3.1", Status::Ok, "layer store"),
            ("5.0.3", Status::Ok, "layer store"),
            ("5.1.0", Status::Fail, "cannot announce"),
            ("5.4.2", Status::Ok, "auth helper"),
            ("6.0.0-dev", Status::Ok, "auth helper"),
            ("unknown", Status::Warn, "no version"),
        ] {
            let finding = says(version, Err("")).finding(false);
            assert!(
                finding.status == status && finding.detail.contains(words),
                "{finding:?}"
            );
        }
        assert_eq!(none().finding(false).status, Status::Warn);
        assert_eq!(none().finding(true).status, Status::Ok);
    }

    #[test]
    fn info_tells_the_image_store() {
        for name in ["overlay.imagestore", ".imagestore", "imagestore"] {
            let json = serde_json::json!({"store": {
                "graphDriverName": "overlay",
                "graphOptions": {"overlay.mountopt": "nodev", "overlay.mount_program": {"Executable": "x"}, name: "/a"},
            }});
            let info = Info::parse(&json.to_string()).unwrap();
            assert_eq!(info.image_store(), Some("/a"), "{name}");
        }
        let info = Info::parse(r#"{"store": {"graphOptions": {}}}"#).unwrap();
        assert_eq!(info.image_store(), None);
        assert!(Info::parse("no").is_err());
    }
}
