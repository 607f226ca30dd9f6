//! `nydus-store setup` on file trees as shipped by distributions.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _},
    path::PathBuf,
    process::Command,
};

use crate::common::{BINARY, copy_program, output};

mod auth_helper;
mod tree;

use tree::{Tree, VENDOR_TEXT};

const STORAGE: &str = "etc/containers/storage.conf";
const REGISTRIES: &str = "etc/containers/registries.conf";
const OURS: &str = "etc/containers/registries.conf.d/zz-nydus-store.conf";
const VENDOR: &str = "usr/share/containers/storage.conf";
const SCRIPT: &str = "etc/containers/nydus-store-auth-helper";
const ROOTFUL: &str = "etc/containers/storage.rootful.conf.d/50-nydus-store.conf";
const CRIO: &str = "etc/crio/crio.conf.d/50-nydus-store.conf";
const ROOT: &str = "var/lib/nydus-store";
const IMAGES: &str = "additionalimagestores = [\"/var/lib/nydus-store/store\"]";
const LAYERS: &str = "additionallayerstores = [\"/var/lib/nydus-store/layers:ref\"]";
/// String in a program by which setup recognises that it reads storage.rootful.conf.d.
const READS_ROOTFUL: &str = "\x7fELF go.podman.io/storage/pkg/configfile.ParseTOML";

#[test]
fn remove_reverts_setup_on_each_distribution() {
    for tree in [Tree::debian(), Tree::fedora()] {
        let before = tree.contents();
        let (printed, notes) = tree.setup(&[]);
        for path in [
            STORAGE,
            OURS,
            SCRIPT,
            "var/lib/nydus-store/store/",
            "var/lib/nydus-store/layers/",
        ] {
            assert!(
                printed.contains(&format!("new       {}", tree.at(path).display())),
                "{printed}"
            );
        }
        assert_eq!(notes, "");
        let storage: toml::Table = tree.read(STORAGE).parse().unwrap();
        let options = &storage["storage"]["options"];
        assert_eq!(
            options["additionalimagestores"][0].as_str(),
            Some("/var/lib/nydus-store/store")
        );
        assert_eq!(
            options["additionallayerstores"][0].as_str(),
            Some("/var/lib/nydus-store/layers:ref")
        );
        // One key applies to all registries.
        let ours: toml::Table = tree.read(OURS).parse().unwrap();
        assert_eq!(ours.keys().collect::<Vec<_>>(), ["additional-layer-store-auth-helper"]);
        // Existing files are unchanged.
        let after = tree.contents();
        assert!(before.iter().all(|(path, text)| after.get(path) == Some(text)));
        let mode = |path| tree.at(path).metadata().unwrap().mode() & 0o777;
        assert_eq!((mode(STORAGE), mode(OURS), mode(ROOT)), (0o644, 0o644, 0o700));

        let once = tree.snapshot();
        let (printed, _) = tree.setup(&[]);
        assert_eq!(printed.matches("unchanged").count(), 3, "{printed}");
        assert_eq!(tree.snapshot(), once);

        tree.setup(&["--remove"]);
        let mut left = tree.contents();
        left.retain(|path, text| text.is_some() || before.contains_key(path));
        let files = |contents: BTreeMap<PathBuf, Option<String>>| {
            contents
                .into_iter()
                .filter(|(_, text)| text.is_some())
                .collect::<Vec<_>>()
        };
        assert_eq!(files(left), files(before));
        assert!(!tree.at(ROOT).exists());
        tree.setup(&["--remove"]);
    }
}

/// With an incomplete store, every Podman command fails: `can't stat imageStore dir`.
#[test]
fn setup_creates_a_complete_store() {
    let tree = Tree::debian();
    tree.setup(&[]);
    let store = tree.at(ROOT).join("store");
    for (file, content) in [
        ("overlay-layers/layers.json", "[]"),
        ("overlay-layers/layers.lock", ""),
        ("overlay-images/images.json", "[]"),
        ("overlay-images/images.lock", ""),
    ] {
        assert_eq!(fs::read_to_string(store.join(file)).unwrap(), content, "{file}");
    }
    assert!(store.join("overlay/l").is_dir());
    // Existing records are neither overwritten nor removed.
    fs::write(store.join("overlay-images/images.json"), "[{}]").unwrap();
    tree.setup(&[]);
    tree.setup(&["--remove"]);
    assert_eq!(
        fs::read_to_string(store.join("overlay-images/images.json")).unwrap(),
        "[{}]"
    );
    assert!(!tree.at(STORAGE).exists());
}

