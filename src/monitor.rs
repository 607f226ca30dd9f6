//! What the daemon tells of itself: [`Status`] for `nydus-store status`, and metrics for Prometheus.
//!
//! Each part of the daemon counts for itself, in atomics that it owns: the registry client, the blob cache, the
//! announcer, and [`metered_fs`] for the FUSE mount. [`Monitor`] reads these counters when asked. So nothing is
//! registered in a global table, parts can be tested by themselves, and counting takes neither locks nor memory where
//! the kernel waits for an answer.

use std::{
    fmt,
    sync::Arc,
    time::{Duration, Instant},
};

use axum::{
    Json, Router,
    extract::State,
    http::{HeaderMap, StatusCode, header},
    response::{IntoResponse, Response},
    routing::get,
};
use prometheus_client::{
    encoding::{prometheus_text, text},
    registry::Registry,
};
use tokio::sync::Semaphore;

use crate::{
    image::resolve::Images,
    jobs::RootContext,
    store::{announcer::Announcer, image_store::ImageStore},
};
use fuse_counters::FuseCounters;
use status::Status;

mod exposition;
pub mod fuse_counters;
pub mod listener;
pub mod metered_fs;
mod process;
pub mod status;

/// Path of the status on the control socket.
pub const STATUS_PATH: &str = "/v1/status";
/// Path of the metrics.
pub const METRICS_PATH: &str = "/metrics";

/// Reads the counters and states of a daemon.
pub struct Monitor {
    sources: Arc<Sources>,
    metrics: Registry,
    /// Held during a report: each reads directories, and local users may ask for metrics as often as they like.
    reporting: Semaphore,
}

/// A text format of metrics.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum MetricsFormat {
    /// OpenMetrics 1.0.
    OpenMetrics,
    /// The exposition format of Prometheus, version 0.0.4.
    Prometheus,
}

/// Where counters and states are.
struct Sources {
    images: Arc<Images>,
    store: Arc<ImageStore>,
    announcer: Arc<Announcer>,
    fuse: Arc<FuseCounters>,
    takeovers: u64,
    started: Instant,
}

impl Monitor {
    /// Reports on `root`. `fuse` counts the requests of its mount, whose session daemons have continued `takeovers`
    /// times.
    pub fn new(root: &RootContext, announcer: Arc<Announcer>, fuse: Arc<FuseCounters>, takeovers: u64) -> Arc<Self> {
        let sources = Arc::new(Sources {
            images: Arc::clone(&root.images),
            store: Arc::clone(&root.store),
            announcer,
            fuse,
            takeovers,
            started: Instant::now(),
        });
        let mut metrics = Registry::default();
        metrics.register_collector(Box::new(process::ProcessCollector));
        let own = metrics.sub_registry_with_prefix("nydus_store");
        own.register_collector(Box::new(exposition::SourcesCollector(Arc::clone(&sources))));
        let reporting = Semaphore::new(1);
        Arc::new(Self {
            sources,
            metrics,
            reporting,
        })
    }

    /// The routes of status and metrics.
    pub fn routes(self: &Arc<Self>) -> Router {
        let status = Router::new()
            .route(STATUS_PATH, get(status))
            .with_state(Arc::clone(self));
        status.merge(self.metrics_routes())
    }

    /// The route of metrics alone, which tell less.
    pub fn metrics_routes(self: &Arc<Self>) -> Router {
        Router::new()
            .route(METRICS_PATH, get(metrics))
            .with_state(Arc::clone(self))
    }

    /// Does `work`, which reads disks, on a blocking thread. One after the other.
    async fn report<T: Send + 'static>(
        self: Arc<Self>,
        work: impl FnOnce(&Self) -> T + Send + 'static,
    ) -> Result<T, StatusCode> {
        let monitor = Arc::clone(&self);
        let _permit = self.reporting.acquire().await;
        let done = tokio::task::spawn_blocking(move || work(&monitor)).await;
        done.map_err(|_| StatusCode::INTERNAL_SERVER_ERROR)
    }
}

impl Sources {
    fn uptime(&self) -> Duration {
        self.started.elapsed()
    }
}

async fn status(State(monitor): State<Arc<Monitor>>) -> Result<Json<Status>, StatusCode> {
    monitor
        .report(|monitor| Status::gather(&monitor.sources))
        .await
        .map(Json)
}

async fn metrics(State(monitor): State<Arc<Monitor>>, headers: HeaderMap) -> Result<Response, StatusCode> {
    let format = MetricsFormat::accepted_by(&headers);
    let text = monitor.report(move |monitor| format.encode(&monitor.metrics)).await?;
    let text = text.map_err(|_| StatusCode::INTERNAL_SERVER_ERROR)?;
    Ok(([(header::CONTENT_TYPE, format.media_type())], text).into_response())
}

impl MetricsFormat {
    /// OpenMetrics for clients that ask for it, as Prometheus does. All others know the older format.
    fn accepted_by(headers: &HeaderMap) -> Self {
        let accepted = headers.get_all(header::ACCEPT).iter();
        let mut accepted = accepted.filter_map(|value| value.to_str().ok());
        match accepted.any(|value| value.contains("application/openmetrics-text")) {
            true => Self::OpenMetrics,
            false => Self::Prometheus,
        }
    }

    fn media_type(self) -> &'static str {
        match self {
            Self::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
            Self::Prometheus => "text/plain; version=0.0.4; charset=utf-8",
        }
    }

    fn encode(self, metrics: &Registry) -> Result<String, fmt::Error> {
        let mut text = String::new();
        match self {
            Self::OpenMetrics => text::encode(&mut text, metrics)?,
            Self::Prometheus => prometheus_text::encode(&mut text, metrics)?,
        }
        Ok(text)
    }
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderValue;

    use super::*;

    #[test]
    fn metrics_format_follows_the_accept_header() {
        let accepted_by = |value: &'static str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::ACCEPT, HeaderValue::from_static(value));
            MetricsFormat::accepted_by(&headers)
        };
        // What Prometheus sends.
        let prometheus = "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.2,*/*;q=0.1";
        assert_eq!(accepted_by(prometheus), MetricsFormat::OpenMetrics);
        assert_eq!(accepted_by("*/*"), MetricsFormat::Prometheus);
        assert_eq!(MetricsFormat::accepted_by(&HeaderMap::new()), MetricsFormat::Prometheus);
    }
}
