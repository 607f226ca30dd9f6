//! `nydus-store bench fetch`: measures fetching an image's chunks.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use anyhow::Context as _;
use clap::{Args, builder::RangedU64ValueParser};
use serde_json::{Value, json};

use super::{
    super::{ConfigArg, RootArg, mount::Workspace, runtime},
    bytes,
    output::{OutputArgs, ensure_any_succeeded},
    progress::ProgressDisplay,
    seconds, stop_on_signals,
};
use crate::{
    bench::{
        fetch::{self, FetchProgress, FetchRun, Fetcher},
        order::FetchOrder,
        report::{BenchKind, BenchReport, Row, Subject},
        stop::StopSignal,
        workload::{FetchRequest, RequestSize, Workload},
    },
    config::Config,
    humanize::{megabytes, size, time},
    image::{loaded::LoadedImage, reference::Reference, resolve::Images},
    registry::{self, Client, Repository},
};

/// Maximum length of a run without `--duration` and `--bytes`.
const DEFAULT_DURATION: Duration = Duration::from_secs(10);
/// Default of `--seed`; constant, so that runs are comparable.
const DEFAULT_SEED: u64 = 1;

/// Measure fetching an image's chunks, with the time of each step
#[derive(Debug, Args)]
pub(super) struct BenchFetchCommand {
    /// Nydus image in a registry
    #[arg(value_name = "REF")]
    reference: Reference,

    /// Concurrent requests, 1 to 1024; one run for each number
    #[arg(long, value_name = "N", value_delimiter = ',', default_value = "8",
          value_parser = RangedU64ValueParser::<usize>::new().range(1..=1024))]
    concurrency: Vec<usize>,

    /// Request size: `chunk`, or the most bytes of adjacent chunks (4K to 64M); one run for each
    #[arg(long, value_name = "SIZE", value_delimiter = ',', default_value = "chunk")]
    request_size: Vec<RequestSize>,

    /// Order of requests: seq (as stored), random, or trace:FILE (output of `trace export`)
    #[arg(long, default_value = "seq")]
    order: FetchOrder,

    /// Seed of the random order
    #[arg(long, value_name = "N", default_value_t = DEFAULT_SEED)]
    seed: u64,

    /// Length of each run in seconds, repeating the image [default: the image once, 10 at most]
    #[arg(long, value_name = "SECS", value_parser = seconds)]
    duration: Option<Duration>,

    /// Compressed bytes to fetch in each run (4096, 64K, 1M, 2G), repeating the image
    #[arg(long, value_name = "SIZE", value_parser = bytes)]
    bytes: Option<u64>,

    /// Fetch from another registry or mirror; PATH precedes the repository's name there
    #[arg(long, visible_alias = "mirror", value_name = "HOST[/PATH]")]
    from: Option<String>,

    /// Write chunks to the cache of --root; fetches the whole image once, unless limited
    #[arg(long)]
    fill: bool,

    #[command(flatten)]
    output: OutputArgs,

    #[command(flatten)]
    root: RootArg,

    #[command(flatten)]
    config: ConfigArg,
}

impl BenchFetchCommand {
    pub(super) fn run(&self) -> anyhow::Result<()> {
        if self.fill && self.concurrency.len() * self.request_size.len() > 1 {
            let message = "--fill allows a single run: later runs would have nothing to write";
            clap::Error::raw(clap::error::ErrorKind::ArgumentConflict, format!("{message}\n")).exit();
        }
        let output = self.output.open(BenchKind::Fetch)?;
        let config = self.config.load()?;
        let workspace = Workspace::open(self.fill.then_some(self.root.root.as_path()))?;
        let runtime = runtime()?;
        let stop = stop_on_signals(runtime.handle())?;
        let measured = runtime.block_on(self.measure(&config, &workspace, stop));
        // Cancelled requests may still be in flight.
        runtime.shutdown_background();
        let report = measured?;
        output.show(&report)?;
        ensure_any_succeeded(&report)
    }

