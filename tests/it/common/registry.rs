//! Debian's `docker-registry` as a process.

use std::{
    fs::{self, File},
    net::TcpStream,
    path::{Path, PathBuf},
    process::Command,
};

use tempfile::TempDir;

use super::process::{Guard, free_port, wait_until};

/// A `docker-registry` process with an access log.
pub struct DockerRegistry {
    host: String,
    storage: PathBuf,
    /// Additional lines of its configuration.
    lines: String,
    dir: TempDir,
    process: Option<Guard>,
}

impl DockerRegistry {
    /// Starts a registry on a free port of loopback.
    pub fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let storage = dir.path().join("storage");
        Self::new(dir, storage, "", "")
    }

    /// Starts another registry on the same storage. `lines` are added to its configuration, `http` (`, key: value`) to
    /// its table `http`.
    pub fn sharing_storage(&self, lines: &str, http: &str) -> Self {
        Self::new(tempfile::tempdir().unwrap(), self.storage.clone(), lines, http)
    }

    fn new(dir: TempDir, storage: PathBuf, lines: &str, http: &str) -> Self {
        let mut registry = Self {
            host: format!("127.0.0.1:{}", free_port()),
            storage,
            lines: lines.to_owned(),
            dir,
            process: None,
        };
        registry.restart(http);
        registry
    }

    /// Restarts it on the same port and storage. `http` (`, key: value`) is added to the table `http` of its
    /// configuration.
    pub fn restart(&mut self, more: &str) {
        self.stop();
        let config = self.dir.path().join("config.yml");
        let text = format!(
            "version: 0.1\nlog: {{level: error, accesslog: {{disabled: false}}}}\n\
             storage: {{filesystem: {{rootdirectory: {}}}}}\nhttp: {{addr: \"{}\"{more}}}\n{}",
            self.storage.display(),
            self.host,
            self.lines
        );
        fs::write(&config, text).unwrap();
        let log = || File::options().create(true).append(true).open(self.log_path()).unwrap();
        let mut command = Command::new("docker-registry");
        command.arg("serve").arg(&config).stdout(log()).stderr(log());
        let process = Guard(
            command
                .spawn()
                .expect("docker-registry is installed (scripts/test installs it)"),
        );
        wait_until("the registry listens", || TcpStream::connect(&self.host).ok());
        self.process = Some(process);
    }

    /// Its storage directory.
    pub fn storage(&self) -> &Path {
        &self.storage
    }

    /// Stops the process.
    pub fn stop(&mut self) {
        self.process = None;
    }

    /// `127.0.0.1:PORT`
    pub fn host(&self) -> &str {
        &self.host
    }

    /// The URL to push to.
    pub fn url(&self) -> String {
        format!("http://{}", self.host)
    }

    /// The reference of an image in it.
    pub fn reference(&self, repository: &str, tag: &str) -> String {
        format!("{}/{repository}:{tag}", self.host)
    }

    /// Entries of the access log.
    pub fn accesses(&self) -> Vec<Access> {
        let log = fs::read(self.log_path()).unwrap();
        String::from_utf8_lossy(&log)
            .lines()
            .filter_map(Access::parse)
            .collect()
    }

    fn log_path(&self) -> PathBuf {
        self.dir.path().join("log")
    }

    /// Number of GET requests for blobs.
    pub fn blob_reads(&self) -> usize {
        let blobs = |access: &&Access| access.method == "GET" && access.path.contains("/blobs/");
        self.accesses().iter().filter(blobs).count()
    }

    /// Bytes of blobs sent, from entry `from` of the log on.
    pub fn blob_bytes_since(&self, from: usize) -> u64 {
        let blobs = |access: &&Access| access.method == "GET" && access.path.contains("/blobs/");
        self.accesses()
            .iter()
            .skip(from)
            .filter(blobs)
            .map(|access| access.bytes)
            .sum()
    }
}

/// One request in the access log.
#[derive(Debug, Clone)]
pub struct Access {
    pub method: String,
    pub path: String,
    pub bytes: u64,
    pub agent: String,
}

impl Access {
    /// Apache's combined format: `… "GET /v2/ HTTP/1.1" 200 2 "" "agent"`.
    fn parse(line: &str) -> Option<Self> {
        let mut quoted = line.split('"');
        let request = quoted.nth(1)?;
        let mut numbers = quoted.next()?.split_whitespace();
        let agent = quoted.nth(2)?.to_owned();
        let mut words = request.split(' ');
        let (method, path, version) = (words.next()?, words.next()?, words.next()?);
        version.starts_with("HTTP/").then_some(())?;
        Some(Self {
            method: method.to_owned(),
            path: path.to_owned(),
            bytes: numbers.nth(1)?.parse().ok()?,
            agent,
        })
    }
}
