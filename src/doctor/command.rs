//! Running a program for what it prints, within a bound of time.

use std::{
    io::{self, Read as _, Seek as _},
    process::{Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};

/// What a program printed, and how it ended.
#[derive(Debug)]
pub struct Printed {
    /// How it ended.
    pub status: ExitStatus,
    /// Its standard output.
    pub stdout: String,
    /// Its standard error, without white space around it.
    pub stderr: String,
}

/// Runs a program. One that takes too long is killed, and given up if even that takes long, as when it waits for a dead
/// file system.
pub fn run(command: &mut Command, patience: Duration) -> io::Result<Printed> {
    // In files, because what the program leaves running may hold on to pipes.
    let (mut stdout, mut stderr) = (tempfile::tempfile()?, tempfile::tempfile()?);
    command.stdin(Stdio::null());
    command.stdout(stdout.try_clone()?).stderr(stderr.try_clone()?);
    let mut child = command.spawn()?;
    let start = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        if start.elapsed() > patience {
            child.kill()?;
            std::thread::sleep(Duration::from_millis(100));
            child.try_wait()?;
            let message = format!("it has not ended after {} seconds", patience.as_secs());
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
    Ok(Printed {
        status,
        stdout: text(&mut stdout)?,
        stderr: text(&mut stderr)?.trim().to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_printed_and_what_hangs() {
        let mut command = Command::new("sh");
        command.args(["-c", "echo out; echo err >&2; exit 3"]);
        let printed = run(&mut command, Duration::from_secs(10)).unwrap();
        assert_eq!((printed.stdout.as_str(), printed.stderr.as_str()), ("out\n", "err"));
        assert_eq!(printed.status.code(), Some(3));

        let error = run(Command::new("sleep").arg("100"), Duration::from_millis(50)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }
}