    async fn measure(
        &self,
        config: &Config,
        workspace: &Workspace,
        mut stop: StopSignal,
    ) -> anyhow::Result<BenchReport> {
        let client = Client::new(config.registry_options())?;
        let images = Images::open(workspace.path(), client, config.limits())?;
        let prepared = tokio::select! {
            prepared = self.prepare(&images) => prepared,
            () = stop.requested() => anyhow::bail!("interrupted before the first measurement"),
        };
        let (image, workload) = prepared?;
        let repository = self.repository();
        let mut report = BenchReport::new(BenchKind::Fetch, self.subject(&image, &repository), self.settings());
        let mut display = ProgressDisplay::new();
        for request_size in &self.request_size {
            let requests = Arc::new(workload.requests(*request_size, &self.order, self.seed)?);
            for concurrency in &self.concurrency {
                if stop.is_requested() {
                    break;
                }
                let run = self.run_settings(&requests, *request_size, *concurrency);
                let fetcher = Fetcher {
                    // Each run has its own connections and tokens, limited by `--concurrency` alone.
                    client: Client::new(registry::Options {
                        max_requests_per_host: *concurrency,
                        ..config.registry_options()
                    })?,
                    repository: repository.clone(),
                    workload: Arc::clone(&workload),
                    fill: self.fill,
                };
                report
                    .rows
                    .push(execute_run(fetcher, run, &mut stop, &mut display).await);
            }
        }
        if self.fill {
            for (_, units) in &workload.blobs {
                units.sync().await?;
            }
        }
        Ok(report)
    }

    async fn prepare(&self, images: &Images) -> anyhow::Result<(Arc<LoadedImage>, Arc<Workload>)> {
        let cannot = || format!("cannot use {}", self.reference);
        let image = images.resolve(&self.reference).await.with_context(cannot)?;
        let workload = Workload::from_image(&image).await.with_context(cannot)?;
        Ok((image, Arc::new(workload)))
    }

    fn run_settings(&self, requests: &Arc<Vec<FetchRequest>>, size: RequestSize, concurrency: usize) -> FetchRun {
        let unbounded = self.duration.is_none() && self.bytes.is_none();
        FetchRun {
            requests: Arc::clone(requests),
            size,
            concurrency,
            duration: self.duration.or((unbounded && !self.fill).then_some(DEFAULT_DURATION)),
            bytes: self.bytes,
            repeat: !unbounded && !self.fill,
        }
    }

    /// The repository to fetch from: the image's own, or that of `--from`.
    fn repository(&self) -> Repository {
        let own = self.reference.repository();
        let Some(from) = &self.from else { return own };
        match from.trim_end_matches('/').split_once('/') {
            Some((host, path)) => Repository::new(host, format!("{path}/{}", own.name)),
            None => Repository::new(from.trim_end_matches('/'), own.name),
        }
    }

    fn subject(&self, image: &LoadedImage, repository: &Repository) -> Subject {
        Subject {
            name: self.reference.to_string(),
            image: Some(image.digest),
            from: Some(repository.to_string()),
            file_system: None,
        }
    }

    fn settings(&self) -> BTreeMap<String, Value> {
        let seed = (self.order == FetchOrder::Random).then_some(self.seed);
        let settings = json!({
            "order": self.order.to_string(),
            "seed": seed,
            "duration": self.duration.map(|duration| duration.as_secs_f64()),
            "bytes": self.bytes,
            "fill": self.fill,
        });
        serde_json::from_value(settings).unwrap_or_default()
    }
}

async fn execute_run(fetcher: Fetcher, run: FetchRun, stop: &mut StopSignal, display: &mut ProgressDisplay) -> Row {
    display.begin(&format!("{} × {}", run.concurrency, run.size));
    let show = |progress: FetchProgress| {
        let FetchProgress {
            share,
            bytes,
            elapsed,
            median,
            failed,
        } = progress;
        display.show(share, || {
            let rate = megabytes(bytes as f64 / elapsed.as_secs_f64().max(0.001));
            format!("{}, {rate} MB/s, median {}, {failed} failed", size(bytes), time(median))
        });
    };
    fetch::run(fetcher, run, stop, show).await
}
