//! The files of this host that say where registries are, read again when they change.

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

use super::{Entry, Error, Registries, drop_ins_in, entries_in, read};

/// How long the files are taken to be as they were.
const INTERVAL: Duration = Duration::from_secs(1);
const MAIN: &str = "registries.conf";
const DROP_INS: &str = "registries.conf.d";

/// The home directory of the user `uid`. A system service has no variable for it.
pub fn home(env: impl Fn(&str) -> Option<OsString>, uid: u32) -> Option<PathBuf> {
    let said = env("HOME").filter(|home| !home.is_empty()).map(PathBuf::from);
    said.or_else(|| (uid == 0).then(|| "/root".into()))
}

/// Which files are read: containers-registries.conf(5), as containers/image looks for them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Files {
    /// Read instead of any other registries.conf.
    named: Option<PathBuf>,
    /// The user's own directory. A registries.conf there stands for all of the system's, drop-ins too.
    own: Option<PathBuf>,
    /// The system's directories, the one that goes before others first.
    system: Vec<PathBuf>,
}

impl Files {
    /// Those of this host and user; `env` gives the variables that name others.
    pub fn usual(env: impl Fn(&str) -> Option<OsString>) -> Self {
        let named = |name: &str| env(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        Self {
            named: named("CONTAINERS_REGISTRIES_CONF"),
            own: home(&env, rustix::process::getuid().as_raw()).map(|home| home.join(".config/containers")),
            system: vec!["/etc/containers".into(), "/usr/share/containers".into()],
        }
    }

    /// Those of one directory alone.
    pub fn below(dir: &Path) -> Self {
        Self {
            system: vec![dir.to_owned()],
            ..Self::default()
        }
    }

    /// What there is, in the order in which it is read. Directories that cannot be listed are left out.
    pub fn list(&self) -> Vec<PathBuf> {
        let listed = |found: Result<Vec<PathBuf>, Error>| {
            found.unwrap_or_else(|error| {
                tracing::debug!(%error, "drop-ins for registries are left out");
                Vec::new()
            })
        };
        self.main()
            .into_iter()
            .chain(self.drop_ins().flat_map(listed))
            .collect()
    }

    /// As [`Files::list`], if all can be listed.
    fn list_all(&self) -> Result<Vec<PathBuf>, Error> {
        let mut files: Vec<PathBuf> = self.main().into_iter().collect();
        for found in self.drop_ins() {
            files.extend(found?);
        }
        Ok(files)
    }

    fn own_main(&self) -> Option<PathBuf> {
        self.own.as_ref().map(|dir| dir.join(MAIN)).filter(|file| file.exists())
    }

    fn main(&self) -> Option<PathBuf> {
        let of_system = || self.system.iter().map(|dir| dir.join(MAIN)).find(|file| file.exists());
        self.named.clone().or_else(|| self.own_main()).or_else(of_system)
    }

    fn drop_ins(&self) -> impl Iterator<Item = Result<Vec<PathBuf>, Error>> {
        let alone = self.named.is_none() && self.own_main().is_some();
        let system = self.system.iter().rev().filter(move |_| !alone);
        system.chain(&self.own).map(|dir| drop_ins_in(&dir.join(DROP_INS)))
    }
}

/// What tells one version of a file from another.
type Stamp = Option<(SystemTime, u64, u64)>;

/// A file as it was when it was last good.
#[derive(Default)]
struct Kept {
    stamp: Stamp,
    entries: Vec<Entry>,
    /// Why it never was, if so.
    unknown: Option<String>,
    /// Whether it ever was.
    known: bool,
}

#[derive(Default)]
struct State {
    files: Vec<PathBuf>,
    /// Whether these are known.
    listed: bool,
    kept: HashMap<PathBuf, Kept>,
    /// What is wrong with the directories of drop-ins, if it has been told.
    unlisted: Option<String>,
}

/// The entries in force, as the files have them by now.
pub struct RegistriesConfWatcher {
    files: Files,
    /// When they were looked at, and what was in force then. Never held while a disk is waited for.
    current: Mutex<Option<(Instant, Arc<Registries>)>>,
    /// Held by who looks. The others do not wait for him, but the first time.
    state: Mutex<State>,
}

impl RegistriesConfWatcher {
    /// Nothing is read yet.
    pub fn new(files: Files) -> Self {
        Self {
            files,
            current: Mutex::default(),
            state: Mutex::default(),
        }
    }

    /// As [`Self::current`], for tasks: the files are read where that holds up no other one.
    pub async fn current_for_task(self: &Arc<Self>) -> Arc<Registries> {
        let known = self.current.lock().clone();
        if let Some((_, registries)) = known.filter(|(at, _)| at.elapsed() < INTERVAL) {
            return registries;
        }
        let followed = Arc::clone(self);
        let current = tokio::task::spawn_blocking(move || followed.current()).await;
        // The runtime ends.
        current.unwrap_or_else(|_| self.current())
    }

