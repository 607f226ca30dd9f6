//! The device of a session: reads requests, and sends replies.

use std::{
    fs::File,
    io::{self, IoSlice, Read as _},
    os::fd::AsFd,
    sync::Arc,
};

use rustix::{io::Errno, io::writev};
use zerocopy::IntoBytes;

use super::abi::{NOTIFY_RESEND, OutHeader};

/// A descriptor of `/dev/fuse` whose session has begun.
#[derive(Debug)]
pub(super) struct Channel(File);

impl Channel {
    pub fn new(device: File) -> Self {
        Self(device)
    }

    /// Waits for a request. Returns its length, or `None` once the file system is unmounted.
    pub fn receive(&self, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        loop {
            match (&self.0).read(buffer) {
                Ok(len) => return Ok(Some(len)),
                Err(error) => match Errno::from_io_error(&error) {
                    // The request was interrupted before it was read.
                    Some(Errno::NOENT | Errno::INTR | Errno::AGAIN) => {}
                    Some(Errno::NODEV) => return Ok(None),
                    _ => return Err(error),
                },
            }
        }
    }

    /// Makes the kernel send again all requests that were read from any descriptor of the session and not answered.
    pub fn resend(&self) -> io::Result<()> {
        send(&self.0, NOTIFY_RESEND, 0, &[])
    }
}

/// Sends `error` and `data` in one message, as the protocol requires.
fn send(device: impl AsFd, error: i32, unique: u64, data: &[u8]) -> io::Result<()> {
    let header = OutHeader {
        len: (size_of::<OutHeader>() + data.len()) as u32,
        error,
        unique,
    };
    writev(device, &[IoSlice::new(header.as_bytes()), IoSlice::new(data)])?;
    Ok(())
}

/// The right to answer one request. If it is dropped, the request fails with EIO: a panic in a task must not leave a
/// process waiting.
#[derive(Debug)]
pub(super) struct Reply {
    channel: Arc<Channel>,
    unique: u64,
    is_sent: bool,
}

impl Reply {
    pub fn new(channel: &Arc<Channel>, unique: u64) -> Self {
        Self {
            channel: Arc::clone(channel),
            unique,
            is_sent: false,
        }
    }

    /// Answers with a structure.
    pub fn structure(self, value: &(impl IntoBytes + zerocopy::Immutable)) {
        self.data(value.as_bytes());
    }

    /// Answers with bytes.
    pub fn data(mut self, data: &[u8]) {
        self.send(0, data);
    }

    /// Answers with success, without data.
    pub fn ok(self) {
        self.data(&[]);
    }

    /// Answers with an error.
    pub fn error(mut self, error: Errno) {
        self.send(-error.raw_os_error(), &[]);
    }

    fn send(&mut self, error: i32, data: &[u8]) {
        self.is_sent = true;
        match send(&self.channel.0, error, self.unique, data) {
            Ok(()) => {}
            // ENOENT: the requesting process was killed. ENODEV: the file system was unmounted.
            Err(error) => tracing::debug!(%error, request = self.unique, "failed to send FUSE reply"),
        }
    }
}

impl Drop for Reply {
    fn drop(&mut self) {
        if !self.is_sent {
            self.send(-Errno::IO.raw_os_error(), &[]);
        }
    }
}
