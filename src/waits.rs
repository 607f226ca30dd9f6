//! [`Waits`]: what is waited for at present, and since when. `nydus-store status` and the metrics show it.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

/// What kind of work a wait is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum WaitKind {
    /// A reader waits for a chunk that is fetched, or hashed before its first use.
    Chunk,
    /// A pull waits for its image to be published.
    Announcement,
    /// A look-up or a command waits for an image to be loaded.
    Image,
}

/// The waits in progress.
#[derive(Debug, Default)]
pub struct Waits(Mutex<WaitTable>);

#[derive(Debug, Default)]
struct WaitTable {
    next: u64,
    /// In the order in which they began.
    waits: BTreeMap<u64, Wait>,
}

/// A wait in progress.
#[derive(Debug, Clone)]
pub struct Wait {
    /// What kind of work it is for.
    pub kind: WaitKind,
    /// What is waited for.
    pub what: String,
    /// When it began.
    pub since: Instant,
}

/// Lists a wait until it is dropped.
#[must_use]
pub struct WaitGuard<'a> {
    waits: &'a Waits,
    number: u64,
}

impl WaitKind {
    /// All kinds.
    pub const ALL: [Self; 3] = [Self::Chunk, Self::Announcement, Self::Image];

    /// The name in metrics and tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::Chunk => "chunk",
            Self::Announcement => "announcement",
            Self::Image => "image",
        }
    }
}

impl Waits {
    /// Lists a wait for `what`. Takes a lock and memory, so that only what takes long is listed.
    pub fn begin(&self, kind: WaitKind, what: String) -> WaitGuard<'_> {
        let since = Instant::now();
        let mut table = self.0.lock();
        let number = table.next;
        table.next += 1;
        table.waits.insert(number, Wait { kind, what, since });
        WaitGuard { waits: self, number }
    }

    /// Number of the waits of that kind, and how long the oldest one has lasted.
    pub fn summary(&self, kind: WaitKind) -> (usize, Duration) {
        let table = self.0.lock();
        let mut waits = table.waits.values().filter(|wait| wait.kind == kind);
        let oldest = waits.next();
        let longest = oldest.map_or(Duration::ZERO, |wait| wait.since.elapsed());
        (usize::from(oldest.is_some()) + waits.count(), longest)
    }

    /// The `limit` oldest waits, the oldest one first.
    pub fn oldest(&self, limit: usize) -> Vec<Wait> {
        self.0.lock().waits.values().take(limit).cloned().collect()
    }
}

impl Drop for WaitGuard<'_> {
    fn drop(&mut self) {
        self.waits.0.lock().waits.remove(&self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_are_listed_from_the_oldest_until_they_end() {
        let waits = Waits::default();
        let first = waits.begin(WaitKind::Chunk, "first".into());
        let _second = waits.begin(WaitKind::Image, "second".into());
        let _third = waits.begin(WaitKind::Chunk, "third".into());
        let listed = |limit| {
            waits
                .oldest(limit)
                .into_iter()
                .map(|wait| wait.what)
                .collect::<Vec<_>>()
        };
        assert_eq!(listed(2), ["first", "second"]);
        assert_eq!(waits.summary(WaitKind::Chunk).0, 2);
        assert_eq!(waits.summary(WaitKind::Announcement), (0, Duration::ZERO));
        drop(first);
        assert_eq!(listed(9), ["second", "third"]);
        assert_eq!(waits.summary(WaitKind::Chunk).0, 1);
    }
}