    /// What is in force. The files are looked at once a second at most. One that cannot be read counts as it was when it
    /// last could be, and the log says so once; if it never could be, [`Registries::unknown`] tells it. Blocks.
    pub fn current(&self) -> Arc<Registries> {
        let known = self.current.lock().clone();
        let mut state = match known {
            Some((at, registries)) if at.elapsed() < INTERVAL => return registries,
            Some((_, registries)) => match self.state.try_lock() {
                Some(state) => state,
                None => return registries,
            },
            None => self.state.lock(),
        };
        let before = self.current.lock().clone();
        if let Some((_, registries)) = before.as_ref().filter(|(at, _)| at.elapsed() < INTERVAL) {
            return Arc::clone(registries);
        }
        let changed = state.look(&self.files);
        let registries = match before {
            Some((_, registries)) if !changed => registries,
            _ => Arc::new(state.registries(&self.files)),
        };
        *self.current.lock() = Some((Instant::now(), Arc::clone(&registries)));
        registries
    }
}

impl State {
    /// Whether anything is different.
    fn look(&mut self, files: &Files) -> bool {
        let (listed, unlisted) = match files.list_all() {
            Ok(listed) => (listed, None),
            Err(error) => (self.files.clone(), Some(error.to_string())),
        };
        let mut changed = listed != self.files || unlisted != self.unlisted;
        if let Some(error) = unlisted.as_ref().filter(|_| unlisted != self.unlisted) {
            tracing::error!(
                error,
                "registries are asked as if the files were those that there were before"
            );
        }
        self.listed |= unlisted.is_none();
        self.unlisted = unlisted;
        for file in &listed {
            let stamp = stamp(file);
            let kept = self.kept.entry(file.clone()).or_default();
            // What cannot be looked at may be there.
            if kept.stamp != stamp || stamp.is_none() && !kept.known {
                kept.stamp = stamp;
                changed |= kept.read(file);
            }
        }
        self.kept.retain(|file, _| listed.contains(file));
        self.files = listed;
        changed
    }

