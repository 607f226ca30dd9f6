//! Starts programs from an image, each in a chroot and a separate mount namespace.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{Ipv4Addr, TcpListener, TcpStream},
    path::Path,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::Context as _;
use tempfile::TempDir;

use crate::{common::Guard, tree};

/// Time-out for nginx's response.
const NGINX_TIMEOUT: Duration = Duration::from_secs(60);
const PYTHON: &str =
    "import json, ssl, asyncio, sqlite3, unittest.mock, xml.dom.minidom, http.server, concurrent.futures, decimal";
/// Loads about 1,500 classes: a third from `lib/modules`, the others from the class data archive.
const KEYTOOL: [&str; 12] = [
    "-genkeypair",
    "-alias=cold",
    "-keyalg=EC",
    "-groupname=secp256r1",
    "-dname=CN=cold",
    "-storepass=not-secret",
    "-keystore=/tmp/keys",
    "-validity=1",
    "-ext=bc:c",
    "-ext=ku=digitalSignature",
    "-ext=eku=serverAuth",
    "-ext=san=dns:localhost",
];
/// Arguments: the image, a writable directory, and the program. Waits for a line of input once everything is mounted.
const SCRIPT: &str = r#"set -e
image=$1 scratch=$2
shift 2
for device in null random urandom; do mount --bind "/dev/$device" "$image/dev/$device"; done
mount -t proc proc "$image/proc"
mount --bind "$scratch" "$image/tmp"
echo ready
read -r _
exec chroot "$image" "$@" </dev/null >"$scratch/log" 2>&1"#;

/// A program and its task.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Program {
    /// Imports ten modules.
    Python,
    /// Serves a page.
    Nginx,
    /// Creates a key and a certificate.
    Java,
}

impl Program {
    pub fn name(self) -> &'static str {
        match self {
            Self::Python => "python",
            Self::Nginx => "nginx",
            Self::Java => "java",
        }
    }

    /// Description of the measurement.
    pub fn description(self) -> &'static str {
        match self {
            Self::Python => "python3 imports modules",
            Self::Nginx => "nginx answers with a page",
            Self::Java => "a JVM runs keytool -genkeypair",
        }
    }

    /// Copies the programs that this machine has to the tree of an image.
    pub fn install(tree: &Path) -> anyhow::Result<Vec<Self>> {
        tree::mount_points(tree)?;
        tree::python(tree)?;
        let mut there = vec![Self::Python];
        if tree::nginx(tree)? {
            there.push(Self::Nginx);
        } else {
            println!("no nginx found: install nginx-light to measure it");
        }
        if tree::java(tree)? {
            there.push(Self::Java);
        } else {
            println!("no Java found: install openjdk-17-jre-headless to measure it");
        }
        Ok(there)
    }

    /// Prepares the start from the image mounted on `image`.
    pub fn ready(self, image: &Path) -> anyhow::Result<Ready> {
        let scratch = tempfile::tempdir()?;
        let mut port = 0;
        let mut command = Command::new("unshare");
        command
            .args(["--mount", "sh", "-c", SCRIPT, "sh"])
            .arg(image)
            .arg(scratch.path());
        match self {
            Self::Python => command.args(["/python3", "-B", "-c", PYTHON]),
            Self::Nginx => {
                port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port();
                fs::write(scratch.path().join("nginx.conf"), nginx_config(port))?;
                command.args(["/usr/sbin/nginx", "-e", "stderr", "-c", "/tmp/nginx.conf"])
            }
            Self::Java => command
                .arg("/java/bin/keytool")
                .args(KEYTOOL.iter().flat_map(|option| option.splitn(2, '='))),
        };
        let mut process = Guard(command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?);
        let mut said = [0; 6];
        let output = process.0.stdout.as_mut().context("no output")?;
        output
            .read_exact(&mut said)
            .with_context(|| format!("cannot prepare {}", self.name()))?;
        Ok(Ready {
            program: self,
            port,
            process,
            scratch,
        })
    }
}

/// Configuration of nginx: listens on `port` and writes below `/tmp` only, including its pid file, which it deletes.
fn nginx_config(port: u16) -> String {
    let dirs = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"].map(|of| format!("{of}_temp_path /tmp/{of};"));
    format!(
        "daemon off; master_process off; pid /tmp/nginx.pid; user root root; events {{}}
         http {{ include /etc/nginx/mime.types; access_log off; {}
         server {{ listen 127.0.0.1:{port}; root /usr/share/nginx/html; }} }}",
        dirs.concat()
    )
}

/// A prepared program. It is stopped when dropped.
pub struct Ready {
    program: Program,
    /// Port of nginx.
    port: u16,
    process: Guard,
    scratch: TempDir,
}

impl Ready {
    /// Starts the program and waits until it has finished its task.
    pub fn start(mut self) -> anyhow::Result<Self> {
        let input = self.process.0.stdin.as_mut().context("no input")?;
        input.write_all(b"\n")?;
        let done = match self.program {
            Program::Nginx => self.page(),
            Program::Python | Program::Java => self.end(),
        };
        done.with_context(|| {
            let said = fs::read_to_string(self.scratch.path().join("log")).unwrap_or_default();
            format!("{}: {said}", self.program.name())
        })?;
        Ok(self)
    }

    fn end(&mut self) -> anyhow::Result<()> {
        let status = self.process.0.wait()?;
        anyhow::ensure!(status.success(), "{status}");
        Ok(())
    }

    /// Requests a page from nginx until it responds.
    fn page(&mut self) -> anyhow::Result<()> {
        let begin = Instant::now();
        let mut connection = loop {
            if let Ok(connection) = TcpStream::connect((Ipv4Addr::LOCALHOST, self.port)) {
                break connection;
            }
            let ended = self.process.0.try_wait()?;
            anyhow::ensure!(ended.is_none() && begin.elapsed() < NGINX_TIMEOUT, "it does not listen");
            std::thread::sleep(Duration::from_millis(1));
        };
        connection.set_read_timeout(Some(NGINX_TIMEOUT))?;
        connection.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
        let mut answer = String::new();
        connection.read_to_string(&mut answer)?;
        let is_page = answer.starts_with("HTTP/1.1 200") && answer.contains("</html>");
        anyhow::ensure!(is_page, "it answers {answer:?}");
        Ok(())
    }
}