/// Newer Podman applies storage.conf to every user, and only root may access the store.
#[test]
fn newer_podman_gets_a_drop_in_for_root_only() {
    let tree = Tree::fedora();
    tree.setup(&[]);
    tree.write("usr/bin/podman", READS_ROOTFUL);
    let (printed, _) = tree.setup(&[]);
    assert!(
        printed.contains(&format!("new       {}", tree.at(ROOTFUL).display())),
        "{printed}"
    );
    assert!(
        printed.contains(&format!("deleted   {}", tree.at(STORAGE).display())),
        "{printed}"
    );
    let rootful: toml::Table = tree.read(ROOTFUL).parse().unwrap();
    let list = rootful["storage"]["options"]["additionalimagestores"]
        .as_array()
        .unwrap();
    assert_eq!(list[0].as_str(), Some("/var/lib/nydus-store/store"));
    assert_eq!(list[1]["append"].as_bool(), Some(true));
    tree.setup(&["--remove"]);
    assert!(!tree.at(ROOTFUL).parent().unwrap().exists());

    tree.write(ROOTFUL, "[storage]\n");
    assert!(tree.fails(&[]).contains("was not written by setup"));
}

#[test]
fn crio_gets_a_drop_in() {
    let tree = Tree::debian();
    tree.setup(&[]);
    assert!(!tree.at("etc/crio").exists());
    tree.write("usr/bin/crio", "\x7fELF");
    let (_, notes) = tree.setup(&[]);
    assert!(
        notes.contains("systemctl restart crio") && notes.contains("storage.conf"),
        "{notes}"
    );
    let crio: toml::Table = tree.read(CRIO).parse().unwrap();
    assert_eq!(crio["crio"]["internal_repair"].as_bool(), Some(false));
    assert!(!crio["crio"].as_table().unwrap().contains_key("storage_option"));
    assert!(!tree.setup(&[]).1.contains("restart crio"));

    // With a newer Podman, storage.conf may not name the store, and CRI-O reads no rootful drop-in.
    tree.write("usr/bin/podman", READS_ROOTFUL);
    let (_, notes) = tree.setup(&[]);
    assert!(notes.contains(tree.at(CRIO).to_str().unwrap()), "{notes}");
    let crio: toml::Table = tree.read(CRIO).parse().unwrap();
    let options = crio["crio"]["storage_option"].as_array().unwrap();
    assert_eq!(
        options[0].as_str(),
        Some("overlay.imagestore=/var/lib/nydus-store/store")
    );
    tree.setup(&["--remove"]);
    assert!(!tree.at("etc/crio").exists());
}

#[test]
fn files_of_earlier_versions_are_replaced() {
    let storage = "# Made by nydus-store setup.\n\n# Added by nydus-store setup.\n[storage]\ndriver = \"overlay\"\n\
                   runroot = \"/run/containers/storage\"\ngraphroot = \"/var/lib/containers/storage\"\n\
                   [storage.options]\nadditionallayerstores = [\"/var/lib/nydus-store/store:ref\"]\n";
    let registries = "# Written by nydus-store setup, anew each time it runs: settings of your own belong in another file.\n\
                      [[registry]]\nprefix = \"r.example\"\nlocation = \"r.example\"\n\
                      [[registry.mirror]]\nlocation = \"127.0.0.1:5055/r.example\"\ninsecure = true\n";
    for args in [&["--remove"][..], &[]] {
        let tree = Tree::debian();
        tree.write(STORAGE, storage);
        tree.write(OURS, registries);
        fs::create_dir_all(tree.at(ROOT).join("store")).unwrap();
        tree.setup(args);
        if args.is_empty() {
            assert!(!tree.read(STORAGE).contains("/store:ref") && tree.read(STORAGE).contains(LAYERS));
            assert!(!tree.read(OURS).contains("5055"));
        } else {
            assert!(!tree.at(STORAGE).exists() && !tree.at(OURS).exists() && !tree.at(ROOT).exists());
        }
    }
}

