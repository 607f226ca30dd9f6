//! Updates the set-up when the daemon starts. An upgraded Podman may read the store from another file, and an upgraded
//! nydus-store may write other entries.

use std::{
    fmt,
    path::{Path, PathBuf},
};

use super::{
    Setup, SetupError,
    change::ChangeKind,
    layout::{self, Layout},
};

/// The result of an update.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UpdatedSetup {
    /// The files that were written or deleted.
    pub files: Vec<(ChangeKind, PathBuf)>,
    /// Hints for the administrator.
    pub notes: Vec<String>,
}

/// Applies [`Setup::add`] again if the store of `root` was set up on this host before. Returns the changes, or `None`
/// if nothing changed.
///
/// # Errors
/// Those of [`Setup::add`] and [`Plan::apply`](super::Plan::apply).
pub fn update_if_needed(layout: Layout, root: &Path) -> Result<Option<UpdatedSetup>, SetupError> {
    let setup = Setup::new(layout, root)?;
    if !is_set_up(&setup)? {
        return Ok(None);
    }
    let plan = setup.add()?;
    let changed = plan.changes.iter().map(|change| (change.kind(), change.path.clone()));
    let files: Vec<_> = changed.filter(|(kind, _)| *kind != ChangeKind::Unchanged).collect();
    if files.is_empty() {
        return Ok(None);
    }
    plan.apply()?;
    Ok(Some(UpdatedSetup {
        files,
        notes: plan.notes,
    }))
}

/// Whether Podman's configuration names the store, also by an earlier version's entry.
fn is_set_up(setup: &Setup) -> Result<bool, SetupError> {
    if setup.named()?.any() {
        return Ok(true);
    }
    let Some(path) = setup.layout.rootful_drop_in() else {
        return Ok(false);
    };
    // The drop-in may name another root.
    let named = |text: String| {
        let table: toml::Table = text.parse().ok()?;
        let list = table.get("storage")?.get("options")?.get("additionalimagestores")?;
        Some(
            list.as_array()?
                .iter()
                .any(|value| value.as_str() == Some(&setup.stores.images)),
        )
    };
    Ok(layout::read_optional(&path)?.and_then(named).unwrap_or(false))
}

impl fmt::Display for UpdatedSetup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let file = |(kind, path): &(ChangeKind, PathBuf)| format!("{} {}", path.display(), kind.word());
        let all = self.files.iter().map(file).chain(self.notes.iter().cloned());
        f.write_str(&all.collect::<Vec<_>>().join("; "))
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::setup::storage;

    const ROOT: &str = "/var/lib/nydus-store";
    const STORAGE: &str = "etc/containers/storage.conf";
    const ROOTFUL: &str = "etc/containers/storage.rootful.conf.d/50-nydus-store.conf";
    const REGISTRIES: &str = "etc/containers/registries.conf.d/zz-nydus-store.conf";
    const CRIO: &str = "etc/crio/crio.conf.d/50-nydus-store.conf";

    /// A sysroot with a fake Podman, which reads storage.rootful.conf.d or not.
    struct TestHost(tempfile::TempDir);

    impl TestHost {
        fn new() -> Self {
            let host = Self(tempfile::tempdir().unwrap());
            host.podman(false);
            host
        }

        fn podman(&self, new: bool) {
            let name = if new {
                "go.podman.io/storage/pkg/configfile.ParseTOML"
            } else {
                ""
            };
            self.write("usr/bin/podman", &format!("\x7fELF{name}"));
        }

        fn write(&self, path: &str, text: &str) {
            let path = self.0.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }

        fn read(&self, path: &str) -> Option<String> {
            fs::read_to_string(self.0.path().join(path)).ok()
        }

        fn layout(&self) -> Layout {
            Layout::new(Some(self.0.path()), |_| None)
        }

        fn setup(&self) -> Setup {
            Setup::new(self.layout(), Path::new(ROOT)).unwrap()
        }

        fn update(&self) -> Option<UpdatedSetup> {
            update_if_needed(self.layout(), Path::new(ROOT)).unwrap()
        }
    }

    #[test]
    fn entry_follows_the_installed_podman() {
        let host = TestHost::new();
        assert_eq!(host.update(), None, "it was not set up");
        host.setup().add().unwrap().apply().unwrap();
        assert_eq!(host.update(), None);
        let before = host.read(STORAGE).unwrap();

        host.podman(true);
        let updated = host.update().unwrap();
        assert_eq!(
            updated.files,
            [
                (ChangeKind::New, host.0.path().join(ROOTFUL)),
                (ChangeKind::Deleted, host.0.path().join(STORAGE))
            ]
        );
        assert!(updated.to_string().contains("50-nydus-store.conf new; "), "{updated}");
        assert!(host.read(ROOTFUL).unwrap().contains("{append=true}"));
        assert_eq!(host.update(), None);

        host.podman(false);
        assert!(host.update().is_some());
        assert_eq!((host.read(STORAGE), host.read(ROOTFUL)), (Some(before), None));
    }

    #[test]
    fn crio_keeps_the_store_when_podman_is_upgraded() {
        let host = TestHost::new();
        host.write("usr/bin/crio", "\x7fELF");
        host.setup().add().unwrap().apply().unwrap();
        assert!(!host.read(CRIO).unwrap().contains("storage_option"));
        host.podman(true);
        let updated = host.update().unwrap();
        assert!(
            host.read(CRIO)
                .unwrap()
                .contains("overlay.imagestore=/var/lib/nydus-store/store")
        );
        assert!(
            updated.notes.iter().any(|note| note.contains("systemctl restart crio")),
            "{updated}"
        );
    }

    #[test]
    fn set_up_of_an_earlier_version_is_replaced() {
        let host = TestHost::new();
        host.write(
            STORAGE,
            &format!(
                "{}\n# Added by nydus-store setup.\n[storage.options]\n\
                 additionallayerstores = [\"{ROOT}/store:ref\"]\n",
                storage::SKELETON
            ),
        );
        host.write(
            REGISTRIES,
            "# Written by nydus-store setup, anew each time it runs: settings of your own belong in another file.\n\
             [[registry]]\nprefix = \"r.example\"\nlocation = \"r.example\"\n\
             [[registry.mirror]]\nlocation = \"127.0.0.1:5055/r.example\"\ninsecure = true\n",
        );
        host.update().unwrap();
        let registries = host.read(REGISTRIES).unwrap();
        assert!(
            !registries.contains("5055") && registries.contains("auth-helper"),
            "{registries}"
        );
        let storage = host.read(STORAGE).unwrap();
        assert!(
            !storage.contains("store:ref") && storage.contains("/layers:ref"),
            "{storage}"
        );
        host.setup().remove().unwrap().apply().unwrap();
        assert_eq!((host.read(STORAGE), host.read(REGISTRIES)), (None, None));
    }

    #[test]
    fn set_up_of_another_root_is_unchanged() {
        let host = TestHost::new();
        host.podman(true);
        let other = Setup::new(host.layout(), Path::new("/srv/other")).unwrap();
        other.add().unwrap().apply().unwrap();
        host.podman(false);
        assert_eq!(host.update(), None);
    }
}
