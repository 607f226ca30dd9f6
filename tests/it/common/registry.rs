//! Debian's `docker-registry` as a process.

use std::{
    fs::{self, File},
    net::{TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::Command,
};

use tempfile::TempDir;

use super::process::{Guard, wait_until};

/// A registry of the real thing, with an access log.
pub struct DockerRegistry {
    host: String,
    storage: PathBuf,
    /// More of its configuration.
    lines: String,
    dir: TempDir,
    process: Option<Guard>,
}

impl DockerRegistry {
    /// Starts a registry on a free port of loopback.
    pub fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let storage = dir.path().join("storage");
        Self::launch(dir, storage, "", "")
    }

    /// Starts another registry with what is in this one, and with more in its configuration: whole lines, and more for
    /// `http` (`, key: value`).
    pub fn twin(&self, lines: &str, http: &str) -> Self {
        Self::launch(tempfile::tempdir().unwrap(), self.storage.clone(), lines, http)
    }

    fn launch(dir: TempDir, storage: PathBuf, lines: &str, http: &str) -> Self {
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let mut registry = Self {
            host: format!("127.0.0.1:{port}"),
            storage,
            lines: lines.to_owned(),
            dir,
            process: None,
        };
        registry.start_again(http);
        registry
    }

    /// Starts it on the same port, with the same images, and with `more` in the table `http` of its configuration.
    pub fn start_again(&mut self, more: &str) {
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

    /// Where it keeps what it has.
    pub fn storage(&self) -> &Path {
        &self.storage
    }

    /// Ends the registry.
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

    /// The name of an image in it.
    pub fn reference(&self, repository: &str, tag: &str) -> String {
        format!("{}/{repository}:{tag}", self.host)
    }

    /// Lines of the access log: what was asked for, and how much was sent.
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

    /// How many requests for blobs there were, of pushes none.
    pub fn blob_reads(&self) -> usize {
        let blobs = |access: &&Access| access.method == "GET" && access.path.contains("/blobs/");
        self.accesses().iter().filter(blobs).count()
    }

    /// Bytes of blobs that were sent since the log had `from` lines.
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
