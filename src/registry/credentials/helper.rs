//! Credential helpers: programs `docker-credential-NAME` that keep passwords
//! ([protocol](https://github.com/docker/docker-credential-helpers#development)). They are the only programs that are
//! started here.

use std::{
    io,
    process::{ExitStatus, Stdio},
    time::Duration,
};

use rustix::process::{Pid, Signal, kill_process_group};
use serde::Deserialize;
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _},
    process::{Child, Command},
};

use super::{Credentials, printable};
use crate::registries_conf::watcher::home;

/// How long a helper may take.
const PATIENCE: Duration = Duration::from_secs(10);
/// Most bytes of a helper's answer.
const MAX_ANSWER: u64 = 64 << 10;
/// Most characters told of what a helper says about a failure.
const MAX_WORDS: usize = 120;
/// What a helper calls the user if the secret is an identity token.
const IDENTITY_TOKEN: &str = "<token>";
/// What a helper says if it has nothing, in the words of the library that most are made with.
const NOTHING: &str = "credentials not found in native keychain";

/// A helper did not do its work. The names are of programs, since that is what a person can try.
#[derive(Debug, thiserror::Error)]
pub(super) enum Error {
    #[error("`{}` is no name of a credential helper", printable(.0))]
    Name(String),
    #[error("cannot run docker-credential-{name}: {source}")]
    Run { name: String, source: io::Error },
    #[error("docker-credential-{name} did not answer within {PATIENCE:?}")]
    TimedOut { name: String },
    #[error("docker-credential-{name} failed ({status}){words}")]
    Failed {
        name: String,
        status: ExitStatus,
        words: String,
    },
    #[error("the answer of docker-credential-{name} is not a credential helper's")]
    Answer { name: String },
}

/// What a helper answers.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Answer {
    #[serde(default)]
    username: String,
    #[serde(default)]
    secret: String,
}

/// What the helper `name` has for `server`, which is a registry's host or however else the helper was told of it.
pub(super) async fn get(name: &str, server: &str) -> Result<Option<Credentials>, Error> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
    if name.is_empty() || !name.chars().all(plain) {
        return Err(Error::Name(name.to_owned()));
    }
    let name = name.to_owned();
    let ran = tokio::time::timeout(PATIENCE, run(&name, server)).await;
    let (status, answer, words) = match ran {
        Err(_) => return Err(Error::TimedOut { name }),
        Ok(Err(error)) if error.kind() == io::ErrorKind::FileTooLarge => return Err(Error::Answer { name }),
        Ok(Err(source)) => return Err(Error::Run { name, source }),
        Ok(Ok(done)) => done,
    };
    if status.success() {
        return parse(&answer).ok_or(Error::Answer { name });
    }
    // Helpers say it on either.
    if [&answer, &words]
        .iter()
        .any(|said| said.trim_ascii() == NOTHING.as_bytes())
    {
        return Ok(None);
    }
    let words = summary(&words);
    Err(Error::Failed { name, status, words })
}

/// The inner `None` stands for nothing in it; the outer one for what is no answer.
fn parse(answer: &[u8]) -> Option<Option<Credentials>> {
    let Answer { username, secret } = serde_json::from_slice(answer).ok()?;
    Some(match (username.as_str(), secret.is_empty()) {
        (_, true) => None,
        (IDENTITY_TOKEN, _) => Some(Credentials::IdentityToken {
            user: None,
            token: secret,
        }),
        _ => Some(Credentials::Password {
            user: username,
            password: secret,
        }),
    })
}

/// The first line on standard error. Never of standard output: a secret may be there.
fn summary(words: &[u8]) -> String {
    let words = String::from_utf8_lossy(words);
    match words.lines().next().map(str::trim) {
        Some(line) if !line.is_empty() => {
            let line: String = printable(line).chars().take(MAX_WORDS).collect();
            format!(": {line}")
        }
        _ => String::new(),
    }
}

