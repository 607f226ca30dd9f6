//! Checks whether Podman's configuration names the store, and whether the store's files exist.

use std::path::Path;

use super::{
    Finding,
    announcement_method::AnnouncementMethod,
    podman::{InstalledPodman, PodmanInfo},
};
use crate::{
    error_chain::ErrorChain,
    fuse::mountpoint,
    setup::{
        Setup, SetupError,
        layout::{self, Layout},
        programs::StorePlacement,
        storage::{self, NamedStores, Stores},
    },
    store::layout::{STORE_DIR, missing_part},
};

const NAME: &str = "storage";
const RUN_SETUP: &str = "run `nydus-store setup`, with the daemon's --root if it has one";

/// The stores that the files of containers/storage name.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ConfiguredStores {
    /// Stores in storage.conf.
    pub main: NamedStores,
    /// Whether a file in storage.rootful.conf.d names the image store.
    pub rootful: bool,
}

impl ConfiguredStores {
    /// Reads the files; `main` is the storage.conf in force.
    pub fn read(layout: &Layout, main: &Path, stores: &Stores) -> Result<Self, SetupError> {
        let text = layout::read_optional(main)?.unwrap_or_default();
        let main = storage::StorageConf {
            path: main,
            text: &text,
        }
        .named_stores(stores)?;
        let mut rootful = false;
        for path in layout.rootful_drop_ins.iter().flat_map(|dir| sorted_files(dir)) {
            let text = layout::read_optional(&path)?.unwrap_or_default();
            rootful |= storage::StorageConf {
                path: &path,
                text: &text,
            }
            .named_stores(stores)?
            .images;
        }
        Ok(Self { main, rootful })
    }

    /// Whether the file of `placement` names the image store.
    pub fn names_images(self, placement: StorePlacement) -> bool {
        if placement.rootful {
            self.rootful
        } else {
            self.main.images
        }
    }
}

/// The files of a directory, sorted by name; empty if it cannot be read.
pub fn sorted_files(dir: &Path) -> Vec<std::path::PathBuf> {
    let entries = dir.read_dir().into_iter().flatten().flatten();
    let mut files: Vec<_> = entries
        .map(|entry| entry.path())
        .filter(|path| path.is_file())
        .collect();
    files.sort();
    files
}

/// The storage.conf in force: the host's, or else the vendor's.
pub fn storage_conf_path(layout: &Layout) -> &Path {
    let files = [&layout.storage, &layout.vendor_storage];
    files.into_iter().find(|file| file.exists()).unwrap_or(&layout.storage)
}

/// Checks Podman's storage, or the files alone if Podman is not installed.
pub fn check(setup: &Setup, placement: StorePlacement, podman: &InstalledPodman) -> Finding {
    let Setup { layout, stores, .. } = setup;
    let info = podman.info.as_ref().ok();
    if let (true, Err(message)) = (podman.is_installed(), &podman.info) {
        return Finding::fail(
            NAME,
            format!("`podman info` fails: {message}"),
            "fix what it reports; if the store's directory is missing, run `nydus-store setup`; if it timed out, the \
             store's mount may hang: restart the daemon",
        );
    }
    let main = match info {
        Some(info) if !info.store.config_file.as_os_str().is_empty() => info.store.config_file.as_path(),
        _ => storage_conf_path(layout),
    };
    match ConfiguredStores::read(layout, main, stores) {
        Ok(files) => judge(stores, placement, files, info, podman.announcement_method()),
        Err(error) => Finding::fail(NAME, ErrorChain(&error).to_string(), "fix the file"),
    }
}

fn judge(
    stores: &Stores,
    placement: StorePlacement,
    files: ConfiguredStores,
    info: Option<&PodmanInfo>,
    announcement_method: Option<AnnouncementMethod>,
) -> Finding {
    let store = &stores.images;
    if let Some(finding) = check_image_store(store, files.names_images(placement), placement, info) {
        return finding;
    }
    if files.main.legacy {
        return Finding::warn(NAME, "storage.conf also has the entry of an earlier version", RUN_SETUP);
    }
    if placement.rootful && files.main.any() {
        let detail = "storage.conf names the store, and this Podman reads it for every user: all commands of other \
                      users fail, because they cannot access the store";
        return Finding::warn(
            NAME,
            detail,
            format!("{RUN_SETUP}, which moves the entry to storage.rootful.conf.d"),
        );
    }
    if announcement_method == Some(AnnouncementMethod::LayerStore) {
        if !files.main.layers {
            let detail = format!(
                "storage.conf does not name {} as an additional layer store",
                stores.layers
            );
            return Finding::fail(NAME, format!("{detail}, so pulls are not announced"), RUN_SETUP);
        }
        if files.main.layers_not_first {
            let detail = "another additional layer store precedes nydus-store's, and Podman 4 uses the first one only";
            return Finding::fail(NAME, detail, format!("{RUN_SETUP}, which puts nydus-store's first"));
        }
    }
    Finding::ok(NAME, format!("{store} is an additional image store"))
}

/// Reports an image store or a driver that is not in force. Without `info`, judges by the files (`named`). `podman
/// info` shows a single store of several.
fn check_image_store(
    store: &str,
    named: bool,
    placement: StorePlacement,
    info: Option<&PodmanInfo>,
) -> Option<Finding> {
    let file = if placement.rootful {
        "storage.rootful.conf.d"
    } else {
        "storage.conf"
    };
    let fail = |detail: String| {
        let advice = format!(
            "{RUN_SETUP}; if setup has run, another file overrides it: $CONTAINERS_STORAGE_CONF, \
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
            format!("Podman's storage driver is {driver}, but the store requires overlay"),
            "set `driver = \"overlay\"` in storage.conf; Podman keeps the driver of its first use until `podman system \
             reset`, which deletes all images and containers",
        ));
    }
    match info.image_store() {
        Some(shown) if shown.trim_end_matches('/') == store => None,
        Some(_) if named => None,
        Some(shown) => fail(format!("Podman uses the image store {shown}, but not {store}")),
        None => fail(format!(
            "Podman does not use the image store {store} (expected in {file})"
        )),
    }
}

