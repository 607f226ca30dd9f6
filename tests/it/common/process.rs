//! Processes that end with the test that started them.

use std::{
    path::Path,
    process::{Child, Command, Output},
    time::{Duration, Instant},
};

/// A process that is stopped when the test ends: asked first, then killed.
pub struct Guard(pub Child);

impl Guard {
    pub fn id(&self) -> u32 {
        self.0.id()
    }

    /// Sends a signal.
    pub fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_child(&self.0);
        rustix::process::kill_process(pid, signal).unwrap();
    }

    /// Waits for the process to end by itself, for a while.
    pub fn wait(&mut self, limit: Duration) -> Option<std::process::ExitStatus> {
        let start = Instant::now();
        loop {
            match self.0.try_wait().unwrap() {
                Some(status) => return Some(status),
                None if start.elapsed() >= limit => return None,
                None => std::thread::sleep(Duration::from_millis(20)),
            }
        }
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        if self.0.try_wait().ok().flatten().is_none() {
            self.signal(rustix::process::Signal::TERM);
            if self.wait(Duration::from_secs(10)).is_none() {
                self.0.kill().ok();
                self.0.wait().ok();
            }
        }
    }
}

/// Waits until `done` gives something; panics with `what` if that takes longer than a minute.
pub fn wait_until<T>(what: &str, mut done: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(value) = done() {
            return value;
        }
        assert!(start.elapsed() < Duration::from_secs(60), "timed out: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Runs a command to its end; its standard output. Panics, with all that it printed, if it fails.
pub fn output(command: &mut Command) -> String {
    let Output { status, stdout, stderr } = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let (stdout, stderr) = (String::from_utf8_lossy(&stdout), String::from_utf8_lossy(&stderr));
    assert!(status.success(), "{command:?}: {status}\n{stdout}{stderr}");
    stdout.into_owned()
}

/// Runs a command, which must fail; what it printed as errors.
pub fn failure(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(!output.status.success(), "{command:?} succeeded");
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Copies the program under test. By another process: a file that this one has open for writing would be open in whatever
/// other tests start meanwhile, and could not be run.
pub fn copy_program(to: &Path) {
    output(Command::new("cp").arg(super::BINARY).arg(to));
}
