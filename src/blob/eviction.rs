//! Evicts chunks of cached blobs: the least recently used parts of the cache make room for others.
//!
//! A pass begins when the high watermark is exceeded, and ends at the low one. Writers that would exceed the limit
//! itself wait for a pass, and do without the cache if it does not help. Pieces are evicted in the order of their last
//! use: whole blobs that no image in use has, and *regions* ([`super::region_uses`]) of the others. So a blob larger
//! than the limit can be read, and what is being read is evicted last.
//!
//! # Why no reader gets zeros
//!
//! Evicted chunks are *punched*: the file system releases their blocks, which then read as zeros. [`CachedBlob::evict`]
//! takes three steps:
//!
//! 1. With the write gate held exclusively: the chunks become [`ChunkState::Missing`], their journal entries are
//!    overwritten, and a new epoch begins.
//! 2. The journal is synced. No lock is held.
//! 3. With the write gate held exclusively: those bytes are punched that belong to no chunk which is journaled, or not
//!    missing.
//!
//! *The journal never lists a punched chunk, not even after a crash.* Step 3 follows the sync of step 2, and leaves out
//! the chunks that were written again since step 1. A crash before step 3 leaves the bytes of chunks that are not
//! listed, which is harmless.
//!
//! *No chunk that was written is punched.* A writer holds the write gate from before its write until the chunk is
//! journaled and ready. So in step 3, each write has either ended, and its chunk is left out, or has not begun. Only a
//! write ends the state [`ChunkState::Missing`]; so what is punched is missing, and stays so until it is written again.
//!
//! *A reader copies a ready chunk from the file, and checks afterwards that the epoch is the one in which the chunk was
//! ready* ([`CachedBlob::is_epoch`]), as in a seqlock. If its copy contains punched bytes, then step 3 began before the
//! copy ended, hence step 1 was over, and the reader sees the new epoch. It then looks at the state again.
//! All other readers of the file hash what they have read. If it was punched meanwhile, it does not match, and the
//! chunk is fetched. [`CachedBlob::mark_verified`] does not make a missing chunk ready: it may have been hashed before
//! it was punched.

use std::{
    collections::HashMap,
    fs::File,
    io,
    os::unix::fs::MetadataExt as _,
    sync::{Arc, atomic::Ordering},
};

use rustix::fs::FallocateFlags;

use super::{
    cache::{CachedBlob, ChunkState},
    cache_dir::CacheDir,
    chunk_journal::JournaledChunk,
};

/// Uncompressed bytes that are evicted at a time: writers of the blob wait meanwhile.
const BATCH_BYTES: u64 = 64 << 20;
/// Maximum number of rounds of a pass. A round may free less than expected, where chunks share blocks.
const MAX_ROUNDS: usize = 4;

/// A piece of the cache that can be evicted.
struct Candidate {
    last_use: u64,
    bytes: u64,
    piece: Piece,
}

enum Piece {
    /// A blob that no image in use has.
    Blob(String),
    /// A region of the open blob at this position.
    Region(usize, usize),
}

impl CacheDir {
    /// Evicts the least recently used pieces until the low watermark is reached. Returns at once if it is, for example
    /// after another thread has done it.
    pub(super) fn evict_to_low_watermark(&self) {
        let _one_at_a_time = self.pass.lock();
        let before = self.budget().used();
        for _ in 0..MAX_ROUNDS {
            let excess = self.budget().used().saturating_sub(self.budget().low_watermark());
            if excess == 0 {
                break;
            }
            match self.evict(excess) {
                Ok(true) => {}
                Ok(false) => break,
                Err(error) => {
                    if let Some(suppressed) = self.eviction_log.permit() {
                        tracing::error!(suppressed, %error, "failed to evict from blob cache; check the disk");
                    }
                    break;
                }
            }
        }
        let freed = before.saturating_sub(self.budget().used());
        if freed > 0 {
            self.counters().record_eviction(freed);
            tracing::debug!(freed, used = self.budget().used(), "evicted from blob cache");
        }
    }

    /// Evicts the least recently used pieces of about so many bytes. Returns whether there were any.
    fn evict(&self, excess: u64) -> io::Result<bool> {
        let open: Vec<_> = self.open_blobs().into_iter().filter(|blob| blob.may_evict()).collect();
        let mut candidates = self.candidates(&open);
        candidates.sort_by_key(|candidate| candidate.last_use);
        let mut left = excess;
        let chosen = candidates.into_iter().take_while(|candidate| {
            let is_needed = left > 0;
            left = left.saturating_sub(candidate.bytes);
            is_needed
        });
        let (mut is_any, mut regions) = (false, HashMap::<usize, HashMap<usize, u64>>::new());
        for Candidate { last_use, piece, .. } in chosen {
            is_any = true;
            match piece {
                Piece::Blob(name) => _ = self.remove_closed(&name)?,
                Piece::Region(blob, region) => _ = regions.entry(blob).or_default().insert(region, last_use),
            }
        }
        for (blob, regions) in regions {
            let blob = &open[blob];
            let is_cold = |chunk: &JournaledChunk| {
                let region = blob.uses.region(chunk.start);
                // Not if the region was used since it was chosen.
                regions.get(&region) == Some(&blob.uses.last_use(region))
            };
            let evicted = blob.evict(is_cold);
            if let Err(error) = &evicted
                && error.kind() == io::ErrorKind::Unsupported
            {
                self.can_punch.store(false, Ordering::Relaxed);
            }
            evicted?;
        }
        Ok(is_any)
    }

