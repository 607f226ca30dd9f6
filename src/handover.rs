//! What survives the process: the FUSE sessions, the control socket, and what the next process must know.
//!
//! A *holder* keeps the descriptors while no daemon runs: systemd, in the service's descriptor store (`FDSTORE` of
//! sd_notify(3)), or [`supervisor`], which speaks the same protocol. The kernel keeps a FUSE session as long as one of
//! its descriptors is open: readers wait, and the next process answers them. State that is not on disk, such as the
//! credentials of pulls, is in a memory file, whose descriptor is held too.
//!
//! Without a holder, a process can only hand over to the program that it executes itself, on SIGHUP.

use std::{
    collections::BTreeMap,
    fs::File,
    io,
    os::{
        fd::{AsFd, BorrowedFd},
        unix::process::CommandExt as _,
    },
    path::Path,
    process::Command,
    sync::Arc,
};

use parking_lot::Mutex;
use rustix::io::FdFlags;
use sd_notify::NotifyState;
use serde::{Deserialize, Serialize};

use crate::{
    fuse::session::SessionInfo,
    registry::{Credentials, Repository},
};

mod inherited;
mod state_file;
pub mod supervisor;

pub use inherited::Inherited;
use state_file::StateFile;

/// Version of [`State`]. A process of another version of it does not take over.
const FORMAT: u32 = 1;
/// Name of the state's descriptor.
const STATE: &str = "state";
/// Name of the control socket's descriptor.
pub const CONTROL: &str = "control";
/// Name of the descriptor of the session on `store/overlay`.
pub const OVERLAY: &str = "overlay";
/// Name of the descriptor of the session on `layers`.
pub const LAYER_STORE: &str = "layers";