    fn registries(&self, all: &Files) -> Registries {
        let mut registries = Registries::default();
        if let Some(error) = self.unlisted.as_ref().filter(|_| !self.listed) {
            // Its text names the directory, too.
            let dir = all.system.first().or(all.own.as_ref()).map(|dir| dir.join(DROP_INS));
            registries.unknown = Some((dir.unwrap_or_default(), error.clone()));
        }
        for file in &self.files {
            let Some(kept) = self.kept.get(file) else { continue };
            registries.add(kept.entries.clone(), file);
            if let Some(why) = &kept.unknown {
                registries.unknown = Some((file.clone(), why.clone()));
            }
        }
        registries
    }
}

impl Kept {
    /// Whether anything is different.
    fn read(&mut self, file: &Path) -> bool {
        let read = read(file).and_then(|text| entries_in(file, &text.unwrap_or_default()));
        match read {
            Ok(entries) => {
                self.entries = entries;
                (self.unknown, self.known) = (None, true);
                true
            }
            Err(error) if self.known => {
                tracing::error!(
                    %error,
                    "registries are asked as if this file were as it last could be read: mend it; nothing needs to be restarted"
                );
                false
            }
            Err(error) => {
                let unknown = Some(error.to_string());
                let news = unknown != self.unknown;
                if news {
                    tracing::error!(%error, "no registry is asked until this file is mended; nothing needs to be restarted");
                }
                self.unknown = unknown;
                news
            }
        }
    }
}

fn stamp(file: &Path) -> Stamp {
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

    /// As it is a second later.
    fn current(followed: &RegistriesConfWatcher) -> Arc<Registries> {
        if let Some((at, _)) = followed.current.lock().as_mut() {
            *at -= INTERVAL;
        }
        followed.current()
    }

    fn location(followed: &RegistriesConfWatcher) -> Option<String> {
        current(followed)
            .in_force("r.example/a")
            .map(|(known, _)| known.entry.location.clone())
    }

    #[test]
    fn files_are_read_again_when_they_change_and_bad_ones_count_as_they_were() {
        let dir = tempfile::tempdir().unwrap();
        let (main, drop_in) = (dir.path().join(MAIN), dir.path().join(DROP_INS).join("a.conf"));
        fs::create_dir(dir.path().join(DROP_INS)).unwrap();
        let followed = RegistriesConfWatcher::new(Files::below(dir.path()));
        assert_eq!(location(&followed), None);
        fs::write(&main, entry("one")).unwrap();
        assert_eq!(location(&followed).as_deref(), Some("one"));
        fs::write(&main, "[[registry]]\nprefix = 1\n").unwrap();
        assert_eq!(location(&followed).as_deref(), Some("one"));
        fs::write(&drop_in, entry("three")).unwrap();
        assert_eq!(location(&followed).as_deref(), Some("three"));
        fs::remove_file(&drop_in).unwrap();
        fs::write(&main, entry("second")).unwrap();
        assert_eq!(location(&followed).as_deref(), Some("second"));
    }

    #[tokio::test]
    async fn tasks_go_on_while_the_files_are_read() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(MAIN), entry("one")).unwrap();
        let followed = Arc::new(RegistriesConfWatcher::new(Files::below(dir.path())));
        let ((reading, begun), (end, ended)) = (mpsc::channel(), mpsc::channel::<()>());
        let slow = Arc::clone(&followed);
        let reader = std::thread::spawn(move || {
            let _state = slow.state.lock();
            reading.send(()).unwrap();
            ended.recv().unwrap();
        });
        begun.recv().unwrap();
        // The test's only thread would be blocked otherwise.
        let waited = tokio::time::timeout(Duration::from_millis(50), followed.current_for_task()).await;
        assert!(waited.is_err());
        end.send(()).unwrap();
        reader.join().unwrap();
        assert!(followed.current_for_task().await.in_force("r.example/a").is_some());
    }

    #[test]
    fn a_file_that_never_could_be_read_is_told_until_it_is_mended() {
        let dir = tempfile::tempdir().unwrap();
        let (main, drop_ins) = (dir.path().join(MAIN), dir.path().join(DROP_INS));
        fs::write(&main, "[[registry]\n").unwrap();
        let followed = RegistriesConfWatcher::new(Files::below(dir.path()));
        let unknown = || current(&followed).unknown().map(|(path, _)| path.to_owned());
        assert_eq!(unknown(), Some(main.clone()));
        fs::write(&main, entry("one")).unwrap();
        assert_eq!(unknown(), None);
        fs::create_dir(&drop_ins).unwrap();
        let large = drop_ins.join("large.conf");
        fs::write(&large, " ".repeat((4 << 20) + 1)).unwrap();
        assert_eq!(unknown(), Some(large.clone()));
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
        assert_eq!(unknown(), Some(pipe.clone()));
        fs::remove_file(pipe).unwrap();
        std::os::unix::fs::symlink("/dev/null", drop_ins.join("none.conf")).unwrap();
        assert_eq!(unknown(), None);
        assert_eq!(location(&followed).as_deref(), Some("one"));
    }

    #[test]
    fn a_directory_that_cannot_be_listed_counts_as_it_was() {
        let dir = tempfile::tempdir().unwrap();
        let drop_ins = dir.path().join(DROP_INS);
        // As one that cannot be listed, since root can list all.
        fs::write(&drop_ins, "").unwrap();
        let followed = RegistriesConfWatcher::new(Files::below(dir.path()));
        assert!(current(&followed).unknown().is_some());
        fs::remove_file(&drop_ins).unwrap();
        fs::create_dir(&drop_ins).unwrap();
        fs::write(drop_ins.join("a.conf"), entry("one")).unwrap();
        assert_eq!(location(&followed).as_deref(), Some("one"));
        let aside = dir.path().join("aside");
        fs::rename(&drop_ins, &aside).unwrap();
        fs::write(&drop_ins, "").unwrap();
        fs::create_dir(dir.path().join("x")).unwrap();
        assert!(location(&followed).is_some() && current(&followed).unknown().is_none());
        fs::remove_file(&drop_ins).unwrap();
        fs::rename(&aside, &drop_ins).unwrap();
        assert_eq!(location(&followed).as_deref(), Some("one"));
    }

    #[test]
    fn root_is_at_home_without_a_variable() {
        assert_eq!(home(|_| None, 0), Some("/root".into()));
        assert_eq!(home(|_| None, 7), None);
        assert_eq!(home(|_| Some("/h".into()), 0), Some("/h".into()));
    }

    #[test]
    fn the_files_are_those_of_containers_image() {
        let dir = tempfile::tempdir().unwrap();
        let place = |path: &str| {
            let path = dir.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, "").unwrap();
            path
        };
        let mut files = Files {
            named: None,
            own: Some(dir.path().join("own")),
            system: vec![dir.path().join("etc"), dir.path().join("usr")],
        };
        let usr = place("usr/registries.conf");
        let late = [
            place("usr/registries.conf.d/z.conf"),
            place("etc/registries.conf.d/a.conf"),
            place("own/registries.conf.d/a.conf"),
        ];
        let listed = |first: &PathBuf, rest: &[PathBuf]| [std::slice::from_ref(first), rest].concat();
        assert_eq!(files.list(), listed(&usr, &late));
        let etc = place("etc/registries.conf");
        assert_eq!(files.list(), listed(&etc, &late));
        let own = place("own/registries.conf");
        assert_eq!(files.list(), listed(&own, &late[2..]));
        let named = place("named.conf");
        files.named = Some(named.clone());
        assert_eq!(files.list(), listed(&named, &late));
    }
}
