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
    jobs::{self, Event, Job, RootContext, control::RemoteJob},
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
enum EventSource {
    Local(mpsc::Receiver<Event>),
    Daemon(RemoteJob),
}

impl EventSource {
    async fn next(&mut self) -> anyhow::Result<Event> {
        match self {
            Self::Local(events) => events.recv().await.context("the job ended unexpectedly"),
            Self::Daemon(job) => job.next().await,
        }
    }
}

/// Runs `job` and shows its events until it ends or a signal interrupts it.
pub(super) fn run(job: Job, root: &RootArg, config: &ConfigArg, show: &mut impl JobOutput) -> anyhow::Result<()> {
    let config = config.load()?;
    let lock = RootLock::try_take(&root.root)?;
    let runtime = runtime()?;
    let outcome = runtime.block_on(async {
        let running = match &lock {
            Ok(_) => EventSource::Local(start_locally(job, &root.root, &config)?),
            Err(holder) => EventSource::Daemon(RemoteJob::run(&root.root, &job).await.with_context(|| {
                format!(
                    "process {holder} is using {}; if it is not a daemon, wait until it ends",
                    root.root.display()
                )
            })?),
        };
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
    let root = RootContext {
        images: Arc::new(images),
        store: Arc::new(ImageStore::open(root, &config.store.graph_roots)?),
    };
    Ok(jobs::start(job, root, Arc::<BulkLimits>::default()))
}

async fn show_events(mut running: EventSource, show: &mut impl JobOutput) -> anyhow::Result<()> {
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
