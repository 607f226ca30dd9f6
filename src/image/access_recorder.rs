//! Notes in which order an image's chunks are first needed on this host.

use std::{
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use tokio::runtime::Handle;

use super::trace::{MOST_CHUNKS, Part, Trace, Traces};
use crate::{blob::layout::BlobLayout, digest::Digest};

/// For how long after the first need it is noted what is needed: a start, and not what a program does later.
const START: Duration = Duration::from_secs(60);
/// Uncompressed bytes that belong to a start at most.
const MOST_BYTES: u64 = 512 << 20;
/// How often what was noted is written to disk.
const SAVE_EVERY: Duration = Duration::from_secs(5);

/// The chunks that were needed since the image was loaded.
pub struct AccessRecorder {
    image: Digest,
    blobs: Vec<Arc<BlobLayout>>,
    /// Nothing is noted any more.
    over: AtomicBool,
    noted: Mutex<Noted>,
    saved: Arc<Saved>,
    runtime: OnceLock<Handle>,
}

/// What is on disk.
struct Saved {
    traces: Arc<Traces>,
    /// How many of the chunks noted are there. Not under the lock, since that is held while the disk is written to.
    chunks: AtomicUsize,
    trace: Mutex<SavedTrace>,
}

struct SavedTrace {
    /// What others needed.
    others: Trace,
    /// What was written last.
    written: Option<Trace>,
}

#[derive(Default)]
struct Noted {
    /// Number of the blob and position in its layout, in order of need.
    chunks: Vec<(u16, u32)>,
    bytes: u64,
    since: Option<Instant>,
}

impl AccessRecorder {
    /// Notes what is needed of `image`, whose blobs are `blobs`, for `traces`, after `earlier`.
    pub fn new(image: Digest, blobs: Vec<Arc<BlobLayout>>, traces: Arc<Traces>, earlier: Option<Trace>) -> Arc<Self> {
        let parts = Vec::new();
        let trace = SavedTrace {
            // On disk it is as it was, so that only who needs something changes anything.
            written: earlier.clone(),
            others: earlier.unwrap_or(Trace { image, parts }).aged(),
        };
        let saved = Saved {
            traces,
            chunks: AtomicUsize::new(0),
            trace: Mutex::new(trace),
        };
        Arc::new(Self {
            image,
            blobs,
            over: AtomicBool::new(false),
            noted: Mutex::default(),
            saved: Arc::new(saved),
            runtime: OnceLock::new(),
        })
    }

    /// The chunk at position `chunk` of blob `blob` is needed for the first time.
    pub fn note(&self, blob: usize, chunk: usize) {
        if self.over.load(Ordering::Relaxed) {
            return;
        }
        let mut noted = self.noted.lock();
        let since = *noted.since.get_or_insert_with(Instant::now);
        let size = u64::from(self.blobs[blob].chunks[chunk].uncompressed_size);
        if noted.chunks.len() == MOST_CHUNKS || noted.bytes + size > MOST_BYTES || since.elapsed() > START {
            self.over.store(true, Ordering::Relaxed);
            return;
        }
        noted.bytes += size;
        // As the tree has them.
        noted.chunks.push((blob as u16, chunk as u32));
    }

    /// Saves what is noted, now and then, on `runtime`.
    pub fn save_regularly(self: &Arc<Self>, runtime: &Handle) {
        // A second time is none.
        self.runtime.set(runtime.clone()).ok();
        let needs = Arc::downgrade(self);
        runtime.spawn(async move {
            loop {
                tokio::time::sleep(SAVE_EVERY).await;
                let Some(needs) = needs.upgrade() else { return };
                let is_over = needs.is_over();
                tokio::task::spawn_blocking(move || needs.save()).await.ok();
                if is_over {
                    return;
                }
            }
        });
    }

    fn is_over(&self) -> bool {
        let since = self.noted.lock().since;
        self.over.load(Ordering::Relaxed) || since.is_some_and(|since| since.elapsed() > START)
    }

    /// Writes to disk what was noted and is not there yet. That it cannot be is logged, and no harm.
    pub fn save(&self) {
        if let Some(unsaved) = self.unsaved() {
            unsaved.write();
        }
    }

    /// What is not on disk yet, if there is something.
    fn unsaved(&self) -> Option<Unsaved> {
        let saved = self.saved.chunks.load(Ordering::Acquire);
        let chunks = {
            let noted = self.noted.lock();
            (noted.chunks.len() > saved).then(|| noted.chunks.clone())?
        };
        Some(Unsaved {
            chunks: chunks.len(),
            trace: self.trace(&chunks),
            saved: Arc::clone(&self.saved),
        })
    }

    fn trace(&self, chunks: &[(u16, u32)]) -> Trace {
        let mut parts: Vec<Part> = Vec::new();
        for (blob, position) in chunks {
            let layout = &self.blobs[usize::from(*blob)];
            let chunk = layout.chunks[*position as usize].index;
            match parts.last_mut() {
                Some(last) if last.blob == layout.id => last.chunks.push(chunk),
                _ => parts.push(Part {
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

/// What is to be written to disk.
struct Unsaved {
    chunks: usize,
    trace: Trace,
    saved: Arc<Saved>,
}

impl Unsaved {
    fn write(self) {
        let Saved { traces, chunks, trace } = &*self.saved;
        let mut saved = trace.lock();
        // Somebody may have saved more in the meantime.
        if chunks.load(Ordering::Acquire) >= self.chunks {
            return;
        }
        let image = self.trace.image;
        // And somebody else may have put a trace there: an import, or another name of the image.
        if let Ok(Some(there)) = traces.get(&image)
            && saved.written.as_ref() != Some(&there)
        {
            saved.others = there;
        }
        let trace = self.trace.and_then(saved.others.clone());
        match traces.put(&trace) {
            Ok(()) => {
                saved.written = Some(trace);
                chunks.store(self.chunks, Ordering::Release);
            }
            Err(error) => tracing::warn!(%image, %error, "cannot keep which chunks the image's start needs"),
        }
    }
}

impl Drop for AccessRecorder {
    fn drop(&mut self) {
        let Some(unsaved) = self.unsaved() else { return };
        // Who drops it may be one who serves files.
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
    fn what_is_needed_comes_first_and_what_others_put_there_stays() {
        let dir = tempfile::tempdir().unwrap();
        let traces = Arc::new(Traces::open(dir.path()).unwrap());
        let first = start(&traces);
        [7, 3].into_iter().for_each(|chunk| first.note(0, chunk));
        first.save();
        assert_eq!(chunks(&traces), [7, 3]);
        // Somebody imports a trace meanwhile.
        let imported = Trace {
            image: Digest::of(b"image"),
            parts: vec![Part {
                blob: blob().id.clone(),
                chunks: vec![100, 3],
                unused: 0,
            }],
        };
        traces.put(&imported).unwrap();
        first.note(0, 8);
        // The last ones, when the image is dropped.
        drop(first);
        assert_eq!(chunks(&traces), [7, 3, 8, 100]);
        let second = start(&traces);
        [8, 9].into_iter().for_each(|chunk| second.note(0, chunk));
        drop(second);
        assert_eq!(chunks(&traces), [8, 9, 7, 3, 100]);
        // Who needs nothing changes nothing.
        for _ in 0..10 {
            drop(start(&traces));
        }
        assert_eq!(chunks(&traces), [8, 9, 7, 3, 100]);
    }

    #[test]
    fn a_start_has_an_end() {
        let dir = tempfile::tempdir().unwrap();
        let traces = Arc::new(Traces::open(dir.path()).unwrap());
        let needs = start(&traces);
        (0..1000).for_each(|chunk| needs.note(0, chunk));
        drop(needs);
        assert_eq!(chunks(&traces).len() as u64, MOST_BYTES >> 20);
    }
}
