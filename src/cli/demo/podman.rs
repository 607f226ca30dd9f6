//! Podman, with storage of its own in the tour's directory, using the store.

use std::{
    fs::{self, File, Permissions},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};

use super::place::Stop;
use crate::{setup, store::layout::StoreLayout};

/// A Podman that has not come to an end by then hangs.
const PATIENCE: Duration = Duration::from_secs(60);
/// It neither looks layers up by their digests, as older ones do, nor runs a helper at a pull, as newer ones do.
const DEAF: (u32, u32) = (5, 1);

/// The host's Podman.
#[derive(Debug)]
pub struct Podman {
    pub version: String,
}

/// Podman with storage of its own. When dropped, it lets go of its containers and images.
pub struct PodmanHere<'a> {
    dir: PathBuf,
    stop: &'a Stop,
}

impl Podman {
    /// Looks for Podman.
    pub fn find() -> anyhow::Result<Self> {
        let output = match Command::new("podman").arg("--version").output() {
            Ok(output) => output,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                bail!("there is no `podman` here: install it, or run the demo without --podman")
            }
            Err(error) => return Err(error).context("cannot run `podman --version`"),
        };
        let text = String::from_utf8_lossy(&output.stdout);
        let version = text.split_whitespace().last().unwrap_or_default();
        ensure!(
            output.status.success() && number(version).is_some(),
            "`podman --version` does not tell a version, but: {}{}",
            text.trim(),
            String::from_utf8_lossy(&output.stderr).trim()
        );
        Ok(Self {
            version: version.to_owned(),
        })
    }

    /// Whether the store learns of this Podman's pulls: by a look-up, or by the helper that it runs.
    pub fn announces_pulls(&self) -> bool {
        number(&self.version).is_some_and(|version| version != DEAF)
    }

    /// Prepares storage below `dir`, with the store of the daemon's `root`.
    pub fn set_up<'a>(
        &self,
        dir: &Path,
        root: &Path,
        registry: &str,
        stop: &'a Stop,
    ) -> anyhow::Result<PodmanHere<'a>> {
        let here = PodmanHere {
            dir: dir.join("podman"),
            stop,
        };
        fs::create_dir_all(here.file("tmp")).context("cannot make a directory for Podman")?;
        let place = here.dir.display();
        let layout = StoreLayout::new(root);
        let program = std::env::current_exe().context("cannot find this program")?;
        let helper = here.file("helper");
        fs::write(&helper, setup::auth_helper::script(&program, root))
            .and_then(|()| fs::set_permissions(&helper, Permissions::from_mode(0o700)))
            .context("cannot write the helper that Podman runs")?;
        let files = [
            (
                "storage.conf",
                format!(
                    "[storage]\ndriver = \"overlay\"\ngraphroot = \"{place}/graph\"\nrunroot = \"{place}/run\"\n\
                     [storage.options]\nadditionalimagestores = [\"{}\"]\nadditionallayerstores = [\"{}:ref\"]\n",
                    layout.store().display(),
                    layout.layer_store().display()
                ),
            ),
            (
                "registries.conf",
                format!(
                    "additional-layer-store-auth-helper = \"{place}/helper\"\n\
                     [[registry]]\nlocation = \"{registry}\"\ninsecure = true\n"
                ),
            ),
            (
                // Its own directory and file locks keep it apart from the host's containers. The limits are such as
                // any machine may set.
                "containers.conf",
                format!(
                    "[containers]\ndefault_ulimits = [\"nofile=1024:1024\", \"nproc=4096:4096\"]\n\
                     log_driver = \"k8s-file\"\n[engine]\ncgroup_manager = \"cgroupfs\"\nevents_logger = \"none\"\n\
                     lock_type = \"file\"\ntmp_dir = \"{place}/tmp\"\n"
                ),
            ),
            (
                "policy.json",
                r#"{"default":[{"type":"insecureAcceptAnything"}]}"#.to_owned(),
            ),
            ("auth.json", "{}".to_owned()),
        ];
        for (name, text) in files {
            fs::write(here.file(name), text).with_context(|| format!("cannot write Podman's {name}"))?;
        }
        Ok(here)
    }
}

/// Podman notes where it has seen blobs in a file of the host, wherever its storage is. The tour's are of no use later,
/// so it gets another directory in that place, below `dir`; only this process and its children see it there.
pub fn hide_shared_cache(dir: &Path) -> anyhow::Result<()> {
    let shared = Path::new("/var/lib/containers");
    if !shared.is_dir() {
        return Ok(());
    }
    let own = dir.join("containers");
    fs::create_dir(&own).context("cannot make a directory for Podman")?;
    rustix::mount::mount_bind(&own, shared).with_context(|| format!("cannot mount on {}", shared.display()))
}

