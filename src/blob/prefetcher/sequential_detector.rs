//! Tells who reads a blob in order, and how far ahead of him to fetch.
//!
//! Files are laid into a blob in the order of the tree, so that whoever reads one file after the other reads the blob in
//! order too. Each such reader is a *stream*: a place in the blob, and how far ahead of it everything has been asked for. A
//! stream's window starts small, with its second step, and doubles as often as what was fetched is used. Before that, and for who
//! reads here and there, there is what comes along with a chunk ([`super::coalesce`]).
//!
//! Places are uncompressed offsets, which every kind of blob has in the order of its stored bytes.

use std::{
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

/// Streams that are kept track of in one blob.
const STREAMS: usize = 8;
/// How far back a step may lead in a stream that is under way, in bytes: several threads ask for the parts of one file in any order.
const BACK: u64 = 2 << 20;
/// How far ahead of what was asked for a step may lead, in bytes: files that nobody reads lie between.
const SKIP: u64 = 256 << 10;
/// The first window of a stream, in bytes.
const FIRST: u64 = 128 << 10;
/// The longest window, in bytes.
const LONGEST: u64 = 64 << 20;

/// The readers of one blob.
#[derive(Debug, Default)]
pub(super) struct SequentialDetector {
    /// The one that was read from last is last.
    streams: Vec<Stream>,
}

#[derive(Debug)]
struct Stream {
    /// Where the reader is.
    at: u64,
    /// Up to where everything has been asked for.
    until: u64,
    /// Zero as long as nothing was asked for.
    window: u64,
    given_up: Arc<AtomicBool>,
}

/// What is to be fetched.
#[derive(Debug)]
pub(super) struct Wanted {
    /// Uncompressed offsets. Chunks that end in there are wanted: not the one of which only a part does, so that small windows
    /// take no large chunks.
    pub(super) range: Range<u64>,
    /// Set when the reader has gone elsewhere.
    pub(super) given_up: Arc<AtomicBool>,
}

impl SequentialDetector {
    /// Somebody reads the bytes at `range` for the first time: with a request of its own (`is_step`), or with more of one
    /// that was told before. Gives what to fetch for him.
    pub(super) fn on_access(&mut self, range: Range<u64>, is_step: bool) -> Option<Wanted> {
        let goes_on = |stream: &Stream| {
            let back = if stream.window > 0 { BACK } else { 0 };
            let (from, to) = (stream.at.saturating_sub(back), stream.until.max(stream.at));
            (from..=to.saturating_add(SKIP)).contains(&range.start)
        };
        let Some(position) = self.streams.iter().rposition(goes_on) else {
            self.begin(range.end);
            return None;
        };
        let mut stream = self.streams.remove(position);
        stream.at = stream.at.max(range.end);
        let wanted = if is_step || stream.window > 0 {
            stream.step()
        } else {
            None
        };
        self.streams.push(stream);
        wanted
    }

    /// What has been asked for will not come.
    pub(super) fn cancel(&mut self) {
        self.streams.clear();
    }

    fn begin(&mut self, at: u64) {
        if self.streams.len() == STREAMS {
            self.streams.remove(0);
        }
        self.streams.push(Stream {
            at,
            until: at,
            window: 0,
            given_up: Arc::default(),
        });
    }
}

impl Stream {
    fn step(&mut self) -> Option<Wanted> {
        if self.window > 0 && self.until.saturating_sub(self.at) > self.window / 2 {
            return None;
        }
        self.window = (self.window * 2).clamp(FIRST, LONGEST);
        let range = self.until.max(self.at)..self.at.saturating_add(self.window);
        self.until = range.end;
        let given_up = Arc::clone(&self.given_up);
        Some(Wanted { range, given_up })
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.given_up.store(true, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    /// What is fetched ahead for one who reads the blob of that length in pieces, up to `stop`.
    fn read_in_order(streams: &mut SequentialDetector, start: u64, stop: u64, piece: u64) -> Vec<Range<u64>> {
        let pieces = (start..stop).step_by(piece as usize);
        let ahead = pieces.filter_map(|at| streams.on_access(at..at + piece, true));
        ahead.map(|wanted| wanted.range).collect()
    }

    #[test]
    fn a_window_grows_with_its_use_and_leaves_nothing_out() {
        let ahead = read_in_order(&mut SequentialDetector::default(), 0, 500 * MIB, MIB / 8);
        // The first pieces are the reader's own.
        assert_eq!(ahead[0].start, MIB / 4);
        for pair in ahead.windows(2) {
            assert_eq!(pair[0].end, pair[1].start);
        }
        let longest = ahead.iter().map(|range| range.end - range.start).max();
        assert!(ahead[0].end - ahead[0].start <= MIB && longest <= Some(LONGEST));
        assert!(ahead.last().is_some_and(|last| last.end > 500 * MIB));
    }

    #[test]
    fn who_reads_here_and_there_gets_nothing_ahead() {
        let mut streams = SequentialDetector::default();
        let at = |step: u64| step * 7919 % 1009 * 10 * MIB;
        let ahead = (0..1000).filter_map(|step| streams.on_access(at(step)..at(step) + MIB, true));
        assert_eq!(ahead.count(), 0);
    }

    #[test]
    fn one_request_for_two_chunks_is_one_step() {
        let mut streams = SequentialDetector::default();
        assert!(streams.on_access(0..MIB, true).is_none());
        assert!(streams.on_access(MIB..2 * MIB, false).is_none());
        assert!(streams.on_access(2 * MIB..3 * MIB, true).is_some());
    }

    #[test]
    fn several_readers_at_once() {
        let mut streams = SequentialDetector::default();
        let mut ahead = [0; 4];
        for step in 0..100 {
            for (reader, ahead) in ahead.iter_mut().enumerate() {
                let at = reader as u64 * 1000 * MIB + step * MIB;
                *ahead += u64::from(streams.on_access(at..at + MIB, true).is_some());
            }
        }
        assert!(ahead.iter().all(|times| *times > 5), "{ahead:?}");
    }

    #[test]
    fn what_is_not_wanted_any_more_is_given_up() {
        let mut streams = SequentialDetector::default();
        streams.on_access(0..MIB, true);
        let wanted = streams.on_access(MIB..3 * MIB, true).unwrap();
        for reader in 1..=STREAMS as u64 {
            assert!(!wanted.given_up.load(Ordering::Relaxed));
            streams.on_access(reader * 100 * MIB..reader * 100 * MIB + 1, true);
        }
        assert!(wanted.given_up.load(Ordering::Relaxed));
    }
}
