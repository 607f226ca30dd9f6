//! Detects sequential readers of a blob, and how far to read ahead of each.
//!
//! Files are laid into a blob in the order of the tree, so that reading one file after the other reads the blob in
//! order too. Each sequential reader is a *stream*: its offset in the blob, and the end of what was requested ahead of
//! it. The second access in order opens a window; the window doubles as often as the reader uses it up. Random access
//! gets no read-ahead, only coalescing ([`super::coalesce`]).
//!
//! Offsets are uncompressed ones, which every kind of blob stores its bytes in the order of.

use std::{
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

/// Streams that are tracked in one blob. The least recently used one is dropped.
const MAX_STREAMS: usize = 8;
/// How far back an access may go in a stream with a window, in bytes: several threads request parts of one file in any
/// order.
const MAX_BACKWARD_BYTES: u64 = 2 << 20;
/// How many bytes an access may skip ahead of what was requested: files that are not read lie between.
const MAX_SKIPPED_BYTES: u64 = 256 << 10;
/// The first window of a stream, in bytes.
const MIN_WINDOW_BYTES: u64 = 128 << 10;
/// The longest window, in bytes.
const MAX_WINDOW_BYTES: u64 = 64 << 20;

/// The sequential readers of one blob.
#[derive(Debug, Default)]
pub(super) struct SequentialDetector {
    /// The most recently used one is last.
    streams: Vec<AccessStream>,
}

#[derive(Debug)]
struct AccessStream {
    /// End of the furthest access.
    at: u64,
    /// Up to where everything has been requested.
    until: u64,
    /// Zero before the first request.
    window: u64,
    cancelled: Arc<AtomicBool>,
}

/// A range to read ahead.
#[derive(Debug)]
pub(super) struct ReadAheadRequest {
    /// Uncompressed offsets. Meant are the chunks that end in there: one that begins there may be much longer than a
    /// small window.
    pub(super) range: Range<u64>,
    /// Set once the stream is dropped.
    pub(super) cancelled: Arc<AtomicBool>,
}

impl SequentialDetector {
    /// Takes the first access to the bytes at `range` into account. `is_first_of_request` tells whether it is the first
    /// such access of a request. Returns what to read ahead.
    pub(super) fn on_access(&mut self, range: Range<u64>, is_first_of_request: bool) -> Option<ReadAheadRequest> {
        let continues = |stream: &AccessStream| {
            let back = if stream.window > 0 { MAX_BACKWARD_BYTES } else { 0 };
            let (from, to) = (stream.at.saturating_sub(back), stream.until.max(stream.at));
            (from..=to.saturating_add(MAX_SKIPPED_BYTES)).contains(&range.start)
        };
        let Some(position) = self.streams.iter().rposition(continues) else {
            self.begin(range.end);
            return None;
        };
        let mut stream = self.streams.remove(position);
        stream.at = stream.at.max(range.end);
        let request = if is_first_of_request || stream.window > 0 {
            stream.advance()
        } else {
            None
        };
        self.streams.push(stream);
        request
    }

    /// Drops all streams, which cancels their requests.
    pub(super) fn cancel(&mut self) {
        self.streams.clear();
    }

    fn begin(&mut self, at: u64) {
        if self.streams.len() == MAX_STREAMS {
            self.streams.remove(0);
        }
        self.streams.push(AccessStream {
            at,
            until: at,
            window: 0,
            cancelled: Arc::default(),
        });
    }
}

impl AccessStream {
    /// Opens the next window once half of the current one is used.
    fn advance(&mut self) -> Option<ReadAheadRequest> {
        if self.window > 0 && self.until.saturating_sub(self.at) > self.window / 2 {
            return None;
        }
        self.window = (self.window * 2).clamp(MIN_WINDOW_BYTES, MAX_WINDOW_BYTES);
        let range = self.until.max(self.at)..self.at.saturating_add(self.window);
        self.until = range.end;
        let cancelled = Arc::clone(&self.cancelled);
        Some(ReadAheadRequest { range, cancelled })
    }
}

impl Drop for AccessStream {
    fn drop(&mut self) {
        self.cancelled.store(true, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    /// The ranges read ahead of a reader that reads from `start` to `stop` in pieces.
    fn read_in_order(detector: &mut SequentialDetector, start: u64, stop: u64, piece: u64) -> Vec<Range<u64>> {
        let pieces = (start..stop).step_by(piece as usize);
        let ahead = pieces.filter_map(|at| detector.on_access(at..at + piece, true));
        ahead.map(|request| request.range).collect()
    }

    #[test]
    fn windows_grow_and_leave_no_gap() {
        let ahead = read_in_order(&mut SequentialDetector::default(), 0, 500 * MIB, MIB / 8);
        // The reader fetches the first pieces itself.
        assert_eq!(ahead[0].start, MIB / 4);
        for pair in ahead.windows(2) {
            assert_eq!(pair[0].end, pair[1].start);
        }
        let longest = ahead.iter().map(|range| range.end - range.start).max();
        assert!(ahead[0].end - ahead[0].start <= MIB && longest <= Some(MAX_WINDOW_BYTES));
        assert!(ahead.last().is_some_and(|last| last.end > 500 * MIB));
    }

    #[test]
    fn random_access_gets_no_read_ahead() {
        let mut detector = SequentialDetector::default();
        let at = |step: u64| step * 7919 % 1009 * 10 * MIB;
        let ahead = (0..1000).filter_map(|step| detector.on_access(at(step)..at(step) + MIB, true));
        assert_eq!(ahead.count(), 0);
    }

    #[test]
    fn one_request_for_two_chunks_is_not_sequential_yet() {
        let mut detector = SequentialDetector::default();
        assert!(detector.on_access(0..MIB, true).is_none());
        assert!(detector.on_access(MIB..2 * MIB, false).is_none());
        assert!(detector.on_access(2 * MIB..3 * MIB, true).is_some());
    }

    #[test]
    fn several_readers_have_a_stream_each() {
        let mut detector = SequentialDetector::default();
        let mut ahead = [0; 4];
        for step in 0..100 {
            for (reader, ahead) in ahead.iter_mut().enumerate() {
                let at = reader as u64 * 1000 * MIB + step * MIB;
                *ahead += u64::from(detector.on_access(at..at + MIB, true).is_some());
            }
        }
        assert!(ahead.iter().all(|times| *times > 5), "{ahead:?}");
    }

    #[test]
    fn a_dropped_stream_cancels_its_request() {
        let mut detector = SequentialDetector::default();
        detector.on_access(0..MIB, true);
        let request = detector.on_access(MIB..3 * MIB, true).unwrap();
        for reader in 1..=MAX_STREAMS as u64 {
            assert!(!request.cancelled.load(Ordering::Relaxed));
            detector.on_access(reader * 100 * MIB..reader * 100 * MIB + 1, true);
        }
        assert!(request.cancelled.load(Ordering::Relaxed));
    }
}
