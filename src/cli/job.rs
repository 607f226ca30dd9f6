//! Has a job done: by the daemon that holds the root, or else by this process.

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

/// Shows what happens in a job.
pub(super) trait Show {
    /// Shows an event.
    fn show(&mut self, event: Event);
    /// Takes away what is on the terminal only for now.
    fn clear(&mut self);
}

/// Where the events come from.
enum Running {
    Here(mpsc::Receiver<Event>),
    InDaemon(RemoteJob),
}

impl Running {
    async fn next(&mut self) -> anyhow::Result<Event> {
        match self {
            Self::Here(events) => events.recv().await.context("the work broke off"),
            Self::InDaemon(job) => job.next().await,
        }
    }
}

/// Has `job` done and its events shown.
pub(super) fn run(job: Job, root: &RootArg, config: &ConfigArg, show: &mut impl Show) -> anyhow::Result<()> {
    let config = config.load()?;
    let lock = RootLock::try_take(&root.root)?;
    let runtime = runtime()?;
    let outcome = runtime.block_on(async {
        let running = match &lock {
            Ok(_) => Running::Here(here(job, &root.root, &config)?),
            Err(holder) => Running::InDaemon(RemoteJob::run(&root.root, &job).await.with_context(|| {
                format!(
                    "process {holder} is using {}; wait until it has ended, if it is not a daemon",
                    root.root.display()
                )
            })?),
        };
        listen(running, show).await
    });
    show.clear();
    // Whatever is still under way is given up: it can be done again.
    runtime.shutdown_background();
    outcome
}

fn here(job: Job, root: &Path, config: &Config) -> anyhow::Result<mpsc::Receiver<Event>> {
    let client = registry::Client::new(config.registry_options())?;
    let images = Images::open(root, client, config.limits());
    let images = images.with_context(|| format!("cannot prepare {}", root.display()))?;
    let root = RootContext {
        images: Arc::new(images),
        store: Arc::new(ImageStore::open(root, &config.store.graph_roots)?),
    };
    Ok(jobs::start(job, root, Arc::<BulkLimits>::default()))
}

async fn listen(mut running: Running, show: &mut impl Show) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("cannot handle SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot handle SIGINT")?;
    loop {
        tokio::select! {
            event = running.next() => match event? {
                Event::End => return Ok(()),
                event => show.show(event),
            },
            _ = terminate.recv() => anyhow::bail!("interrupted: what was done is kept, and the same command goes on from there"),
            _ = interrupt.recv() => anyhow::bail!("interrupted: what was done is kept, and the same command goes on from there"),
        }
    }
}