#[test]
fn storage_conf_of_the_vendor_stays_in_force() {
    let tree = Tree::fedora();
    tree.setup(&[]);
    let text = tree.read(STORAGE);
    let (first, rest) = text.split_once('\n').unwrap();
    assert!(first.starts_with("# Copied by nydus-store setup from /usr/share/containers/storage.conf"));
    let added = format!("# Added by nydus-store setup.\n{LAYERS}\n");
    assert!(rest.contains(&added), "{rest}");
    let without = rest
        .replace(&added, "")
        .replace(&IMAGES[..IMAGES.len() - 1], "additionalimagestores = [");
    assert_eq!(without, VENDOR_TEXT);
}

#[test]
fn settings_of_the_user_are_kept() {
    let theirs = "\
# Mine.
[storage]
  driver = \"overlay\"
  graphroot = \"/srv/containers\"  # the big disk
[storage.options]
  additionallayerstores = [
    \"/var/lib/stargz-store/store:ref\", # the other one
  ]
# The end.
";
    let tree = Tree::fedora();
    tree.write(STORAGE, theirs);
    fs::set_permissions(tree.at(STORAGE), fs::Permissions::from_mode(0o600)).unwrap();
    let (_, notes) = tree.setup(&[]);
    assert!(
        notes.contains("stargz-store/store:ref") && notes.contains("the first one only"),
        "{notes}"
    );
    let text = tree.read(STORAGE);
    let ours = "    \"/var/lib/nydus-store/layers:ref\",";
    assert!(text.lines().any(|line| line.trim_end().starts_with(ours)), "{text}");
    for line in theirs.lines() {
        let known = line.split(" #").next().unwrap().trim_end();
        assert!(text.contains(known), "{line} is missing in:\n{text}");
    }
    assert!(text.contains("# the other one"));
    assert_eq!(tree.at(STORAGE).metadata().unwrap().mode() & 0o777, 0o600);
    tree.setup(&["--remove"]);
    assert_eq!(tree.read(STORAGE), theirs);

    // A file that the user changed since is not deleted.
    let tree = Tree::debian();
    tree.setup(&[]);
    tree.write(STORAGE, &tree.read(STORAGE).replace("/var/lib/containers", "/srv"));
    tree.setup(&["--remove"]);
    assert!(tree.read(STORAGE).contains("/srv/storage") && !tree.read(STORAGE).contains("nydus-store/store"));
}

#[test]
fn print_writes_nothing() {
    for tree in [Tree::debian(), Tree::fedora()] {
        let before = tree.snapshot();
        let (printed, _) = tree.setup(&["--print"]);
        assert_eq!(tree.snapshot(), before);
        tree.setup(&[]);
        for path in [STORAGE, OURS, SCRIPT] {
            let part = format!("==> {} (new) <==\n{}", tree.at(path).display(), tree.read(path));
            assert!(printed.contains(&part), "{printed}");
        }
        let (printed, _) = tree.setup(&["--remove", "--print"]);
        assert_eq!(printed.matches("(deleted) <==").count(), 3, "{printed}");
        assert!(tree.at(OURS).exists());
    }
}

