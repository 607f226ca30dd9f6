//! Podman with storage of its own, using a store.

use std::{
    fs,
    io::{BufRead as _, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use tempfile::TempDir;

use super::process::output;

/// Which Podman.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Release {
    /// The host's: 4.3.
    Four,
    /// 5.4, which runs in the tree that `scripts/podman5` has made. It sees the host's temporary directory, but nothing
    /// that is mounted there: only the store.
    Five,
}

/// A Podman, with its own images and containers.
pub struct Podman {
    /// Where the newer one runs.
    place: Option<Place>,
    /// A process in whose network it runs.
    neighbour: Option<u32>,
    /// What it finds in /etc/containers; nothing if it is given its files by name.
    etc: Option<PathBuf>,
    dir: TempDir,
}

impl Podman {
    /// The host's Podman, which looks for layers in `store` (or nowhere) and may use `registry` over plain HTTP.
    pub fn new(store: Option<&Path>, registry: &str) -> Self {
        Self::of(Release::Four, store, registry, None)
    }

    /// A Podman of that release. With `mirror` (host and port) it asks that before it asks the registry.
    pub fn of(release: Release, store: Option<&Path>, registry: &str, mirror: Option<&str>) -> Self {
        let mut registries = format!(
            "unqualified-search-registries = [\"{registry}\"]\n[[registry]]\nprefix = \"{registry}\"\nlocation = \"{registry}\"\ninsecure = true\n"
        );
        if let Some(mirror) = mirror {
            // A repository's name has no colon.
            let registry = registry.replace(':', "_");
            registries.push_str(&format!(
                "[[registry.mirror]]\nlocation = \"{mirror}/{registry}\"\ninsecure = true\n"
            ));
        }
        match release {
            Release::Four => Self::with(store, &registries, "", None),
            Release::Five => {
                let place = Place::enter(store.and_then(Path::parent));
                // The host's cgroups may be of the old kind.
                Self::with(store, &registries, "cgroups = \"disabled\"\n", Some(place))
            }
        }
    }

    /// A Podman that reads the usual files, as `nydus-store setup` has written them: `setup` gets a tree of files with a
    /// person's storage.conf and `registries`, whose `etc/containers` Podman then has as its own. `root` is the daemon's.
    pub fn set_up(release: Release, root: &Path, registries: &str, setup: impl FnOnce(&Path)) -> Self {
        let (place, containers) = match release {
            Release::Four => (None, ""),
            Release::Five => (Some(Place::enter(Some(root))), "cgroups = \"disabled\"\n"),
        };
        let mut podman = Self::with(None, registries, containers, place);
        let tree = podman.dir.path().join("tree");
        let etc = tree.join("etc/containers");
        fs::create_dir_all(&etc).unwrap();
        for name in ["storage.conf", "registries.conf", "policy.json"] {
            fs::rename(podman.dir.path().join(name), etc.join(name)).unwrap();
        }
        setup(&tree);
        if let Some(place) = &podman.place {
            output(place.command("rm", None).args(["-rf", "/etc/containers"]));
            output(place.command("cp", None).arg("-r").arg(&etc).arg("/etc/containers"));
        }
        podman.etc = Some(etc);
        podman
    }

    /// A directory that Podman sees too.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    fn with(store: Option<&Path>, registries: &str, containers: &str, place: Option<Place>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (graph, run) = (dir.path().join("graph"), dir.path().join("run"));
        let stores = store.map(|store| format!("additionallayerstores = [\"{}:ref\"]\n", store.display()));
        let storage = format!(
            "[storage]\ndriver = \"overlay\"\ngraphroot = \"{}\"\nrunroot = \"{}\"\n[storage.options]\n{}",
            graph.display(),
            run.display(),
            stores.unwrap_or_default()
        );
        // A container's usual limits are more than a test machine without CAP_SYS_RESOURCE may set.
        let containers =
            format!("[containers]\ndefault_ulimits = [\"nofile=1024:1024\",\"nproc=4096:4096\"]\n{containers}");
        let policy = r#"{"default":[{"type":"insecureAcceptAnything"}]}"#;
        for (name, text) in [
            ("storage.conf", storage.as_str()),
            ("registries.conf", registries),
            ("containers.conf", &containers),
            ("policy.json", policy),
        ] {
            fs::write(dir.path().join(name), text).unwrap();
        }
        Self {
            place,
            neighbour: None,
            etc: None,
            dir,
        }
    }

    /// Where it keeps images and containers.
    pub fn graph_root(&self) -> PathBuf {
        self.dir.path().join("graph")
    }

    /// From now on it runs in the network of that process.
    pub fn move_to_network_of(&mut self, process: u32) {
        self.neighbour = Some(process);
    }

    /// Other contents for its `registries.conf`.
    pub fn set_registries(&self, text: &str) {
        fs::write(self.dir.path().join("registries.conf"), text).unwrap();
    }

    /// Where a path that Podman prints is to be found from here.
    pub fn outside(&self, path: &str) -> PathBuf {
        match &self.place {
            Some(place) => PathBuf::from(format!("/proc/{}/root{path}", place.holder.id())),
            None => path.into(),
        }
    }

    /// A command of Podman or another program of its family (skopeo, buildah) with this storage.
    pub fn program(&self, program: &str) -> Command {
        let file = |name: &str| self.dir.path().join(name);
        let mut command = match (&self.place, self.neighbour, &self.etc) {
            (Some(place), neighbour, _) => place.command(program, neighbour),
            (None, Some(neighbour), _) => {
                let mut command = Command::new("nsenter");
                command.args(["--target", &neighbour.to_string(), "--net", "--", program]);
                command
            }
            (None, None, None) => Command::new(program),
            (None, None, Some(etc)) => with_etc(etc, program),
        };
        if self.etc.is_none() {
            command
                .env("CONTAINERS_STORAGE_CONF", file("storage.conf"))
                .env("CONTAINERS_REGISTRIES_CONF", file("registries.conf"));
        }
        command
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
        // Debian 12's crun does not get on with hybrid cgroups.
        if self.place.is_none() {
            command.args(["--runtime", "runc"]);
        }
        command.args(args);
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

/// A command of the host with another /etc/containers.
fn with_etc(etc: &Path, program: &str) -> Command {
    let mut command = Command::new("unshare");
    let script = "mount --bind \"$1\" /etc/containers && shift && exec \"$@\"";
    command.args(["--mount", "--propagation", "slave", "sh", "-c", script, "sh"]);
    command.arg(etc).arg(program);
    command
}

impl Drop for Podman {
    fn drop(&mut self) {
        // Containers and mounts would outlive the directory.
        self.command(&["rm", "--all", "--force", "--time", "0"]).output().ok();
        self.command(&["rmi", "--all", "--force"]).output().ok();
    }
}

/// A mount namespace with a newer Debian as its root, kept by a process that ends with the test.
struct Place {
    holder: Child,
    _dir: TempDir,
}

impl Place {
    /// `root` is a daemon's, to be seen inside.
    fn enter(root: Option<&Path>) -> Self {
        let tree = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/podman-trixie");
        assert!(
            tree.exists(),
            "{} is there (scripts/podman5 makes it, scripts/test runs that)",
            tree.display()
        );
        let dir = tempfile::tempdir().unwrap();
        let mut command = Command::new("unshare");
        command.args(["--mount", "--propagation", "slave", "sh", "-c"]);
        command.args([include_str!("enter-podman5"), "enter-podman5"]);
        command.arg(tree).arg(dir.path()).arg(std::env::temp_dir()).args(root);
        let mut holder = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(holder.stdout.take().unwrap())
            .read_line(&mut line)
            .unwrap();
        assert_eq!(line, "ready\n", "{command:?}");
        Self { holder, _dir: dir }
    }

    fn command(&self, program: &str, neighbour: Option<u32>) -> Command {
        let mut command = Command::new("nsenter");
        command.args(["--target", &self.holder.id().to_string(), "--mount"]);
        if let Some(neighbour) = neighbour {
            command.arg(format!("--net=/proc/{neighbour}/ns/net"));
        }
        command.args(["--", program]);
        command.env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
        command
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        drop(self.holder.stdin.take());
        self.holder.wait().ok();
    }
}
