//! `serve --supervise`: holds the descriptors of a daemon and starts it again when it dies, on hosts without systemd.
//!
//! The supervisor speaks the part of sd_notify(3) that the daemon uses: `FDSTORE`, `READY` and `WATCHDOG`. So the
//! daemon treats it like systemd. On SIGHUP, the supervisor stops the daemon and executes the program anew, which may
//! have been replaced by then.

use std::{
    collections::BTreeMap,
    fs::Permissions,
    io::{self, IoSliceMut},
    mem::MaybeUninit,
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::{fs::PermissionsExt as _, process::CommandExt as _},
    },
    path::{Path, PathBuf},
    process::ExitStatus,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use rustix::{
    io::FdFlags,
    net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg},
    process::{Pid, Signal, kill_process},
};
use sd_notify::NotifyState;
use tokio::{
    io::Interest,
    net::UnixDatagram,
    process::{Child, Command},
    signal::unix::{SignalKind, signal},
    time::Instant as Deadline,
};

use super::inherited::{self, Inherited};

/// Name of the notification socket in the root.
pub const SOCKET: &str = "supervisor.sock";
/// Longest time between two signs of life of the daemon.
const WATCHDOG: Duration = Duration::from_secs(60);
/// A daemon that ran for this long is started again at once.
const STABLE_TIME: Duration = Duration::from_secs(2);
/// Delay before the second start in a row; it doubles with each further one.
const FIRST_DELAY: Duration = Duration::from_millis(50);
/// Longest delay before a start after a daemon that did serve: readers are waiting.
const MAX_READY_DELAY: Duration = Duration::from_millis(200);
/// Longest delay before a start after a daemon that did not get that far.
const MAX_DELAY: Duration = Duration::from_secs(5);
/// Most descriptors in a message.
const MAX_FDS: usize = 4;

/// Holds descriptors and runs the daemon.
pub struct Supervisor {
    socket: NotifySocket,
    program: PathBuf,
    signals: Signals,
    held: BTreeMap<String, OwnedFd>,
}

/// Signals to the supervisor, also those that arrive while no daemon runs.
struct Signals {
    terminate: tokio::signal::unix::Signal,
    interrupt: tokio::signal::unix::Signal,
    hang_up: tokio::signal::unix::Signal,
}

/// What the supervisor was asked to do with the daemon.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Intent {
    Run,
    End,
    Upgrade,
}

/// How a run of the daemon ended.
struct Run {
    status: ExitStatus,
    was_ready: bool,
    lasted: Duration,
    intent: Intent,
}

impl Supervisor {
    /// A supervisor of the daemon on `root`, with the descriptors that an earlier program of this process held. Must
    /// be called within a runtime.
    pub fn new(root: &Path, inherited: Inherited) -> anyhow::Result<Self> {
        let program = std::env::current_exe().context("cannot find the path of this program")?;
        let socket =
            NotifySocket::bind(root).with_context(|| format!("cannot listen on {}", root.join(SOCKET).display()))?;
        let mut supervisor = Self {
            socket,
            program,
            signals: Signals::new()?,
            held: BTreeMap::new(),
        };
        for (name, fd) in inherited.into_all() {
            supervisor.hold(name, fd);
        }
        Ok(supervisor)
    }

    /// Runs the daemon until it ends for good. Fails with the daemon if it cannot start.
    pub async fn run(mut self) -> anyhow::Result<()> {
        let mut delay = Duration::ZERO;
        loop {
            let run = self.run_once().await?;
            match run.intent {
                Intent::End => return Ok(()),
                Intent::Upgrade => {
                    let error = self.execute();
                    tracing::error!(%error, program = %self.program.display(), "failed to execute new program");
                }
                Intent::Run if self.held.is_empty() && run.status.success() => return Ok(()),
                Intent::Run if self.held.is_empty() && !run.was_ready => {
                    anyhow::bail!("the daemon failed to start ({})", run.status)
                }
                Intent::Run => {}
            }
            delay = next_delay(delay, &run);
            let delay_ms = delay.as_millis() as u64;
            tracing::warn!(status = %run.status, delay_ms, "daemon exited; restarting it");
            tokio::time::sleep(delay).await;
        }
    }

