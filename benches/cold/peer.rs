//! Mounts an image with nydus-store or nydusd.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use nydus_store::{fixtures::BuiltImage, internals::Digest};
use tempfile::TempDir;

use crate::common::{BINARY, Guard, wait_until};

/// The program that serves the image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Server {
    /// `nydus-store mount`, with or without a recorded trace.
    Ours { learned: bool },
    /// `nydusd fuse`.
    Nydusd,
}

/// An image in the registry.
pub struct Image {
    pub repository: String,
    pub bootstrap: PathBuf,
    /// Digest of the bootstrap layer.
    pub layer: Digest,
    /// Digests of its data blobs.
    pub data: Vec<String>,
}

impl Image {
    /// The image that was pushed to `repository`.
    pub fn new(built: &BuiltImage, repository: String) -> anyhow::Result<Self> {
        Ok(Self {
            repository,
            bootstrap: built.bootstrap_path()?.to_owned(),
            layer: built.bootstrap_blob()?.digest,
            data: built.blobs.iter().map(|blob| blob.digest.to_string()).collect(),
        })
    }
}

/// A mount with an empty cache.
pub struct Mounted {
    process: Option<Guard>,
    place: TempDir,
}

impl Server {
    pub fn name(self) -> &'static str {
        match self {
            Self::Ours { learned: false } => "nydus-store",
            Self::Ours { learned: true } => "nydus-store, learned",
            Self::Nydusd => "nydusd",
        }
    }

    /// Mounts `image` from the registry at `host`, with an empty cache. `traces` has the recorded traces, for a server
    /// that uses them.
    pub fn mount(self, image: &Image, host: &str, traces: &Path) -> anyhow::Result<Mounted> {
        let place = tempfile::tempdir()?;
        let dir = place.path().join("mnt");
        fs::create_dir(&dir)?;
        let mut command = match self {
            Self::Ours { learned } => {
                let root = place.path().join("root");
                fs::create_dir(&root)?;
                if learned && traces.exists() {
                    copy_dir(traces, &root.join("traces"))?;
                }
                let mut command = Command::new(BINARY);
                command.args(["--log", "error", "mount", "--root"]).arg(&root);
                command.arg(format!("{host}/{}:1", image.repository)).arg(&dir);
                command
            }
            Self::Nydusd => {
                let config = place.path().join("nydusd.json");
                fs::write(&config, nydusd_config(image, host, &place.path().join("cache")))?;
                let mut command = Command::new(nydusd().ok_or_else(|| anyhow::anyhow!("no nydusd"))?);
                command.args([
                    "fuse",
                    "--log-level",
                    "error",
                    "--thread-num",
                    "4",
                    "--rlimit-nofile",
                    "1024",
                ]);
                command.arg("--config").arg(config);
                command
                    .arg("--bootstrap")
                    .arg(&image.bootstrap)
                    .arg("--mountpoint")
                    .arg(&dir);
                command
            }
        };
        command.stdin(Stdio::null()).stdout(Stdio::null());
        let process = Guard(command.spawn()?);
        let first = wait_until("the image is mounted", || fs::read_dir(&dir).ok()?.next());
        first?;
        Ok(Mounted {
            process: Some(process),
            place,
        })
    }
}

impl Mounted {
    pub fn dir(&self) -> PathBuf {
        self.place.path().join("mnt")
    }

    /// Directory of nydus-store's traces.
    pub fn traces(&self) -> PathBuf {
        self.place.path().join("root/traces")
    }

    /// Unmounts. Traces stay until this is dropped.
    pub fn stop(&mut self) {
        self.process = None;
    }
}

/// Path of nydusd: `$NYDUSD`, or found in `$PATH`.
pub fn nydusd() -> Option<PathBuf> {
    if let Some(path) = env::var_os("NYDUSD") {
        return Some(path.into());
    }
    env::split_paths(&env::var_os("PATH")?)
        .map(|dir| dir.join("nydusd"))
        .find(|path| path.is_file())
}

fn nydusd_config(image: &Image, host: &str, cache: &Path) -> String {
    fs::create_dir(cache).ok();
    serde_json::json!({
        "device": {
            "backend": {"type": "registry", "config": {"scheme": "http", "host": host, "repo": image.repository}},
            "cache": {"type": "blobcache", "config": {"work_dir": cache}},
        },
        "mode": "direct",
        "digest_validate": false,
        "enable_xattr": true,
        "fs_prefetch": {"enable": false},
    })
    .to_string()
}

pub fn copy_dir(from: &Path, to: &Path) -> anyhow::Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        fs::copy(entry.path(), to.join(entry.file_name()))?;
    }
    Ok(())
}
