//! `nydus-store bench fetch`

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use anyhow::Context as _;
use clap::{Args, builder::RangedU64ValueParser};
use serde_json::{Value, json};

use super::{
    super::{ConfigArg, RootArg, mount::Workspace, runtime},
    bytes,
    output::{OutputArgs, ensure_some},
    progress::Live,
    seconds, stop_on_signals,
};
use crate::{
    bench::{
        fetch::{self, Fetcher, Progress, Run},
        order::Order,
        report::{Kind, Report, Row, Subject},
        stop::Stop,
        workload::{Request, RequestSize, Workload},
    },
    config::Config,
    humanize::{megabytes, size, time},
    image::{loaded::LoadedImage, reference::Reference, resolve::Images},
    registry::{self, Client, Repository},
};

/// How long a run takes at most, where nothing is said.
const USUAL: Duration = Duration::from_secs(10);
/// The seed, where none is given: the order is to be the same each time.
const SEED: u64 = 1;

/// Fetch the chunks of an image, and tell what takes how long
#[derive(Debug, Args)]
pub(super) struct Fetch {
    /// A Nydus image in a registry
    #[arg(value_name = "REF")]
    reference: Reference,

    /// Requests at a time; several numbers make several runs
    #[arg(long, value_name = "N", value_delimiter = ',', default_value = "8",
          value_parser = RangedU64ValueParser::<usize>::new().range(1..=1024))]
    concurrency: Vec<usize>,

    /// How much to ask for at a time: `chunk` as a reader does, or up to so many bytes of neighbours (64K, 1M, 4M); several make
    /// several runs
    #[arg(long, value_name = "SIZE", value_delimiter = ',', default_value = "chunk")]
    request_size: Vec<RequestSize>,

    /// seq (as they are stored), random, or trace:FILE (as `nydus-store trace export` has recorded it)
    #[arg(long, default_value = "seq")]
    order: Order,

    /// Another random order; the same number gives the same one
    #[arg(long, value_name = "N", default_value_t = SEED)]
    seed: u64,

    /// How long each run is, over and over the image [default: the image once, but 10 seconds at most]
    #[arg(long, value_name = "SECS", value_parser = seconds)]
    duration: Option<Duration>,

    /// How many stored bytes each run fetches, over and over the image
    #[arg(long, value_name = "SIZE", value_parser = bytes)]
    bytes: Option<u64>,

    /// Ask another registry or mirror for the chunks: its host, and the path before the repository's name if there is one
    #[arg(long, visible_alias = "mirror", value_name = "HOST[/PATH]")]
    from: Option<String>,

    /// Keep what is fetched in the cache of --root; the image is fetched once and whole, unless a bound is given
    #[arg(long)]
    fill: bool,

    #[command(flatten)]
    output: OutputArgs,

    #[command(flatten)]
    root: RootArg,

    #[command(flatten)]
    config: ConfigArg,
}

impl Fetch {
    pub(super) fn run(&self) -> anyhow::Result<()> {
        if self.fill && self.concurrency.len() * self.request_size.len() > 1 {
            let message = "--fill goes with one run: after it, nothing would be left to be written";
            clap::Error::raw(clap::error::ErrorKind::ArgumentConflict, format!("{message}\n")).exit();
        }
        let output = self.output.open(Kind::Fetch)?;
        let config = self.config.load()?;
        let workspace = Workspace::open(self.fill.then_some(self.root.root.as_path()))?;
        let runtime = runtime()?;
        let stop = stop_on_signals(runtime.handle())?;
        let measured = runtime.block_on(self.measure(&config, &workspace, stop));
        // Requests that were given up may still be under way.
        runtime.shutdown_background();
        let report = measured?;
        output.show(&report)?;
        ensure_some(&report)
    }

    async fn measure(&self, config: &Config, workspace: &Workspace, mut stop: Stop) -> anyhow::Result<Report> {
        let client = Client::new(config.registry_options())?;
        let images = Images::open(workspace.path(), client, config.limits())?;
        let prepared = tokio::select! {
            prepared = self.prepare(&images) => prepared,
            () = stop.asked() => anyhow::bail!("interrupted before anything was measured"),
        };
        let (image, workload) = prepared?;
        let repository = self.repository();
        let mut report = Report::new(Kind::Fetch, self.subject(&image, &repository), self.settings());
        let mut live = Live::new();
        for request_size in &self.request_size {
            let requests = Arc::new(workload.requests(*request_size, &self.order, self.seed)?);
            for concurrency in &self.concurrency {
                if stop.is_asked() {
                    break;
                }
                let run = self.one(&requests, *request_size, *concurrency);
                let fetcher = Fetcher {
                    // Its own connections and tokens, and no other bound than the one asked for.
                    client: Client::new(registry::Options {
                        max_requests_per_host: *concurrency,
                        ..config.registry_options()
                    })?,
                    repository: repository.clone(),
                    workload: Arc::clone(&workload),
                    fill: self.fill,
                };
                report.rows.push(done(fetcher, run, &mut stop, &mut live).await);
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
        let workload = Workload::of(&image).await.with_context(cannot)?;
        Ok((image, Arc::new(workload)))
    }

    fn one(&self, requests: &Arc<Vec<Request>>, size: RequestSize, concurrency: usize) -> Run {
        let unbounded = self.duration.is_none() && self.bytes.is_none();
        Run {
            requests: Arc::clone(requests),
            size,
            concurrency,
            duration: self.duration.or((unbounded && !self.fill).then_some(USUAL)),
            bytes: self.bytes,
            again: !unbounded && !self.fill,
        }
    }

    /// Where the chunks come from.
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
        let seed = (self.order == Order::Random).then_some(self.seed);
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

async fn done(fetcher: Fetcher, run: Run, stop: &mut Stop, live: &mut Live) -> Row {
    live.begin(&format!("{} × {}", run.concurrency, run.size));
    let show = |progress: Progress| {
        let Progress {
            share,
            bytes,
            elapsed,
            median,
            failed,
        } = progress;
        live.show(share, || {
            let rate = megabytes(bytes as f64 / elapsed.as_secs_f64().max(0.001));
            format!("{}, {rate} MB/s, median {}, {failed} failed", size(bytes), time(median))
        });
    };
    fetch::run(fetcher, run, stop, show).await
}