/// Checks the store's files. Every Podman command fails if the configuration names the store and one of them is
/// missing.
pub fn files(root: &Path) -> Finding {
    let name = "store";
    let store = root.join(STORE_DIR);
    // A mount of an earlier version's daemon, which may hang.
    if let Ok(Some(kind)) = mountpoint::mounted_on(&store) {
        let detail = format!("a file system of type {kind} is mounted on {}", store.display());
        return Finding::fail(
            name,
            detail,
            format!("unmount it (`systemctl stop nydus-store`), then {RUN_SETUP}"),
        );
    }
    match missing_part(root) {
        Ok(None) => Finding::ok(name, format!("{} is complete", store.display())),
        Ok(Some(path)) => Finding::fail(name, format!("{} is missing", path.display()), RUN_SETUP),
        Err(error) => Finding::fail(
            name,
            format!("cannot access {}: {error}", root.display()),
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
        podman::tests::{not_installed, with_info},
    };

    const STORE: &str = "/var/lib/nydus-store/store";
    const MAIN: StorePlacement = StorePlacement {
        rootful: false,
        crio: false,
    };
    const ROOTFUL: StorePlacement = StorePlacement {
        rootful: true,
        crio: false,
    };

    fn stores() -> Stores {
        Stores {
            images: STORE.to_owned(),
            layers: "/var/lib/nydus-store/layers".to_owned(),
        }
    }

    fn both() -> ConfiguredStores {
        ConfiguredStores {
            main: NamedStores {
                images: true,
                layers: true,
                ..NamedStores::default()
            },
            rootful: false,
        }
    }

    fn rootful() -> ConfiguredStores {
        ConfiguredStores {
            rootful: true,
            ..ConfiguredStores::default()
        }
    }

    #[test]
    fn podman_info_decides_over_files() {
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
                ConfiguredStores::default(),
                Status::Fail,
                "the image store /other, but not",
            ),
            ("overlay", None, both(), Status::Fail, "does not use the image store"),
            ("vfs", None, both(), Status::Fail, "driver is vfs"),
        ] {
            let options = option.map_or(json!({}), |option| json!({"overlay.imagestore": option}));
            let podman = with_info(
                "5.4.2",
                Ok(json!({"store": {"graphDriverName": driver, "graphOptions": options}})),
            );
            let finding = judge(
                &stores(),
                MAIN,
                files,
                podman.info.as_ref().ok(),
                podman.announcement_method(),
            );
            assert!(
                finding.status == status && finding.detail.contains(words),
                "{finding:?}"
            );
        }
    }

    #[test]
    fn entry_belongs_in_the_file_that_the_version_reads() {
        let in_both = ConfiguredStores {
            rootful: true,
            ..both()
        };
        for (placement, files, status) in [
            (MAIN, both(), Status::Ok),
            (MAIN, rootful(), Status::Fail),
            (ROOTFUL, rootful(), Status::Ok),
            (ROOTFUL, both(), Status::Fail),
            (ROOTFUL, in_both, Status::Warn),
        ] {
            let finding = judge(&stores(), placement, files, None, Some(AnnouncementMethod::Helper));
            assert_eq!(finding.status, status, "{placement:?}: {finding:?}");
        }
        let mut earlier = both();
        earlier.main.legacy = true;
        let finding = judge(&stores(), MAIN, earlier, None, None);
        assert!(
            finding.status == Status::Warn && finding.detail.contains("earlier version"),
            "{finding:?}"
        );
    }

    #[test]
    fn older_versions_need_the_layer_store_first() {
        let mut files = both();
        let judge = |files, announcement_method| judge(&stores(), MAIN, files, None, Some(announcement_method)).status;
        assert_eq!(judge(files, AnnouncementMethod::LayerStore), Status::Ok);
        files.main.layers_not_first = true;
        assert_eq!(judge(files, AnnouncementMethod::LayerStore), Status::Fail);
        assert_eq!(judge(files, AnnouncementMethod::Helper), Status::Ok);
        files.main.layers = false;
        assert_eq!(judge(files, AnnouncementMethod::LayerStore), Status::Fail);
    }

    #[test]
    fn without_podman_the_files_decide() {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout::new(Some(dir.path()), |_| None);
        let root = Path::new("/var/lib/nydus-store");
        let setup = Setup::new(layout, root).unwrap();
        let there = setup.layout.in_sysroot(root);
        let status = || (check(&setup, MAIN, &not_installed()).status, files(&there).status);
        assert_eq!(status(), (Status::Fail, Status::Fail));
        setup.add().unwrap().apply().unwrap();
        assert_eq!(status(), (Status::Ok, Status::Ok));
        std::fs::remove_file(there.join("store/overlay-images/images.lock")).unwrap();
        assert!(files(&there).detail.contains("images.lock is missing"));
        // Reports a broken file instead of ignoring it.
        std::fs::write(&setup.layout.storage, "[storage\n").unwrap();
        assert!(check(&setup, MAIN, &not_installed()).detail.contains("line 1"));
    }
}
