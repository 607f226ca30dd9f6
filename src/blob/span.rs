//! Spans: units that lie close together in the stored blob, and are fetched by one request.

use super::unit::Unit;

/// Units that lie close together, and the stored range that they cover.
pub(super) struct Span {
    pub(super) start: u64,
    pub(super) end: u64,
    /// In the order in which they are stored; never empty.
    pub(super) units: Vec<Unit>,
    /// The greatest uncompressed length of a unit.
    longest: u32,
}

/// Limits of one request for several units, in bytes.
#[derive(Debug, Clone, Copy)]
pub(super) struct SpanLimits {
    /// Stored bytes, gaps between units included.
    pub(super) len: u64,
    /// The longest gap between two units that is fetched along, rather than sending a request for each.
    pub(super) gap: u64,
    /// Limit of [`Span::memory`].
    pub(super) memory: u64,
}

impl SpanLimits {
    /// Whether the gap between `end` of one unit and `start` of the next is short enough.
    pub(super) fn bridges(self, end: u64, start: u64) -> bool {
        start <= end.saturating_add(self.gap)
    }
}

/// Stored bytes that two units of a span may share: an inflate start in a gzip stream may lie within a byte. Units of a
/// malformed image may share more; each would take memory of its own, so they are fetched apart.
pub(super) const MAX_SHARED_BYTES: u64 = 1;

impl Span {
    /// A span of one unit.
    pub(super) fn single(unit: Unit) -> Self {
        Self {
            start: unit.extent.compressed_offset,
            end: unit.extent.compressed_end(),
            longest: unit.extent.uncompressed_size,
            units: vec![unit],
        }
    }

    /// Groups `units` into spans within `limits`. A single unit may exceed them.
    pub(super) fn group(mut units: Vec<Unit>, limits: SpanLimits) -> Vec<Self> {
        units.sort_unstable_by_key(|unit| unit.extent.compressed_offset);
        let mut spans: Vec<Self> = Vec::new();
        for unit in units {
            let (start, end) = (unit.extent.compressed_offset, unit.extent.compressed_end());
            let fits = |span: &Self| {
                let longest = u64::from(span.longest.max(unit.extent.uncompressed_size));
                let len = end.max(span.end) - span.start;
                limits.bridges(span.end, start)
                    && start.saturating_add(MAX_SHARED_BYTES) >= span.end
                    && len <= limits.len
                    && len + longest <= limits.memory
            };
            match spans.last_mut().filter(|last| fits(last)) {
                Some(last) => {
                    last.end = last.end.max(end);
                    last.longest = last.longest.max(unit.extent.uncompressed_size);
                    last.units.push(unit);
                }
                None => spans.push(Self::single(unit)),
            }
        }
        spans
    }

    /// Stored bytes, gaps between units included.
    pub(super) fn len(&self) -> usize {
        (self.end - self.start) as usize
    }

    /// Bytes of memory to fetch the span and to decompress its longest unit.
    pub(super) fn memory(&self) -> usize {
        self.len() + self.longest as usize
    }

    /// Drops all but the first `count` units, but keeps at least one.
    pub(super) fn truncate(&mut self, count: usize) {
        self.units.truncate(count.max(1));
        let ends = self.units.iter().map(|unit| unit.extent.compressed_end());
        self.end = ends.max().unwrap_or(self.start);
    }

    /// Both halves of the span. An error returns a span of a single unit.
    pub(super) fn halve(mut self) -> Result<[Self; 2], Self> {
        if self.units.len() < 2 {
            return Err(self);
        }
        let rest = self.units.split_off(self.units.len() / 2);
        Ok([self.units, rest].map(|units| Self {
            start: units[0].extent.compressed_offset,
            end: units.iter().map(|unit| unit.extent.compressed_end()).max().unwrap_or(0),
            longest: units
                .iter()
                .map(|unit| unit.extent.uncompressed_size)
                .max()
                .unwrap_or(0),
            units,
        }))
    }
}
