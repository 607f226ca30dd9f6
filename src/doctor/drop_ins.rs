//! Whether what `setup` writes is in force.

use std::path::Path;

use super::{Finding, podman::Info, podman::Podman};
use crate::{
    config::MirrorConfig,
    mirror,
    report::Report,
    setup::{
        Error, Setup, drop_in,
        layout::{self, Layout},
        storage,
    },
};

const STORAGE: &str = "storage";
const REGISTRIES: &str = "registries";

/// About storage.conf and the registries.
pub fn look(root: &Path, config: &MirrorConfig, podman: &Podman) -> Vec<Finding> {
    let layout = Layout::new(None, |name| std::env::var_os(name));
    match Setup::new(layout, root) {
        Ok(setup) => vec![
            storage(setup.store(), &setup.layout, podman),
            registries(&setup.layout, config, podman),
        ],
        Err(error) => vec![Finding::fail(STORAGE, error.to_string(), "choose another --root")],
    }
}

fn storage(store: &str, layout: &Layout, podman: &Podman) -> Finding {
    match &podman.info {
        Ok(info) => storage_in_force(store, info, names(&info.store.config_file, store).unwrap_or(false)),
        Err(message) if podman.is_installed() => Finding::fail(
            STORAGE,
            format!("`podman info` fails: {message}"),
            "mend what it says. If it cannot find the store's directory, start the daemon, or run `nydus-store setup`; if it \
             hangs, the store's mount may be dead: restart the daemon",
        ),
        Err(_) => {
            let file = [&layout.storage, &layout.vendor_storage]
                .into_iter()
                .find(|file| file.exists());
            match file.map_or(Ok(false), |file| names(file, store)) {
                Ok(true) => Finding::ok(STORAGE, format!("storage.conf names {store}")),
                Ok(false) => no_store(format!("storage.conf does not name {store}")),
                Err(error) => Finding::fail(STORAGE, Report(&error).to_string(), "mend the file"),
            }
        }
    }
}

/// Whether a storage.conf names the store.
fn names(path: &Path, store: &str) -> Result<bool, Error> {
    let text = layout::read(path)?.unwrap_or_default();
    storage::File { path, text: &text }.names(store)
}

fn no_store(detail: String) -> Finding {
    Finding::fail(
        STORAGE,
        detail,
        "run `nydus-store setup`, with the daemon's --root if it has one. If it has been run, another file is in force: \
         $CONTAINERS_STORAGE_CONF, ~/.config/containers/storage.conf, or a file in storage.conf.d",
    )
}

/// `in_file`: whether the file that Podman has read names the store. Of several stores Podman shows one.
fn storage_in_force(store: &str, info: &Info, in_file: bool) -> Finding {
    let driver = &info.store.graph_driver_name;
    if driver != "overlay" {
        return Finding::fail(
            STORAGE,
            format!("Podman's storage driver is {driver}, which cannot use the store"),
            "set `driver = \"overlay\"` in storage.conf. Podman keeps the driver that it was first used with: `podman system \
             reset` deletes all images and containers and makes it choose anew",
        );
    }
    match info.layer_store() {
        Some(shown) if shown == format!("{store}:ref") => {
            Finding::ok(STORAGE, format!("Podman looks for layers in {store}"))
        }
        Some(_) if in_file => Finding::ok(STORAGE, format!("Podman looks for layers in {store}, among others")),
        Some(shown) if shown.split(':').next() == Some(store) => no_store(format!(
            "Podman looks for layers in {store}, but without references (`:ref`)"
        )),
        Some(shown) => no_store(format!("Podman looks for layers in {shown}, but not in {store}")),
        None => no_store(format!(
            "Podman looks for layers in no additional store ({})",
            info.store.config_file.display()
        )),
    }
}

fn registries(layout: &Layout, config: &MirrorConfig, podman: &Podman) -> Finding {
    let ours = layout.ours();
    let written = layout::read(&ours).and_then(|text| {
        text.map_or_else(
            || Ok(Default::default()),
            |text| drop_in::ours(&ours, &text).map(|ours| ours.registries),
        )
    });
    let written = match written {
        Ok(written) => written.into_iter().collect::<Vec<_>>(),
        Err(error) => return Finding::fail(REGISTRIES, Report(&error).to_string(), "move the file away, or mend it"),
    };
    match (&podman.info, podman.needs_mirror()) {
        (Ok(info), needed) => registries_in_force(&written, config, info, needed.unwrap_or(true)),
        (Err(_), _) if !written.is_empty() => Finding::ok(
            REGISTRIES,
            format!("{} gives the mirror to {}", ours.display(), written.join(", ")),
        ),
        (Err(_), Some(false)) => Finding::ok(REGISTRIES, "this Podman needs no mirror"),
        (Err(_), _) => Finding::warn(
            REGISTRIES,
            format!("{} does not give the mirror to any registry", ours.display()),
            "run `nydus-store setup --registry HOST` for each registry with Nydus images",
        ),
    }
}

