//! Runs a [`Job`] in the daemon that holds the root's lock, or in this process if there is none.

use std::{path::Path, sync::Arc};

use anyhow::Context as _;
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::mpsc,
};

use super::{ConfigArg, RootArg, runtime};
use crate::{
    blob::bulk::BulkLimits,
    config::Config,
    daemon::RootLock,
    image::resolve::Images,
    jobs::{
        self, Event, Job, RootContext,
        control::{ConnectionLost, RemoteJob},
    },
    registry,
    store::image_store::ImageStore,
};

/// Displays a job's events.
pub(super) trait JobOutput {
    /// Displays an event.
    fn show(&mut self, event: Event);
    /// Removes the progress bar from the terminal.
    fn clear(&mut self);
}

/// Where the events come from.
enum EventSource<'a> {
    Local(mpsc::Receiver<Event>),
    Daemon(Box<ResumableJob<'a>>),
}

impl EventSource<'_> {
    async fn next(&mut self) -> anyhow::Result<Event> {
        match self {
            Self::Local(events) => events.recv().await.context("the job ended unexpectedly"),
            Self::Daemon(job) => job.next().await,
        }
    }
}

/// A job in a daemon, which is continued in the next process when the daemon is restarted.
struct ResumableJob<'a> {
    root: &'a Path,
    /// What was left of the job when it was last started.
    job: Job,
    running: RemoteJob,
    /// Parts of `job` that have succeeded or failed.
    done: usize,
}

impl<'a> ResumableJob<'a> {
    /// Has the daemon of `root` run `job`. Returns `None` if no daemon is reachable.
    async fn start(root: &'a Path, job: Job) -> anyhow::Result<Option<Self>> {
        let running = RemoteJob::run(root, &job).await?;
        Ok(running.map(|running| Self {
            root,
            job,
            running,
            done: 0,
        }))
    }

    async fn next(&mut self) -> anyhow::Result<Event> {
        loop {
            match self.running.next().await {
                Err(error) if error.is::<ConnectionLost>() => self.resume(error).await?,
                Ok(event) => {
                    self.done += usize::from(event.is_outcome());
                    return Ok(event);
                }
                Err(error) => return Err(error),
            }
        }
    }

    async fn resume(&mut self, error: anyhow::Error) -> anyhow::Result<()> {
        let Some(rest) = self.job.rest(self.done) else {
            return Err(error);
        };
        match Self::start(self.root, rest).await? {
            Some(resumed) => *self = resumed,
            None => return Err(error),
        }
        Ok(())
    }
}

/// Runs `job` and shows its events until it ends or a signal interrupts it.
pub(super) fn run(job: Job, root: &RootArg, config: &ConfigArg, show: &mut impl JobOutput) -> anyhow::Result<()> {
    let config = config.load()?;
    let runtime = runtime()?;
    let outcome = runtime.block_on(async {
        // A daemon that is being restarted does not hold the lock, but its socket.
        if let Some(running) = ResumableJob::start(&root.root, job.clone()).await? {
            return show_events(EventSource::Daemon(Box::new(running)), show).await;
        }
        let _lock = RootLock::try_take(&root.root)?.map_err(|holder| {
            anyhow::anyhow!(
                "process {holder} is using {}; if it is not a daemon, wait until it ends",
                root.root.display()
            )
        })?;
        let running = EventSource::Local(start_locally(job, &root.root, &config)?);
        show_events(running, show).await
    });
    show.clear();
    // Abandons requests in flight; the job can be run again.
    runtime.shutdown_background();
    outcome
}

fn start_locally(job: Job, root: &Path, config: &Config) -> anyhow::Result<mpsc::Receiver<Event>> {
    let client = registry::Client::new(config.registry_options())?;
    let images = Images::open(root, client, config.limits());
    let images = images.with_context(|| format!("cannot prepare {}", root.display()))?;
    let store = ImageStore::open(root, &config.store.graph_roots)?;
    let root = RootContext::new(Arc::new(images), Arc::new(store));
    Ok(jobs::start(job, root, Arc::<BulkLimits>::default()))
}

async fn show_events(mut running: EventSource<'_>, show: &mut impl JobOutput) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("cannot handle SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot handle SIGINT")?;
    loop {
        tokio::select! {
            event = running.next() => match event? {
                Event::End => return Ok(()),
                event => show.show(event),
            },
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
        }
    }
    anyhow::bail!("interrupted: finished work is kept; run the command again to continue")
}
