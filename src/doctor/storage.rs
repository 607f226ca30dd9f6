//! Whether the store is named where Podman reads it, and is there.

use std::path::Path;

use super::{
    Finding,
    door::Door,
    podman::{Info, Podman},
};
use crate::{
    error_chain::ErrorChain,
    fuse::mountpoint,
    setup::{
        Error, Setup,
        layout::{self, Layout},
        programs::Place,
        storage::{self, Named, Stores},
    },
    store::layout::{STORE_DIR, missing_part},
};

const NAME: &str = "storage";
const AGAIN: &str = "run `nydus-store setup`, with the daemon's --root if it has one";

/// What the files that containers/storage reads have of the stores.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct InFiles {
    /// storage.conf.
    pub main: Named,
    /// Whether a file in storage.rootful.conf.d has the image store.
    pub rootful: bool,
}

impl InFiles {
    /// Reads the files; `main` is the storage.conf in force.
    pub fn read(layout: &Layout, main: &Path, stores: &Stores) -> Result<Self, Error> {
        let text = layout::read(main)?.unwrap_or_default();
        let main = storage::File {
            path: main,
            text: &text,
        }
        .names(stores)?;
        let mut rootful = false;
        for path in layout.rootful_drop_ins.iter().flat_map(|dir| files_in(dir)) {
            let text = layout::read(&path)?.unwrap_or_default();
            rootful |= storage::File {
                path: &path,
                text: &text,
            }
            .names(stores)?
            .images;
        }
        Ok(Self { main, rootful })
    }

    /// Whether the image store is named where `place` says.
    pub fn names_images(self, place: Place) -> bool {
        if place.rootful { self.rootful } else { self.main.images }
    }
}

/// The files of a directory in order; none if it cannot be read.
pub fn files_in(dir: &Path) -> Vec<std::path::PathBuf> {
    let entries = dir.read_dir().into_iter().flatten().flatten();
    let mut files: Vec<_> = entries
        .map(|entry| entry.path())
        .filter(|path| path.is_file())
        .collect();
    files.sort();
    files
}

/// The storage.conf that is read, as far as the layout tells.
pub fn main_file(layout: &Layout) -> &Path {
    let files = [&layout.storage, &layout.vendor_storage];
    files.into_iter().find(|file| file.exists()).unwrap_or(&layout.storage)
}

/// About Podman's storage, if there is a Podman, or else about the files.
pub fn look(setup: &Setup, place: Place, podman: &Podman) -> Finding {
    let Setup { layout, stores, .. } = setup;
    let info = podman.info.as_ref().ok();
    if let (true, Err(message)) = (podman.is_installed(), &podman.info) {
        return Finding::fail(
            NAME,
            format!("`podman info` fails: {message}"),
            "mend what it says. If it cannot find the store's directory, run `nydus-store setup`; if it hangs, the \
             store's mount may be dead: restart the daemon",
        );
    }
    let main = match info {
        Some(info) if !info.store.config_file.as_os_str().is_empty() => info.store.config_file.as_path(),
        _ => main_file(layout),
    };
    match InFiles::read(layout, main, stores) {
        Ok(files) => judge(stores, place, files, info, podman.door()),
        Err(error) => Finding::fail(NAME, ErrorChain(&error).to_string(), "mend the file"),
    }
}

fn judge(stores: &Stores, place: Place, files: InFiles, info: Option<&Info>, door: Option<Door>) -> Finding {
    let store = &stores.images;
    if let Some(finding) = not_in_force(store, files.names_images(place), place, info) {
        return finding;
    }
    if files.main.earlier {
        return Finding::warn(NAME, "storage.conf has the entry of an earlier version too", AGAIN);
    }
    if place.rootful && files.main.any() {
        let detail = "storage.conf names the store, which this Podman reads for every user: no command of another user \
                      works, since the store is closed to them";
        return Finding::warn(
            NAME,
            detail,
            format!("{AGAIN}: it moves the entry to storage.rootful.conf.d"),
        );
    }
    if door == Some(Door::LayerStore) {
        if !files.main.layers {
            let detail = format!(
                "storage.conf does not name {} as an additional layer store",
                stores.layers
            );
            return Finding::fail(NAME, format!("{detail}, so that pulls are not announced"), AGAIN);
        }
        if files.main.layers_behind {
            let detail = "another additional layer store comes before ours, and Podman 4 asks the first one only";
            return Finding::fail(NAME, detail, format!("{AGAIN}: it puts ours first"));
        }
    }
    Finding::ok(NAME, format!("{store} is an additional image store"))
}

/// Without `info` the files count. Of several stores Podman shows one.
fn not_in_force(store: &str, named: bool, place: Place, info: Option<&Info>) -> Option<Finding> {
    let file = if place.rootful {
        "storage.rootful.conf.d"
    } else {
        "storage.conf"
    };
    let fail = |detail: String| {
        let advice = format!(
            "{AGAIN}. If it has been run, another file is in force: $CONTAINERS_STORAGE_CONF, \
             ~/.config/containers/storage.conf, or a later drop-in of storage.conf"
        );
        Some(Finding::fail(NAME, detail, advice))
    };
    let Some(info) = info else {
        return if named {
            None
        } else {
            fail(format!("{file} does not name {store}"))
        };
    };
    let driver = &info.store.graph_driver_name;
    if driver != "overlay" {
        return Some(Finding::fail(
            NAME,
            format!("Podman's storage driver is {driver}, which cannot use the store"),
            "set `driver = \"overlay\"` in storage.conf. Podman keeps the driver that it was first used with: `podman \
             system reset` deletes all images and containers and makes it choose anew",
        ));
    }
    match info.image_store() {
        Some(shown) if shown.trim_end_matches('/') == store => None,
        Some(_) if named => None,
        Some(shown) => fail(format!("Podman looks for images in {shown}, but not in {store}")),
        None => fail(format!("Podman does not look for images in {store} ({file})")),
    }
}

