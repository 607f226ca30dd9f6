//! Queries Podman's version and storage.

use std::{collections::BTreeMap, io, path::PathBuf, process::Command, time::Duration};

use serde::Deserialize;

use super::{Finding, announcement_method::AnnouncementMethod, command, kernel};

/// Time limit of a Podman command. Podman usually hangs because a mounted file system does not respond.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(20);
const NAME: &str = "podman";

/// The host's Podman.
#[derive(Debug)]
pub struct InstalledPodman {
    /// Version from `podman --version`.
    version: Result<String, VersionError>,
    /// Output of `podman info`, or its error message.
    pub info: Result<PodmanInfo, String>,
}

/// Why the version is unknown.
#[derive(Debug)]
enum VersionError {
    NotInstalled,
    Broken(String),
}

/// The checked parts of `podman info --format json`.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct PodmanInfo {
    /// Podman's storage.
    pub store: PodmanStorage,
}

/// Podman's storage.
#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct PodmanStorage {
    /// The storage.conf in force.
    pub config_file: PathBuf,
    /// The storage driver.
    pub graph_driver_name: String,
    /// Options by name, such as `overlay.imagestore`. Podman shows the last of several options of a name.
    graph_options: BTreeMap<String, serde_json::Value>,
}

/// Queries the host's Podman.
pub fn check() -> InstalledPodman {
    let podman = |arguments: &[&str]| command::run(Command::new("podman").args(arguments), COMMAND_TIMEOUT);
    let version = match podman(&["--version"]) {
        Ok(printed) => match printed.stdout.split_whitespace().last() {
            Some(version) if printed.status.success() => Ok(version.to_owned()),
            _ => Err(VersionError::Broken(printed.stderr)),
        },
        Err(error) if error.kind() == io::ErrorKind::NotFound => Err(VersionError::NotInstalled),
        Err(error) => Err(VersionError::Broken(error.to_string())),
    };
    let info = match &version {
        Ok(_) => match podman(&["info", "--format", "json"]) {
            Ok(printed) if printed.status.success() => PodmanInfo::parse(&printed.stdout),
            // The last line is the error; warnings may precede it.
            Ok(printed) => Err(printed.stderr.lines().last().unwrap_or_default().to_owned()),
            Err(error) => Err(error.to_string()),
        },
        Err(_) => Err("Podman is not installed".to_owned()),
    };
    InstalledPodman { version, info }
}

impl InstalledPodman {
    /// Whether Podman is installed.
    pub fn is_installed(&self) -> bool {
        !matches!(self.version, Err(VersionError::NotInstalled))
    }

    /// How it announces pulls; `None` if the version is unknown.
    pub fn announcement_method(&self) -> Option<AnnouncementMethod> {
        let version = self.version.as_ref().ok()?;
        Some(AnnouncementMethod::of_podman(kernel::major_minor(version)?))
    }

    /// Judges the version. `has_crio` says whether the host has CRI-O.
    pub fn finding(&self, has_crio: bool) -> Finding {
        match (&self.version, self.announcement_method()) {
            (Ok(version), Some(AnnouncementMethod::None)) => Finding::fail(
                NAME,
                format!(
                    "{version}: {}, which every other version can",
                    AnnouncementMethod::None.description()
                ),
                "upgrade Podman to 5.2 or later; images from `nydus-store preseed` or `pull` run without announcements",
            ),
            (Ok(version), Some(announcement_method)) => {
                Finding::ok(NAME, format!("{version}: {}", announcement_method.description()))
            }
            (Ok(version), None) => Finding::warn(
                NAME,
                format!("`podman --version` prints no version, but {version:?}"),
                "nydus-store is tested with Podman 4.3, 5.4 and 5.8",
            ),
            (Err(VersionError::NotInstalled), _) if has_crio => {
                Finding::ok(NAME, "not installed: this host runs CRI-O")
            }
            (Err(VersionError::NotInstalled), _) => Finding::warn(
                NAME,
                "neither Podman (in PATH) nor CRI-O is installed; only configuration files are checked",
                "install Podman or CRI-O",
            ),
            (Err(VersionError::Broken(message)), _) => Finding::fail(
                NAME,
                format!("`podman --version` fails: {message}"),
                "repair or reinstall Podman",
            ),
        }
    }
}

impl PodmanInfo {
    fn parse(json: &str) -> Result<Self, String> {
        serde_json::from_str(json).map_err(|error| format!("cannot parse the output of `podman info`: {error}"))
    }

    /// The additional image store in force; the last one of several.
    pub fn image_store(&self) -> Option<&str> {
        // The prefix, the driver's name, may be missing.
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

    /// A Podman with this version and `podman info`.
    pub fn with_info(version: &str, info: Result<serde_json::Value, &str>) -> InstalledPodman {
        InstalledPodman {
            version: Ok(version.to_owned()),
            info: info
                .map(|info| PodmanInfo::parse(&info.to_string()).unwrap())
                .map_err(str::to_owned),
        }
    }

    /// A missing Podman.
    pub fn not_installed() -> InstalledPodman {
        InstalledPodman {
            version: Err(VersionError::NotInstalled),
            info: Err(String::new()),
        }
    }

    #[test]
    fn version_decides_the_announcement_method() {
        for (version, status, words) in [
            ("4.3.1", Status::Ok, "layer store"),
            ("5.0.3", Status::Ok, "layer store"),
            ("5.1.0", Status::Fail, "cannot announce"),
            ("5.4.2", Status::Ok, "auth helper"),
            ("6.0.0-dev", Status::Ok, "auth helper"),
            ("unknown", Status::Warn, "no version"),
        ] {
            let finding = with_info(version, Err("")).finding(false);
            assert!(
                finding.status == status && finding.detail.contains(words),
                "{finding:?}"
            );
        }
        assert_eq!(not_installed().finding(false).status, Status::Warn);
        assert_eq!(not_installed().finding(true).status, Status::Ok);
    }

    #[test]
    fn info_shows_the_image_store() {
        for name in ["overlay.imagestore", ".imagestore", "imagestore"] {
            let json = serde_json::json!({"store": {
                "graphDriverName": "overlay",
                "graphOptions": {"overlay.mountopt": "nodev", "overlay.mount_program": {"Executable": "x"}, name: "/a"},
            }});
            let info = PodmanInfo::parse(&json.to_string()).unwrap();
            assert_eq!(info.image_store(), Some("/a"), "{name}");
        }
        let info = PodmanInfo::parse(r#"{"store": {"graphOptions": {}}}"#).unwrap();
        assert_eq!(info.image_store(), None);
        assert!(PodmanInfo::parse("no").is_err());
    }
}
