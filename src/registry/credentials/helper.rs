//! Credential helpers: programs `docker-credential-NAME` that keep passwords
//! ([protocol](https://github.com/docker/docker-credential-helpers#development)). The daemon starts no other programs.

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

use super::Credentials;
use crate::{printable::printable, registries_conf::watcher::home_dir};

/// Longest run of a helper.
const TIMEOUT: Duration = Duration::from_secs(10);
/// Most bytes of a helper's standard output.
const MAX_OUTPUT: u64 = 64 << 10;
/// Most characters shown of a helper's error message.
const MAX_MESSAGE_CHARS: usize = 120;
/// The user name that marks the secret as an identity token.
const IDENTITY_TOKEN_USER: &str = "<token>";
/// The message of a helper without credentials for the server, as the library of most helpers writes it.
const NOT_FOUND_MESSAGE: &str = "credentials not found in native keychain";

/// A helper failed. Messages name the program, so that the user can run it.
#[derive(Debug, thiserror::Error)]
pub(super) enum HelperError {
    #[error("`{}` is not a valid name of a credential helper", printable(.0))]
    Name(String),
    #[error("cannot run docker-credential-{name}: {source}")]
    Run { name: String, source: io::Error },
    #[error("docker-credential-{name} did not answer within {TIMEOUT:?}")]
    TimedOut { name: String },
    #[error("docker-credential-{name} failed ({status}){message}")]
    Failed {
        name: String,
        status: ExitStatus,
        message: String,
    },
    #[error("the answer of docker-credential-{name} is not in the format of a credential helper")]
    Output { name: String },
}

/// A helper's answer.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct HelperOutput {
    #[serde(default)]
    username: String,
    #[serde(default)]
    secret: String,
}

/// Asks the helper `name` for the credentials of `server`, a registry's host or the helper's other name for it.
pub(super) async fn get(name: &str, server: &str) -> Result<Option<Credentials>, HelperError> {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
    if name.is_empty() || !name.chars().all(is_plain) {
        return Err(HelperError::Name(name.to_owned()));
    }
    let name = name.to_owned();
    let result = tokio::time::timeout(TIMEOUT, run(&name, server)).await;
    let (status, output, errors) = match result {
        Err(_) => return Err(HelperError::TimedOut { name }),
        Ok(Err(error)) if error.kind() == io::ErrorKind::FileTooLarge => return Err(HelperError::Output { name }),
        Ok(Err(source)) => return Err(HelperError::Run { name, source }),
        Ok(Ok(finished)) => finished,
    };
    if status.success() {
        return parse(&output).ok_or(HelperError::Output { name });
    }
    // Helpers write it to either stream.
    if [&output, &errors]
        .iter()
        .any(|written| written.trim_ascii() == NOT_FOUND_MESSAGE.as_bytes())
    {
        return Ok(None);
    }
    let message = summary(&errors);
    Err(HelperError::Failed { name, status, message })
}

/// Parses a helper's output. The inner `None` means no credentials, the outer one a malformed output.
fn parse(output: &[u8]) -> Option<Option<Credentials>> {
    let HelperOutput { username, secret } = serde_json::from_slice(output).ok()?;
    Some(match (username.as_str(), secret.is_empty()) {
        (_, true) => None,
        (IDENTITY_TOKEN_USER, _) => Some(Credentials::IdentityToken {
            user: None,
            token: secret,
        }),
        _ => Some(Credentials::Password {
            user: username,
            password: secret,
        }),
    })
}

/// The first line of standard error, as `: line`. Standard output is never shown: it may hold a secret.
fn summary(errors: &[u8]) -> String {
    let errors = String::from_utf8_lossy(errors);
    match errors.lines().next().map(str::trim) {
        Some(line) if !line.is_empty() => {
            let line: String = printable(line).chars().take(MAX_MESSAGE_CHARS).collect();
            format!(": {line}")
        }
        _ => String::new(),
    }
}