/// About the files of the store: without one of them, no command of Podman works as soon as the store is named.
pub fn files(root: &Path) -> Finding {
    let name = "store";
    let store = root.join(STORE_DIR);
    // A daemon of an earlier version, which may hang.
    if let Ok(Some(kind)) = mountpoint::mounted_on(&store) {
        let detail = format!("a file system of type {kind} is mounted on {}", store.display());
        return Finding::fail(
            name,
            detail,
            format!("unmount it (`systemctl stop nydus-store`), and {AGAIN}"),
        );
    }
    match missing_part(root) {
        Ok(None) => Finding::ok(name, format!("its records are in {}", store.display())),
        Ok(Some(path)) => Finding::fail(name, format!("{} is missing", path.display()), AGAIN),
        Err(error) => Finding::fail(
            name,
            format!("{} cannot be looked at: {error}", root.display()),
            "run doctor as root",
        ),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::doctor::{
        Status,
        podman::tests::{none, says},
    };

    const STORE: &str = "/var/lib/nydus-store/store";
    const MAIN: Place = Place {
        rootful: false,
        crio: false,
    };
    const ROOTFUL: Place = Place {
        rootful: true,
        crio: false,
    };

    fn stores() -> Stores {
        Stores {
            images: STORE.to_owned(),
            layers: "/var/lib/nydus-store/layers".to_owned(),
        }
    }

    fn both() -> InFiles {
        InFiles {
            main: Named {
                images: true,
                layers: true,
                ..Named::default()
            },
            rootful: false,
        }
    }

    fn rootful() -> InFiles {
        InFiles {
            rootful: true,
            ..InFiles::default()
        }
    }

    #[test]
    fn what_podman_shows_counts() {
        for (driver, option, files, status, words) in [
            (
                "overlay",
                Some(STORE),
                both(),
                Status::Ok,
                "is an additional image store",
            ),
            (
                "overlay",
                Some("/other"),
                both(),
                Status::Ok,
                "is an additional image store",
            ),
            (
                "overlay",
                Some("/other"),
                InFiles::default(),
                Status::Fail,
                "in /other, but not in",
            ),
            ("overlay", None, both(), Status::Fail, "does not look for images in"),
            ("vfs", None, both(), Status::Fail, "driver is vfs"),
        ] {
            let options = option.map_or(json!({}), |option| json!({"overlay.imagestore": option}));
            let podman = says(
                "5.4.2",
                Ok(json!({"store": {"graphDriverName": driver, "graphOptions": options}})),
            );
            let finding = judge(&stores(), MAIN, files, podman.info.as_ref().ok(), podman.door());
            assert!(
                finding.status == status && finding.detail.contains(words),
                "{finding:?}"
            );
        }
    }

    #[test]
    fn entry_belongs_in_the_file_that_the_version_reads() {
        let in_both = InFiles {
            rootful: true,
            ..both()
        };
        for (place, files, status) in [
            (MAIN, both(), Status::Ok),
            (MAIN, rootful(), Status::Fail),
            (ROOTFUL, rootful(), Status::Ok),
            (ROOTFUL, both(), Status::Fail),
            (ROOTFUL, in_both, Status::Warn),
        ] {
            let finding = judge(&stores(), place, files, None, Some(Door::Helper));
            assert_eq!(finding.status, status, "{place:?}: {finding:?}");
        }
        let mut earlier = both();
        earlier.main.earlier = true;
        let finding = judge(&stores(), MAIN, earlier, None, None);
        assert!(
            finding.status == Status::Warn && finding.detail.contains("earlier version"),
            "{finding:?}"
        );
    }

    #[test]
    fn older_versions_need_the_layer_store_first() {
        let mut files = both();
        let judge = |files, door| judge(&stores(), MAIN, files, None, Some(door)).status;
        assert_eq!(judge(files, Door::LayerStore), Status::Ok);
        files.main.layers_behind = true;
        assert_eq!(judge(files, Door::LayerStore), Status::Fail);
        assert_eq!(judge(files, Door::Helper), Status::Ok);
        files.main.layers = false;
        assert_eq!(judge(files, Door::LayerStore), Status::Fail);
    }

    #[test]
    fn without_podman_the_files_count() {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout::new(Some(dir.path()), |_| None);
        let root = Path::new("/var/lib/nydus-store");
        let setup = Setup::new(layout, root).unwrap();
        let there = setup.layout.at(root);
        let status = || (look(&setup, MAIN, &none()).status, files(&there).status);
        assert_eq!(status(), (Status::Fail, Status::Fail));
        setup.add().unwrap().apply().unwrap();
        assert_eq!(status(), (Status::Ok, Status::Ok));
        std::fs::remove_file(there.join("store/overlay-images/images.lock")).unwrap();
        assert!(files(&there).detail.contains("images.lock is missing"));
        // What is broken is told, not taken for nothing.
        std::fs::write(&setup.layout.storage, "[storage\n").unwrap();
        assert!(look(&setup, MAIN, &none()).detail.contains("line 1"));
    }
}
