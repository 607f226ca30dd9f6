//! Watches the files of registries.conf on this host, by looking at them once a second while they are used.

use std::{
    collections::HashMap,
    ffi::OsString,
    fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use parking_lot::Mutex;

use super::{Registries, RegistriesConfError, RegistryEntry, list_drop_ins, parse_entries, read};

/// Shortest time between two looks at the files.
const CHECK_INTERVAL: Duration = Duration::from_secs(1);
const MAIN_FILE: &str = "registries.conf";
const DROP_IN_DIR: &str = "registries.conf.d";

/// The home directory of the user `uid`. Root's is known without `$HOME`, which a system service lacks.
pub fn home_dir(env: impl Fn(&str) -> Option<OsString>, uid: u32) -> Option<PathBuf> {
    let variable = env("HOME").filter(|home| !home.is_empty()).map(PathBuf::from);
    variable.or_else(|| (uid == 0).then(|| "/root".into()))
}

/// Where containers/image looks for registries.conf and its drop-ins (containers-registries.conf(5)).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RegistriesConfPaths {
    /// Replaces any other registries.conf.
    override_file: Option<PathBuf>,
    /// The user's directory. A registries.conf there replaces all files of the system, drop-ins too.
    user: Option<PathBuf>,
    /// The system's directories, highest precedence first.
    system: Vec<PathBuf>,
}

impl RegistriesConfPaths {
    /// The paths of this host and user. `env` looks up the environment variables that override them.
    pub fn of_host(env: impl Fn(&str) -> Option<OsString>) -> Self {
        let variable = |name: &str| env(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        Self {
            override_file: variable("CONTAINERS_REGISTRIES_CONF"),
            user: home_dir(&env, rustix::process::getuid().as_raw()).map(|home| home.join(".config/containers")),
            system: vec!["/etc/containers".into(), "/usr/share/containers".into()],
        }
    }

    /// The files of one directory only.
    pub fn in_dir(dir: &Path) -> Self {
        Self {
            system: vec![dir.to_owned()],
            ..Self::default()
        }
    }

    /// The existing files in reading order. Skips directories that cannot be listed.
    pub fn list(&self) -> Vec<PathBuf> {
        let listed = |found: Result<Vec<PathBuf>, RegistriesConfError>| {
            found.unwrap_or_else(|error| {
                tracing::debug!(%error, "failed to list drop-ins of registries.conf; ignoring them");
                Vec::new()
            })
        };
        self.main()
            .into_iter()
            .chain(self.drop_ins().flat_map(listed))
            .collect()
    }

    /// As [`RegistriesConfPaths::list`], but fails if a directory cannot be listed.
    fn list_all(&self) -> Result<Vec<PathBuf>, RegistriesConfError> {
        let mut files: Vec<PathBuf> = self.main().into_iter().collect();
        for found in self.drop_ins() {
            files.extend(found?);
        }
        Ok(files)
    }

    fn user_main(&self) -> Option<PathBuf> {
        self.user
            .as_ref()
            .map(|dir| dir.join(MAIN_FILE))
            .filter(|file| file.exists())
    }

    fn main(&self) -> Option<PathBuf> {
        let of_system = || {
            self.system
                .iter()
                .map(|dir| dir.join(MAIN_FILE))
                .find(|file| file.exists())
        };
        self.override_file
            .clone()
            .or_else(|| self.user_main())
            .or_else(of_system)
    }

    fn drop_ins(&self) -> impl Iterator<Item = Result<Vec<PathBuf>, RegistriesConfError>> {
        let is_user_only = self.override_file.is_none() && self.user_main().is_some();
        let system = self.system.iter().rev().filter(move |_| !is_user_only);
        system
            .chain(&self.user)
            .map(|dir| list_drop_ins(&dir.join(DROP_IN_DIR)))
    }
}

/// Modification time, size and inode: a change of one means that the file has changed. `None` if there is no file.
type FileVersion = Option<(SystemTime, u64, u64)>;

/// A file as it was when it was last readable.
#[derive(Default)]
struct CachedFile {
    version: FileVersion,
    entries: Vec<RegistryEntry>,
    /// Why it has never been readable, if so.
    error: Option<String>,
    has_been_read: bool,
}

#[derive(Default)]
struct WatcherState {
    /// As last listed.
    files: Vec<PathBuf>,
    has_been_listed: bool,
    cached: HashMap<PathBuf, CachedFile>,
    /// Why the drop-in directories cannot be listed, if so. It has been logged.
    listing_error: Option<String>,
}

/// Keeps the effective entries up to date.
pub struct RegistriesConfWatcher {
    paths: RegistriesConfPaths,
    /// The effective entries, and when the files were last looked at. Never held during disk I/O.
    current: Mutex<Option<(Instant, Arc<Registries>)>>,
    /// Held during a look at the files. Other callers get the previous entries meanwhile, except the first time.
    state: Mutex<WatcherState>,
}

impl RegistriesConfWatcher {
    /// Watches `paths`. Reads nothing yet.
    pub fn new(paths: RegistriesConfPaths) -> Self {
        Self {
            paths,
            current: Mutex::default(),
            state: Mutex::default(),
        }
    }

