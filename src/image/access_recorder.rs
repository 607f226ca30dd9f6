//! Records the order in which an image's chunks are first needed on this host.

use std::{
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use tokio::runtime::Handle;

use super::trace::{MAX_TRACE_CHUNKS, Trace, TracePart, Traces};
use crate::{blob::layout::BlobLayout, digest::Digest};

/// How long accesses are recorded after the first one. Later accesses are not part of the program's start.
const MAX_START: Duration = Duration::from_secs(60);
/// Maximum uncompressed bytes of a recorded start.
const MAX_RECORDED_BYTES: u64 = 512 << 20;
/// Interval between writes to disk.
const SAVE_INTERVAL: Duration = Duration::from_secs(5);

/// Records the first access to each chunk since the image was loaded.
pub struct AccessRecorder {
    image: Digest,
    blobs: Vec<Arc<BlobLayout>>,
    /// Recording has ended.
    is_over: AtomicBool,
    recorded: Mutex<Recorded>,
    saved: Arc<Saved>,
    runtime: OnceLock<Handle>,
}

/// State of the trace on disk.
struct Saved {
    traces: Arc<Traces>,
    /// Number of recorded chunks in the file. Atomic, because the lock is held while the file is written.
    chunks: AtomicUsize,
    trace: Mutex<SavedTrace>,
}

struct SavedTrace {
    /// Chunks of earlier starts or of an imported trace, which follow the recorded ones.
    rest: Trace,
    /// The trace as written last.
    written: Option<Trace>,
}

#[derive(Default)]
struct Recorded {
    /// Index of the blob and position in its layout, in order of access.
    chunks: Vec<(u16, u32)>,
    bytes: u64,
    since: Option<Instant>,
}

impl AccessRecorder {
    /// Records accesses to `image`, whose blobs are `blobs`. Saves to `traces`; `earlier` is the trace stored there.
    pub fn new(image: Digest, blobs: Vec<Arc<BlobLayout>>, traces: Arc<Traces>, earlier: Option<Trace>) -> Arc<Self> {
        let parts = Vec::new();
        let trace = SavedTrace {
            // As stored, so that the file changes only if something is recorded.
            written: earlier.clone(),
            rest: earlier.unwrap_or(Trace { image, parts }).aged(),
        };
        let saved = Saved {
            traces,
            chunks: AtomicUsize::new(0),
            trace: Mutex::new(trace),
        };
        Arc::new(Self {
            image,
            blobs,
            is_over: AtomicBool::new(false),
            recorded: Mutex::default(),
            saved: Arc::new(saved),
            runtime: OnceLock::new(),
        })
    }

    /// Records the first access to the chunk at position `chunk` of blob `blob`.
    pub fn record(&self, blob: usize, chunk: usize) {
        if self.is_over.load(Ordering::Relaxed) {
            return;
        }
        let mut recorded = self.recorded.lock();
        let since = *recorded.since.get_or_insert_with(Instant::now);
        let size = u64::from(self.blobs[blob].chunks[chunk].uncompressed_size);
        if recorded.chunks.len() == MAX_TRACE_CHUNKS
            || recorded.bytes + size > MAX_RECORDED_BYTES
            || since.elapsed() > MAX_START
        {
            self.is_over.store(true, Ordering::Relaxed);
            return;
        }
        recorded.bytes += size;
        // The tree uses the same widths.
        recorded.chunks.push((blob as u16, chunk as u32));
    }

    /// Saves in regular intervals on `runtime`, until recording ends.
    pub fn save_regularly(self: &Arc<Self>, runtime: &Handle) {
        // Later calls have no effect.
        self.runtime.set(runtime.clone()).ok();
        let recorder = Arc::downgrade(self);
        runtime.spawn(async move {
            loop {
                tokio::time::sleep(SAVE_INTERVAL).await;
                let Some(recorder) = recorder.upgrade() else { return };
                let is_over = recorder.has_ended();
                tokio::task::spawn_blocking(move || recorder.save()).await.ok();
                if is_over {
                    return;
                }
            }
        });
    }

    fn has_ended(&self) -> bool {
        let since = self.recorded.lock().since;
        self.is_over.load(Ordering::Relaxed) || since.is_some_and(|since| since.elapsed() > MAX_START)
    }

    /// Writes new accesses to disk. A failure is logged and harmless.
    pub fn save(&self) {
        if let Some(unsaved) = self.unsaved() {
            unsaved.write();
        }
    }

    /// Accesses that are not on disk yet, if any.
    fn unsaved(&self) -> Option<Unsaved> {
        let saved = self.saved.chunks.load(Ordering::Acquire);
        let chunks = {
            let recorded = self.recorded.lock();
            (recorded.chunks.len() > saved).then(|| recorded.chunks.clone())?
        };
        Some(Unsaved {
            chunks: chunks.len(),
            trace: self.trace(&chunks),
            saved: Arc::clone(&self.saved),
        })
    }

    fn trace(&self, chunks: &[(u16, u32)]) -> Trace {
        let mut parts: Vec<TracePart> = Vec::new();
        for (blob, position) in chunks {
            let layout = &self.blobs[usize::from(*blob)];
            let chunk = layout.chunks[*position as usize].index;
            match parts.last_mut() {
                Some(last) if last.blob == layout.id => last.chunks.push(chunk),
                _ => parts.push(TracePart {
                    blob: layout.id.clone(),
                    chunks: vec![chunk],
                    unused: 0,
                }),
            }
        }
        let image = self.image;
        Trace { image, parts }
    }
}

/// Accesses to be written to disk.
struct Unsaved {
    chunks: usize,
    trace: Trace,
    saved: Arc<Saved>,
}

impl Unsaved {
    fn write(self) {
        let Saved { traces, chunks, trace } = &*self.saved;
        let mut saved = trace.lock();
        // Another task may have saved more in the meantime.
        if chunks.load(Ordering::Acquire) >= self.chunks {
            return;
        }
        let image = self.trace.image;
        // The file may have been replaced: by an import, or through another reference to the image.
        if let Ok(Some(there)) = traces.get(&image)
            && saved.written.as_ref() != Some(&there)
        {
            saved.rest = there;
        }
        let trace = self.trace.append_missing(saved.rest.clone());
        match traces.put(&trace) {
            Ok(()) => {
                saved.written = Some(trace);
                chunks.store(self.chunks, Ordering::Release);
            }
            Err(error) => tracing::warn!(manifest = %image, %error, "failed to save trace"),
        }
    }
}

impl Drop for AccessRecorder {
    fn drop(&mut self) {
        let Some(unsaved) = self.unsaved() else { return };
        // Writes on a blocking thread, because the thread that drops this may serve FUSE requests.
        match self.runtime.get() {
            Some(runtime) => drop(runtime.spawn_blocking(|| unsaved.write())),
            None => unsaved.write(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::blob::layout::Chunk;

    fn blob() -> Arc<BlobLayout> {
        let chunk = |index: u32| Chunk {
            index,
            digest: [0; 32],
            compressed_offset: 0,
            compressed_size: 1,
            uncompressed_offset: u64::from(index) << 20,
            uncompressed_size: 1 << 20,
            compressed: false,
        };
        Arc::new(BlobLayout::of_plain((0..1000).map(chunk).collect()))
    }

    fn start(traces: &Arc<Traces>) -> Arc<AccessRecorder> {
        let image = Digest::of(b"image");
        let earlier = traces.get(&image).unwrap();
        AccessRecorder::new(image, vec![blob()], Arc::clone(traces), earlier)
    }

    fn chunks(traces: &Traces) -> Vec<u32> {
        let trace = traces.get(&Digest::of(b"image")).unwrap().unwrap();
        trace.parts.into_iter().flat_map(|part| part.chunks).collect()
    }

    #[test]
    fn recorded_chunks_come_first_and_imported_ones_follow() {
        let dir = tempfile::tempdir().unwrap();
        let traces = Arc::new(Traces::open(dir.path()).unwrap());
        let first = start(&traces);
        [7, 3].into_iter().for_each(|chunk| first.record(0, chunk));
        first.save();
        assert_eq!(chunks(&traces), [7, 3]);
        // A trace is imported meanwhile.
        let imported = Trace {
            image: Digest::of(b"image"),
            parts: vec![TracePart {
                blob: blob().id.clone(),
                chunks: vec![100, 3],
                unused: 0,
            }],
        };
        traces.put(&imported).unwrap();
        first.record(0, 8);
        // Dropping the image saves the last accesses.
        drop(first);
        assert_eq!(chunks(&traces), [7, 3, 8, 100]);
        let second = start(&traces);
        [8, 9].into_iter().for_each(|chunk| second.record(0, chunk));
        drop(second);
        assert_eq!(chunks(&traces), [8, 9, 7, 3, 100]);
        // A start without accesses changes nothing.
        for _ in 0..10 {
            drop(start(&traces));
        }
        assert_eq!(chunks(&traces), [8, 9, 7, 3, 100]);
    }

    #[test]
    fn recording_stops_at_the_size_limit() {
        let dir = tempfile::tempdir().unwrap();
        let traces = Arc::new(Traces::open(dir.path()).unwrap());
        let recorder = start(&traces);
        (0..1000).for_each(|chunk| recorder.record(0, chunk));
        drop(recorder);
        assert_eq!(chunks(&traces).len() as u64, MAX_RECORDED_BYTES >> 20);
    }
}
