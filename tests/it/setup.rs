//! `nydus-store setup` on trees of files as distributions ship them.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    process::{Command, Output},
};

use tempfile::TempDir;

use crate::common::{BINARY, output};

mod auth_helper;

const STORAGE: &str = "etc/containers/storage.conf";
const REGISTRIES: &str = "etc/containers/registries.conf";
const OURS: &str = "etc/containers/registries.conf.d/zz-nydus-store.conf";
const VENDOR: &str = "usr/share/containers/storage.conf";
const ENTRY: &str = "additionallayerstores = [\"/var/lib/nydus-store/store:ref\"]";

/// What a vendor ships, in small.
const VENDOR_TEXT: &str = "\
# The vendor's storage.conf.
[storage]
driver = \"overlay\"   # the usual one
runroot = \"/run/containers/storage\"
graphroot = \"/var/lib/containers/storage\"

[storage.options]
# More images:
additionalimagestores = [
]
pull_options = {enable_partial_images = \"true\", use_hard_links = \"false\", ostree_repos=\"\"}

[storage.options.overlay]
# mount_program = \"/usr/bin/fuse-overlayfs\"
mountopt = \"nodev,metacopy=on\"
";

/// A tree of files.
struct Tree(TempDir);

impl Tree {
    fn new(files: &[(&str, &str)]) -> Self {
        let tree = Self(tempfile::tempdir().unwrap());
        for (path, text) in files {
            tree.write(path, text);
        }
        tree
    }

    /// Debian: everything commented out, and no storage.conf.
    fn debian() -> Self {
        Self::new(&[
            (REGISTRIES, "# unqualified-search-registries = [\"example.com\"]\n"),
            (
                "etc/containers/registries.conf.d/shortnames.conf",
                "[aliases]\n  \"debian\" = \"docker.io/library/debian\"\n",
            ),
            ("etc/containers/policy.json", "{}"),
        ])
    }

    /// Fedora: the vendor's storage.conf, and registries to search in.
    fn fedora() -> Self {
        Self::new(&[
            (VENDOR, VENDOR_TEXT),
            (
                REGISTRIES,
                "unqualified-search-registries = [\"registry.fedoraproject.org\", \"docker.io\"]\n\
                 short-name-mode = \"enforcing\"\n",
            ),
            (
                "etc/containers/registries.conf.d/000-shortnames.conf",
                "[aliases]\n  \"fedora\" = \"registry.fedoraproject.org/fedora\"\n",
            ),
        ])
    }

    fn at(&self, path: &str) -> PathBuf {
        self.0.path().join(path)
    }

    fn write(&self, path: &str, text: &str) {
        fs::create_dir_all(self.at(path).parent().unwrap()).unwrap();
        fs::write(self.at(path), text).unwrap();
    }

    fn read(&self, path: &str) -> String {
        fs::read_to_string(self.at(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
    }

    /// Every file and directory, with its contents and its inode: whatever is written anew has another.
    fn snapshot(&self) -> BTreeMap<PathBuf, (u64, Option<String>)> {
        let entries = walkdir::WalkDir::new(self.0.path()).into_iter().map(Result::unwrap);
        let state = |path: &Path| (path.metadata().unwrap().ino(), fs::read_to_string(path).ok());
        entries
            .map(|entry| (entry.path().to_owned(), state(entry.path())))
            .collect()
    }

    /// Contents alone.
    fn contents(&self) -> BTreeMap<PathBuf, Option<String>> {
        self.snapshot()
            .into_iter()
            .map(|(path, (_, text))| (path, text))
            .collect()
    }

    fn command(&self, args: &[&str]) -> Output {
        let mut command = Command::new(BINARY);
        command.args(["setup", "--sysroot"]).arg(self.0.path()).args(args);
        // What this host's users have logged in to is none of the tree's business, as what they set.
        command
            .env("CONTAINERS_STORAGE_CONF", "/nonexistent")
            .env_remove("REGISTRY_AUTH_FILE");
        command
            .env("HOME", "/root")
            .env_remove("XDG_RUNTIME_DIR")
            .output()
            .unwrap()
    }

    /// Runs it; what it printed, and what it noted.
    fn setup(&self, args: &[&str]) -> (String, String) {
        let Output { status, stdout, stderr } = self.command(args);
        let (stdout, stderr) = (String::from_utf8(stdout).unwrap(), String::from_utf8(stderr).unwrap());
        assert!(status.success(), "{args:?}: {stdout}{stderr}");
        (stdout, stderr)
    }

    /// Runs it; it must fail and change nothing. What it said.
    fn fails(&self, args: &[&str]) -> String {
        let before = self.snapshot();
        let output = self.command(args);
        let message = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{args:?}: {message}");
        assert_eq!(self.snapshot(), before, "{args:?}");
        message
    }

    /// The entries of our drop-in, as TOML has them.
    fn ours(&self) -> Vec<toml::Table> {
        let parsed: toml::Table = self.read(OURS).parse().unwrap();
        let entries = parsed["registry"].as_array().unwrap().iter();
        entries.map(|entry| entry.as_table().unwrap().clone()).collect()
    }

    fn prefixes(&self) -> Vec<String> {
        let prefix = |entry: &toml::Table| entry["prefix"].as_str().unwrap().to_owned();
        self.ours().iter().map(prefix).collect()
    }
}

#[test]
fn each_layout_there_and_back() {
    for tree in [Tree::debian(), Tree::fedora()] {
        let before = tree.contents();
        let (printed, _) = tree.setup(&["--registry", "registry.example:5000", "--registry", "docker.io"]);
        for path in [STORAGE, OURS, "var/lib/nydus-store/store/"] {
            assert!(
                printed.contains(&format!("new       {}", tree.at(path).display())),
                "{printed}"
            );
        }
        assert!(tree.read(STORAGE).contains(ENTRY), "{}", tree.read(STORAGE));
        assert_eq!(tree.prefixes(), ["docker.io", "registry.example:5000"]);
        // What was there is as it was.
        let after = tree.contents();
        assert!(before.iter().all(|(path, text)| after.get(path) == Some(text)));
        let mode = |path| tree.at(path).metadata().unwrap().mode() & 0o777;
        assert_eq!(
            (mode(STORAGE), mode(OURS), mode("var/lib/nydus-store")),
            (0o644, 0o644, 0o700)
        );

        let once = tree.snapshot();
        let (printed, _) = tree.setup(&["--registry", "docker.io"]);
        assert_eq!(printed.matches("unchanged").count(), 2, "{printed}");
        tree.setup(&[]);
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
        assert!(!tree.at("var/lib/nydus-store").exists());
        tree.setup(&["--remove"]);
    }
}

#[test]
fn the_vendors_storage_conf_goes_on_to_hold() {
    let tree = Tree::fedora();
    tree.setup(&[]);
    let text = tree.read(STORAGE);
    let (first, rest) = text.split_once('\n').unwrap();
    assert!(first.starts_with("# Copied by nydus-store setup from /usr/share/containers/storage.conf"));
    let added = format!("# Added by nydus-store setup.\n{ENTRY}\n");
    assert_eq!(rest.replace(&added, ""), VENDOR_TEXT);
    assert!(rest.contains(&added), "{rest}");
}

#[test]
fn what_the_person_has_stays() {
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
    tree.setup(&[]);
    let text = tree.read(STORAGE);
    let ours = "    \"/var/lib/nydus-store/store:ref\",";
    assert!(text.lines().any(|line| line.trim_end().starts_with(ours)), "{text}");
    for line in theirs.lines() {
        let known = line.split(" #").next().unwrap().trim_end();
        assert!(text.contains(known), "{line} is missing in:\n{text}");
    }
    assert!(text.contains("# the other one"));
    assert_eq!(tree.at(STORAGE).metadata().unwrap().mode() & 0o777, 0o600);
    tree.setup(&["--remove"]);
    assert_eq!(tree.read(STORAGE), theirs);

    // What has been changed since is not ours to delete.
    let tree = Tree::debian();
    tree.setup(&[]);
    tree.write(STORAGE, &tree.read(STORAGE).replace("/var/lib/containers", "/srv"));
    tree.setup(&["--remove"]);
    assert!(tree.read(STORAGE).contains("/srv/storage") && !tree.read(STORAGE).contains("nydus-store/store"));
}

#[test]
fn registries_keep_their_settings() {
    let tree = Tree::debian();
    tree.write(
        REGISTRIES,
        "[[registry]]\nlocation = \"registry.example\"\ninsecure = true\n[[registry.mirror]]\nlocation = \"near.example/r\"\n\
         [[registry]]\nlocation = \"registry.example/secret\"\nblocked = true\n\
         [[registry]]\nlocation = \"registry.example/team\"\nmirror-by-digest-only = true\n\
         [[registry.mirror]]\nlocation = \"near.example/team\"\n",
    );
    let (_, notes) = tree.setup(&["--registry", "registry.example"]);
    assert!(
        notes.contains("registry.example/secret has no mirror") && notes.contains("stays blocked"),
        "{notes}"
    );
    assert_eq!(tree.prefixes(), ["registry.example", "registry.example/team"]);
    let expected = r#"
[[registry]]
prefix = "registry.example"
location = "registry.example"
insecure = true

[[registry.mirror]]
location = "127.0.0.1:5055/registry.example"
insecure = true

[[registry.mirror]]
location = "near.example/r"

[[registry]]
prefix = "registry.example/team"
location = "registry.example/team"

[[registry.mirror]]
location = "127.0.0.1:5055/registry.example/team"
insecure = true

[[registry.mirror]]
location = "near.example/team"
pull-from-mirror = "digest-only"
"#;
    let text = tree.read(OURS);
    assert!(text.ends_with(expected), "{text}");

    // What is changed there later is taken over by the next run, and what is blocked later is left to be so.
    tree.write(REGISTRIES, "[[registry]]\nlocation = \"registry.example\"\n");
    tree.setup(&["--registry", "other.example"]);
    assert!(!tree.read(OURS).contains("near.example") && !tree.read(OURS).contains("team"));
    assert_eq!(tree.prefixes(), ["other.example", "registry.example"]);
    tree.write(
        REGISTRIES,
        "[[registry]]\nlocation = \"registry.example\"\nblocked = true\n",
    );
    let (_, notes) = tree.setup(&[]);
    assert!(notes.contains("registry.example no longer has the mirror"), "{notes}");
    assert_eq!(tree.prefixes(), ["other.example"]);
}

#[test]
fn registries_come_and_go_one_by_one() {
    let tree = Tree::debian();
    for registry in ["a.example", "b.example:5000", "docker.io"] {
        tree.setup(&["--registry", registry]);
    }
    assert_eq!(tree.prefixes(), ["a.example", "b.example:5000", "docker.io"]);
    tree.write("root/.docker/config.json", r#"{"auths": {"a.example:5000": {}}}"#);
    let (_, notes) = tree.setup(&[]);
    assert!(notes.contains("add --registry a.example:5000"), "{notes}");
    assert!(tree.read(OURS).contains("\"127.0.0.1:5055/b.example_5000\""));
    tree.setup(&["--remove", "--registry", "docker.io", "--registry", "*.example"]);
    assert!(!tree.at(OURS).exists());
    assert!(tree.read(STORAGE).contains(ENTRY));
    let (_, notes) = tree.setup(&[]);
    assert!(notes.contains("name each registry with --registry HOST"), "{notes}");
}

/// Podman does not tell a mirror which of a domain's registries is meant, so that those known get entries of their own.
#[test]
fn the_registries_of_a_domain_that_are_known() {
    let tree = Tree::debian();
    let message = tree.fails(&["--registry", "*.corp.example"]);
    assert!(
        message.contains("no registry below that domain is known") && message.contains("in full"),
        "{message}"
    );
    tree.write(
        REGISTRIES,
        "[[registry]]\nprefix = \"*.corp.example\"\ninsecure = true\n",
    );
    tree.write(
        "etc/containers/registries.conf.d/a.conf",
        "unqualified-search-registries = [\"hub.corp.example\"]\n",
    );
    let auth = r#"{"auths": {"dev.corp.example:5000": {}, "dev.corp.example.org": {}}, "credHelpers": {}}"#;
    tree.write("root/.config/containers/auth.json", auth);
    tree.setup(&["--registry", "*.corp.example"]);
    assert_eq!(tree.prefixes(), ["dev.corp.example:5000", "hub.corp.example"]);
    assert!(
        tree.ours()
            .iter()
            .all(|entry| entry["insecure"].as_bool() == Some(true))
    );
}

#[test]
fn print_writes_nothing() {
    for tree in [Tree::debian(), Tree::fedora()] {
        let before = tree.snapshot();
        let args = ["--registry", "registry.example", "--print"];
        let (printed, _) = tree.setup(&args);
        assert_eq!(tree.snapshot(), before);
        tree.setup(&args[..2]);
        for path in [STORAGE, OURS] {
            let part = format!("==> {} (new) <==\n{}", tree.at(path).display(), tree.read(path));
            assert!(printed.contains(&part), "{printed}");
        }
        let (printed, _) = tree.setup(&["--remove", "--print"]);
        assert_eq!(printed.matches("(deleted) <==").count(), 2, "{printed}");
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
        ("etc/nydus-store/config.toml", "[mirror]\nlisten = 1\n", "line 2"),
    ] {
        let tree = with(path, text);
        let message = tree.fails(&["--registry", "registry.example"]);
        let name = tree.at(path).display().to_string();
        assert!(
            message.contains(&name) && message.contains(expected),
            "{path}: {message}"
        );
    }
    // What is not touched may be as it is.
    with(OURS, "mine").fails(&["--remove"]);
    with(drop_in, "[[registry]\n").setup(&["--remove"]);
}

#[test]
fn what_cannot_be_set_up_is_told() {
    let tree = Tree::debian();
    tree.write(
        REGISTRIES,
        "[[registry]]\nlocation = \"blocked.example\"\nblocked = true\n",
    );
    for (registry, expected) in [
        ("blocked.example", "stays blocked"),
        ("127.0.0.1:5055", "this mirror itself"),
        ("https://registry.example", "without the scheme"),
        ("registry.example/team", "without a path"),
        ("alpine", "a point or a port"),
    ] {
        let message = tree.fails(&["--registry", registry]);
        assert!(message.contains(registry) && message.contains(expected), "{message}");
    }
    tree.write(
        "etc/nydus-store/config.toml",
        "[mirror]\nregistries = [\"a.example\"]\n",
    );
    let message = tree.fails(&["--registry", "b.example"]);
    assert!(message.contains("`registries` in the table [mirror]"), "{message}");
    for (config, expected) in [
        ("enabled = false", "turns the mirror off"),
        ("listen = \"127.0.0.1:0\"", "choose one"),
        ("listen = \"[::1]:5055\"", "no IPv6 address"),
    ] {
        tree.write("etc/nydus-store/config.toml", &format!("[mirror]\n{config}\n"));
        let message = tree.fails(&["--registry", "b.example"]);
        assert!(message.contains(expected), "{message}");
        tree.setup(&["--print"]);
    }
    let message = tree.fails(&["--root", "/srv/a:b"]);
    assert!(message.contains("/srv/a:b/store cannot be named"), "{message}");
}

#[test]
fn a_later_file_is_told_of() {
    let tree = Tree::debian();
    tree.write(
        "etc/containers/registries.conf.d/zzz.conf",
        "[[registry]]\nlocation = \"registry.example\"\n",
    );
    let (_, notes) = tree.setup(&["--registry", "registry.example"]);
    assert!(
        notes.contains("zzz.conf is read after") && notes.contains("earlier name"),
        "{notes}"
    );
}

/// What is right in the tree would lead to this host's file from outside.
#[test]
fn links_do_not_lead_out_of_the_tree() {
    let outside = tempfile::tempdir().unwrap();
    let target = outside.path().join("storage.conf");
    fs::write(&target, "# this host's\n").unwrap();
    let tree = Tree::debian();
    std::os::unix::fs::symlink(&target, tree.at(STORAGE)).unwrap();
    let message = tree.fails(&[]);
    assert!(
        message.contains("out of the tree") && message.contains(target.to_str().unwrap()),
        "{message}"
    );
    fs::remove_file(tree.at(STORAGE)).unwrap();
    tree.write("etc/real.conf", "# the tree's\n");
    std::os::unix::fs::symlink("../real.conf", tree.at(STORAGE)).unwrap();
    tree.setup(&[]);
    assert!(tree.at(STORAGE).is_symlink() && tree.read("etc/real.conf").contains(ENTRY));
    // An empty directory would be taken away, if it were the tree's.
    let store = outside.path().join("lib/nydus-store/store");
    fs::create_dir_all(&store).unwrap();
    fs::remove_dir_all(tree.at("var")).unwrap();
    std::os::unix::fs::symlink(outside.path(), tree.at("var")).unwrap();
    let message = tree.fails(&["--remove"]);
    assert!(message.contains("out of the tree") && store.exists(), "{message}");
}

#[test]
fn another_storage_conf_is_named_by_the_environment() {
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
fn only_root_sets_up_the_host() {
    use std::os::unix::process::CommandExt as _;
    let dir = tempfile::tempdir().unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    // Where another user can find it.
    let program = dir.path().join("nydus-store");
    fs::copy(BINARY, &program).unwrap();
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
