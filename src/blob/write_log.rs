//! Logs failures of the disk below the cache once when they begin and once when they are over.

use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// How long no failure must have occurred for an episode to be over. On a disk that is nearly full, some writes still
/// succeed.
const CALM: Duration = Duration::from_secs(60);

/// The failures of all cached blobs of a root: they lie on the same disk.
pub(super) struct WriteLog {
    calm: Duration,
    writes: Mutex<Option<Instant>>,
    syncs: Mutex<Option<Instant>>,
}

impl Default for WriteLog {
    fn default() -> Self {
        Self {
            calm: CALM,
            writes: Mutex::default(),
            syncs: Mutex::default(),
        }
    }
}

impl WriteLog {
    /// A write has failed. Returns whether that begins an episode, and is to be logged.
    pub(super) fn begins_with_failed_write(&self) -> bool {
        self.writes.lock().replace(Instant::now()).is_none()
    }

    /// A sync has failed. Returns the same.
    pub(super) fn begins_with_failed_sync(&self) -> bool {
        self.syncs.lock().replace(Instant::now()).is_none()
    }

    /// A write has succeeded. Logs the end of an episode.
    pub(super) fn on_write(&self) {
        if self.ends(&self.writes) {
            tracing::info!("writing to blob cache again");
        }
    }

    /// A sync has succeeded. Ends an episode.
    pub(super) fn on_sync(&self) {
        if self.ends(&self.syncs) {
            tracing::info!("syncing blob cache again");
        }
    }

    fn ends(&self, last_failure: &Mutex<Option<Instant>>) -> bool {
        last_failure
            .lock()
            .take_if(|failed| failed.elapsed() >= self.calm)
            .is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn episode_begins_and_ends_once() {
        let log = WriteLog::default();
        assert!(log.begins_with_failed_write() && log.begins_with_failed_sync());
        log.on_write();
        assert!(!log.begins_with_failed_write(), "a single success does not end it");
        let log = WriteLog {
            calm: Duration::ZERO,
            ..WriteLog::default()
        };
        assert!(log.begins_with_failed_write() && !log.begins_with_failed_write());
        log.on_sync();
        assert!(!log.begins_with_failed_write());
        log.on_write();
        assert!(log.begins_with_failed_write());
    }
}
