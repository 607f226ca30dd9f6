//! The mirror on a socket that systemd has made.

use std::{
    net::TcpListener,
    os::{fd::AsRawFd as _, unix::process::CommandExt as _},
    process::Command,
};

use super::ask;
use crate::common::{BINARY, Serve};

/// What systemd does: the socket is descriptor 3, and two variables say so.
fn hand_over(command: &mut Command, listener: &TcpListener) {
    let mut wrapped = Command::new("sh");
    wrapped.args(["-c", "LISTEN_PID=$$ LISTEN_FDS=1 exec \"$@\"", "sh", BINARY]);
    wrapped.args(command.get_args());
    let socket = listener.as_raw_fd();
    // SAFETY: between fork and exec, only system calls are made.
    unsafe {
        wrapped.pre_exec(move || {
            // It may be that descriptor already; and it is to stay open.
            let done = libc::dup2(socket, 3) == 3 && libc::fcntl(3, libc::F_SETFD, 0) == 0;
            done.then_some(()).ok_or_else(std::io::Error::last_os_error)
        });
    }
    *command = wrapped;
}

#[test]
fn the_port_is_held_while_the_daemon_does_not_run() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let mut serve = Serve::prepare(&format!("[mirror]\nlisten = \"{address}\"\n"));
    for _ in 0..2 {
        serve.launch_with(|command| hand_over(command, &listener));
        assert_eq!(serve.mirror(), address);
        assert_eq!(ask(address, "GET", "/v2/", "").status, 200);
        serve.stop();
        let busy = TcpListener::bind(address).unwrap_err();
        assert_eq!(busy.kind(), std::io::ErrorKind::AddrInUse);
    }
}

#[test]
fn another_address_than_the_configured_one_is_an_error() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let serve = Serve::prepare("[mirror]\nlisten = \"127.0.0.1:1\"\n");
    let mut command = serve.command();
    hand_over(&mut command, &listener);
    let refused = command.output().unwrap();
    assert_eq!(refused.status.code(), Some(1));
    let message = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(message.contains("change `ListenStream` or `listen`"), "{message}");
}