/// Runs the helper to its end. Returns its status, its standard output and the beginning of its standard error.
async fn run(name: &str, server: &str) -> io::Result<(ExitStatus, Vec<u8>, Vec<u8>)> {
    let mut command = Command::new(format!("docker-credential-{name}"));
    // A helper may need it, and a system service has no `$HOME`.
    if let Some(home) = home_dir(|name| std::env::var_os(name), rustix::process::getuid().as_raw()) {
        command.env("HOME", home);
    }
    let mut child = command
        .arg("get")
        // systemd's variables concern the daemon only.
        .env_remove("NOTIFY_SOCKET")
        .env_remove("LISTEN_FDS")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        // Lets the helper's own children be killed with it.
        .process_group(0)
        .kill_on_drop(true)
        .spawn()?;
    let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
    let mut group = ProcessGroup::of(&child);
    let write_server = async {
        if let Some(mut stdin) = stdin {
            // A helper may answer without reading it.
            stdin.write_all(server.as_bytes()).await.ok();
        }
        Ok(())
    };
    let ((), output, errors) = tokio::try_join!(write_server, read_output(stdout), read_errors(stderr))?;
    let status = child.wait().await?;
    group.0 = None;
    Ok((status, output, errors))
}

/// Reads standard output. Fails with [`io::ErrorKind::FileTooLarge`] beyond [`MAX_OUTPUT`].
async fn read_output(stdout: Option<impl AsyncRead + Unpin>) -> io::Result<Vec<u8>> {
    let mut output = Vec::new();
    if let Some(stdout) = stdout {
        stdout.take(MAX_OUTPUT + 1).read_to_end(&mut output).await?;
    }
    if output.len() as u64 > MAX_OUTPUT {
        return Err(io::ErrorKind::FileTooLarge.into());
    }
    Ok(output)
}

/// Reads the first 4 KiB of standard error. Drops the rest, so that the helper does not block.
async fn read_errors(stderr: Option<impl AsyncRead + Unpin>) -> io::Result<Vec<u8>> {
    let mut errors = Vec::new();
    if let Some(mut stderr) = stderr {
        (&mut stderr).take(4 << 10).read_to_end(&mut errors).await?;
        tokio::io::copy(&mut stderr, &mut tokio::io::sink()).await?;
    }
    Ok(errors)
}

/// A running helper and its children, killed on drop.
struct ProcessGroup(Option<Pid>);

impl ProcessGroup {
    /// Must be dropped before `child` is reaped: its id may be reused then.
    fn of(child: &Child) -> Self {
        let id = child.id().and_then(|id| i32::try_from(id).ok());
        Self(id.and_then(Pid::from_raw))
    }
}

impl Drop for ProcessGroup {
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
    fn output_is_parsed() {
        let output = |user: &str| format!(r#"{{"ServerURL":"r","Username":"{user}","Secret":"s"}}"#);
        let password = Credentials::Password {
            user: "me".to_owned(),
            password: "s".to_owned(),
        };
        let token = Credentials::IdentityToken {
            user: None,
            token: "s".to_owned(),
        };
        assert_eq!(parse(output("me").as_bytes()), Some(Some(password)));
        assert_eq!(parse(output("<token>").as_bytes()), Some(Some(token)));
        assert_eq!(parse(b"{}"), Some(None));
        assert_eq!(parse(b"nothing"), None);
    }

    #[test]
    fn summary_is_one_short_line_without_control_characters() {
        assert_eq!(summary(b"no\x1b[31m keyring\nsecret"), ": no [31m keyring");
        assert_eq!(summary(b""), "");
        assert_eq!(summary(&[b'x'; 4096]).len(), 2 + MAX_MESSAGE_CHARS);
    }

    #[tokio::test]
    async fn names_that_are_paths_are_refused() {
        for name in ["", "../x", "a b", "x;y"] {
            assert!(
                matches!(get(name, "r.example").await, Err(HelperError::Name(_))),
                "{name}"
            );
        }
        let missing = get("of-which-there-is-none", "r.example").await.unwrap_err();
        assert!(
            missing.to_string().contains("docker-credential-of-which-there-is-none"),
            "{missing}"
        );
    }
}