    /// As [`Self::current`], but reads the files on a blocking thread.
    pub async fn current_async(self: &Arc<Self>) -> Arc<Registries> {
        let previous = self.current.lock().clone();
        if let Some((_, registries)) = previous.filter(|(at, _)| at.elapsed() < CHECK_INTERVAL) {
            return registries;
        }
        let watcher = Arc::clone(self);
        let current = tokio::task::spawn_blocking(move || watcher.current()).await;
        // Fails only while the runtime shuts down.
        current.unwrap_or_else(|_| self.current())
    }

    /// The effective entries. Looks at the files once a second at most. A file that becomes unreadable keeps its last
    /// entries and is logged once; [`Registries::unreadable`] reports one that has never been readable. Blocks.
    pub fn current(&self) -> Arc<Registries> {
        let previous = self.current.lock().clone();
        let mut state = match previous {
            Some((at, registries)) if at.elapsed() < CHECK_INTERVAL => return registries,
            Some((_, registries)) => match self.state.try_lock() {
                Some(state) => state,
                None => return registries,
            },
            None => self.state.lock(),
        };
        let before = self.current.lock().clone();
        if let Some((_, registries)) = before.as_ref().filter(|(at, _)| at.elapsed() < CHECK_INTERVAL) {
            return Arc::clone(registries);
        }
        let changed = state.refresh(&self.paths);
        let registries = match before {
            Some((_, registries)) if !changed => registries,
            _ => Arc::new(state.registries(&self.paths)),
        };
        *self.current.lock() = Some((Instant::now(), Arc::clone(&registries)));
        registries
    }
}

impl WatcherState {
    /// Looks at the files, and returns whether anything has changed.
    fn refresh(&mut self, paths: &RegistriesConfPaths) -> bool {
        let (listed, listing_error) = match paths.list_all() {
            Ok(listed) => (listed, None),
            Err(error) => (self.files.clone(), Some(error.to_string())),
        };
        let mut changed = listed != self.files || listing_error != self.listing_error;
        if let Some(error) = listing_error.as_ref().filter(|_| listing_error != self.listing_error) {
            tracing::error!(
                error,
                "failed to list drop-ins of registries.conf; using the files listed before"
            );
        }
        self.has_been_listed |= listing_error.is_none();
        self.listing_error = listing_error;
        for file in &listed {
            let version = file_version(file);
            let cached = self.cached.entry(file.clone()).or_default();
            // A file without a version may exist but be inaccessible.
            if cached.version != version || version.is_none() && !cached.has_been_read {
                cached.version = version;
                changed |= cached.read(file);
            }
        }
        self.cached.retain(|file, _| listed.contains(file));
        self.files = listed;
        changed
    }

