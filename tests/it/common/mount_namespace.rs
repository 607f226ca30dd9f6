//! [`MountNamespace`]: isolates a Podman from the host; made by `enter-podman`.

use std::{
    io::{BufRead as _, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use tempfile::TempDir;

use super::{BINARY, Release};

/// A mount namespace whose root is a Debian with a temporary upper layer. A child process keeps it until drop.
pub struct MountNamespace {
    holder: Child,
    _dir: TempDir,
}

impl MountNamespace {
    /// Creates a namespace for `release`; binds a daemon's `root` at the same path inside.
    pub fn enter(release: Release, root: Option<&Path>) -> Self {
        let tree = Path::new(env!("CARGO_MANIFEST_DIR")).join(release.tree());
        assert!(
            tree.exists(),
            "{} is missing: run scripts/podman-trees as root",
            release.tree()
        );
        let dir = tempfile::tempdir().unwrap();
        let mut command = Command::new("unshare");
        command.args(["--mount", "--propagation", "slave", "sh", "-c"]);
        command.args([include_str!("enter-podman"), "enter-podman"]);
        command.arg(tree).arg(dir.path()).arg(std::env::temp_dir());
        command.arg(Path::new(BINARY).parent().unwrap()).args(root);
        let mut holder = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(holder.stdout.take().unwrap())
            .read_line(&mut line)
            .unwrap();
        assert_eq!(line, "ready\n", "{command:?}");
        Self { holder, _dir: dir }
    }

    /// A command that runs inside, in the network namespace of process `network_of`, with `user` as user and group id.
    pub fn command(&self, program: &str, network_of: Option<u32>, user: Option<u32>) -> Command {
        let mut command = Command::new("nsenter");
        command.args(["--target", &self.holder.id().to_string(), "--mount"]);
        if let Some(network_of) = network_of {
            command.arg(format!("--net=/proc/{network_of}/ns/net"));
        }
        if let Some(user) = user {
            let user = user.to_string();
            command.args(["--setuid", &user, "--setgid", &user]);
        }
        command.args(["--", program]);
        command.env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
        command
    }

    /// The host's path of `path` inside.
    pub fn outside(&self, path: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root{path}", self.holder.id()))
    }
}

impl Drop for MountNamespace {
    fn drop(&mut self) {
        drop(self.holder.stdin.take());
        self.holder.wait().ok();
    }
}
