//! Notes in which order an image's chunks are first needed on this host.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
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
pub struct Needs {
    image: Digest,
    blobs: Vec<Arc<BlobLayout>>,
    traces: Arc<Traces>,
    /// What earlier starts needed.
    earlier: Trace,
    /// Nothing is noted any more.
    over: AtomicBool,
    noted: Mutex<Noted>,
}

#[derive(Default)]
struct Noted {
    /// Number of the blob and position in its layout, in order of need.
    chunks: Vec<(u16, u32)>,
    bytes: u64,
    since: Option<Instant>,
    /// How many of the chunks are on disk.
    saved: usize,
}

impl Needs {
    /// Notes what is needed of `image`, whose blobs are `blobs`, for `traces`, after `earlier`.
    pub fn new(image: Digest, blobs: Vec<Arc<BlobLayout>>, traces: Arc<Traces>, earlier: Option<Trace>) -> Arc<Self> {
        let parts = Vec::new();
        Arc::new(Self {
            image,
            blobs,
            traces,
            earlier: earlier.unwrap_or(Trace { image, parts }),
            over: AtomicBool::new(false),
            noted: Mutex::default(),
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
        let needs = Arc::downgrade(self);
        runtime.spawn(async move {
            loop {
                tokio::time::sleep(SAVE_EVERY).await;
                let Some(needs) = needs.upgrade() else { return };
                let is_over = needs.over.load(Ordering::Relaxed);
                tokio::task::spawn_blocking(move || needs.save()).await.ok();
                if is_over {
                    return;
                }
            }
        });
    }

    /// Writes to disk what was noted and is not there yet. That it cannot be is logged, and no harm.
    pub fn save(&self) {
        let chunks = {
            let mut noted = self.noted.lock();
            if noted.saved == noted.chunks.len() {
                return;
            }
            noted.saved = noted.chunks.len();
            noted.chunks.clone()
        };
        let trace = self.trace(&chunks).after(self.earlier.clone());
        if let Err(error) = self.traces.put(&trace) {
            tracing::warn!(image = %self.image, %error, "cannot keep which chunks the image's start needs");
        }
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

impl Drop for Needs {
    fn drop(&mut self) {
        self.save();
    }
}
