//! Whether CRI-O finds the store, and keeps its images.

use std::{
    fs, io,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use serde::Deserialize;

use super::{
    Finding, command,
    door::Door,
    kernel,
    storage::{InFiles, files_in, main_file},
};
use crate::{
    error_chain::ErrorChain,
    setup::{
        Error, Setup,
        layout::{self, Layout},
        programs::{Place, Programs},
        storage::Stores,
    },
};

const PATIENCE: Duration = Duration::from_secs(20);
const STORAGE: &str = "cri-o-storage";
const AGAIN: &str = "run `nydus-store setup`, with the daemon's --root if it has one, and `systemctl restart crio`";
/// The kernel tells when it was started in whole seconds.
const UNCERTAINTY: Duration = Duration::from_secs(1);

/// What is looked at here of CRI-O's configuration.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct File {
    crio: Root,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Root {
    internal_repair: Option<bool>,
    storage_option: Vec<String>,
}

/// What all of CRI-O's configuration says, and where.
#[derive(Debug, Default)]
struct Configuration {
    /// The last file counts.
    internal_repair: Option<(bool, PathBuf)>,
    /// Those of all files.
    storage_options: Vec<String>,
}

impl Configuration {
    fn read(layout: &Layout) -> Result<Self, Error> {
        let mut all = Self::default();
        for path in files(layout) {
            let text = layout::read(&path)?.unwrap_or_default();
            let parsed: Result<File, _> = toml::from_str(&text);
            let File { crio } = parsed.map_err(|source| Error::Crio {
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

    fn has(&self, option: &str) -> bool {
        let (name, value) = option.split_once('=').unwrap_or((option, ""));
        let short = |name: &str| name.rsplit('.').next().map(str::to_owned);
        self.storage_options.iter().any(|known| {
            let known = known.split_once('=').unwrap_or((known, ""));
            short(known.0) == short(name) && known.1 == value
        })
    }
}

/// The files of CRI-O's configuration, in the order in which they are read.
fn files(layout: &Layout) -> Vec<PathBuf> {
    let mut files = vec![layout.crio.join("crio.conf")];
    files.extend(files_in(&layout.crio_drop_ins()));
    files
}

/// How CRI-O announces pulls; nothing if that cannot be told, or there is no CRI-O.
pub struct Crio {
    version: Result<String, String>,
}

/// Asks the host's CRI-O, if there is one.
pub fn look(programs: &Programs) -> Option<Crio> {
    let program = match (&programs.crio, programs.has_crio) {
        (Some(program), _) => program,
        (None, true) => {
            let version = Err("there is /etc/crio, but no `crio`".to_owned());
            return Some(Crio { version });
        }
        (None, false) => return None,
    };
    let version = match command::run(Command::new(&program.path).arg("--version"), PATIENCE) {
        Ok(printed) if printed.status.success() => number_in(&printed.stdout)
            .map(str::to_owned)
            .ok_or_else(|| "`crio --version` gives no version".to_owned()),
        Ok(printed) => Err(format!("`crio --version` fails: {}", printed.stderr)),
        Err(error) => Err(format!("`crio --version` fails: {error}")),
    };
    Some(Crio { version })
}

/// The first word that is a version, as in `crio version 1.31.0`.
fn number_in(printed: &str) -> Option<&str> {
    printed.split_whitespace().find(|word| kernel::number(word).is_some())
}

impl Crio {
    /// How it announces pulls, if that can be told.
    pub fn door(&self) -> Option<Door> {
        Some(Door::of_crio(kernel::number(self.version.as_ref().ok()?)?))
    }

    /// About its version, its storage, and whether it keeps its images.
    pub fn findings(&self, setup: &Setup, place: Place) -> Vec<Finding> {
        let version = match (&self.version, self.door()) {
            (Ok(version), Some(door)) => Finding::ok("cri-o", format!("{version}: {}", door.words())),
            (Ok(said) | Err(said), _) => {
                Finding::warn("cri-o", said.clone(), "nydus-store is tested with CRI-O 1.32 and 1.37")
            }
        };
        let judged = || -> Result<Vec<Finding>, Error> {
            let configuration = Configuration::read(&setup.layout)?;
            let files = InFiles::read(&setup.layout, main_file(&setup.layout), &setup.stores)?;
            let storage = judge_storage(&setup.stores, place, files, &configuration, self.door());
            Ok(vec![
                storage.unwrap_or_else(|| restarted(&setup.layout)),
                judge_repair(&configuration),
            ])
        };
        let judged = judged().unwrap_or_else(|error| {
            let text = ErrorChain(&error).to_string();
            vec![Finding::fail(STORAGE, text, "mend the file, or CRI-O does not start")]
        });
        std::iter::once(version).chain(judged).collect()
    }
}

/// What is wrong with what CRI-O is told of the stores, if anything is.
fn judge_storage(
    stores: &Stores,
    place: Place,
    files: InFiles,
    configuration: &Configuration,
    door: Option<Door>,
) -> Option<Finding> {
    let [images, layers] = stores.driver_options();
    // Not all that Podman reads is read by this CRI-O.
    let named = !place.crio && files.names_images(place);
    if !named && !configuration.has(&images) {
        let detail = format!("CRI-O does not look for images in {}", stores.images);
        return Some(Finding::fail(STORAGE, detail, AGAIN));
    }
    let announced = files.main.layers || configuration.has(&layers);
    if door == Some(Door::LayerStore) && !announced {
        let detail = format!(
            "CRI-O does not look for layers in {}, so that pulls are not announced",
            stores.layers
        );
        return Some(Finding::fail(STORAGE, detail, AGAIN));
    }
    None
}

fn judge_repair(configuration: &Configuration) -> Finding {
    let name = "cri-o-repair";
    let detail = match &configuration.internal_repair {
        Some((false, _)) => {
            return Finding::ok(name, "CRI-O does not \"repair\" its storage when it starts");
        }
        Some((true, path)) => format!("{} has `internal_repair = true`", path.display()),
        None => "`internal_repair` is not set, which means true".to_owned(),
    };
    Finding::fail(
        name,
        format!(
            "{detail}: after an unclean stop CRI-O would delete all images and containers of this node, as soon as \
             there is a container of a lazy image"
        ),
        "run `nydus-store setup`, which sets it to false in crio.conf.d; if a later file there sets it to true, take \
         that line out. Then `systemctl restart crio`",
    )
}

/// Whether a CRI-O that runs has read its files as they are now.
fn restarted(layout: &Layout) -> Finding {
    let Some(started) = running_since() else {
        return Finding::ok(STORAGE, "CRI-O will find the store when it is started");
    };
    let mut read = vec![main_file(layout).to_owned()];
    read.extend(layout.rootful_drop_ins.iter().flat_map(|dir| files_in(dir)));
    read.extend(files(layout));
    judge_start(started, &read)
}

fn judge_start(started: SystemTime, read: &[PathBuf]) -> Finding {
    let changed = |path: &Path| path.metadata().and_then(|data| data.modified());
    let newer = read
        .iter()
        .find(|path| changed(path).is_ok_and(|changed| changed > started + UNCERTAINTY));
    match newer {
        Some(path) => Finding::warn(
            STORAGE,
            format!(
                "{} was changed after CRI-O was started, which reads it only then",
                path.display()
            ),
            "`systemctl restart crio`; a reload (SIGHUP) reads registries.conf only",
        ),
        None => Finding::ok(STORAGE, "CRI-O finds the store"),
    }
}

/// When the CRI-O that runs was started.
fn running_since() -> Option<SystemTime> {
    let processes = fs::read_dir("/proc").ok()?.flatten();
    let is_crio = |dir: &PathBuf| fs::read_to_string(dir.join("comm")).is_ok_and(|name| name.trim_end() == "crio");
    let process = processes.map(|entry| entry.path()).find(is_crio)?;
    start_of(&process).ok().flatten()
}

/// When the process of a directory of /proc was started (proc_pid_stat(5), field 22, in clock ticks since boot).
fn start_of(process: &Path) -> io::Result<Option<SystemTime>> {
    let (stat, kernel) = (
        fs::read_to_string(process.join("stat"))?,
        fs::read_to_string("/proc/stat")?,
    );
    // SAFETY: sysconf takes a number, and has no other requirements.
    let ticks_per_second = unsafe { libc::sysconf(libc::_SC_CLK_TCK) };
    // The name of the process, field 2, is in parentheses and may hold anything.
    let ticks = stat
        .rsplit_once(')')
        .and_then(|(_, rest)| rest.split_whitespace().nth(19));
    let boot = kernel.lines().find_map(|line| line.strip_prefix("btime "));
    let number = |text: Option<&str>| text.and_then(|text| text.trim().parse::<u64>().ok());
    let (Some(ticks), Some(boot), Ok(per_second @ 1..)) =
        (number(ticks), number(boot), u64::try_from(ticks_per_second))
    else {
        return Ok(None);
    };
    Ok(Some(UNIX_EPOCH + Duration::from_secs(boot + ticks / per_second)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Status;

    const ROOT: &str = "/var/lib/nydus-store";
    const ROOTFUL: Place = Place {
        rootful: true,
        crio: true,
    };

    struct Node(tempfile::TempDir, Setup);

    impl Node {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            fs::create_dir_all(dir.path().join("etc/crio/crio.conf.d")).unwrap();
            let setup = Setup::new(Layout::new(Some(dir.path()), |_| None), Path::new(ROOT)).unwrap();
            Self(dir, setup)
        }

        fn write(&self, file: &str, text: &str) {
            fs::write(self.0.path().join("etc/crio").join(file), text).unwrap();
        }

        fn finding(&self, version: &str, place: Place, name: &str) -> Finding {
            let version = Ok(version.to_owned());
            let found = Crio { version }.findings(&self.1, place);
            found.into_iter().find(|finding| finding.name == name).unwrap()
        }
    }

    #[test]
    fn repair_must_be_off_in_the_last_file() {
        let node = Node::new();
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
        let node = Node::new();
        let main = Place {
            rootful: false,
            crio: false,
        };
        let status = |version: &str, place| node.finding(version, place, STORAGE).status;
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
    fn files_that_changed_after_the_start() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let read = [file.path().to_owned(), PathBuf::from("/nonexistent")];
        let status = |started| judge_start(started, &read).status;
        assert_eq!(status(SystemTime::now() + Duration::from_secs(60)), Status::Ok);
        assert_eq!(status(SystemTime::now() - Duration::from_secs(60)), Status::Warn);
    }

    #[test]
    fn start_of_this_process_is_in_the_past() {
        let start = start_of(Path::new("/proc/self")).unwrap().unwrap();
        let age = (SystemTime::now() + UNCERTAINTY).duration_since(start).unwrap();
        assert!(age < Duration::from_secs(24 * 60 * 60), "{age:?}");
    }

    #[test]
    fn version_in_what_is_printed() {
        assert_eq!(number_in("crio version 1.37.0\nVersion: 1.37.0\n"), Some("1.37.0"));
        assert_eq!(number_in("Version:       1.24.6-3.el9\n"), Some("1.24.6-3.el9"));
        assert_eq!(number_in("none"), None);
    }
}
