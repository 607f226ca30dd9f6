//! Podman with storage of its own, using a store.

use std::{fs, path::Path, process::Command};

use tempfile::TempDir;

use super::process::output;

/// Debian's Podman, with its own images and containers.
pub struct Podman {
    dir: TempDir,
}

impl Podman {
    /// A Podman that looks for layers in `store` (or nowhere) and may use `registry` over plain HTTP.
    pub fn new(store: Option<&Path>, registry: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (graph, run) = (dir.path().join("graph"), dir.path().join("run"));
        let stores = store.map(|store| format!("additionallayerstores = [\"{}:ref\"]\n", store.display()));
        let storage = format!(
            "[storage]\ndriver = \"overlay\"\ngraphroot = \"{}\"\nrunroot = \"{}\"\n[storage.options]\n{}",
            graph.display(),
            run.display(),
            stores.unwrap_or_default()
        );
        let registries = format!("[[registry]]\nlocation = \"{registry}\"\ninsecure = true\n");
        // A container's usual limits are more than a test machine without CAP_SYS_RESOURCE may set.
        let containers = "[containers]\ndefault_ulimits = [\"nofile=1024:1024\",\"nproc=4096:4096\"]\n";
        let policy = r#"{"default":[{"type":"insecureAcceptAnything"}]}"#;
        for (name, text) in [
            ("storage.conf", storage.as_str()),
            ("registries.conf", &registries),
            ("containers.conf", containers),
            ("policy.json", policy),
        ] {
            fs::write(dir.path().join(name), text).unwrap();
        }
        Self { dir }
    }

    /// A command of Podman or another program of its family (skopeo, buildah) with this storage.
    pub fn program(&self, program: &str) -> Command {
        let file = |name: &str| self.dir.path().join(name);
        let mut command = Command::new(program);
        command
            .env("CONTAINERS_STORAGE_CONF", file("storage.conf"))
            .env("CONTAINERS_REGISTRIES_CONF", file("registries.conf"))
            .env("CONTAINERS_CONF", file("containers.conf"))
            .env("PODMAN_IGNORE_CGROUPSV1_WARNING", "1")
            // Podman notes its own paths in a database of the host; this keeps it apart.
            .env("XDG_RUNTIME_DIR", self.dir.path())
            .env("TMPDIR", self.dir.path());
        command
    }

    /// `podman ARGS…`
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = self.program("podman");
        command.args(["--runtime", "runc"]).args(args);
        command
    }

    /// Runs `podman ARGS…`; what it printed, without the last line's end. Panics if it fails.
    pub fn run(&self, args: &[&str]) -> String {
        output(&mut self.command(args)).trim_end().to_owned()
    }

    /// Runs `podman ARGS…`, which must fail; what it printed as errors.
    pub fn fails(&self, args: &[&str]) -> String {
        let output = self.command(args).output().unwrap();
        assert!(!output.status.success(), "podman {args:?} succeeded");
        String::from_utf8_lossy(&output.stderr).into_owned()
    }
}

impl Drop for Podman {
    fn drop(&mut self) {
        // Containers and mounts would outlive the directory.
        self.command(&["rm", "--all", "--force", "--time", "0"]).output().ok();
        self.command(&["rmi", "--all", "--force"]).output().ok();
    }
}
