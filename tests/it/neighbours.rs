//! Hostile neighbours: other users of the host, and other images. `podman::neighbours` has containers.

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

use rustix::{
    process::{Gid, Uid},
    thread::{set_thread_groups, set_thread_res_gid, set_thread_res_uid},
};

mod failing_image;
mod images;
mod latency;
mod unprivileged;

/// The id of an ordinary user and of its group.
const USER_ID: u32 = 12_345;

/// Runs `work` in a thread of an ordinary user, without groups and capabilities.
fn as_user<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    let with_its_rights = || {
        become_user();
        work()
    };
    thread::scope(|scope| scope.spawn(with_its_rights).join().unwrap())
}

/// Makes the calling thread, and no other, one of an ordinary user.
fn become_user() {
    let (uid, gid) = (Uid::from_raw(USER_ID), Gid::from_raw(USER_ID));
    set_thread_groups(&[]).unwrap();
    set_thread_res_gid(gid, gid, gid).unwrap();
    // The kernel drops all capabilities of the thread too (capabilities(7)).
    set_thread_res_uid(uid, uid, uid).unwrap();
}

/// Sets a flag when it is dropped, also by a panic: threads that wait for it must end then.
struct Ends<'flag>(&'flag AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// The answer to `GET /metrics` on the port.
fn metrics_on(port: u16) -> String {
    let mut connection = TcpStream::connect(SocketAddr::from(([127, 0, 0, 1], port))).unwrap();
    connection.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    connection.write_all(b"GET /metrics HTTP/1.0\r\n\r\n").unwrap();
    let mut answer = String::new();
    connection.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.0 200"), "{answer}");
    answer
}
