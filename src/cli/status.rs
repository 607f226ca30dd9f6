//! `nydus-store status`: shows the state of the running daemon.

use std::{
    io::{self, Write as _},
    thread,
    time::Duration,
};

use anyhow::Context as _;
use clap::Args;

use super::{RootArg, columns::columns, runtime};
use crate::{
    humanize::{self, size},
    jobs::control,
    monitor::status::{CacheStatus, Engine, ErrorTotals, ImageStatus, LastingWait, Status, WaitStatus},
    registry::{CircuitStatus, HostStatus},
};

/// Pause between two outputs of `--watch`.
const WATCH_INTERVAL: Duration = Duration::from_secs(1);
/// Moves the cursor to the upper left corner and clears the screen (ECMA-48: CUP, ED).
const CLEAR_SCREEN: &str = "\x1b[H\x1b[2J";

/// Show images, cache, traffic, registries and waits of the running daemon
#[derive(Debug, Args)]
pub struct StatusCommand {
    /// Print JSON
    #[arg(long)]
    json: bool,

    /// Show the status each second, with --json one document a line
    #[arg(long)]
    watch: bool,

    #[command(flatten)]
    root: RootArg,
}

impl StatusCommand {
    pub fn run(&self) -> anyhow::Result<()> {
        let runtime = runtime()?;
        let mut is_shown = false;
        loop {
            match runtime.block_on(self.status()) {
                Ok(status) if !self.show(&status)? => return Ok(()),
                Ok(_) => is_shown = true,
                // It may be restarting.
                Err(error) if is_shown => eprintln!("{error:#}"),
                Err(error) => return Err(error),
            }
            thread::sleep(WATCH_INTERVAL);
        }
    }

    /// Prints the status. Returns whether to go on.
    fn show(&self, status: &Status) -> anyhow::Result<bool> {
        match io::stdout().write_all(self.format(status)?.as_bytes()) {
            Ok(()) => Ok(self.watch),
            // Nobody reads any more, as after `… | head`.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(false),
            Err(error) => Err(error).context("cannot print"),
        }
    }

    async fn status(&self) -> anyhow::Result<Status> {
        let root = &self.root.root;
        let status = control::status(root).await?;
        status.with_context(|| {
            format!(
                "no daemon is running on {}, or it is not accessible to you",
                root.display()
            )
        })
    }

    fn format(&self, status: &Status) -> anyhow::Result<String> {
        Ok(match (self.json, self.watch) {
            (true, true) => format!("{}\n", serde_json::to_string(status)?),
            (true, false) => format!("{}\n", serde_json::to_string_pretty(status)?),
            (false, true) => format!("{CLEAR_SCREEN}{}", text(status)),
            (false, false) => text(status),
        })
    }
}

/// The status as text: a summary, then tables of images, hosts and waits.
fn text(status: &Status) -> String {
    let tables = [
        table(&images(&status.images)),
        table(&hosts(&status.hosts)),
        table(&waits(&status.waits.oldest)),
    ];
    summary(status) + &tables.concat()
}

/// Formats a table with an empty line before it; nothing if it has only a heading.
fn table<const N: usize>(rows: &[[String; N]]) -> String {
    match rows {
        [] | [_] => String::new(),
        rows => format!("\n{}", columns(rows)),
    }
}

fn summary(status: &Status) -> String {
    let uptime = Duration::from_secs_f64(status.uptime_seconds.max(0.0));
    let loaded = status.images.iter().filter(|image| image.loaded.is_some()).count();
    let layers = &status.layers;
    let in_use = layers
        .in_use
        .map_or_else(|| "an unknown number".to_owned(), |count| count.to_string());
    let rows = [
        (
            "version",
            format!(
                "{}, up {}, {} takeovers",
                status.version,
                indicatif::HumanDuration(uptime),
                status.takeovers
            ),
        ),
        ("images", format!("{} published, {loaded} loaded", status.images.len())),
        ("layers", format!("{} published, {in_use} in use", layers.published)),
        ("cache", cache(status)),
        (
            "fetched",
            format!("{} from registries", size(status.traffic.fetched_bytes)),
        ),
        ("served", format!("{} to readers", size(status.traffic.served_bytes))),
        ("errors", errors(&status.errors)),
        ("waits", wait_counts(&status.waits)),
    ];
    columns(&rows.map(|(name, value)| [name.to_owned(), value]))
}

fn cache(status: &Status) -> String {
    let CacheStatus {
        bytes,
        limit_bytes,
        evicted_bytes,
        failed_write,
    } = &status.cache;
    let mut text = format!("{} on disk, limit {}", size(*bytes), size(*limit_bytes));
    if *evicted_bytes > 0 {
        text.push_str(&format!(", {} evicted", size(*evicted_bytes)));
    }
    if let Some(failed) = failed_write {
        let ago = humanize::time(Duration::from_secs_f64(failed.seconds_ago.max(0.0)));
        text.push_str(&format!("; last failed write {ago} ago: {}", failed.error));
    }
    text
}

fn errors(errors: &ErrorTotals) -> String {
    list(&[
        (errors.failed_reads, "failed reads"),
        (errors.failed_lookups, "failed look-ups"),
        (errors.failed_announcements, "failed announcements"),
        (errors.corrupt_answers, "corrupt answers of registries"),
        (errors.corrupt_chunks, "corrupt cached chunks"),
        (errors.failed_cache_writes, "failed writes to the cache"),
    ])
}

fn wait_counts(waits: &WaitStatus) -> String {
    list(&[
        (waits.chunks as u64, "for chunks"),
        (waits.announcements as u64, "for announcements"),
        (waits.images as u64, "for images"),
    ])
}

