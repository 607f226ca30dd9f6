//! [`Tree`]: a temporary sysroot with the files of a distribution.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use tempfile::TempDir;

use super::{REGISTRIES, VENDOR};
use crate::common::BINARY;

/// A short vendor's storage.conf.
pub const VENDOR_TEXT: &str = "\
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

/// A temporary sysroot.
pub struct Tree(TempDir);

impl Tree {
    pub fn new(files: &[(&str, &str)]) -> Self {
        let tree = Self(tempfile::tempdir().unwrap());
        for (path, text) in files {
            tree.write(path, text);
        }
        tree
    }

    /// Debian: registries.conf with comments only, and no storage.conf.
    pub fn debian() -> Self {
        Self::new(&[
            (REGISTRIES, "# unqualified-search-registries = [\"example.com\"]\n"),
            (
                "etc/containers/registries.conf.d/shortnames.conf",
                "[aliases]\n  \"debian\" = \"docker.io/library/debian\"\n",
            ),
            ("etc/containers/policy.json", "{}"),
        ])
    }

    /// Fedora: a vendor's storage.conf, and search registries.
    pub fn fedora() -> Self {
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

    pub fn at(&self, path: &str) -> PathBuf {
        self.0.path().join(path)
    }

    pub fn write(&self, path: &str, text: &str) {
        fs::create_dir_all(self.at(path).parent().unwrap()).unwrap();
        fs::write(self.at(path), text).unwrap();
    }

    pub fn read(&self, path: &str) -> String {
        fs::read_to_string(self.at(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
    }

    /// Every file and directory with its inode and contents. A rewritten file has another inode.
    pub fn snapshot(&self) -> BTreeMap<PathBuf, (u64, Option<String>)> {
        let entries = walkdir::WalkDir::new(self.0.path()).into_iter().map(Result::unwrap);
        let state = |path: &Path| (path.metadata().unwrap().ino(), fs::read_to_string(path).ok());
        entries
            .map(|entry| (entry.path().to_owned(), state(entry.path())))
            .collect()
    }

    /// Every file and directory with its contents.
    pub fn contents(&self) -> BTreeMap<PathBuf, Option<String>> {
        self.snapshot()
            .into_iter()
            .map(|(path, (_, text))| (path, text))
            .collect()
    }

    fn command(&self, args: &[&str]) -> Output {
        let mut command = Command::new(BINARY);
        command.args(["setup", "--sysroot"]).arg(self.0.path()).args(args);
        // Logins and settings of this host's user must not apply to the tree.
        command
            .env("CONTAINERS_STORAGE_CONF", "/nonexistent")
            .env_remove("REGISTRY_AUTH_FILE");
        command
            .env("HOME", "/root")
            .env_remove("XDG_RUNTIME_DIR")
            .output()
            .unwrap()
    }

    /// Runs it and returns standard output and standard error.
    pub fn setup(&self, args: &[&str]) -> (String, String) {
        let Output { status, stdout, stderr } = self.command(args);
        let (stdout, stderr) = (String::from_utf8(stdout).unwrap(), String::from_utf8(stderr).unwrap());
        assert!(status.success(), "{args:?}: {stdout}{stderr}");
        (stdout, stderr)
    }

    /// Runs it, requires exit status 1 and an unchanged tree, and returns its standard error.
    pub fn fails(&self, args: &[&str]) -> String {
        let before = self.snapshot();
        let output = self.command(args);
        let message = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{args:?}: {message}");
        assert_eq!(self.snapshot(), before, "{args:?}");
        message
    }
}
