//! [`Podman`]: a Podman of a [`Release`] with its own storage and configuration, which may use a daemon's store.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::Command,
};

use tempfile::TempDir;

use super::{
    BINARY, Rootless,
    mount_namespace::MountNamespace,
    process::{failure, output},
};

/// A release of Podman.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Release {
    /// 4.3, of Debian 12, the host's own. Uses an image store and a layer store.
    Four,
    /// 5.4, of Debian 13, in `target/podman-trixie`. Uses an image store and runs the auth helper at each pull.
    Five,
    /// 5.8 or later, of Debian testing, in `target/podman-testing`. Like [`Self::Five`], with other rules for rootless
    /// users.
    Newest,
}

impl Release {
    /// All releases, oldest first.
    pub const ALL: [Self; 3] = [Self::Four, Self::Five, Self::Newest];

    /// Root of the system with this Podman, relative to the package's directory.
    pub(super) fn tree(self) -> &'static str {
        match self {
            Self::Four => "/",
            Self::Five => "target/podman-trixie",
            Self::Newest => "target/podman-testing",
        }
    }

    /// Lines of `containers.conf`, after the table `containers`, that let containers start on a test machine. The last
    /// table is `engine`.
    fn runtime(self) -> &'static str {
        match self {
            // Debian 12's crun does not support hybrid cgroups.
            Self::Four => "[engine]\nruntime = \"runc\"\n",
            // The host's cgroups may be version 1, which Podman 5 does not support.
            Self::Five | Self::Newest => "cgroups = \"disabled\"\n[engine]\n",
        }
    }
}

/// Lowers the default limits: a test machine without CAP_SYS_RESOURCE may not raise limits that far.
const CONTAINERS_CONF: &str = "[containers]\ndefault_ulimits = [\"nofile=1024:1024\",\"nproc=4096:4096\"]\n";

/// Options of a [`Podman`]; made by [`Podman::builder`].
pub struct PodmanBuilder {
    release: Release,
    root: Option<PathBuf>,
    registry: Option<String>,
    registries: String,
    storage_options: String,
    policy: String,
    userns: bool,
}

impl PodmanBuilder {
    /// Uses the stores of the daemon with this root: `<root>/store` as image store, and for [`Release::Four`]
    /// `<root>/layers` as layer store, for others the auth helper. Later mounts below `root` propagate to a Podman in
    /// its own mount namespace if `root` is on a shared mount ([`super::Serve::shared`]).
    pub fn root(mut self, root: &Path) -> Self {
        self.root = Some(root.to_owned());
        self
    }

    /// Uses a registry (`host:port`) over plain HTTP, also for short names.
    pub fn registry(mut self, host: &str) -> Self {
        self.registry = Some(host.to_owned());
        self
    }

    /// Appends tables to `registries.conf`.
    pub fn registries(mut self, text: &str) -> Self {
        self.registries.push_str(text);
        self
    }

    /// Adds lines to the table `storage.options` of `storage.conf`.
    pub fn storage_options(mut self, lines: &str) -> Self {
        self.storage_options.push_str(lines);
        self
    }

    /// Replaces the contents of `policy.json`; the default accepts every image.
    pub fn policy(mut self, json: &str) -> Self {
        json.clone_into(&mut self.policy);
        self
    }

    /// Runs in its own mount namespace for every release. There `--userns=auto` has ids to allocate.
    pub fn userns(mut self) -> Self {
        self.userns = true;
        self
    }

    /// Builds a Podman that gets its configuration files by environment variables. The stores of [`Self::root`] must
    /// exist.
    pub fn build(self) -> Podman {
        let stores = self.root.as_deref().map(|root| self.stores(root)).unwrap_or_default();
        let isolated = self.userns || self.release != Release::Four;
        let namespace = isolated.then(|| MountNamespace::enter(self.release, self.root.as_deref()));
        let podman = self.write(namespace, &stores, self.root.as_deref());
        if let Some(root) = &self.root {
            podman.write_helper(root);
        }
        podman
    }

    /// Builds a Podman that reads `/etc/containers` in its own mount namespace. `setup` gets a directory whose
    /// `etc/containers` holds a user's storage.conf, registries.conf and policy.json, and may change it; the result
    /// becomes Podman's `/etc/containers`. Podman uses the stores of [`Self::root`] only if `setup` names them.
    /// [`Podman::rootless`] requires such a Podman.
    pub fn set_up(self, setup: impl FnOnce(&Path)) -> Podman {
        let namespace = MountNamespace::enter(self.release, self.root.as_deref());
        let mut podman = self.write(Some(namespace), "", None);
        let tree = podman.dir.path().join("tree");
        let etc = tree.join("etc/containers");
        fs::create_dir_all(&etc).unwrap();
        for file in ["storage.conf", "registries.conf", "home/.config/containers/policy.json"] {
            let file = podman.dir.path().join(file);
            fs::rename(&file, etc.join(file.file_name().unwrap())).unwrap();
        }
        if self.release == Release::Newest {
            move_graph_roots(podman.dir.path(), &etc);
        }
        setup(&tree);
        podman.reads_etc = true;
        output(podman.program("rm").args(["-rf", "/etc/containers"]));
        output(podman.program("cp").arg("-r").arg(&etc).arg("/etc/containers"));
        podman
    }