/// Runs the helper to its end: its status, its answer, and the beginning of what it says on standard error.
async fn run(name: &str, server: &str) -> io::Result<(ExitStatus, Vec<u8>, Vec<u8>)> {
    let mut command = Command::new(format!("docker-credential-{name}"));
    // It may keep something there, and a system service has no variable for it.
    if let Some(home) = home(|name| std::env::var_os(name), rustix::process::getuid().as_raw()) {
        command.env("HOME", home);
    }
    let mut child = command
        .arg("get")
        // What systemd has to do with it is the daemon's business.
        .env_remove("NOTIFY_SOCKET")
        .env_remove("LISTEN_FDS")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        // So that what it starts can be ended with it.
        .process_group(0)
        .kill_on_drop(true)
        .spawn()?;
    let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
    let mut group = Group::of(&child);
    let tell = async {
        if let Some(mut stdin) = stdin {
            // One that does not read it may know the answer all the same.
            stdin.write_all(server.as_bytes()).await.ok();
        }
        Ok(())
    };
    let ((), answer, words) = tokio::try_join!(tell, whole(stdout), beginning(stderr))?;
    let status = child.wait().await?;
    group.0 = None;
    Ok((status, answer, words))
}

/// [`io::ErrorKind::FileTooLarge`] if it is longer than an answer may be.
async fn whole(stdout: Option<impl AsyncRead + Unpin>) -> io::Result<Vec<u8>> {
    let mut answer = Vec::new();
    if let Some(stdout) = stdout {
        stdout.take(MAX_ANSWER + 1).read_to_end(&mut answer).await?;
    }
    if answer.len() as u64 > MAX_ANSWER {
        return Err(io::ErrorKind::FileTooLarge.into());
    }
    Ok(answer)
}

/// The rest is read and dropped, so that the helper can go on.
async fn beginning(stderr: Option<impl AsyncRead + Unpin>) -> io::Result<Vec<u8>> {
    let mut words = Vec::new();
    if let Some(mut stderr) = stderr {
        (&mut stderr).take(4 << 10).read_to_end(&mut words).await?;
        tokio::io::copy(&mut stderr, &mut tokio::io::sink()).await?;
    }
    Ok(words)
}

/// A helper that is still running and all that it has started, killed when dropped.
struct Group(Option<Pid>);

impl Group {
    /// To be dropped before `child`, whose number is somebody else's once its end has been noticed.
    fn of(child: &Child) -> Self {
        let id = child.id().and_then(|id| i32::try_from(id).ok());
        Self(id.and_then(Pid::from_raw))
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(leader) = self.0 {
            kill_process_group(leader, Signal::KILL).ok();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers() {
        let answer = |user: &str| format!(r#"{{"ServerURL":"r","Username":"{user}","Secret":"s"}}"#);
        let password = Credentials::Password {
            user: "me".to_owned(),
            password: "s".to_owned(),
        };
        let token = Credentials::IdentityToken {
            user: None,
            token: "s".to_owned(),
        };
        assert_eq!(parse(answer("me").as_bytes()), Some(Some(password)));
        assert_eq!(parse(answer("<token>").as_bytes()), Some(Some(token)));
        assert_eq!(parse(b"{}"), Some(None));
        assert_eq!(parse(b"nothing"), None);
    }

    #[test]
    fn little_is_told_of_what_it_says() {
        assert_eq!(summary(b"no\x1b[31m keyring\nsecret"), ": no [31m keyring");
        assert_eq!(summary(b""), "");
        assert_eq!(summary(&[b'x'; 4096]).len(), 2 + MAX_WORDS);
    }

    #[tokio::test]
    async fn names_are_no_paths() {
        for name in ["", "../x", "a b", "x;y"] {
            assert!(matches!(get(name, "r.example").await, Err(Error::Name(_))), "{name}");
        }
        let missing = get("of-which-there-is-none", "r.example").await.unwrap_err();
        assert!(
            missing.to_string().contains("docker-credential-of-which-there-is-none"),
            "{missing}"
        );
    }
}