/// Why a session cannot be taken over.
#[derive(Debug, thiserror::Error)]
pub enum HandoverError {
    /// The earlier process was of a version with another format.
    #[error(
        "cannot take over from nydus-store {version}: its state has format {format}, this version knows {FORMAT}; \
         install that version again, or stop the service first, which cuts running containers off from their images"
    )]
    Format {
        /// The format.
        format: u32,
        /// Version of the earlier program.
        version: String,
    },
    /// The state cannot be read.
    #[error("cannot read the state of the earlier process: {0}")]
    Read(#[source] io::Error),
    /// The state is malformed.
    #[error("cannot parse the state of the earlier process: {0}")]
    Parse(#[source] serde_json::Error),
    /// There is no memory for the state.
    #[error("cannot keep state for the next process: {0}")]
    Write(#[source] io::Error),
    /// The holder is not reachable.
    #[error("cannot pass descriptors to the service manager: {0}")]
    Notify(#[source] io::Error),
}

/// The part of the state that all formats have.
#[derive(Debug, Deserialize)]
struct StateHeader {
    format: u32,
    version: String,
}

/// What the next process must know and cannot find on disk.
#[derive(Clone, Default, Serialize, Deserialize)]
struct State {
    format: u32,
    /// Version of the program that wrote the state.
    version: String,
    /// The FUSE sessions, by the names of their descriptors.
    sessions: BTreeMap<String, SessionInfo>,
    /// Number of times that a process has taken over.
    takeovers: u64,
    /// Credentials that Podman or CRI-O has pushed. They are never on disk.
    credentials: Vec<(Repository, Credentials)>,
}

/// Keeps descriptors and state for the next process.
pub struct Handover {
    state: Mutex<State>,
    file: StateFile,
    /// Whether a holder keeps descriptors beyond the death of this process.
    pub is_held: bool,
    /// Descriptors for a program that this process executes.
    kept: Mutex<Vec<(&'static str, File)>>,
}

impl Handover {
    /// Continues with what an earlier process has left, or begins anew. Blocks for no longer than a disk does.
    ///
    /// # Errors
    /// Fails if there is something to take over that this version does not understand.
    pub fn new(inherited: &mut Inherited) -> Result<Arc<Self>, HandoverError> {
        let mut state = State::default();
        let file = match inherited.take(STATE) {
            Some(file) => {
                let file = StateFile::open(file);
                let bytes = file.read().map_err(HandoverError::Read)?;
                state = parse(&bytes)?;
                state.takeovers += 1;
                file
            }
            None => {
                // Descriptors without a state mean nothing.
                inherited.clear();
                StateFile::create().map_err(HandoverError::Write)?
            }
        };
        state.format = FORMAT;
        env!("CARGO_PKG_VERSION").clone_into(&mut state.version);
        let handover = Self {
            state: Mutex::new(state),
            file,
            is_held: inherited.is_held,
            kept: Mutex::default(),
        };
        // Written before it is kept: the next process must not find an empty state.
        handover.change(|_| ())?;
        handover.keep(STATE, handover.file.as_fd())?;
        Ok(Arc::new(handover))
    }

    /// Number of times that a process has taken the sessions over.
    pub fn takeovers(&self) -> u64 {
        self.state.lock().takeovers
    }

    /// What an earlier process recorded of the session.
    pub fn session(&self, name: &str) -> Option<SessionInfo> {
        self.state.lock().sessions.get(name).cloned()
    }

    /// Records a session and keeps its descriptor.
    pub fn keep_session(&self, name: &'static str, device: impl AsFd, info: &SessionInfo) -> Result<(), HandoverError> {
        self.change(|state| _ = state.sessions.insert(name.to_owned(), info.clone()))?;
        self.keep(name, device.as_fd())
    }

    /// Keeps a descriptor under this name.
    pub fn keep(&self, name: &'static str, fd: BorrowedFd<'_>) -> Result<(), HandoverError> {
        if self.is_held {
            sd_notify::notify_with_fds(&[NotifyState::FdStore, NotifyState::FdName(name)], &[fd])
                .map_err(HandoverError::Notify)?;
        }
        let kept = fd.try_clone_to_owned().map_err(HandoverError::Write)?;
        self.kept.lock().push((name, kept.into()));
        Ok(())
    }

    /// Credentials that were pushed to an earlier process.
    pub fn credentials(&self) -> Vec<(Repository, Credentials)> {
        self.state.lock().credentials.clone()
    }

    /// Replaces the recorded credentials.
    pub fn keep_credentials(&self, credentials: Vec<(Repository, Credentials)>) -> Result<(), HandoverError> {
        self.change(|state| state.credentials = credentials)
    }

    /// Gives up what is kept under this name.
    pub fn forget(&self, name: &str) {
        self.kept.lock().retain(|(kept, _)| *kept != name);
        if self.is_held
            && let Err(error) = sd_notify::notify(&[NotifyState::FdStoreRemove, NotifyState::FdName(name)])
        {
            tracing::warn!(%error, "failed to remove descriptor from service manager");
        }
    }

    /// Gives everything up: the sessions end with this process.
    pub fn release(&self) {
        for name in [OVERLAY, LAYER_STORE, CONTROL, STATE] {
            self.forget(name);
        }
    }

    /// Replaces this process by `program`, with the same arguments and all that is kept. Returns only on failure.
    pub fn execute(&self, program: &Path) -> io::Error {
        let kept = self.kept.lock();
        let set_flags = |flags| kept.iter().try_for_each(|(_, fd)| rustix::io::fcntl_setfd(fd, flags));
        if let Err(error) = set_flags(FdFlags::empty()) {
            return error.into();
        }
        let mut command = Command::new(program);
        command.args(std::env::args_os().skip(1));
        inherited::pass(&mut command, kept.iter().map(|(name, fd)| (*name, fd.as_fd())));
        let error = command.exec();
        set_flags(FdFlags::CLOEXEC).ok();
        error
    }

    fn change(&self, change: impl FnOnce(&mut State)) -> Result<(), HandoverError> {
        let mut state = self.state.lock();
        change(&mut state);
        // Strings, numbers and lists always have a JSON form.
        let bytes = serde_json::to_vec(&*state).map_err(HandoverError::Parse)?;
        self.file.write(&bytes).map_err(HandoverError::Write)
    }
}

fn parse(bytes: &[u8]) -> Result<State, HandoverError> {
    let StateHeader { format, version } = serde_json::from_slice(bytes).map_err(HandoverError::Parse)?;
    if format != FORMAT {
        return Err(HandoverError::Format { format, version });
    }
    serde_json::from_slice(bytes).map_err(HandoverError::Parse)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn state_of_another_format_is_refused_by_name() {
        let error = parse(br#"{"format":99,"version":"7.1","sessions":[]}"#).err().unwrap();
        let message = error.to_string();
        assert!(
            message.contains("nydus-store 7.1") && message.contains("format 99"),
            "{message}"
        );
        assert!(matches!(parse(b"{}"), Err(HandoverError::Parse(_))));
    }
}
