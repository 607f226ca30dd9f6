//! Work on a root as a whole: filling its cache beforehand, checking it, and which images are known by name.
//!
//! A [`Job`] is done by the process that holds the root: a running daemon, which takes jobs over its [`control`] socket,
//! or else the command itself. So there is always but one who writes to the cache, and what a job changes is seen by
//! readers at once. Either way a job tells of itself by [`Event`]s, which the command shows.

use std::{path::PathBuf, sync::Arc};

use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

use crate::{
    blob::verify::Bulk,
    image::{
        resolve::Images,
        seed::Seeded,
        verify::{UnknownBlobs, VerifiedImage},
    },
    store::image_store::ImageStore,
};

pub mod announcement;
pub mod control;
mod known;
mod seed;
pub mod source;
mod verify;

pub use known::KnownImage;
use source::SeedSource;

/// What jobs work on: all of a root.
#[derive(Clone)]
pub struct Root {
    /// The images that can be loaded.
    pub images: Arc<Images>,
    /// What of them is published.
    pub store: Arc<ImageStore>,
}

/// What is to be done.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Job {
    /// Fill the cache.
    Preseed(Vec<SeedItem>),
    /// Make images known by name, without fetching their data.
    Pull(Vec<String>),
    /// Tell which images are known by name.
    List,
    /// Forget images by name.
    Remove(Vec<String>),
    /// Hash what is in the cache.
    Verify {
        /// Only these; all that is known if there is none.
        references: Vec<String>,
        /// Drop what is corrupt.
        repair: bool,
    },
}

/// An image to be fetched whole.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SeedItem {
    /// Where it is.
    pub source: SeedSource,
    /// The names to note it under, if not the one it has there.
    pub names: Vec<String>,
}

/// What happened in a job.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Event {
    /// Work on that begins.
    Begin(String),
    /// How far it has come, in bytes.
    Progress {
        /// What is in the cache and verified, uncompressed.
        there: u64,
        /// What there is to be in the end; 0 until it is known.
        total: u64,
        /// What was fetched, stored.
        fetched: u64,
    },
    /// An image is here whole.
    Seeded(Seeded),
    /// An image was made known by name.
    Pulled(KnownImage),
    /// An image is known by name.
    Known(KnownImage),
    /// An image is not known by that name any more.
    Removed(String),
    /// An image was checked.
    VerifiedImage(VerifiedImage),
    /// Cached blobs that could not be checked.
    UnknownBlobs(UnknownBlobs),
    /// Something was not done; the rest of the job is.
    Failed {
        /// What.
        what: String,
        /// Why.
        why: String,
    },
    /// The job is over.
    End,
}

/// Where a job's events go. When nobody listens any more, the job is given up.
pub type Events = mpsc::Sender<Event>;

/// How many events may wait for the listener.
const WAITING: usize = 64;

/// Does `job`; its events come out of what is returned, [`Event::End`] last unless the job broke off.
pub fn start(job: Job, root: Root, bulk: Arc<Bulk>) -> mpsc::Receiver<Event> {
    let (events, listener) = mpsc::channel(WAITING);
    tokio::spawn(async move {
        let nobody = events.clone();
        let work = async {
            match job {
                Job::Preseed(items) => seed::run(items, &root, &bulk, &events).await,
                Job::Pull(references) => known::pull(&references, &root, &events).await,
                Job::List => known::list(&root, &events).await,
                Job::Remove(names) => known::remove(&names, &root, &events).await,
                Job::Verify { references, repair } => {
                    verify::run(&references, repair, &root.images, &bulk, &events).await;
                }
            }
            events.send(Event::End).await.ok();
        };
        tokio::select! {
            () = work => {}
            () = nobody.closed() => tracing::info!("a job was given up, since nobody waits for it any more"),
        }
    });
    listener
}

/// An absolute form of a path, since the daemon's working directory is another.
pub(crate) fn absolute(path: PathBuf) -> PathBuf {
    std::path::absolute(&path).unwrap_or(path)
}