    fn registries(&self, paths: &RegistriesConfPaths) -> Registries {
        let mut registries = Registries::default();
        if let Some(error) = self.listing_error.as_ref().filter(|_| !self.has_been_listed) {
            // The error's text names the directory, too.
            let dir = paths.system.first().or(paths.user.as_ref());
            let dir = dir.map(|dir| dir.join(DROP_IN_DIR));
            registries.unreadable = Some((dir.unwrap_or_default(), error.clone()));
        }
        for file in &self.files {
            let Some(cached) = self.cached.get(file) else { continue };
            registries.add(cached.entries.clone(), file);
            if let Some(error) = &cached.error {
                registries.unreadable = Some((file.clone(), error.clone()));
            }
        }
        registries
    }
}

impl CachedFile {
    /// Reads the file, and returns whether anything has changed.
    fn read(&mut self, file: &Path) -> bool {
        let read = read(file).and_then(|text| parse_entries(file, &text.unwrap_or_default()));
        match read {
            Ok(entries) => {
                self.entries = entries;
                (self.error, self.has_been_read) = (None, true);
                true
            }
            Err(error) if self.has_been_read => {
                tracing::error!(
                    %error,
                    "failed to read registries.conf file; using its last readable version until it is fixed"
                );
                false
            }
            Err(error) => {
                let message = Some(error.to_string());
                let is_new = message != self.error;
                if is_new {
                    tracing::error!(
                        %error,
                        "failed to read registries.conf file; sending no registry requests until it is fixed"
                    );
                }
                self.error = message;
                is_new
            }
        }
    }
}

fn file_version(file: &Path) -> FileVersion {
    let meta = fs::metadata(file).ok()?;
    Some((meta.modified().ok()?, meta.len(), meta.ino()))
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    fn entry(location: &str) -> String {
        format!("[[registry]]\nprefix = \"r.example\"\nlocation = \"{location}\"\n")
    }

    /// The entries after another look at the files.
    fn current(watcher: &RegistriesConfWatcher) -> Arc<Registries> {
        if let Some((at, _)) = watcher.current.lock().as_mut() {
            *at -= CHECK_INTERVAL;
        }
        watcher.current()
    }

    fn location(watcher: &RegistriesConfWatcher) -> Option<String> {
        current(watcher)
            .entry_for("r.example/a")
            .map(|(known, _)| known.entry.location.clone())
    }

    #[test]
    fn changed_files_are_read_again_and_malformed_ones_keep_their_entries() {
        let dir = tempfile::tempdir().unwrap();
        let (main, drop_in) = (dir.path().join(MAIN_FILE), dir.path().join(DROP_IN_DIR).join("a.conf"));
        fs::create_dir(dir.path().join(DROP_IN_DIR)).unwrap();
        let watcher = RegistriesConfWatcher::new(RegistriesConfPaths::in_dir(dir.path()));
        assert_eq!(location(&watcher), None);
        fs::write(&main, entry("one")).unwrap();
        assert_eq!(location(&watcher).as_deref(), Some("one"));
        fs::write(&main, "[[registry]]\nprefix = 1\n").unwrap();
        assert_eq!(location(&watcher).as_deref(), Some("one"));
        fs::write(&drop_in, entry("three")).unwrap();
        assert_eq!(location(&watcher).as_deref(), Some("three"));
        fs::remove_file(&drop_in).unwrap();
        fs::write(&main, entry("second")).unwrap();
        assert_eq!(location(&watcher).as_deref(), Some("second"));
    }

    #[tokio::test]
    async fn reading_the_files_blocks_no_task() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(MAIN_FILE), entry("one")).unwrap();
        let watcher = Arc::new(RegistriesConfWatcher::new(RegistriesConfPaths::in_dir(dir.path())));
        let ((reading, begun), (end, ended)) = (mpsc::channel(), mpsc::channel::<()>());
        let slow = Arc::clone(&watcher);
        let reader = std::thread::spawn(move || {
            let _state = slow.state.lock();
            reading.send(()).unwrap();
            ended.recv().unwrap();
        });
        begun.recv().unwrap();
        // Blocking would stop the test's only thread.
        let waited = tokio::time::timeout(Duration::from_millis(50), watcher.current_async()).await;
        assert!(waited.is_err());
        end.send(()).unwrap();
        reader.join().unwrap();
        assert!(watcher.current_async().await.entry_for("r.example/a").is_some());
    }

    #[test]
    fn file_that_was_never_readable_is_reported_until_it_is_fixed() {
        let dir = tempfile::tempdir().unwrap();
        let (main, drop_ins) = (dir.path().join(MAIN_FILE), dir.path().join(DROP_IN_DIR));
        fs::write(&main, "[[registry]\n").unwrap();
        let watcher = RegistriesConfWatcher::new(RegistriesConfPaths::in_dir(dir.path()));
        let unreadable = || current(&watcher).unreadable().map(|(path, _)| path.to_owned());
        assert_eq!(unreadable(), Some(main.clone()));
        fs::write(&main, entry("one")).unwrap();
        assert_eq!(unreadable(), None);
        fs::create_dir(&drop_ins).unwrap();
        let large = drop_ins.join("large.conf");
        fs::write(&large, " ".repeat((4 << 20) + 1)).unwrap();
        assert_eq!(unreadable(), Some(large.clone()));
        fs::remove_file(large).unwrap();
        let pipe = drop_ins.join("pipe.conf");
        rustix::fs::mknodat(
            rustix::fs::CWD,
            &pipe,
            rustix::fs::FileType::Fifo,
            rustix::fs::Mode::RUSR,
            0,
        )
        .unwrap();
        assert_eq!(unreadable(), Some(pipe.clone()));
        fs::remove_file(pipe).unwrap();
        std::os::unix::fs::symlink("/dev/null", drop_ins.join("none.conf")).unwrap();
        assert_eq!(unreadable(), None);
        assert_eq!(location(&watcher).as_deref(), Some("one"));
    }

    #[test]
    fn directory_that_cannot_be_listed_keeps_its_entries() {
        let dir = tempfile::tempdir().unwrap();
        let drop_ins = dir.path().join(DROP_IN_DIR);
        // A file in place of the directory, since root can list any directory.
        fs::write(&drop_ins, "").unwrap();
        let watcher = RegistriesConfWatcher::new(RegistriesConfPaths::in_dir(dir.path()));
        assert!(current(&watcher).unreadable().is_some());
        fs::remove_file(&drop_ins).unwrap();
        fs::create_dir(&drop_ins).unwrap();
        fs::write(drop_ins.join("a.conf"), entry("one")).unwrap();
        assert_eq!(location(&watcher).as_deref(), Some("one"));
        let aside = dir.path().join("aside");
        fs::rename(&drop_ins, &aside).unwrap();
        fs::write(&drop_ins, "").unwrap();
        fs::create_dir(dir.path().join("x")).unwrap();
        assert!(location(&watcher).is_some() && current(&watcher).unreadable().is_none());
        fs::remove_file(&drop_ins).unwrap();
        fs::rename(&aside, &drop_ins).unwrap();
        assert_eq!(location(&watcher).as_deref(), Some("one"));
    }

    #[test]
    fn home_of_root_needs_no_variable() {
        assert_eq!(home_dir(|_| None, 0), Some("/root".into()));
        assert_eq!(home_dir(|_| None, 7), None);
        assert_eq!(home_dir(|_| Some("/h".into()), 0), Some("/h".into()));
    }

    #[test]
    fn files_and_their_order_match_containers_image() {
        let dir = tempfile::tempdir().unwrap();
        let touch = |path: &str| {
            let path = dir.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, "").unwrap();
            path
        };
        let mut paths = RegistriesConfPaths {
            override_file: None,
            user: Some(dir.path().join("own")),
            system: vec![dir.path().join("etc"), dir.path().join("usr")],
        };
        let usr = touch("usr/registries.conf");
        let drop_ins_by_order = [
            touch("usr/registries.conf.d/z.conf"),
            touch("etc/registries.conf.d/a.conf"),
            touch("own/registries.conf.d/a.conf"),
        ];
        let listed = |first: &PathBuf, rest: &[PathBuf]| [std::slice::from_ref(first), rest].concat();
        assert_eq!(paths.list(), listed(&usr, &drop_ins_by_order));
        let etc = touch("etc/registries.conf");
        assert_eq!(paths.list(), listed(&etc, &drop_ins_by_order));
        let own = touch("own/registries.conf");
        assert_eq!(paths.list(), listed(&own, &drop_ins_by_order[2..]));
        let named = touch("named.conf");
        paths.override_file = Some(named.clone());
        assert_eq!(paths.list(), listed(&named, &drop_ins_by_order));
    }
}
