//! What Podman says of itself.

use std::{collections::BTreeMap, io, path::PathBuf, process::Command, time::Duration};

use serde::Deserialize;

use super::{Finding, command, kernel};

/// A Podman that takes longer hangs, most likely at a file system that does not answer.
const PATIENCE: Duration = Duration::from_secs(20);
/// From this version on it looks layers up by digests that only the mirror gives.
const MIRROR_FROM: (u32, u32) = (5, 1);

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
    /// Registries by prefix, and under `search` a list.
    registries: BTreeMap<String, serde_json::Value>,
}

/// Podman's storage.
#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Store {
    /// The storage.conf that was read.
    pub config_file: PathBuf,
    /// The storage driver.
    pub graph_driver_name: String,
    /// Options by name, as `overlay.additionallayerstore`; of several of one name, the last.
    graph_options: BTreeMap<String, serde_json::Value>,
}

/// A registry in force.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Registry {
    /// Which images it is for.
    pub prefix: String,
    /// Its mirrors, in order.
    pub mirrors: Option<Vec<Mirror>>,
}

/// A mirror in force.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Mirror {
    /// Where it is.
    pub location: String,
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
        self.version.is_ok()
    }

    /// Whether it needs the mirror; nothing if that cannot be told.
    pub fn needs_mirror(&self) -> Option<bool> {
        let version = self.version.as_ref().ok()?;
        Some(kernel::number(version)? >= MIRROR_FROM)
    }

    /// About its version.
    pub fn finding(&self) -> Finding {
        let name = "podman";
        match (&self.version, self.needs_mirror()) {
            (Ok(version), Some(true)) => Finding::ok(
                name,
                format!("{version}: it finds Nydus layers by way of the mirror, in images pulled by tag"),
            ),
            (Ok(version), Some(false)) => Finding::ok(name, format!("{version}: it needs no mirror")),
            (Ok(version), None) => Finding::warn(
                name,
                format!("`podman --version` gives no version, but {version:?}"),
                "nydus-store is tested with Podman 4.3 and 5.4",
            ),
            (Err(Missing::NotInstalled), _) => Finding::warn(
                name,
                "there is no `podman` in PATH, so that only the files can be looked at",
                "install it, unless this host runs CRI-O, which reads the same files",
            ),
            (Err(Missing::Broken(message)), _) => Finding::fail(
                name,
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

    /// The additional layer store in force; the last one, if there are several.
    pub fn layer_store(&self) -> Option<&str> {
        // The driver's name before it may be left out, in whole or in part.
        let is_it = |name: &str| name.rsplit('.').next() == Some("additionallayerstore");
        let mut options = self.store.graph_options.iter();
        options
            .find(|(name, _)| is_it(name))
            .and_then(|(_, value)| value.as_str())
    }

    /// The registries in force.
    pub fn registries(&self) -> Vec<Registry> {
        let read = |value: &serde_json::Value| Registry::deserialize(value).ok();
        self.registries.values().filter_map(read).collect()
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
    fn versions() {
        for (version, needs, status) in [
            ("4.3.1", Some(false), Status::Ok),
            ("5.0.3", Some(false), Status::Ok),
            ("5.1.0", Some(true), Status::Ok),
            ("6.0.0-dev", Some(true), Status::Ok),
            ("unknown", None, Status::Warn),
        ] {
            let podman = says(version, Err(""));
            assert_eq!(
                (podman.needs_mirror(), podman.finding().status),
                (needs, status),
                "{version}"
            );
        }
        assert_eq!(none().finding().status, Status::Warn);
    }

    #[test]
    fn what_info_tells() {
        for name in [
            "overlay.additionallayerstore",
            ".additionallayerstore",
            "additionallayerstore",
        ] {
            let json = serde_json::json!({"store": {
                "graphDriverName": "overlay",
                "graphOptions": {"overlay.mountopt": "nodev", "overlay.mount_program": {"Executable": "x"}, name: "/a:ref"},
            }});
            let info = Info::parse(&json.to_string()).unwrap();
            assert_eq!(info.layer_store(), Some("/a:ref"), "{name}");
        }
        let json = serde_json::json!({"store": {"graphOptions": {}}, "registries": {
            "search": ["docker.io"],
            "r.example": {"Prefix": "r.example", "Mirrors": [{"Location": "m"}]},
            "q.example": {"Prefix": "q.example", "Mirrors": null},
        }});
        let info = Info::parse(&json.to_string()).unwrap();
        assert_eq!(info.layer_store(), None);
        assert_eq!(info.registries().len(), 2);
        assert!(Info::parse("no").is_err());
    }
}