/// `written`: the registries of our drop-in.
fn registries_in_force(written: &[String], config: &MirrorConfig, info: &Info, needed: bool) -> Finding {
    let mirrored = |prefix: &str, locations: Vec<String>| {
        let ours = mirror::location(config.listen, prefix);
        locations.contains(&ours)
    };
    let mut with = Vec::new();
    for registry in info.registries() {
        let locations = registry.mirrors.into_iter().flatten().map(|mirror| mirror.location);
        if mirrored(&registry.prefix, locations.collect()) {
            with.push(registry.prefix);
        }
    }
    let without: Vec<&str> = written
        .iter()
        .filter(|name| !with.contains(name))
        .map(String::as_str)
        .collect();
    let names = with.join(", ");
    let advice = "run `nydus-store setup --registry HOST` for each registry with Nydus images";
    match (with.is_empty(), without.is_empty()) {
        (false, true) => Finding::ok(REGISTRIES, format!("Podman asks the mirror for images of {names}")),
        (true, true) if !needed => Finding::ok(REGISTRIES, "no registry has the mirror, and this Podman needs none"),
        (true, true) => Finding::fail(
            REGISTRIES,
            "no registry has the mirror, which this Podman needs",
            advice,
        ),
        (none, false) => {
            let detail = format!(
                "Podman does not ask the mirror on {} for images of {}",
                config.listen,
                without.join(", ")
            );
            let advice = "another file is in force: a later name in registries.conf.d, or ~/.config/containers/registries.conf; \
                          or the mirror listens elsewhere since setup was run: run it again";
            if none && needed {
                Finding::fail(REGISTRIES, detail, advice)
            } else {
                Finding::warn(REGISTRIES, detail, advice)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::doctor::{Status, podman::tests::says};

    const STORE: &str = "/var/lib/nydus-store/store";

    fn info(value: serde_json::Value) -> Info {
        says("5.4.2", Ok(value)).info.unwrap()
    }

    #[test]
    fn the_store_in_force() {
        for (driver, option, in_file, expected, words) in [
            (
                "overlay",
                Some("/var/lib/nydus-store/store:ref"),
                true,
                Status::Ok,
                "looks for layers in /var",
            ),
            ("overlay", Some("/other:ref"), true, Status::Ok, "among others"),
            (
                "overlay",
                Some("/other:ref"),
                false,
                Status::Fail,
                "in /other:ref, but not in",
            ),
            (
                "overlay",
                Some("/var/lib/nydus-store/store"),
                false,
                Status::Fail,
                "without references",
            ),
            ("overlay", None, false, Status::Fail, "in no additional store"),
            ("vfs", None, false, Status::Fail, "driver is vfs"),
        ] {
            let options = option.map_or(json!({}), |option| json!({"overlay.additionallayerstore": option}));
            let info = info(json!({"store": {"graphDriverName": driver, "graphOptions": options}}));
            let finding = storage_in_force(STORE, &info, in_file);
            assert_eq!(finding.status, expected, "{finding:?}");
            assert!(finding.detail.contains(words), "{finding:?}");
        }
    }

    #[test]
    fn the_registries_in_force() {
        let config = MirrorConfig::default();
        let ours = json!({"r.example": {"Prefix": "r.example", "Mirrors": [{"Location": "127.0.0.1:5055/r.example"}]}});
        let other =
            json!({"r.example": {"Prefix": "r.example", "Mirrors": [{"Location": "127.0.0.1:5056/r.example"}]}});
        for (written, registries, needed, expected) in [
            (&["r.example"][..], &ours, true, Status::Ok),
            (&[], &ours, true, Status::Ok),
            (&["r.example", "q.example"], &ours, true, Status::Warn),
            (&["r.example"], &other, true, Status::Fail),
            (&["r.example"], &other, false, Status::Warn),
            (&[], &other, true, Status::Fail),
            (&[], &json!({"search": []}), false, Status::Ok),
        ] {
            let written: Vec<_> = written.iter().map(|name| (*name).to_owned()).collect();
            let info = info(json!({"registries": registries}));
            let finding = registries_in_force(&written, &config, &info, needed);
            assert_eq!(finding.status, expected, "{finding:?}");
        }
    }

    #[test]
    fn without_podman_the_files_count() {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout::new(Some(dir.path()), |_| None);
        let podman = crate::doctor::podman::tests::none();
        assert_eq!(storage(STORE, &layout, &podman).status, Status::Fail);
        let found = registries(&layout, &MirrorConfig::default(), &podman);
        assert_eq!(found.status, Status::Warn);

        let setup = Setup::new(layout, Path::new("/var/lib/nydus-store")).unwrap();
        let registry = "r.example".parse().unwrap();
        setup
            .add(&[registry], false, &crate::config::Config::default())
            .unwrap()
            .apply()
            .unwrap();
        assert_eq!(storage(STORE, &setup.layout, &podman).status, Status::Ok);
        assert_eq!(
            registries(&setup.layout, &MirrorConfig::default(), &podman).status,
            Status::Ok
        );
        // What is broken is told, not taken for nothing.
        std::fs::write(&setup.layout.storage, "[storage\n").unwrap();
        assert!(storage(STORE, &setup.layout, &podman).detail.contains("line 1"));
    }
}
