//! Writes the counters and states of the daemon as metrics.
//!
//! `docs/operations.md` lists the metrics. Their labels have few values each: no image, blob or container is named.

use std::{fmt, sync::Arc};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeCounterValue, EncodeLabelSet, NoLabelSet},
    metrics::MetricType,
    registry::Unit,
};

use super::{
    Sources,
    fuse_counters::{Operation, Outcome},
};
use crate::{histogram::DurationHistogram, registry::Answers, waits::WaitKind};

pub(super) const BYTES: Option<&Unit> = Some(&Unit::Bytes);
pub(super) const SECONDS: Option<&Unit> = Some(&Unit::Seconds);

/// Writes all metrics of the daemon.
pub(super) struct SourcesCollector(pub(super) Arc<Sources>);

/// Writes metric families.
pub(super) struct Exposition<'a>(pub(super) DescriptorEncoder<'a>);

impl fmt::Debug for SourcesCollector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SourcesCollector")
    }
}

impl Collector for SourcesCollector {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let mut exposition = Exposition(encoder);
        exposition.build()?;
        exposition.takeovers(&self.0)?;
        exposition.fuse(&self.0)?;
        exposition.cache(&self.0)?;
        exposition.registries(&self.0)?;
        exposition.images(&self.0)
    }
}

