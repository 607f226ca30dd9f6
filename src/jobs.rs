//! Jobs on a whole root: fill the cache, verify it, clean it up, and register images.
//!
//! A [`Job`] runs in the process that holds the root: a running daemon, which accepts jobs on its [`control`] socket,
//! or else the command itself. So the cache has a single writer, and readers see the changes of a job at once. Either
//! way, the job reports [`Event`]s, which the command displays.

use std::{path::PathBuf, sync::Arc};

use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

use crate::{
    blob::bulk::BulkLimits,
    image::{
        garbage::{Garbage, GarbageOptions},
        resolve::Images,
        seed::Seeded,
        verify::{UnknownBlobs, VerifiedImage},
    },
    store::image_store::ImageStore,
};

pub mod announcement;
pub mod control;
mod gc;
mod pins;
mod registered;
mod seed;
pub mod source;
pub mod upkeep;
mod verify;

pub use registered::RegisteredImage;
use source::SeedSource;

/// The root that jobs work on.
#[derive(Clone)]
pub struct RootContext {
    /// The images of the root.
    pub images: Arc<Images>,
    /// The published images and layers.
    pub store: Arc<ImageStore>,
}

impl RootContext {
    /// The root with these images and this store. From then on, no pinned data is evicted.
    pub fn new(images: Arc<Images>, store: Arc<ImageStore>) -> Self {
        let root = Self { images, store };
        pins::apply(&root);
        root
    }
}

/// A job.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Job {
    /// Fetches whole images into the cache.
    Preseed(Vec<SeedItem>),
    /// Publishes images by name, without fetching their data.
    Pull(Vec<String>),
    /// Lists the registered images.
    List,
    /// Removes names of images.
    Remove {
        /// The names.
        names: Vec<String>,
        /// Whether an earlier run may have removed the first name.
        is_resumed: bool,
    },
    /// Hashes the content of the cache.
    Verify {
        /// The images to verify; all images in the root if empty.
        references: Vec<String>,
        /// Whether to remove corrupt content.
        repair: bool,
    },
    /// Pins images, or unpins them: pinned data is never evicted.
    Pin {
        /// Names of the images.
        names: Vec<String>,
        /// Whether they are to be pinned.
        is_pinned: bool,
    },
    /// Removes what nothing needs.
    Gc(GarbageOptions),
}

impl Job {
    /// What is left of the job after `done` of its parts have succeeded or failed. `None` if it cannot be continued.
    pub fn rest(&self, done: usize) -> Option<Self> {
        match self {
            Self::Preseed(items) => Some(Self::Preseed(items.get(done..)?.to_vec())),
            Self::Pull(references) => Some(Self::Pull(references.get(done..)?.to_vec())),
            Self::Remove { names, .. } => Some(Self::Remove {
                names: names.get(done..)?.to_vec(),
                is_resumed: true,
            }),
            Self::Pin { names, is_pinned } => Some(Self::Pin {
                names: names.get(done..)?.to_vec(),
                is_pinned: *is_pinned,
            }),
            Self::List | Self::Verify { .. } | Self::Gc(_) => (done == 0).then(|| self.clone()),
        }
    }
}

/// An image to be fetched as a whole.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SeedItem {
    /// Where the image is.
    pub source: SeedSource,
    /// The names to record; if empty, the name in the source.
    pub names: Vec<String>,
}

/// What happened in a job.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Event {
    /// Work on this source or image begins.
    Begin(String),
    /// Progress, in bytes.
    Progress {
        /// Uncompressed bytes that are cached and verified.
        there: u64,
        /// Total uncompressed bytes; 0 until it is known.
        total: u64,
        /// Stored bytes that were fetched.
        fetched: u64,
    },
    /// An image is completely on disk.
    Seeded(Seeded),
    /// An image was published by name.
    Pulled(RegisteredImage),
    /// A registered image.
    Listed(RegisteredImage),
    /// A name was removed.
    Removed(String),
    /// An image was pinned or unpinned.
    Pinned(RegisteredImage),
    /// The job does what was asked, which may not be what is wanted.
    Warning(String),
    /// An image was verified.
    Checked(VerifiedImage),
    /// Cached blobs that could not be verified.
    Unknown(UnknownBlobs),
    /// Unneeded data was removed.
    Collected(Garbage),
    /// A part of the job failed; the rest continues.
    Failed {
        /// The part that failed.
        what: String,
        /// The cause.
        why: String,
    },
    /// The job has ended.
    End,
}

impl Event {
    /// Whether a part of the job has succeeded or failed.
    pub fn is_outcome(&self) -> bool {
        !matches!(self, Self::Begin(_) | Self::Progress { .. } | Self::End)
    }
}

/// Receives the events of a job. Dropping the receiver cancels the job.
pub type Events = mpsc::Sender<Event>;

/// Maximum number of queued events.
const EVENT_QUEUE_LEN: usize = 64;

/// Starts `job`. The result yields its events; [`Event::End`] is the last one unless the job was cancelled.
pub fn start(job: Job, root: RootContext, bulk: Arc<BulkLimits>) -> mpsc::Receiver<Event> {
    let (events, listener) = mpsc::channel(EVENT_QUEUE_LEN);
    tokio::spawn(async move {
        let cancelled = events.clone();
        let work = async {
            match job {
                Job::Preseed(items) => seed::run(items, &root, &bulk, &events).await,
                Job::Pull(references) => registered::pull(&references, &root, &events).await,
                Job::List => registered::list(&root, &events).await,
                Job::Remove { names, is_resumed } => {
                    registered::remove(&names, is_resumed, &root, &events).await;
                }
                Job::Verify { references, repair } => {
                    verify::run(&references, repair, &root.images, &bulk, &events).await;
                }
                Job::Pin { names, is_pinned } => registered::pin(&names, is_pinned, &root, &events).await,
                Job::Gc(options) => gc::run(options, &root, &events).await,
            }
            events.send(Event::End).await.ok();
        };
        tokio::select! {
            () = work => {}
            () = cancelled.closed() => tracing::info!("cancelled job: its client disconnected"),
        }
    });
    listener
}

/// Makes a path absolute, because the daemon has another working directory.
pub(crate) fn absolute(path: PathBuf) -> PathBuf {
    std::path::absolute(&path).unwrap_or(path)
}