    fn candidates(&self, open: &[Arc<CachedBlob>]) -> Vec<Candidate> {
        let closed = self.closed_blobs().into_iter();
        let closed = closed.map(|(name, bytes, last_use)| Candidate {
            last_use,
            bytes,
            piece: Piece::Blob(name),
        });
        let mut candidates: Vec<_> = closed.collect();
        if !self.can_punch.load(Ordering::Relaxed) {
            return candidates;
        }
        for (position, blob) in open.iter().enumerate() {
            let mut regions = HashMap::<usize, u64>::new();
            for chunk in blob.journal.lock().chunks() {
                *regions.entry(blob.uses.region(chunk.start)).or_default() += chunk.end - chunk.start;
            }
            candidates.extend(regions.into_iter().map(|(region, bytes)| Candidate {
                last_use: blob.uses.last_use(region),
                bytes,
                piece: Piece::Region(position, region),
            }));
        }
        candidates
    }
}

impl CachedBlob {
    fn may_evict(&self) -> bool {
        self.holds.load(Ordering::SeqCst) == 0 && !self.dir.is_pinned(self.name())
    }

    /// Evicts the journaled chunks that `is_victim` selects, unless the blob is held.
    ///
    /// # Errors
    /// If the journal cannot be written, or bytes cannot be released. Either way, the chunks are missing from then on.
    pub(super) fn evict(&self, is_victim: impl Fn(&JournaledChunk) -> bool) -> io::Result<()> {
        let _evicting = self.evicting.lock();
        if self.holds.load(Ordering::SeqCst) > 0 {
            return Ok(());
        }
        let mut victims: Vec<_> = self.journal.lock().chunks().filter(is_victim).collect();
        victims.sort_unstable_by_key(|chunk| chunk.start);
        while !victims.is_empty() {
            let mut bytes = 0;
            let fits = |chunk: &&JournaledChunk| {
                bytes += chunk.end - chunk.start;
                bytes <= BATCH_BYTES
            };
            let count = victims.iter().take_while(fits).count().max(1);
            let batch: Vec<_> = victims.drain(..count).collect();
            self.forget(&batch)?;
            self.sync_journal()?;
            self.punch(&batch)?;
        }
        Ok(())
    }

    /// The first step.
    fn forget(&self, victims: &[JournaledChunk]) -> io::Result<()> {
        let _no_writes = self.write_gate.write();
        let (mut journal, mut chunks) = (self.journal.lock(), self.chunks.lock());
        self.next_epoch();
        for chunk in victims {
            journal.remove(chunk.index)?;
            chunks.on_evicted(chunk);
        }
        journal.shrink()
    }

    /// The third step.
    fn punch(&self, victims: &[JournaledChunk]) -> io::Result<()> {
        let _no_writes = self.write_gate.write();
        let journal = self.journal.lock();
        let mut kept: Vec<_> = journal.chunks().map(|chunk| (chunk.start, chunk.end)).collect();
        {
            let chunks = self.chunks.lock();
            let present = chunks
                .by_index
                .values()
                .filter(|(_, state)| *state != ChunkState::Missing);
            kept.extend(present.map(|(chunk, _)| {
                let start = chunk.uncompressed_offset;
                (start, start + u64::from(chunk.uncompressed_size))
            }));
        }
        kept.sort_unstable();
        let victims = victims.iter().map(|chunk| (chunk.start, chunk.end));
        let block = self.data.metadata()?.blksize().max(1);
        let punched = ranges_to_punch(victims, &kept, block)
            .into_iter()
            .try_for_each(|range| punch_hole(&self.data, range));
        self.update_usage(&journal);
        punched
    }
}

/// The ranges of `victims`, extended to whole blocks, without what `kept` contains. Both are sorted; ranges are start
/// and end.
fn ranges_to_punch(victims: impl Iterator<Item = (u64, u64)>, kept: &[(u64, u64)], block: u64) -> Vec<(u64, u64)> {
    let mut merged: Vec<(u64, u64)> = Vec::new();
    for (start, end) in victims {
        let start = start / block * block;
        let end = end.checked_next_multiple_of(block).unwrap_or(end);
        match merged.last_mut() {
            Some((_, last_end)) if start <= *last_end => *last_end = end.max(*last_end),
            _ => merged.push((start, end)),
        }
    }
    let mut kept = kept.iter().peekable();
    let mut ranges = Vec::new();
    for (mut start, end) in merged {
        while kept.next_if(|(_, kept_end)| *kept_end <= start).is_some() {}
        let mut overlapping = kept.clone();
        while let Some((kept_start, kept_end)) = overlapping.next_if(|(kept_start, _)| *kept_start < end) {
            if *kept_start > start {
                ranges.push((start, *kept_start));
            }
            start = start.max(*kept_end);
        }
        if start < end {
            ranges.push((start, end));
        }
    }
    ranges
}

fn punch_hole(file: &File, (start, end): (u64, u64)) -> io::Result<()> {
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    let len = end.min(i64::MAX as u64).saturating_sub(start);
    if len == 0 {
        return Ok(());
    }
    rustix::fs::fallocate(file, flags, start, len).map_err(io::Error::from)
}

#[cfg(test)]
mod tests;
