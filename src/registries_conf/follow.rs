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

use super::{Entry, Registries, drop_ins_in, entries_in, read};

/// How long the files are taken to be as they were.
const INTERVAL: Duration = Duration::from_secs(1);
const MAIN: &str = "registries.conf";
const DROP_INS: &str = "registries.conf.d";

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
            own: named("HOME").map(|home| home.join(".config/containers")),
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

    /// What there is, in the order in which it is read.
    pub fn list(&self) -> Vec<PathBuf> {
        let own = self.own.as_ref().map(|dir| dir.join(MAIN)).filter(|file| file.exists());
        let alone = self.named.is_none() && own.is_some();
        let of_system = || self.system.iter().map(|dir| dir.join(MAIN)).find(|file| file.exists());
        let main = self.named.clone().or(own).or_else(of_system);
        let system = self.system.iter().rev().filter(|_| !alone);
        let mut files: Vec<PathBuf> = main.into_iter().collect();
        for dir in system.chain(&self.own) {
            match drop_ins_in(&dir.join(DROP_INS)) {
                Ok(found) => files.extend(found),
                Err(error) => tracing::debug!(%error, "drop-ins for registries are left out"),
            }
        }
        files
    }
}

/// What tells one version of a file from another.
type Stamp = Option<(SystemTime, u64, u64)>;

/// A file as it was when it was last good.
#[derive(Default)]
struct Kept {
    stamp: Stamp,
    entries: Vec<Entry>,
    searched: Vec<String>,
}

#[derive(Default)]
struct State {
    checked: Option<Instant>,
    files: Vec<PathBuf>,
    kept: HashMap<PathBuf, Kept>,
    registries: Arc<Registries>,
}

/// The entries in force, as the files have them by now.
pub struct Followed {
    files: Files,
    state: Mutex<State>,
}

impl Followed {
    /// Nothing is read yet.
    pub fn new(files: Files) -> Self {
        let state = Mutex::default();
        Self { files, state }
    }

    /// What is in force. The files are looked at once a second at most. One that cannot be read counts as it was when it
    /// last could be, and the log says so once.
    pub fn current(&self) -> Arc<Registries> {
        let mut state = self.state.lock();
        if state.checked.is_none_or(|at| at.elapsed() >= INTERVAL) {
            state.checked = Some(Instant::now());
            state.look(self.files.list());
        }
        Arc::clone(&state.registries)
    }
}

impl State {
    fn look(&mut self, files: Vec<PathBuf>) {
        let mut changed = files != self.files;
        for file in &files {
            let stamp = stamp(file);
            let kept = self.kept.entry(file.clone()).or_default();
            if kept.stamp != stamp {
                kept.stamp = stamp;
                kept.read(file);
                changed = true;
            }
        }
        if !changed {
            return;
        }
        self.kept.retain(|file, _| files.contains(file));
        let mut registries = Registries::default();
        for file in &files {
            if let Some(Kept { entries, searched, .. }) = self.kept.get(file) {
                registries.add((entries.clone(), searched.clone()), file, false);
            }
        }
        self.registries = Arc::new(registries);
        self.files = files;
    }
}

impl Kept {
    fn read(&mut self, file: &Path) {
        let read = read(file).and_then(|text| entries_in(file, &text.unwrap_or_default()));
        match read {
            Ok((entries, searched)) => (self.entries, self.searched) = (entries, searched),
            Err(error) => tracing::error!(
                %error,
                "registries are asked as if this file were as it last could be read: mend it; nothing needs to be restarted"
            ),
        }
    }
}

fn stamp(file: &Path) -> Stamp {
    let meta = fs::metadata(file).ok()?;
    Some((meta.modified().ok()?, meta.len(), meta.ino()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(location: &str) -> String {
        format!("[[registry]]\nprefix = \"r.example\"\nlocation = \"{location}\"\n")
    }

    fn location(followed: &Followed) -> Option<String> {
        followed.state.lock().checked = None;
        let current = followed.current();
        current
            .in_force("r.example/a")
            .map(|(known, _)| known.entry.location.clone())
    }

    #[test]
    fn files_are_read_again_when_they_change_and_bad_ones_count_as_they_were() {
        let dir = tempfile::tempdir().unwrap();
        let (main, drop_in) = (dir.path().join(MAIN), dir.path().join(DROP_INS).join("a.conf"));
        fs::create_dir(dir.path().join(DROP_INS)).unwrap();
        let followed = Followed::new(Files::below(dir.path()));
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