    async fn run_once(&mut self) -> anyhow::Result<Run> {
        let start = Instant::now();
        let mut child = self.spawn()?;
        let (mut was_ready, mut intent) = (false, Intent::Run);
        let mut deadline = Deadline::now() + WATCHDOG;
        let status = loop {
            tokio::select! {
                status = child.wait() => break status.context("cannot wait for the daemon")?,
                message = self.socket.receive() => {
                    let message = message.context("cannot read a notification of the daemon")?;
                    was_ready |= message.has("READY=1");
                    deadline = Deadline::now() + WATCHDOG;
                    self.apply(message);
                }
                asked = self.signals.next() => {
                    intent = asked;
                    send(&child, if asked == Intent::End { Signal::INT } else { Signal::TERM });
                }
                () = tokio::time::sleep_until(deadline) => {
                    tracing::error!("daemon is stuck; killing it");
                    send(&child, Signal::ABORT);
                    deadline = Deadline::now() + WATCHDOG;
                }
            }
        };
        // What the daemon sent before it exited.
        while let Some(message) = self.socket.try_receive() {
            self.apply(message);
        }
        Ok(Run {
            status,
            was_ready,
            lasted: start.elapsed(),
            intent,
        })
    }

    /// Starts the daemon: the program as it is on disk now or, if that fails, the one that this process runs.
    fn spawn(&self) -> anyhow::Result<Child> {
        let started = self.command(&self.program).spawn();
        let started = started.or_else(|_| self.command(Path::new("/proc/self/exe")).spawn());
        started.with_context(|| format!("cannot start {}", self.program.display()))
    }

    fn command(&self, program: &Path) -> Command {
        let mut command = std::process::Command::new(program);
        command.args(std::env::args_os().skip(1).filter(|argument| argument != "--supervise"));
        command.env("NOTIFY_SOCKET", self.socket.path());
        command.env("WATCHDOG_USEC", WATCHDOG.as_micros().to_string());
        command.env_remove("WATCHDOG_PID");
        self.pass_descriptors(&mut command);
        command.into()
    }

    fn pass_descriptors(&self, command: &mut std::process::Command) {
        inherited::pass(command, self.held.iter().map(|(name, fd)| (name.as_str(), fd.as_fd())));
    }

    /// Replaces this process by the program on disk. Returns only on failure.
    fn execute(&self) -> io::Error {
        let mut command = std::process::Command::new(&self.program);
        command.args(std::env::args_os().skip(1));
        self.pass_descriptors(&mut command);
        command.exec()
    }

    fn apply(&mut self, message: Message) {
        if message.has("READY=1") && sd_notify::notify(&[NotifyState::Ready]).is_err() {
            tracing::debug!("failed to notify systemd of readiness");
        }
        let Some(name) = message.field("FDNAME").map(str::to_owned) else {
            return;
        };
        if message.has("FDSTOREREMOVE=1") {
            self.held.remove(&name);
        } else if message.has("FDSTORE=1") {
            for fd in message.fds {
                self.hold(name.clone(), fd);
            }
        }
    }

    /// Holds a descriptor. The daemon inherits it; this process starts no other programs.
    fn hold(&mut self, name: String, fd: OwnedFd) {
        if rustix::io::fcntl_setfd(&fd, FdFlags::empty()).is_ok() {
            self.held.insert(name, fd);
        }
    }
}

impl Signals {
    fn new() -> anyhow::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate()).context("cannot handle SIGTERM")?,
            interrupt: signal(SignalKind::interrupt()).context("cannot handle SIGINT")?,
            hang_up: signal(SignalKind::hangup()).context("cannot handle SIGHUP")?,
        })
    }

    /// Waits for a signal.
    async fn next(&mut self) -> Intent {
        tokio::select! {
            _ = self.terminate.recv() => Intent::End,
            _ = self.interrupt.recv() => Intent::End,
            _ = self.hang_up.recv() => Intent::Upgrade,
        }
    }
}

fn send(child: &Child, signal: Signal) {
    let pid = child.id().and_then(|id| Pid::from_raw(id.cast_signed()));
    if let Some(pid) = pid {
        // The daemon may have exited meanwhile.
        kill_process(pid, signal).ok();
    }
}

