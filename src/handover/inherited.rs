//! [`Inherited`]: the descriptors that this process got from its holder.

use std::{
    collections::HashMap,
    fs::File,
    io,
    os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd},
    process::Command,
};

use rustix::io::FdFlags;

/// Environment variable with the descriptors from a supervisor or from an earlier program of this process:
/// `name:number`, separated by commas. Unlike `LISTEN_FDS` of sd_listen_fds(3), it allows any numbers.
const VARIABLE: &str = "NYDUS_STORE_FDS";

/// Descriptors by name. Those that nothing takes are closed.
#[derive(Debug, Default)]
pub struct Inherited {
    fds: HashMap<String, OwnedFd>,
    /// Whether a holder keeps descriptors beyond the death of this process.
    pub is_held: bool,
}

impl Inherited {
    /// Takes the descriptors that the environment lists, from systemd or from [`super::supervisor`]. Must be called
    /// once, before any other descriptor is opened.
    pub fn from_environment() -> io::Result<Self> {
        let mut listed: Vec<(RawFd, String)> = sd_notify::listen_fds_with_names()?.collect();
        if let Ok(text) = std::env::var(VARIABLE) {
            listed.extend(decode(&text));
        }
        let mut inherited = HashMap::new();
        for (number, name) in listed {
            if number < 3 {
                continue;
            }
            #[expect(unsafe_code, reason = "the environment names descriptors by number")]
            // SAFETY: the holder has opened the descriptor for this process, and nothing else here owns it: the caller
            // calls this once, before other descriptors are opened. A number that is not open fails in the next line.
            let fd = unsafe { OwnedFd::from_raw_fd(number) };
            if rustix::io::fcntl_setfd(&fd, FdFlags::CLOEXEC).is_err() {
                // Not open: closing the number later might close another descriptor.
                std::mem::forget(fd);
                continue;
            }
            inherited.insert(name, fd);
        }
        Ok(Self {
            fds: inherited,
            is_held: std::env::var_os("NOTIFY_SOCKET").is_some(),
        })
    }

    /// Takes the descriptor with this name.
    pub fn take(&mut self, name: &str) -> Option<File> {
        self.fds.remove(name).map(File::from)
    }

    /// Whether there is a descriptor with this name.
    pub fn has(&self, name: &str) -> bool {
        self.fds.contains_key(name)
    }

    /// All descriptors by name.
    pub(super) fn into_all(self) -> HashMap<String, OwnedFd> {
        self.fds
    }

    /// Closes all descriptors.
    pub fn clear(&mut self) {
        self.fds.clear();
    }
}

/// Passes descriptors, which are not closed at an exec, to the program that `command` starts.
pub(super) fn pass<'a>(command: &mut Command, fds: impl Iterator<Item = (&'a str, BorrowedFd<'a>)>) {
    let one = |(name, fd): (&str, BorrowedFd<'_>)| format!("{name}:{}", fd.as_raw_fd());
    command.env(VARIABLE, fds.map(one).collect::<Vec<_>>().join(","));
    // Those of this process have other numbers now.
    for name in ["LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PID"] {
        command.env_remove(name);
    }
}

fn decode(text: &str) -> impl Iterator<Item = (RawFd, String)> {
    text.split(',').filter_map(|entry| {
        let (name, number) = entry.split_once(':')?;
        Some((number.parse().ok()?, name.to_owned()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn malformed_entries_are_skipped() {
        let decoded: Vec<_> = decode("state:7,layers:x,:8,nothing,control:12").collect();
        let expected = [(7, "state"), (8, ""), (12, "control")].map(|(number, name)| (number, name.to_owned()));
        assert_eq!(decoded, expected);
    }
}