/// Lists what is not 0.
fn list(counts: &[(u64, &str)]) -> String {
    let counts = counts.iter().filter(|(count, _)| *count > 0);
    let counts: Vec<_> = counts.map(|(count, what)| format!("{count} {what}")).collect();
    if counts.is_empty() {
        "none".to_owned()
    } else {
        counts.join(", ")
    }
}

/// One row for each name.
fn images(images: &[ImageStatus]) -> Vec<[String; 5]> {
    let mut rows = vec![["IMAGE", "DIGEST", "ENGINE", "LOADED", "CACHED"].map(str::to_owned)];
    for image in images {
        let engine = match image.engine {
            Engine::Fuse => "FUSE",
        };
        let digest: String = image.digest.to_string().chars().take(19).collect();
        let is_loaded = if image.loaded.is_some() { "yes" } else { "no" };
        let cached = image
            .loaded
            .map_or_else(|| "-".to_owned(), |data| format!("{}%", data.percent()));
        let row = |name: &String| {
            [
                name.clone(),
                digest.clone(),
                engine.to_owned(),
                is_loaded.to_owned(),
                cached.clone(),
            ]
        };
        rows.extend(image.names.iter().map(row));
    }
    rows
}

fn hosts(hosts: &[HostStatus]) -> Vec<[String; 5]> {
    let mut rows = vec![["HOST", "CIRCUIT", "IN FLIGHT", "WAITING", "RECEIVED"].map(str::to_owned)];
    rows.extend(hosts.iter().map(|host| {
        let load = |number: Option<usize>| number.map_or_else(|| "-".to_owned(), |number| number.to_string());
        [
            host.host.clone(),
            circuit(host.circuit),
            load(host.load.map(|load| load.in_flight)),
            load(host.load.map(|load| load.waiting)),
            size(host.stats.bytes_received),
        ]
    }));
    rows
}

fn circuit(circuit: CircuitStatus) -> String {
    match circuit {
        CircuitStatus::Closed => "closed".to_owned(),
        CircuitStatus::HalfOpen => "half-open".to_owned(),
        CircuitStatus::Open(seconds) => format!("open for {seconds:.1} s"),
    }
}

fn waits(waits: &[LastingWait]) -> Vec<[String; 3]> {
    let mut rows = vec![["WAITING", "FOR", "WHAT"].map(str::to_owned)];
    let row = |wait: &LastingWait| {
        [
            format!("{:.1} s", wait.seconds),
            wait.kind.name().to_owned(),
            wait.what.clone(),
        ]
    };
    rows.extend(waits.iter().map(row));
    rows
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(json: &str) -> Status {
        serde_json::from_str(json).unwrap()
    }

    #[test]
    fn text_shows_what_is_there_and_leaves_out_empty_tables() {
        let digest = format!("sha256:{}", "ab".repeat(32));
        let busy = status(
            &r#"{
                "version": "1.2.3", "uptime_seconds": 7200.5, "takeovers": 5,
                "images": [
                    {"names": ["r.example/a:1", "r.example/b:1"], "digest": "DIGEST", "engine": "fuse",
                     "loaded": {"cached_bytes": 999, "total_bytes": 1000}},
                    {"names": ["r.example/c:1"], "digest": "DIGEST", "engine": "fuse", "loaded": null}],
                "layers": {"published": 4, "in_use": null},
                "cache": {"bytes": 2048, "limit_bytes": 4096, "evicted_bytes": 1024, "failed_write": {"error": "No space left", "seconds_ago": 5.0}},
                "traffic": {"fetched_bytes": 1024, "served_bytes": 4096},
                "errors": {"failed_reads": 3, "failed_lookups": 0, "failed_announcements": 0, "corrupt_answers": 0,
                           "corrupt_chunks": 1, "failed_cache_writes": 0},
                "waits": {"chunks": 1, "announcements": 0, "images": 2, "oldest": [
                    {"kind": "chunk", "what": "chunk 7 of blob abc from r.example", "seconds": 1.25}]},
                "hosts": [{"host": "r.example", "circuit": {"open": 2.5}, "load": {"in_flight": 3, "waiting": 4},
                           "requests": 9, "bytes_received": 1024,
                           "answers": {"success": 9, "redirect": 0, "client_error": 0, "server_error": 0, "none": 0}}]
            }"#
            .replace("DIGEST", &digest),
        );
        let expected = "\
version  1.2.3, up 2 hours, 5 takeovers
images   2 published, 1 loaded
layers   4 published, an unknown number in use
cache    2.00 KiB on disk, limit 4.00 KiB, 1.00 KiB evicted; last failed write 5.00 s ago: No space left
fetched  1.00 KiB from registries
served   4.00 KiB to readers
errors   3 failed reads, 1 corrupt cached chunks
waits    1 for chunks, 2 for images

IMAGE          DIGEST               ENGINE  LOADED  CACHED
r.example/a:1  sha256:abababababab  FUSE    yes     99%
r.example/b:1  sha256:abababababab  FUSE    yes     99%
r.example/c:1  sha256:abababababab  FUSE    no      -

HOST       CIRCUIT         IN FLIGHT  WAITING  RECEIVED
r.example  open for 2.5 s  3          4        1.00 KiB

WAITING  FOR    WHAT
1.2 s    chunk  chunk 7 of blob abc from r.example
";
        assert_eq!(text(&busy), expected);
        let idle = Status {
            images: Vec::new(),
            hosts: Vec::new(),
            waits: WaitStatus {
                oldest: Vec::new(),
                ..busy.waits.clone()
            },
            ..busy
        };
        assert_eq!(text(&idle).lines().count(), 8);
    }
}
