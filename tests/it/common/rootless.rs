//! [`Rootless`]: Podman run by an ordinary user.

use std::{
    fs,
    os::unix::fs::{PermissionsExt as _, chown},
    path::{Path, PathBuf},
    process::Command,
};

use super::{RunPodman, mount_namespace::MountNamespace};

/// User and group id of `tester`, created by `enter-podman`.
const TESTER: u32 = 2000;

/// The Podman of an ordinary user, with storage in the user's home. It shares the /etc/containers of the
/// [`super::Podman`] it was made from.
pub struct Rootless<'podman> {
    namespace: &'podman MountNamespace,
    /// [`super::Podman::dir`] of root's Podman.
    dir: &'podman Path,
}

impl<'podman> Rootless<'podman> {
    pub(super) fn new(namespace: &'podman MountNamespace, dir: &'podman Path) -> Self {
        let rootless = Self { namespace, dir };
        for (dir, mode) in [(rootless.home(), 0o755), (rootless.runtime_dir(), 0o700)] {
            fs::create_dir_all(&dir).unwrap();
            fs::set_permissions(&dir, fs::Permissions::from_mode(mode)).unwrap();
            chown(&dir, Some(TESTER), Some(TESTER)).unwrap();
        }
        rootless
    }

    /// `$HOME`.
    pub fn home(&self) -> PathBuf {
        self.dir.join("tester")
    }

    fn runtime_dir(&self) -> PathBuf {
        self.dir.join("tester.run")
    }
}

impl RunPodman for Rootless<'_> {
    fn program(&self, program: &str) -> Command {
        let mut command = self.namespace.command(program, None, Some(TESTER));
        for variable in [
            "XDG_CONFIG_HOME",
            "XDG_DATA_HOME",
            "XDG_CACHE_HOME",
            "DBUS_SESSION_BUS_ADDRESS",
        ] {
            command.env_remove(variable);
        }
        command
            .env("CONTAINERS_CONF", self.dir.join("containers.conf"))
            .env("PODMAN_IGNORE_CGROUPSV1_WARNING", "1")
            .env("HOME", self.home())
            .env("USER", "tester")
            .env("XDG_RUNTIME_DIR", self.runtime_dir())
            .env("TMPDIR", self.home());
        command
    }
}

impl Drop for Rootless<'_> {
    fn drop(&mut self) {
        self.command(&["rm", "--all", "--force", "--time", "0"]).output().ok();
        // Ends the process that keeps the user's namespaces, which would outlive the directory.
        self.command(&["system", "migrate"]).output().ok();
    }
}
