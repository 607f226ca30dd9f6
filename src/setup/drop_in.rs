//! Drop-in files that setup owns. Each run rewrites them.

use std::path::Path;

use super::{SetupError, storage::Stores};

const HEADER: &str =
    "# Written by nydus-store setup, anew each time it runs: settings of your own belong in another file.\n";

/// Text of the drop-in for registries.conf.d.
pub fn registries(auth_helper: &str) -> String {
    format!(
        "{HEADER}\
# Podman (5.2 and later) and CRI-O (1.31 and later) run this program at each pull, before they look for layers. It tells
# nydus-store the image and the credentials of the pull, and exits when the layers of a Nydus image are published.
additional-layer-store-auth-helper = {}\n",
        text(auth_helper)
    )
}

/// Text of the drop-in for storage.rootful.conf.d.
pub fn storage(stores: &Stores) -> String {
    format!(
        "{HEADER}\
# Only root's Podman reads this directory. In storage.conf, the store would make every command of other users fail,
# because they may not look into it.
[storage.options]
additionalimagestores = [{}, {{append=true}}]\n",
        text(&stores.images)
    )
}

/// Text of the drop-in for crio.conf.d. `stores` is set if CRI-O does not read the file that names them to Podman.
pub fn crio(stores: Option<&Stores>) -> String {
    let options = stores.map(|stores| {
        let [images, layers] = stores.driver_options();
        format!(
            "# CRI-O does not read storage.rootful.conf.d, where Podman finds the store. CRI-O adds these options to\n\
             # those of storage.conf.\n\
             storage_option = [{}, {}]\n",
            text(&images),
            text(&layers)
        )
    });
    format!(
        "{HEADER}\
[crio]
# With the default, `true`, CRI-O deletes all images and containers of the node when it starts after an unclean stop and
# there is a container of a lazy image. Its check looks for parents of layers before it has read read-only stores.
internal_repair = false
{}",
        options.unwrap_or_default()
    )
}

/// Fails unless setup wrote the file.
pub fn check(path: &Path, text: &str) -> Result<(), SetupError> {
    if text.starts_with(HEADER.trim_end()) {
        Ok(())
    } else {
        let path = path.to_owned();
        Err(SetupError::NotOurs { path })
    }
}

/// A string as a TOML value, which displays quoted.
fn text(value: &str) -> toml::Value {
    toml::Value::from(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stores() -> Stores {
        Stores {
            images: "/srv/a \"b\"/store".to_owned(),
            layers: "/srv/a \"b\"/layers".to_owned(),
        }
    }

    #[test]
    fn drop_ins_are_toml() {
        let parse = |text: &str| text.parse::<toml::Table>().unwrap();
        let registries = parse(&registries("/etc/x"));
        assert_eq!(registries.len(), 1);
        assert_eq!(
            registries["additional-layer-store-auth-helper"].as_str(),
            Some("/etc/x")
        );
        let storage = parse(&storage(&stores()));
        let list = storage["storage"]["options"]["additionalimagestores"]
            .as_array()
            .unwrap();
        assert_eq!(list[0].as_str(), Some("/srv/a \"b\"/store"));
        assert_eq!(list[1]["append"].as_bool(), Some(true));
        for (with, options) in [(None, 0), (Some(&stores()), 2)] {
            let crio = parse(&crio(with));
            assert_eq!(crio["crio"]["internal_repair"].as_bool(), Some(false));
            let list = crio["crio"]
                .get("storage_option")
                .map_or(0, |list| list.as_array().unwrap().len());
            assert_eq!(list, options);
        }
    }

    #[test]
    fn foreign_files_are_refused() {
        let path = Path::new("x");
        assert!(check(path, &crio(None)).is_ok() && check(path, &registries("/x")).is_ok());
        assert!(check(path, "[crio]\n").is_err());
    }
}
