//! Spans: units that lie close together, so that one request brings them all.

use super::unit::PlannedUnit;

/// Units that lie close together, and their stored bytes' place.
pub(super) struct Span {
    pub(super) start: u64,
    pub(super) end: u64,
    /// In the order of their stored bytes; never empty.
    pub(super) units: Vec<PlannedUnit>,
    /// Length of the longest of them, uncompressed.
    longest: u32,
}

/// What makes units too much for one request.
#[derive(Debug, Clone, Copy)]
pub(super) struct Bounds {
    /// Stored bytes, those between units included.
    pub(super) len: u64,
    /// Bytes between two units that are rather fetched for nothing than asked around.
    pub(super) gap: u64,
    /// [`Span::memory`].
    pub(super) memory: u64,
}

impl Bounds {
    /// Whether what starts at `start` is rather fetched with what ends at `end`, and all between, than asked for apart.
    pub(super) fn bridge(self, end: u64, start: u64) -> bool {
        start <= end.saturating_add(self.gap)
    }
}

/// Bytes that two units may share: a point of random access in a gzip stream may lie within a byte. Units of a malformed image
/// may share more, and would each take memory of their own.
pub(super) const OVERLAP: u64 = 1;

impl Span {
    /// A single unit.
    pub(super) fn single(plan: PlannedUnit) -> Self {
        Self {
            start: plan.unit.compressed_offset,
            end: plan.unit.compressed_end(),
            longest: plan.unit.uncompressed_size,
            units: vec![plan],
        }
    }

    /// Makes spans of `units` that do with `bounds`, unless a single unit does not.
    pub(super) fn gather(mut units: Vec<PlannedUnit>, bounds: Bounds) -> Vec<Self> {
        units.sort_unstable_by_key(|plan| plan.unit.compressed_offset);
        let mut spans: Vec<Self> = Vec::new();
        for plan in units {
            let (start, end) = (plan.unit.compressed_offset, plan.unit.compressed_end());
            let fits = |span: &Self| {
                let longest = u64::from(span.longest.max(plan.unit.uncompressed_size));
                let len = end.max(span.end) - span.start;
                bounds.bridge(span.end, start)
                    && start.saturating_add(OVERLAP) >= span.end
                    && len <= bounds.len
                    && len + longest <= bounds.memory
            };
            match spans.last_mut().filter(|last| fits(last)) {
                Some(last) => {
                    last.end = last.end.max(end);
                    last.longest = last.longest.max(plan.unit.uncompressed_size);
                    last.units.push(plan);
                }
                None => spans.push(Self::single(plan)),
            }
        }
        spans
    }

    /// Stored bytes, those between units included.
    pub(super) fn len(&self) -> usize {
        (self.end - self.start) as usize
    }

    /// Bytes that it takes to fetch it, and to decompress its longest unit.
    pub(super) fn memory(&self) -> usize {
        self.len() + self.longest as usize
    }

    /// Leaves the first units in it, `count` of them and one at least.
    pub(super) fn keep(&mut self, count: usize) {
        self.units.truncate(count.max(1));
        let ends = self.units.iter().map(|plan| plan.unit.compressed_end());
        self.end = ends.max().unwrap_or(self.start);
    }

    /// Both halves of it, unless it is a single unit.
    pub(super) fn cut(mut self) -> Result<[Self; 2], Self> {
        if self.units.len() < 2 {
            return Err(self);
        }
        let rest = self.units.split_off(self.units.len() / 2);
        Ok([self.units, rest].map(|units| Self {
            start: units[0].unit.compressed_offset,
            end: units.iter().map(|plan| plan.unit.compressed_end()).max().unwrap_or(0),
            longest: units.iter().map(|plan| plan.unit.uncompressed_size).max().unwrap_or(0),
            units,
        }))
    }
}