#[test]
fn malformed_files_are_named_and_kept() {
    let with = |path: &str, text: &str| {
        let tree = Tree::fedora();
        tree.write(path, text);
        tree
    };
    let drop_in = "etc/containers/registries.conf.d/corp.conf";
    for (path, text, expected) in [
        (STORAGE, "[storage]\n\ndriver = overlay\n", "line 3"),
        (
            STORAGE,
            "[storage]\ndriver = \"btrfs\"\n",
            "line 2: the storage driver is \"btrfs\"",
        ),
        (STORAGE, "[storage.options]\nadditionallayerstores = \"x\"\n", "line 2"),
        (VENDOR, "[storage\n", "line 1"),
        (REGISTRIES, "[[registry]]\nlocation = \"a\n", "line 2"),
        (
            REGISTRIES,
            "[[registry]]\nlocation = \"a\"\ninsecure = \"yes\"\n",
            "line 3",
        ),
        (drop_in, "[[registry]\n", "line 1"),
        (OURS, "[[registry]]\nlocation = \"a\"\n", "was not written by setup"),
        ("etc/nydus-store/config.toml", "[fuse]\nthreads = \"x\"\n", "line 2"),
        (ROOTFUL, "[storage]\n", "was not written by setup"),
    ] {
        let tree = with(path, text);
        let message = tree.fails(&[]);
        let name = tree.at(path).display().to_string();
        assert!(
            message.contains(&name) && message.contains(expected),
            "{path}: {message}"
        );
    }
    // Removal does not read malformed files of others.
    with(OURS, "mine").fails(&["--remove"]);
    with(drop_in, "[[registry]\n").setup(&["--remove"]);
}

#[test]
fn unsupported_root_is_refused_and_old_table_is_noted() {
    let tree = Tree::debian();
    let message = tree.fails(&["--root", "/srv/a:b"]);
    assert!(message.contains("cannot express the path /srv/a:b/store"), "{message}");
    // An old configuration keeps working.
    tree.write("etc/nydus-store/config.toml", "[mirror]\nlisten = \"127.0.0.1:6055\"\n");
    let (_, notes) = tree.setup(&[]);
    assert_eq!(notes.matches("ignoring table [mirror]").count(), 1, "{notes}");
}

/// An absolute symlink of the tree would resolve to this host's file.
#[test]
fn symlink_out_of_the_tree_is_refused() {
    let outside = tempfile::tempdir().unwrap();
    let target = outside.path().join("storage.conf");
    fs::write(&target, "# this host's\n").unwrap();
    let tree = Tree::debian();
    std::os::unix::fs::symlink(&target, tree.at(STORAGE)).unwrap();
    let message = tree.fails(&[]);
    assert!(
        message.contains("outside the sysroot") && message.contains(target.to_str().unwrap()),
        "{message}"
    );
    fs::remove_file(tree.at(STORAGE)).unwrap();
    tree.write("etc/real.conf", "# the tree's\n");
    std::os::unix::fs::symlink("../real.conf", tree.at(STORAGE)).unwrap();
    tree.setup(&[]);
    assert!(tree.at(STORAGE).is_symlink() && tree.read("etc/real.conf").contains(IMAGES));
    // Removal would delete this empty directory if it were the tree's.
    let store = outside.path().join("lib/nydus-store/store");
    fs::create_dir_all(&store).unwrap();
    fs::remove_dir_all(tree.at("var")).unwrap();
    std::os::unix::fs::symlink(outside.path(), tree.at("var")).unwrap();
    let message = tree.fails(&["--remove"]);
    assert!(message.contains("outside the sysroot") && store.exists(), "{message}");
}

#[test]
fn storage_conf_of_the_environment_is_used() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("mine.conf");
    let mut command = Command::new(BINARY);
    command.args(["setup", "--print", "--root"]).arg(dir.path());
    let printed = output(command.env("CONTAINERS_STORAGE_CONF", &file));
    assert!(
        printed.contains(&format!("==> {} (new) <==", file.display())),
        "{printed}"
    );
    assert!(!file.exists() && !dir.path().join("store").exists());
}

#[test]
fn setup_of_the_host_requires_root() {
    use std::os::unix::process::CommandExt as _;
    let dir = tempfile::tempdir().unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    // Where other users can execute it.
    let program = dir.path().join("nydus-store");
    copy_program(&program);
    let output = Command::new(&program)
        .arg("setup")
        .uid(65534)
        .gid(65534)
        .output()
        .unwrap();
    let message = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{message}");
    assert!(
        message.contains("setup needs root") && message.contains("--print"),
        "{message}"
    );
}