fn next_delay(delay: Duration, run: &Run) -> Duration {
    if run.intent == Intent::Upgrade || run.was_ready && run.lasted >= STABLE_TIME {
        return Duration::ZERO;
    }
    let max = if run.was_ready { MAX_READY_DELAY } else { MAX_DELAY };
    (delay * 2).clamp(FIRST_DELAY, max)
}

/// A notification of the daemon.
#[derive(Debug)]
struct Message {
    text: String,
    fds: Vec<OwnedFd>,
}

impl Message {
    fn has(&self, assignment: &str) -> bool {
        self.text.lines().any(|line| line == assignment)
    }

    fn field(&self, name: &str) -> Option<&str> {
        let mut assignments = self.text.lines().filter_map(|line| line.split_once('='));
        assignments.find_map(|(key, value)| (key == name).then_some(value))
    }
}

/// The socket for notifications, which only root can reach.
struct NotifySocket {
    socket: UnixDatagram,
    path: PathBuf,
    /// Keeps the descriptor open that the path contains: socket paths have at most 107 bytes (unix(7)).
    _root: std::fs::File,
}

impl NotifySocket {
    fn bind(root: &Path) -> io::Result<Self> {
        use std::os::fd::AsRawFd as _;
        crate::atomic_file::make_private_dir(root)?;
        let root = std::fs::File::open(root)?;
        let path = format!("/proc/{}/fd/{}/{SOCKET}", std::process::id(), root.as_raw_fd());
        let path = PathBuf::from(path);
        if std::os::unix::net::UnixDatagram::unbound()?.connect(&path).is_ok() {
            return Err(io::Error::new(
                io::ErrorKind::AddrInUse,
                "another supervisor is running",
            ));
        }
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let socket = UnixDatagram::bind(&path)?;
        std::fs::set_permissions(&path, Permissions::from_mode(0o600))?;
        Ok(Self {
            socket,
            path,
            _root: root,
        })
    }

    fn path(&self) -> &Path {
        &self.path
    }

    async fn receive(&self) -> io::Result<Message> {
        let receive = || receive(&self.socket);
        loop {
            self.socket.readable().await?;
            match self.socket.try_io(Interest::READABLE, receive) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                received => return received,
            }
        }
    }

    fn try_receive(&self) -> Option<Message> {
        receive(&self.socket).ok()
    }
}

impl Drop for NotifySocket {
    fn drop(&mut self) {
        std::fs::remove_file(&self.path).ok();
    }
}

fn receive(socket: &UnixDatagram) -> io::Result<Message> {
    let mut text = [0; 4096];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
    let received = recvmsg(socket, &mut [IoSliceMut::new(&mut text)], &mut control, flags)?;
    let mut fds = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(passed) = message {
            fds.extend(passed);
        }
    }
    let text = String::from_utf8_lossy(&text[..received.bytes]).into_owned();
    Ok(Message { text, fds })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn notifications_are_parsed() {
        let message = Message {
            text: "FDSTORE=1\nFDNAME=overlay\n".to_owned(),
            fds: Vec::new(),
        };
        assert!(message.has("FDSTORE=1") && !message.has("FDSTOREREMOVE=1") && !message.has("FDSTORE"));
        assert_eq!(message.field("FDNAME"), Some("overlay"));
        assert_eq!(message.field("FD"), None);
    }

    #[test]
    fn delay_grows_until_a_daemon_stays_up() {
        let run = |was_ready, lasted| Run {
            status: ExitStatus::default(),
            was_ready,
            lasted,
            intent: Intent::Run,
        };
        let mut delay = Duration::ZERO;
        for expected in [50, 100, 200, 400, 800, 1600, 3200, 5000, 5000] {
            delay = next_delay(delay, &run(false, STABLE_TIME));
            assert_eq!(delay, Duration::from_millis(expected));
        }
        assert_eq!(
            next_delay(delay, &run(true, Duration::from_millis(10))),
            MAX_READY_DELAY
        );
        assert_eq!(next_delay(delay, &run(true, STABLE_TIME)), Duration::ZERO);
    }
}
