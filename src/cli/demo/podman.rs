//! Runs the host's Podman on the store, with separate storage in the tour's directory.

use std::{
    fs::{self, File, Permissions},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};

use super::sandbox::StopFlag;
use crate::{setup, store::layout::StoreLayout};

/// Time-out of one Podman command.
const PODMAN_TIMEOUT: Duration = Duration::from_secs(60);
/// The version that cannot announce pulls: older ones look layers up by digest, newer ones run the auth helper.
const SILENT_VERSION: (u32, u32) = (5, 1);

/// The installed Podman.
#[derive(Debug)]
pub struct HostPodman {
    pub version: String,
}

/// Podman with separate storage and configuration. Removes its containers and images when dropped.
pub struct IsolatedPodman<'a> {
    dir: PathBuf,
    stop: &'a StopFlag,
}

impl HostPodman {
    /// Finds Podman in `PATH` and its version.
    pub fn find() -> anyhow::Result<Self> {
        let output = match Command::new("podman").arg("--version").output() {
            Ok(output) => output,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                bail!("`podman` is not installed: install it, or run the demo without --podman")
            }
            Err(error) => return Err(error).context("cannot run `podman --version`"),
        };
        let text = String::from_utf8_lossy(&output.stdout);
        let version = text.split_whitespace().last().unwrap_or_default();
        ensure!(
            output.status.success() && number(version).is_some(),
            "unexpected output of `podman --version`: {}{}",
            text.trim(),
            String::from_utf8_lossy(&output.stderr).trim()
        );
        Ok(Self {
            version: version.to_owned(),
        })
    }

    /// Whether this version announces pulls, by a look-up in the layer store or by the auth helper.
    pub fn announces_pulls(&self) -> bool {
        number(&self.version).is_some_and(|version| version != SILENT_VERSION)
    }

    /// Writes configuration below `dir` that uses the store of the daemon's `root`.
    pub fn set_up<'a>(
        &self,
        dir: &Path,
        root: &Path,
        registry: &str,
        stop: &'a StopFlag,
    ) -> anyhow::Result<IsolatedPodman<'a>> {
        let here = IsolatedPodman {
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
            .context("cannot write the auth helper")?;
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
                // A separate directory and file locks isolate it from the host's containers. Every machine permits
                // these limits.
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

/// Hides the host's /var/lib/containers with a bind mount of a directory below `dir`. Podman keeps its blob info cache
/// there, wherever its storage is, and the tour's entries would be useless later. Requires a private mount namespace.
pub fn hide_blob_info_cache(dir: &Path) -> anyhow::Result<()> {
    let shared = Path::new("/var/lib/containers");
    if !shared.is_dir() {
        return Ok(());
    }
    let own = dir.join("containers");
    fs::create_dir(&own).context("cannot make a directory for Podman")?;
    rustix::mount::mount_bind(&own, shared).with_context(|| format!("cannot mount on {}", shared.display()))
}

/// Parses the major and minor version.
fn number(version: &str) -> Option<(u32, u32)> {
    let mut parts = version.split('.');
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

/// Output and status of a finished command.
struct CommandResult {
    status: ExitStatus,
    stdout: String,
    stderr: String,
}

impl IsolatedPodman<'_> {
    fn file(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// `podman pull`
    pub fn pull(&self, reference: &str) -> anyhow::Result<()> {
        let policy = self.file("policy.json").display().to_string();
        let result = self.run(&["pull", "--quiet", "--signature-policy", &policy, reference])?;
        ensure!(result.status.success(), "`podman pull` failed: {}", result.stderr);
        Ok(())
    }

    /// Runs `podman run` with crun, or else with runc. Returns the runtime's name, the container's output and the time.
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
            let result = self.run(&arguments)?;
            if result.status.success() {
                return Ok((runtime, result.stdout, start.elapsed()));
            }
            failures.push(format!("with {runtime}: {}", result.stderr));
        }
        bail!("`podman run` failed {}", failures.join("; "))
    }

    /// Removes all containers and images, which unmounts and releases the store's layers.
    pub fn remove_all(&self) {
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
                other => tracing::debug!(?arguments, result = ?other, "failed to clean up with Podman"),
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
        // These variables select other storage or another host.
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

    /// Runs `podman ARGUMENTS…`; kills it on a request to stop or after [`PODMAN_TIMEOUT`].
    fn run(&self, arguments: &[&str]) -> anyhow::Result<CommandResult> {
        // Uses files, because Podman's background processes may keep pipes open.
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
            let may_continue = self.stop.check().and_then(|()| {
                ensure!(
                    start.elapsed() < PODMAN_TIMEOUT,
                    "`podman {}` did not end within {} seconds",
                    arguments.join(" "),
                    PODMAN_TIMEOUT.as_secs()
                );
                Ok(())
            });
            if may_continue.is_err() {
                child.kill().and_then(|()| child.wait()).context("cannot stop podman")?;
            }
            may_continue?;
            std::thread::sleep(Duration::from_millis(5));
        };
        let text = |path: &Path| fs::read(path).map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
        Ok(CommandResult {
            status,
            stdout: text(&stdout)?,
            stderr: text(&stderr)?.trim().to_owned(),
        })
    }
}

impl Drop for IsolatedPodman<'_> {
    fn drop(&mut self) {
        self.remove_all();
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
            let podman = HostPodman {
                version: version.to_owned(),
            };
            assert_eq!(podman.announces_pulls(), announces, "{version}");
        }
    }
}