    /// Lines of `storage.conf` for the stores of the daemon with this root.
    fn stores(&self, root: &Path) -> String {
        let root = root.display();
        let images = format!("additionalimagestores = [\"{root}/store\"]\n");
        match self.release {
            Release::Four => format!("{images}additionallayerstores = [\"{root}/layers:ref\"]\n"),
            Release::Five | Release::Newest => images,
        }
    }

    /// The contents of `registries.conf`.
    fn registries_conf(&self, helper: Option<&Path>) -> String {
        let mut text = String::new();
        if let Some(helper) = helper {
            text = format!("additional-layer-store-auth-helper = \"{}\"\n", helper.display());
        }
        if let Some(host) = &self.registry {
            text.push_str(&format!(
                "unqualified-search-registries = [\"{host}\"]\n\
                 [[registry]]\nprefix = \"{host}\"\nlocation = \"{host}\"\ninsecure = true\n"
            ));
        }
        text + &self.registries
    }

    /// Writes the configuration files; `root` is the root of the auth helper's daemon.
    fn write(&self, namespace: Option<MountNamespace>, stores: &str, root: Option<&Path>) -> Podman {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path();
        // Contains directories of the rootless user.
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
        let helper = (root.is_some() && self.release != Release::Four).then(|| path.join(HELPER));
        let storage = format!(
            "[storage]\ndriver = \"overlay\"\n{}[storage.options]\n{}{stores}",
            graph_roots(path),
            self.storage_options,
        );
        let mut containers = format!("{CONTAINERS_CONF}{}", self.release.runtime());
        if root.is_some() {
            // What a reboot removes must not be shared with other tests: Podman takes a missing file in the first
            // directory for a reboot, and shares its other kind of locks with all Podmans of the machine.
            let own = path.join("libpod");
            containers.push_str(&format!("tmp_dir = \"{}\"\nlock_type = \"file\"\n", own.display()));
        }
        let own = path.join("home/.config/containers");
        fs::create_dir_all(&own).unwrap();
        for (file, text) in [
            (path.join("storage.conf"), storage),
            (path.join("registries.conf"), self.registries_conf(helper.as_deref())),
            (path.join("containers.conf"), containers),
            (own.join("policy.json"), self.policy.clone()),
        ] {
            fs::write(file, text).unwrap();
        }
        Podman {
            namespace,
            network_of: None,
            reads_etc: false,
            dir,
        }
    }
}

/// Lines of the table `storage` of `storage.conf` with the directories of root's Podman.
fn graph_roots(dir: &Path) -> String {
    format!("graphroot = \"{0}/graph\"\nrunroot = \"{0}/run\"\n", dir.display())
}

/// Moves the lines of [`graph_roots`] to a file for root only. Podman 5.8 applies a `graphroot` in `storage.conf` to
/// every user, and fails for users who may not write there.
fn move_graph_roots(dir: &Path, etc: &Path) {
    let (roots, storage) = (graph_roots(dir), etc.join("storage.conf"));
    let text = fs::read_to_string(&storage).unwrap();
    fs::write(&storage, text.replace(&roots, "")).unwrap();
    let rootful = etc.join("storage.rootful.conf.d");
    fs::create_dir(&rootful).unwrap();
    fs::write(rootful.join("00-graph-root.conf"), format!("[storage]\n{roots}")).unwrap();
}

/// File name of the auth helper in [`Podman::dir`].
const HELPER: &str = "auth-helper";

/// Podman commands, run by root ([`Podman`]) or by an ordinary user ([`Rootless`]).
pub trait RunPodman {
    /// A command of Podman, skopeo, Buildah or another program, with this storage and configuration.
    fn program(&self, program: &str) -> Command;

    /// `podman ARGS…`
    fn command(&self, args: &[&str]) -> Command {
        let mut command = self.program("podman");
        command.args(args);
        command
    }

    /// Runs `podman ARGS…` and returns its output without trailing white space. Panics if it fails.
    fn run(&self, args: &[&str]) -> String {
        output(&mut self.command(args)).trim_end().to_owned()
    }