/// Major and minor version.
fn number(version: &str) -> Option<(u32, u32)> {
    let mut parts = version.split('.');
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

/// What a program printed, and how it ended.
struct Ended {
    status: ExitStatus,
    stdout: String,
    stderr: String,
}

impl PodmanHere<'_> {
    fn file(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// `podman pull`
    pub fn pull(&self, reference: &str) -> anyhow::Result<()> {
        let policy = self.file("policy.json").display().to_string();
        let ended = self.run(&["pull", "--quiet", "--signature-policy", &policy, reference])?;
        ensure!(ended.status.success(), "`podman pull` failed: {}", ended.stderr);
        Ok(())
    }

    /// `podman run`, with crun or runc, whichever works here: its name, what the container printed, and how long that took.
    pub fn run_container(&self, reference: &str) -> anyhow::Result<(&'static str, String, Duration)> {
        let mut failures = Vec::new();
        let state = format!("root={}", self.file("runtime").display());
        for runtime in ["crun", "runc"] {
            let arguments = [
                "--runtime",
                runtime,
                "--runtime-flag",
                &state,
                "run",
                "--rm",
                "--pull",
                "never",
                "--network",
                "none",
                reference,
            ];
            let start = Instant::now();
            let ended = self.run(&arguments)?;
            if ended.status.success() {
                return Ok((runtime, ended.stdout, start.elapsed()));
            }
            failures.push(format!("with {runtime}: {}", ended.stderr));
        }
        bail!("`podman run` failed {}", failures.join("; "))
    }

    /// Removes containers and images, so that nothing is mounted and the store's layers are released.
    pub fn let_go(&self) {
        for arguments in [
            ["rm", "--all", "--force", "--time", "0"].as_slice(),
            &["rmi", "--all", "--force"],
        ] {
            match self
                .command(arguments)
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .status()
            {
                Ok(status) if status.success() => {}
                other => tracing::debug!(?arguments, ?other, "Podman could not clean up"),
            }
        }
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new("podman");
        command
            .args(arguments)
            .env("CONTAINERS_STORAGE_CONF", self.file("storage.conf"))
            .env("CONTAINERS_REGISTRIES_CONF", self.file("registries.conf"))
            .env("CONTAINERS_CONF", self.file("containers.conf"))
            .env("REGISTRY_AUTH_FILE", self.file("auth.json"))
            .env("PODMAN_IGNORE_CGROUPSV1_WARNING", "1")
            .env("XDG_RUNTIME_DIR", &self.dir)
            .env("TMPDIR", self.file("tmp"))
            .stdin(Stdio::null());
        // These would lead it to other storage, or to another host.
        for name in [
            "CONTAINERS_CONF_OVERRIDE",
            "CONTAINER_CONNECTION",
            "CONTAINER_HOST",
            "NOTIFY_SOCKET",
            "STORAGE_DRIVER",
            "STORAGE_OPTS",
        ] {
            command.env_remove(name);
        }
        command
    }

    /// Runs `podman ARGUMENTS…`; stops it when the tour is to stop.
    fn run(&self, arguments: &[&str]) -> anyhow::Result<Ended> {
        // To files, because what Podman leaves running may hold on to pipes.
        let (stdout, stderr) = (self.file("stdout"), self.file("stderr"));
        let create = |path: &Path| File::create(path).context("cannot make a file for Podman's output");
        let mut command = self.command(arguments);
        command.stdout(create(&stdout)?).stderr(create(&stderr)?);
        let mut child = command.spawn().context("cannot run podman")?;
        let start = Instant::now();
        let status = loop {
            if let Some(status) = child.try_wait().context("cannot wait for podman")? {
                break status;
            }
            let go_on = self.stop.check().and_then(|()| {
                ensure!(start.elapsed() < PATIENCE, "`podman {}` hangs", arguments.join(" "));
                Ok(())
            });
            if go_on.is_err() {
                child.kill().and_then(|()| child.wait()).context("cannot stop podman")?;
            }
            go_on?;
            std::thread::sleep(Duration::from_millis(5));
        };
        let text = |path: &Path| fs::read(path).map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
        Ok(Ended {
            status,
            stdout: text(&stdout)?,
            stderr: text(&stderr)?.trim().to_owned(),
        })
    }
}

impl Drop for PodmanHere<'_> {
    fn drop(&mut self) {
        self.let_go();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn podman_5_1_announces_no_pulls() {
        for (version, announces) in [
            ("4.3.1", true),
            ("5.0.3", true),
            ("5.1.0", false),
            ("5.2.0", true),
            ("5.10.0-rc1", true),
            ("6.0", true),
        ] {
            let podman = Podman {
                version: version.to_owned(),
            };
            assert_eq!(podman.announces_pulls(), announces, "{version}");
        }
    }
}
