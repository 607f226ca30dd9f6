//! Checks whether CRI-O uses the store, and whether it keeps its images after an unclean stop.

use std::{
    fs, io,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use serde::Deserialize;

use super::{
    Finding,
    announcement_method::AnnouncementMethod,
    command, kernel,
    storage::{ConfiguredStores, sorted_files, storage_conf_path},
};
use crate::{
    error_chain::ErrorChain,
    setup::{
        Setup, SetupError,
        layout::{self, Layout},
        programs::{Programs, StorePlacement},
        storage::Stores,
    },
};

const COMMAND_TIMEOUT: Duration = Duration::from_secs(20);
const STORAGE: &str = "cri-o-storage";
const RUN_SETUP: &str = "run `nydus-store setup`, with the daemon's --root if it has one, and `systemctl restart crio`";
/// /proc/stat gives the boot time in whole seconds.
const START_TIME_PRECISION: Duration = Duration::from_secs(1);

/// The checked parts of one of CRI-O's configuration files.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct CrioConfFile {
    crio: CrioTable,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct CrioTable {
    internal_repair: Option<bool>,
    storage_option: Vec<String>,
}

/// CRI-O's configuration, merged from all files.
#[derive(Debug, Default)]
struct CrioConfig {
    /// Value and file; the last file is in force.
    internal_repair: Option<(bool, PathBuf)>,
    /// Options of all files.
    storage_options: Vec<String>,
}

impl CrioConfig {
    fn read(layout: &Layout) -> Result<Self, SetupError> {
        let mut all = Self::default();
        for path in files(layout) {
            let text = layout::read_optional(&path)?.unwrap_or_default();
            let parsed: Result<CrioConfFile, _> = toml::from_str(&text);
            let CrioConfFile { crio } = parsed.map_err(|source| SetupError::Crio {
                path: path.clone(),
                source: Box::new(source),
            })?;
            all.storage_options.extend(crio.storage_option);
            if let Some(repair) = crio.internal_repair {
                all.internal_repair = Some((repair, path));
            }
        }
        Ok(all)
    }

    fn has_storage_option(&self, option: &str) -> bool {
        let (name, value) = option.split_once('=').unwrap_or((option, ""));
        let short = |name: &str| name.rsplit('.').next().map(str::to_owned);
        self.storage_options.iter().any(|known| {
            let known = known.split_once('=').unwrap_or((known, ""));
            short(known.0) == short(name) && known.1 == value
        })
    }
}

/// CRI-O's configuration files, in reading order.
fn files(layout: &Layout) -> Vec<PathBuf> {
    let mut files = vec![layout.crio.join("crio.conf")];
    files.extend(sorted_files(&layout.crio_drop_ins()));
    files
}

/// The host's CRI-O: its version, or why the version is unknown.
pub struct InstalledCrio {
    version: Result<String, String>,
}

/// Queries the host's CRI-O; `None` if the host has neither CRI-O nor /etc/crio.
pub fn check(programs: &Programs) -> Option<InstalledCrio> {
    let program = match (&programs.crio, programs.has_crio) {
        (Some(program), _) => program,
        (None, true) => {
            let version = Err("/etc/crio exists, but `crio` is not installed".to_owned());
            return Some(InstalledCrio { version });
        }
        (None, false) => return None,
    };
    let version = match command::run(Command::new(&program.path).arg("--version"), COMMAND_TIMEOUT) {
        Ok(printed) if printed.status.success() => version_in(&printed.stdout)
            .map(str::to_owned)
            .ok_or_else(|| "`crio --version` prints no version".to_owned()),
        Ok(printed) => Err(format!("`crio --version` fails: {}", printed.stderr)),
        Err(error) => Err(format!("`crio --version` fails: {error}")),
    };
    Some(InstalledCrio { version })
}

/// The first word that is a version, such as `1.31.0` in `crio version 1.31.0`.
fn version_in(printed: &str) -> Option<&str> {
    printed
        .split_whitespace()
        .find(|word| kernel::major_minor(word).is_some())
}

impl InstalledCrio {
    /// How it announces pulls; `None` if the version is unknown.
    pub fn announcement_method(&self) -> Option<AnnouncementMethod> {
        Some(AnnouncementMethod::of_crio(kernel::major_minor(
            self.version.as_ref().ok()?,
        )?))
    }

    /// Judges its version, its storage and `internal_repair`.
    pub fn findings(&self, setup: &Setup, placement: StorePlacement) -> Vec<Finding> {
        let version = match (&self.version, self.announcement_method()) {
            (Ok(version), Some(announcement_method)) => {
                Finding::ok("cri-o", format!("{version}: {}", announcement_method.description()))
            }
            (Ok(said) | Err(said), _) => {
                Finding::warn("cri-o", said.clone(), "nydus-store is tested with CRI-O 1.32 and 1.37")
            }
        };
        let judged = || -> Result<Vec<Finding>, SetupError> {
            let configuration = CrioConfig::read(&setup.layout)?;
            let files = ConfiguredStores::read(&setup.layout, storage_conf_path(&setup.layout), &setup.stores)?;
            let storage = judge_storage(
                &setup.stores,
                placement,
                files,
                &configuration,
                self.announcement_method(),
            );
            Ok(vec![
                storage.unwrap_or_else(|| check_restarted(&setup.layout)),
                judge_repair(&configuration),
            ])
        };
        let judged = judged().unwrap_or_else(|error| {
            let text = ErrorChain(&error).to_string();
            vec![Finding::fail(
                STORAGE,
                text,
                "fix the file; CRI-O does not start until then",
            )]
        });
        std::iter::once(version).chain(judged).collect()
    }
}

/// Reports a store that CRI-O's configuration lacks, if any.
fn judge_storage(
    stores: &Stores,
    placement: StorePlacement,
    files: ConfiguredStores,
    configuration: &CrioConfig,
    announcement_method: Option<AnnouncementMethod>,
) -> Option<Finding> {
    let [images, layers] = stores.driver_options();
    // With `placement.crio`, CRI-O does not read the file that names the store to Podman.
    let named = !placement.crio && files.names_images(placement);
    if !named && !configuration.has_storage_option(&images) {
        let detail = format!("CRI-O's configuration lacks the image store {}", stores.images);
        return Some(Finding::fail(STORAGE, detail, RUN_SETUP));
    }
    let announced = files.main.layers || configuration.has_storage_option(&layers);
    if announcement_method == Some(AnnouncementMethod::LayerStore) && !announced {
        let detail = format!(
            "CRI-O's configuration lacks the layer store {}, so pulls are not announced",
            stores.layers
        );
        return Some(Finding::fail(STORAGE, detail, RUN_SETUP));
    }
    None
}

fn judge_repair(configuration: &CrioConfig) -> Finding {
    let name = "cri-o-repair";
    let detail = match &configuration.internal_repair {
        Some((false, _)) => {
            return Finding::ok(
                name,
                "CRI-O keeps its images after an unclean stop (`internal_repair = false`)",
            );
        }
        Some((true, path)) => format!("{} has `internal_repair = true`", path.display()),
        None => "`internal_repair` is not set and defaults to true".to_owned(),
    };
    Finding::fail(
        name,
        format!(
            "{detail}: after an unclean stop, CRI-O would delete all images and containers of this node if it has a \
             container of a lazy image"
        ),
        "run `nydus-store setup`, which sets it to false in crio.conf.d; remove the line from any later file \
         there that sets it to true; then run `systemctl restart crio`",
    )
}

/// Checks whether a running CRI-O was started after the last change to its files.
fn check_restarted(layout: &Layout) -> Finding {
    // Processes are those of this host, not of a sysroot.
    let Some(started) = layout.is_host().then(running_since).flatten() else {
        return Finding::ok(STORAGE, "CRI-O is not running; it will use the store when it starts");
    };
    let mut read = vec![storage_conf_path(layout).to_owned()];
    read.extend(layout.rootful_drop_ins.iter().flat_map(|dir| sorted_files(dir)));
    read.extend(files(layout));
    judge_start(started, &read)
}

fn judge_start(started: SystemTime, read: &[PathBuf]) -> Finding {
    let changed = |path: &Path| path.metadata().and_then(|data| data.modified());
    let newer = read
        .iter()
        .find(|path| changed(path).is_ok_and(|changed| changed > started + START_TIME_PRECISION));
    match newer {
        Some(path) => Finding::warn(
            STORAGE,
            format!(
                "{} changed after CRI-O started; CRI-O reads it only at start",
                path.display()
            ),
            "run `systemctl restart crio`; a reload (SIGHUP) reads registries.conf only",
        ),
        None => Finding::ok(STORAGE, "CRI-O uses the store"),
    }
}

/// Start time of the running CRI-O.
fn running_since() -> Option<SystemTime> {
    let processes = fs::read_dir("/proc").ok()?.flatten();
    let is_crio = |dir: &PathBuf| fs::read_to_string(dir.join("comm")).is_ok_and(|name| name.trim_end() == "crio");
    let process = processes.map(|entry| entry.path()).find(is_crio)?;
    start_of(&process).ok().flatten()
}

/// Start time of a process, given its directory in /proc (proc_pid_stat(5), field 22, in clock ticks since boot).
fn start_of(process: &Path) -> io::Result<Option<SystemTime>> {
    let (stat, kernel) = (
        fs::read_to_string(process.join("stat"))?,
        fs::read_to_string("/proc/stat")?,
    );
    // Field 2, the process name in parentheses, may contain any character.
    let ticks = stat
        .rsplit_once(')')
        .and_then(|(_, rest)| rest.split_whitespace().nth(19));
    let boot = kernel.lines().find_map(|line| line.strip_prefix("btime "));
    let number = |text: Option<&str>| text.and_then(|text| text.trim().parse::<u64>().ok());
    let (Some(ticks), Some(boot)) = (number(ticks), number(boot)) else {
        return Ok(None);
    };
    Ok(Some(
        UNIX_EPOCH + Duration::from_secs(boot + ticks / rustix::param::clock_ticks_per_second()),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Status;

    const ROOT: &str = "/var/lib/nydus-store";
    const ROOTFUL: StorePlacement = StorePlacement {
        rootful: true,
        crio: true,
    };

    struct TestNode(tempfile::TempDir, Setup);

    impl TestNode {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            fs::create_dir_all(dir.path().join("etc/crio/crio.conf.d")).unwrap();
            let setup = Setup::new(Layout::new(Some(dir.path()), |_| None), Path::new(ROOT)).unwrap();
            Self(dir, setup)
        }

        fn write(&self, file: &str, text: &str) {
            fs::write(self.0.path().join("etc/crio").join(file), text).unwrap();
        }

        fn finding(&self, version: &str, placement: StorePlacement, name: &str) -> Finding {
            let version = Ok(version.to_owned());
            let found = InstalledCrio { version }.findings(&self.1, placement);
            found.into_iter().find(|finding| finding.name == name).unwrap()
        }
    }

    #[test]
    fn repair_must_be_off_in_the_last_file() {
        let node = TestNode::new();
        let finding = || node.finding("1.32.1", ROOTFUL, "cri-o-repair");
        assert!(finding().status == Status::Fail && finding().detail.contains("not set"));
        node.1.add().unwrap().apply().unwrap();
        assert_eq!(finding().status, Status::Ok);
        node.write("crio.conf.d/60.conf", "[crio]\ninternal_repair = true\n");
        assert!(finding().status == Status::Fail && finding().detail.contains("60.conf"));
        node.write("crio.conf.d/60.conf", "[crio.runtime]\nlog_level = \"info\"\n");
        assert_eq!(finding().status, Status::Ok);
        node.write("crio.conf", "[crio\n");
        assert!(node.finding("1.32.1", ROOTFUL, STORAGE).detail.contains("line 1"));
    }

    #[test]
    fn store_is_named_where_crio_reads_it() {
        let node = TestNode::new();
        let main = StorePlacement {
            rootful: false,
            crio: false,
        };
        let status = |version: &str, placement| node.finding(version, placement, STORAGE).status;
        assert_eq!(status("1.32.1", main), Status::Fail);
        node.1.add().unwrap().apply().unwrap();
        assert_eq!(status("1.32.1", main), Status::Ok);
        assert_eq!(status("1.30.1", main), Status::Ok);
        assert_eq!(status("1.32.1", ROOTFUL), Status::Fail);
        let image_store = format!("[crio]\nstorage_option = [\"overlay.imagestore={ROOT}/store\"]\n");
        node.write("crio.conf.d/99.conf", &image_store);
        assert_eq!(status("1.32.1", ROOTFUL), Status::Ok);
        fs::remove_file(&node.1.layout.storage).unwrap();
        let finding = node.finding("1.30.1", ROOTFUL, STORAGE);
        assert!(finding.detail.contains("not announced"), "{finding:?}");
    }

    #[test]
    fn file_changed_after_the_start_is_reported() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let read = [file.path().to_owned(), PathBuf::from("/nonexistent")];
        let status = |started| judge_start(started, &read).status;
        assert_eq!(status(SystemTime::now() + Duration::from_secs(60)), Status::Ok);
        assert_eq!(status(SystemTime::now() - Duration::from_secs(60)), Status::Warn);
    }

    #[test]
    fn start_of_this_process_is_in_the_past() {
        let start = start_of(Path::new("/proc/self")).unwrap().unwrap();
        let age = (SystemTime::now() + START_TIME_PRECISION)
            .duration_since(start)
            .unwrap();
        assert!(age < Duration::from_secs(24 * 60 * 60), "{age:?}");
    }

    #[test]
    fn version_is_found_in_output() {
        assert_eq!(version_in("crio version 1.37.0\nVersion: 1.37.0\n"), Some("1.37.0"));
        assert_eq!(version_in("Version:       1.24.6-3.el9\n"), Some("1.24.6-3.el9"));
        assert_eq!(version_in("none"), None);
    }
}