impl Exposition<'_> {
    /// A gauge, because parsers of the format before OpenMetrics do not know the type for this.
    fn build(&mut self) -> fmt::Result {
        let version = [([("version", env!("CARGO_PKG_VERSION"))], 1.0)];
        self.gauges("build_info", None, "The version of the program; always 1", version)
    }

    fn takeovers(&mut self, sources: &Sources) -> fmt::Result {
        let help = "Times that a daemon continued the sessions of an earlier one";
        self.counter("takeovers", None, help, &sources.takeovers)
    }

    fn fuse(&mut self, sources: &Sources) -> fmt::Result {
        let fuse = &sources.fuse;
        let outcomes = |operation: Operation| {
            Outcome::ALL.into_iter().map(move |outcome| {
                let labels = [("operation", operation.name()), ("outcome", outcome.name())];
                (labels, fuse.count(operation, outcome))
            })
        };
        let requests = Operation::ALL.into_iter().flat_map(outcomes);
        self.counters("fuse_requests", None, "Requests of the kernel", requests)?;
        let durations = Operation::ALL.map(|operation| (operation_label(operation), fuse.durations(operation)));
        let help = "Time from a request of the kernel to its answer";
        self.histograms("fuse_request_duration", help, durations)?;
        let waits = Operation::WAITING.map(|operation| (operation_label(operation), fuse.waits(operation)));
        let help = "The same of requests that had to wait for a registry or a disk";
        self.histograms("fuse_wait_duration", help, waits)?;
        let help = "Bytes of files that readers received";
        self.counter("fuse_read", BYTES, help, &fuse.bytes_read())
    }

    fn cache(&mut self, sources: &Sources) -> fmt::Result {
        let counters = sources.images.cache().counters().stats();
        let results = [("hit", counters.hits), ("miss", counters.misses)];
        let chunks = results.map(|(result, totals)| ([("result", result)], totals.chunks));
        let help = "Parts of chunks that readers requested; a miss waited for a registry";
        self.counters("cache_chunk_reads", None, help, chunks)?;
        let bytes = results.map(|(result, totals)| ([("result", result)], totals.bytes));
        self.counters("cache_read", BYTES, "Bytes of these", bytes)?;
        let corrupt = counters.corrupt_chunks;
        self.counter(
            "cache_corrupt_chunks",
            None,
            "Cached chunks that were damaged",
            &corrupt,
        )?;
        let failed = counters.failed_writes;
        self.counter("cache_failed_writes", None, "Chunks that could not be cached", &failed)?;
        let evicted = counters.evicted_bytes;
        self.counter("cache_evicted", BYTES, "Disk space freed to keep the limit", &evicted)?;
        let (used, limit) = sources.images.cache().usage();
        let help = "Disk space that cached chunks and metadata of images take";
        self.gauge("cache_size", BYTES, help, used as f64)?;
        self.gauge(
            "cache_limit",
            BYTES,
            "What that space is limited to at present",
            limit as f64,
        )
    }

    fn registries(&mut self, sources: &Sources) -> fmt::Result {
        let client = sources.images.client();
        let (stats, hosts) = (client.stats(), client.hosts());
        let label = |host: &str| [("host", host.to_owned())];
        let requests = hosts.iter().map(|host| (label(&host.host), host.stats.requests));
        self.counters("registry_requests", None, "HTTP requests to each host", requests)?;
        let answers = hosts.iter().flat_map(|host| by_class(&host.host, &host.stats.answers));
        let help = "Answers by class of HTTP status; none if the host did not answer in time";
        self.counters("registry_answers", None, help, answers)?;
        let bytes = hosts.iter().map(|host| (label(&host.host), host.stats.bytes_received));
        self.counters("registry_received", BYTES, "Bytes of bodies from each host", bytes)?;
        let open = hosts.iter().map(|host| {
            let is_open = !host.circuit.is_closed();
            (label(&host.host), f64::from(u8::from(is_open)))
        });
        let help = "Whether requests to the host fail at once because it does not answer";
        self.gauges("registry_circuit_open", None, help, open)?;
        let loads = || hosts.iter().filter_map(|host| Some((&host.host, host.load?)));
        let in_flight = loads().map(|(host, load)| (label(host), load.in_flight as f64));
        self.gauges(
            "registry_requests_in_flight",
            None,
            "Requests without a complete answer",
            in_flight,
        )?;
        let waiting = loads().map(|(host, load)| (label(host), load.waiting as f64));
        let help = "Requests that wait because too many are in flight";
        self.gauges("registry_requests_waiting", None, help, waiting)?;
        self.counter(
            "registry_retries",
            None,
            "Requests that were repeated after a pause",
            &stats.retries,
        )?;
        let help = "Answers whose bytes did not match a digest";
        self.counter("registry_corrupt_answers", None, help, &stats.corrupt_answers)
    }

    fn images(&mut self, sources: &Sources) -> fmt::Result {
        let published = sources.store.layers().len();
        self.gauge("layers_published", None, "Published layers", published as f64)?;
        let loaded = sources.images.loaded().len();
        self.gauge("images_loaded", None, "Images whose trees are in memory", loaded as f64)?;
        let announcements = sources.announcer.counters();
        let outcomes = announcements
            .outcomes()
            .map(|(outcome, count)| ([("outcome", outcome)], count));
        self.counters("announcements", None, "Announced pulls", outcomes)?;
        let help = "Time that pulls waited for their announcement";
        self.histogram("announcement_duration", help, &announcements.duration)?;
        let waits = WaitKind::ALL.map(|kind| (kind, sources.images.waits().summary(kind)));
        let label = |kind: WaitKind| [("kind", kind.name())];
        let counts = waits.map(|(kind, (count, _))| (label(kind), count as f64));
        self.gauges("waits", None, "Waits in progress", counts)?;
        let longest = waits.map(|(kind, (_, longest))| (label(kind), longest.as_secs_f64()));
        let help = "How long the oldest wait in progress has lasted";
        self.gauges("longest_wait", SECONDS, help, longest)
    }

    /// Writes a counter without labels.
    pub(super) fn counter(
        &mut self,
        name: &str,
        unit: Option<&Unit>,
        help: &str,
        value: &impl EncodeCounterValue,
    ) -> fmt::Result {
        let mut encoder = self.0.encode_descriptor(name, help, unit, MetricType::Counter)?;
        encoder.encode_counter::<NoLabelSet, _, f64>(value, None)
    }

    /// Writes counters, each with its labels.
    fn counters<L: EncodeLabelSet>(
        &mut self,
        name: &str,
        unit: Option<&Unit>,
        help: &str,
        values: impl IntoIterator<Item = (L, u64)>,
    ) -> fmt::Result {
        let mut encoder = self.0.encode_descriptor(name, help, unit, MetricType::Counter)?;
        for (labels, value) in values {
            let mut encoder = encoder.encode_family(&labels)?;
            encoder.encode_counter::<NoLabelSet, _, f64>(&value, None)?;
        }
        Ok(())
    }

    /// Writes a gauge without labels.
    pub(super) fn gauge(&mut self, name: &str, unit: Option<&Unit>, help: &str, value: f64) -> fmt::Result {
        let mut encoder = self.0.encode_descriptor(name, help, unit, MetricType::Gauge)?;
        encoder.encode_gauge(&value)
    }

    /// Writes gauges, each with its labels.
    fn gauges<L: EncodeLabelSet>(
        &mut self,
        name: &str,
        unit: Option<&Unit>,
        help: &str,
        values: impl IntoIterator<Item = (L, f64)>,
    ) -> fmt::Result {
        let mut encoder = self.0.encode_descriptor(name, help, unit, MetricType::Gauge)?;
        for (labels, value) in values {
            encoder.encode_family(&labels)?.encode_gauge(&value)?;
        }
        Ok(())
    }

    /// Writes a histogram without labels.
    fn histogram(&mut self, name: &str, help: &str, values: &DurationHistogram) -> fmt::Result {
        let unit = SECONDS;
        values.encode(self.0.encode_descriptor(name, help, unit, MetricType::Histogram)?)
    }

    /// Writes histograms, each with its labels.
    fn histograms<'h, L: EncodeLabelSet>(
        &mut self,
        name: &str,
        help: &str,
        values: impl IntoIterator<Item = (L, &'h DurationHistogram)>,
    ) -> fmt::Result {
        let unit = SECONDS;
        let mut encoder = self.0.encode_descriptor(name, help, unit, MetricType::Histogram)?;
        for (labels, histogram) in values {
            histogram.encode(encoder.encode_family(&labels)?)?;
        }
        Ok(())
    }
}

fn operation_label(operation: Operation) -> [(&'static str, &'static str); 1] {
    [("operation", operation.name())]
}

fn by_class(host: &str, answers: &Answers) -> [([(&'static str, String); 2], u64); 5] {
    let classes = [
        ("2xx", answers.success),
        ("3xx", answers.redirect),
        ("4xx", answers.client_error),
        ("5xx", answers.server_error),
        ("none", answers.none),
    ];
    classes.map(|(status, count)| ([("host", host.to_owned()), ("status", status.to_owned())], count))
}
