//! Spans: units that lie close together, so that one request brings them all.

use super::unit::UnitPlan;

/// Units that lie close together, and their stored bytes' place.
pub(super) struct Span {
    pub(super) start: u64,
    pub(super) end: u64,
    /// In the order of their stored bytes; never empty.
    pub(super) units: Vec<UnitPlan>,
}

impl Span {
    /// A single unit.
    pub(super) fn single(plan: UnitPlan) -> Self {
        Self {
            start: plan.unit.compressed_offset,
            end: plan.unit.compressed_end(),
            units: vec![plan],
        }
    }

    /// Makes spans of `units`, of at most `longest` bytes unless a single unit is longer. Up to `gap` bytes between two units
    /// are rather fetched for nothing than asked around.
    pub(super) fn gather(mut units: Vec<UnitPlan>, longest: u64, gap: u64) -> Vec<Self> {
        units.sort_unstable_by_key(|plan| plan.unit.compressed_offset);
        let mut spans: Vec<Self> = Vec::new();
        for plan in units {
            let (start, end) = (plan.unit.compressed_offset, plan.unit.compressed_end());
            match spans.last_mut() {
                Some(last) if end.max(last.end) - last.start <= longest && start <= last.end.saturating_add(gap) => {
                    last.end = last.end.max(end);
                    last.units.push(plan);
                }
                _ => spans.push(Self::single(plan)),
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
        let longest = self.units.iter().map(|plan| plan.unit.uncompressed_size).max();
        self.len() + longest.unwrap_or(0) as usize
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
            units,
        }))
    }
}