    /// Runs `podman ARGS…`, which must fail, and returns its standard error.
    fn fails(&self, args: &[&str]) -> String {
        failure(&mut self.command(args))
    }
}

/// A Podman with its own images and containers.
pub struct Podman {
    /// Its mount namespace, unless it runs in the host's.
    namespace: Option<MountNamespace>,
    /// The process whose network namespace it uses.
    network_of: Option<u32>,
    /// Whether it reads /etc/containers instead of files named by environment variables.
    reads_etc: bool,
    dir: TempDir,
}

impl Podman {
    /// Options for a Podman of this release, initially without stores and registries.
    pub fn builder(release: Release) -> PodmanBuilder {
        PodmanBuilder {
            release,
            root: None,
            registry: None,
            registries: String::new(),
            storage_options: String::new(),
            policy: r#"{"default":[{"type":"insecureAcceptAnything"}]}"#.to_owned(),
            userns: false,
        }
    }

    /// A Podman that uses the stores of the daemon with this root, if given ([`PodmanBuilder::root`]), and `registry`
    /// (`host:port`) over plain HTTP.
    pub fn of(release: Release, root: Option<&Path>, registry: &str) -> Self {
        let builder = Self::builder(release).registry(registry);
        match root {
            Some(root) => builder.root(root),
            None => builder,
        }
        .build()
    }

    /// [`PodmanBuilder::set_up`] for the daemon with this root and these tables in `registries.conf`.
    pub fn set_up(release: Release, root: &Path, registries: &str, setup: impl FnOnce(&Path)) -> Self {
        Self::builder(release).root(root).registries(registries).set_up(setup)
    }

    /// Writes the auth helper: a script that runs `nydus-store auth-helper`.
    fn write_helper(&self, root: &Path) {
        let script = format!("#!/bin/sh\nexec '{BINARY}' auth-helper --root '{}'\n", root.display());
        fs::write(self.helper(), script).unwrap();
        fs::set_permissions(self.helper(), fs::Permissions::from_mode(0o755)).unwrap();
    }

    /// Path of the auth helper, which a test may replace.
    pub fn helper(&self) -> PathBuf {
        self.dir.path().join(HELPER)
    }

    /// A temporary directory at the same path for the test and for Podman.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Its `$HOME`. `.config/containers` there takes precedence over /etc/containers for policy.json and registries.d.
    pub fn home(&self) -> PathBuf {
        self.dir.path().join("home")
    }

    /// Its directory of images and containers.
    pub fn graph_root(&self) -> PathBuf {
        self.dir.path().join("graph")
    }

    /// Runs later commands in the network namespace of a process.
    pub fn join_network_of(&mut self, process: u32) {
        self.network_of = Some(process);
    }

    /// The host's path of a path printed by Podman.
    pub fn outside(&self, path: &str) -> PathBuf {
        match &self.namespace {
            Some(namespace) => namespace.outside(path),
            None => path.into(),
        }
    }

    /// This Podman run by an ordinary user: with the same /etc/containers and its own storage. Panics unless this one
    /// was made by [`PodmanBuilder::set_up`].
    pub fn rootless(&self) -> Rootless<'_> {
        assert!(self.reads_etc, "this Podman does not read /etc/containers");
        Rootless::new(self.namespace.as_ref().unwrap(), self.dir.path())
    }
}

impl RunPodman for Podman {
    fn program(&self, program: &str) -> Command {
        let file = |name: &str| self.dir.path().join(name);
        let mut command = match (&self.namespace, self.network_of) {
            (Some(namespace), network_of) => namespace.command(program, network_of, None),
            (None, Some(network_of)) => {
                let mut command = Command::new("nsenter");
                command.args(["--target", &network_of.to_string(), "--net", "--", program]);
                command
            }
            (None, None) => Command::new(program),
        };
        if !self.reads_etc {
            command
                .env("CONTAINERS_STORAGE_CONF", file("storage.conf"))
                .env("CONTAINERS_REGISTRIES_CONF", file("registries.conf"));
        }
        command
            .env("CONTAINERS_CONF", file("containers.conf"))
            .env("PODMAN_IGNORE_CGROUPSV1_WARNING", "1")
            .env("HOME", self.home())
            // Podman records its paths in a database below this directory.
            .env("XDG_RUNTIME_DIR", self.dir.path())
            .env("TMPDIR", self.dir.path());
        command
    }
}

impl Drop for Podman {
    fn drop(&mut self) {
        // Otherwise containers and mounts outlive the directory.
        self.command(&["rm", "--all", "--force", "--time", "0"]).output().ok();
        self.command(&["rmi", "--all", "--force"]).output().ok();
    }
}
