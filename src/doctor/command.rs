//! Runs a program with a time limit and captures its output.

use std::{
    io::{self, Read as _, Seek as _},
    process::{Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};

/// Status and output of a program.
#[derive(Debug)]
pub struct CommandOutput {
    /// Exit status.
    pub status: ExitStatus,
    /// Standard output.
    pub stdout: String,
    /// Standard error, trimmed.
    pub stderr: String,
}

/// Runs a program. Kills it after `time_limit`, and does not wait for its end then: it may hang in a dead file system.
pub fn run(command: &mut Command, time_limit: Duration) -> io::Result<CommandOutput> {
    // Uses files, because the program's background processes may keep pipes open.
    let (mut stdout, mut stderr) = (tempfile::tempfile()?, tempfile::tempfile()?);
    command.stdin(Stdio::null());
    command.stdout(stdout.try_clone()?).stderr(stderr.try_clone()?);
    let mut child = command.spawn()?;
    let start = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        if start.elapsed() > time_limit {
            child.kill()?;
            std::thread::sleep(Duration::from_millis(100));
            child.try_wait()?;
            let message = format!("timed out after {} seconds", time_limit.as_secs());
            return Err(io::Error::new(io::ErrorKind::TimedOut, message));
        }
        std::thread::sleep(Duration::from_millis(10));
    };
    let text = |file: &mut std::fs::File| -> io::Result<String> {
        let mut bytes = Vec::new();
        file.rewind()?;
        file.read_to_end(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    };
    Ok(CommandOutput {
        status,
        stdout: text(&mut stdout)?,
        stderr: text(&mut stderr)?.trim().to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn output_is_captured_and_hanging_program_is_killed() {
        let mut command = Command::new("sh");
        command.args(["-c", "echo out; echo err >&2; exit 3"]);
        let printed = run(&mut command, Duration::from_secs(10)).unwrap();
        assert_eq!((printed.stdout.as_str(), printed.stderr.as_str()), ("out\n", "err"));
        assert_eq!(printed.status.code(), Some(3));

        let error = run(Command::new("sleep").arg("100"), Duration::from_millis(50)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }
}
