//! Requests that wait for a disk or a registry, and their interruption.
//!
//! The kernel sends INTERRUPT when a signal reaches a process that waits for a request. Programs do not expect EINTR
//! from a file system, and most signals have a handler after which the wait continues. So a request ends early only if
//! its process is being killed.

use std::{collections::HashMap, fs, sync::Arc, time::Duration};

use parking_lot::Mutex;
use rustix::io::Errno;
use tokio::{runtime::Handle, task::AbortHandle};

use super::channel::Reply;

/// Interval at which it is checked whether the process of an interrupted request is being killed.
const KILL_CHECK_INTERVAL: Duration = Duration::from_millis(50);

/// The requests that wait, by their unique id.
#[derive(Debug, Default)]
pub(super) struct WaitingRequests(Mutex<HashMap<u64, Waiting>>);

#[derive(Debug)]
struct Waiting {
    reply: Reply,
    /// The requesting thread.
    pid: u32,
    /// The task that will answer. Missing for the moment until it is spawned.
    task: Option<AbortHandle>,
}

impl WaitingRequests {
    /// Runs `work` on `runtime`, then passes its result and the reply to `answer`, unless the request was interrupted.
    pub fn spawn<T: Send + 'static>(
        self: &Arc<Self>,
        runtime: &Handle,
        (unique, pid): (u64, u32),
        reply: Reply,
        work: impl Future<Output = T> + Send + 'static,
        answer: impl FnOnce(T, Reply) + Send + 'static,
    ) {
        let waiting = Waiting { reply, pid, task: None };
        self.0.lock().insert(unique, waiting);
        let place = Place {
            requests: Some(Arc::clone(self)),
            unique,
        };
        let task = runtime.spawn(async move {
            let result = work.await;
            if let Some(reply) = place.take() {
                answer(result, reply);
            }
        });
        if let Some(waiting) = self.0.lock().get_mut(&unique) {
            waiting.task = Some(task.abort_handle());
        }
    }

    /// Handles an INTERRUPT of the request. Returns `false` if the request is not known: it has been answered, or its
    /// handling has not begun yet.
    pub fn interrupt(self: &Arc<Self>, runtime: &Handle, unique: u64) -> bool {
        let Some(pid) = self.0.lock().get(&unique).map(|waiting| waiting.pid) else {
            return false;
        };
        let requests = Arc::clone(self);
        runtime.spawn(async move {
            while requests.0.lock().contains_key(&unique) {
                if is_being_killed(pid) {
                    requests.end(unique);
                    return;
                }
                tokio::time::sleep(KILL_CHECK_INTERVAL).await;
            }
        });
        true
    }

    fn end(&self, unique: u64) {
        let waiting = self.0.lock().remove(&unique);
        if let Some(Waiting { reply, task, .. }) = waiting {
            reply.error(Errno::INTR);
            if let Some(task) = task {
                task.abort();
            }
        }
    }
}

/// The place of a request among the waiting ones. A task that panics drops it, and with it the reply.
struct Place {
    /// `None` once the reply is taken: answering may make the request wait again, in another task.
    requests: Option<Arc<WaitingRequests>>,
    unique: u64,
}

impl Place {
    fn take(mut self) -> Option<Reply> {
        self.remove()
    }

    fn remove(&mut self) -> Option<Reply> {
        let waiting = self.requests.take()?.0.lock().remove(&self.unique);
        waiting.map(|waiting| waiting.reply)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        drop(self.remove());
    }
}

/// Whether SIGKILL is pending for the thread. The kernel adds it to all threads of a process that a signal will end
/// (`complete_signal` in `kernel/signal.c`). A thread that is gone or not visible is not waited for either.
fn is_being_killed(pid: u32) -> bool {
    const SIGKILL_BIT: u64 = 1 << (libc::SIGKILL - 1);
    if pid == 0 {
        return false;
    }
    let Ok(status) = fs::read_to_string(format!("/proc/{pid}/status")) else {
        return true;
    };
    let pending = |line: &str| {
        let mask = line.strip_prefix("SigPnd:").or_else(|| line.strip_prefix("ShdPnd:"))?;
        u64::from_str_radix(mask.trim(), 16).ok()
    };
    status.lines().filter_map(pending).any(|mask| mask & SIGKILL_BIT != 0)
}
