//! Measures cold reads of nydus-store and of nydusd (the peer), alternating, with the same image and registry.
//!
//! Run `NYDUSD=/path/to/nydusd cargo bench --bench cold` as root, with `docker-registry` and `python3` installed.
//! `cargo install --locked nydus-rs` installs nydusd; without it, only nydus-store is measured. Everything runs on
//! loopback, and a proxy models links. `NYDUS_BENCH_MIB` sets the image's size in MiB (default 1024),
//! `NYDUS_BENCH_ROUNDS` the number of rounds (default 3). Arguments choose scenarios: `files`, `program` (or
//! `program:python`, `program:nginx`, `program:java`), `many`. nginx and the JVM come from Debian's `nginx-light` and
//! `openjdk-17-jre-headless`; missing programs are skipped.

#![allow(
    unsafe_code,
    missing_docs,
    clippy::missing_docs_in_private_items,
    clippy::needless_pass_by_value,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a benchmark uses the tests' harness, and ends when it fails"
)]

use std::{
    env, fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use nydus_store::{
    fixtures::{self, BuildOptions, LayerSource},
    internals::{Traces, Tree},
};

#[allow(dead_code, unused_imports, reason = "shared with the tests, which use more of it")]
#[path = "../../tests/it/common/mod.rs"]
mod common;
mod link;
mod peer;
mod programs;
mod tree;

use common::{Access, DockerRegistry, Serve};
use link::{Link, Speed};
use peer::{Image, Mounted, Server};
use programs::Program;

/// A modelled link to the registry.
struct LinkModel {
    name: &'static str,
    speed: Option<Speed>,
}

const LOOPBACK: LinkModel = LinkModel {
    name: "loopback",
    speed: None,
};
const HOME: LinkModel = LinkModel {
    name: "20 ms, 100 Mbit/s",
    speed: Some(Speed {
        round_trip: Duration::from_millis(20),
        bytes_per_second: 12.5e6,
    }),
};
const NEAR: LinkModel = LinkModel {
    name: "5 ms, 1 Gbit/s",
    speed: Some(Speed {
        round_trip: Duration::from_millis(5),
        bytes_per_second: 125e6,
    }),
};
const FAR: LinkModel = LinkModel {
    name: "80 ms, 1 Gbit/s",
    speed: Some(Speed {
        round_trip: Duration::from_millis(80),
        bytes_per_second: 125e6,
    }),
};

/// Number of images that start at once.
const PARALLEL_STARTS: usize = 16;

fn main() -> anyhow::Result<()> {
    let chosen: Vec<_> = env::args().skip(1).filter(|word| !word.starts_with("--")).collect();
    let is_chosen = |name: &str| chosen.is_empty() || chosen.iter().any(|word| word == name);
    let bench = Bench::prepare()?;
    if is_chosen("files") {
        for link in [LOOPBACK, HOME, NEAR] {
            bench.files(&link)?;
        }
    }
    for program in &bench.programs {
        if is_chosen("program") || is_chosen(&format!("program:{}", program.name())) {
            let learned = bench.learn(*program)?;
            for link in [LOOPBACK, HOME, FAR] {
                bench.program(*program, &link, &learned)?;
            }
        }
    }
    if is_chosen("many") {
        bench.many(&bench.images()?)?;
    }
    Ok(())
}

struct Bench {
    registry: DockerRegistry,
    image: Image,
    /// Programs that the image has.
    programs: Vec<Program>,
    files: usize,
    plain_bytes: u64,
    servers: Vec<Server>,
    rounds: usize,
    dir: tempfile::TempDir,
}

/// The chunks that a program's start needs.
struct ProgramNeeds {
    traces: PathBuf,
    /// Compressed bytes of these chunks.
    needed: u64,
    /// Uncompressed bytes of these chunks.
    plain: u64,
}

/// Result of one run.
#[derive(Clone, Copy)]
struct Run {
    time: Duration,
    /// Bytes fetched from blobs.
    fetched: u64,
    requests: usize,
}

impl Bench {
    fn prepare() -> anyhow::Result<Self> {
        let number = |name, default| {
            env::var(name)
                .ok()
                .and_then(|text| text.parse().ok())
                .unwrap_or(default)
        };
        let dir = tempfile::tempdir()?;
        let registry = DockerRegistry::start();
        let tree = dir.path().join("tree");
        let programs = Program::install(&tree)?;
        tree::system(&tree, (number("NYDUS_BENCH_MIB", 1024) as u64) << 20)?;
        let (files, plain_bytes) = tree::read_all(&tree)?;
        let built = fixtures::build(
            &[LayerSource::Dir(tree.clone())],
            &BuildOptions::default(),
            &dir.path().join("image"),
        )?;
        fs::remove_dir_all(tree)?;
        tokio::runtime::Runtime::new()?.block_on(built.push(&registry.url(), "bench/cold", "1"))?;
        let mut servers = vec![Server::Ours { learned: false }, Server::Ours { learned: true }];
        match peer::nydusd() {
            Some(_) => servers.push(Server::Nydusd),
            None => println!("no nydusd found: set NYDUSD to compare with it"),
        }
        let stored: u64 = built.blobs.iter().map(|blob| blob.size).sum();
        println!(
            "image of {files} files, {} MiB, stored {} MiB",
            plain_bytes >> 20,
            stored >> 20
        );
        Ok(Self {
            registry,
            image: Image::new(&built, "bench/cold".to_owned())?,
            programs,
            files,
            plain_bytes,
            servers,
            rounds: number("NYDUS_BENCH_ROUNDS", 3),
            dir,
        })
    }

    /// Scenario `files`: one reader reads every file.
    fn files(&self, link: &LinkModel) -> anyhow::Result<()> {
        println!("\nevery file by one reader, {}", link.name);
        let servers = self
            .servers
            .iter()
            .copied()
            .filter(|server| *server != Server::Ours { learned: true });
        let read = |dir: PathBuf| {
            let (files, bytes) = tree::read_all(&dir)?;
            anyhow::ensure!(
                (files, bytes) == (self.files, self.plain_bytes),
                "read {files} files, {bytes} bytes"
            );
            Ok(())
        };
        let nowhere = self.dir.path().join("no-traces");
        let runs = self.in_turns(servers.collect(), link, &nowhere, |mounted| Ok(mounted.dir()), read)?;
        report(&runs, |run| {
            let rate = self.plain_bytes as f64 / run.time.as_secs_f64() / 1e6;
            let share = link
                .speed
                .map(|speed| run.fetched as f64 / run.time.as_secs_f64() / speed.bytes_per_second);
            let share = share.map_or_else(String::new, |share| format!(", {:.0} % of the link", share * 100.0));
            format!("{rate:.0} MB/s{share}")
        });
        Ok(())
    }

    /// Runs a program once and keeps the recorded trace.
    fn learn(&self, program: Program) -> anyhow::Result<ProgramNeeds> {
        let traces = self.dir.path().join("traces").join(program.name());
        let mut teacher = Server::Ours { learned: false }.mount(&self.image, self.registry.host(), &traces)?;
        program.ready(&teacher.dir())?.start()?;
        teacher.stop();
        peer::copy_dir(&teacher.traces(), &traces)?;
        let (mut needed, mut plain, known) = (0, 0, Traces::open(&traces)?);
        let tree = Tree::load(&self.image.bootstrap)?;
        for image in known.images()? {
            for part in known.get(&image)?.into_iter().flat_map(|trace| trace.parts) {
                let blob = tree.blobs().iter().find(|blob| blob.id == part.blob);
                let chunks = blob.map_or(&[][..], |blob| &blob.chunks);
                for chunk in chunks.iter().filter(|chunk| part.chunks.contains(&chunk.index)) {
                    needed += u64::from(chunk.compressed_size);
                    plain += u64::from(chunk.uncompressed_size);
                }
            }
        }
        Ok(ProgramNeeds { traces, needed, plain })
    }

    /// Scenario `program`: a program starts.
    fn program(&self, program: Program, link: &LinkModel, learned: &ProgramNeeds) -> anyhow::Result<()> {
        let ProgramNeeds { traces, needed, plain } = learned;
        let mb = |bytes: u64| bytes as f64 / 1e6;
        let (stored, plain) = (mb(*needed), mb(*plain));
        println!(
            "\n{}, {}; needs chunks of {stored:.2} MB ({plain:.2} MB uncompressed)",
            program.description(),
            link.name
        );
        let ready = |mounted: &Mounted| program.ready(&mounted.dir());
        let runs = self.in_turns(self.servers.clone(), link, traces, ready, programs::Ready::start)?;
        report(&runs, |run| {
            let fetched = mb(run.fetched);
            let share = fetched / stored;
            format!("{fetched:.2} MB ({share:.2} x the need) in {} requests", run.requests)
        });
        Ok(())
    }

    /// Images of python3, each with a separate blob.
    fn images(&self) -> anyhow::Result<Vec<Image>> {
        let tree = self.dir.path().join("small");
        tree::mount_points(&tree)?;
        tree::python(&tree)?;
        let runtime = tokio::runtime::Runtime::new()?;
        let image = |number: usize| {
            fs::write(tree.join("number"), number.to_string())?;
            let out = self.dir.path().join(format!("small-{number}"));
            let built = fixtures::build(&[LayerSource::Dir(tree.clone())], &BuildOptions::default(), &out)?;
            let repository = format!("bench/small-{number}");
            runtime.block_on(built.push(&self.registry.url(), &repository, "1"))?;
            Image::new(&built, repository)
        };
        (0..PARALLEL_STARTS).map(image).collect()
    }

    /// Scenario `many`: images start at once, served by one nydus-store daemon or by one nydusd each.
    fn many(&self, images: &[Image]) -> anyhow::Result<()> {
        println!("\n{PARALLEL_STARTS} images at once, each runs python3, loopback");
        let servers = self
            .servers
            .iter()
            .copied()
            .filter(|server| *server != Server::Ours { learned: true });
        let mut runs: Vec<(Server, Vec<Run>)> = servers.map(|server| (server, Vec::new())).collect();
        let nowhere = self.dir.path().join("no-traces");
        let data: Vec<_> = images.iter().flat_map(|image| image.data.clone()).collect();
        for _ in 0..self.rounds {
            for (server, runs) in &mut runs {
                let server = *server;
                let before = self.registry.accesses().len();
                let daemon = (server != Server::Nydusd).then(Serve::start);
                let start = |image: &Image| {
                    if let Some(daemon) = &daemon {
                        let reference = format!("{}/{}:1", self.registry.host(), image.repository);
                        let layer = daemon.layer(&reference, &image.layer);
                        return Program::Python.ready(&layer.diff())?.start().map(drop);
                    }
                    let mounted = server.mount(image, self.registry.host(), &nowhere)?;
                    Program::Python.ready(&mounted.dir())?.start().map(drop)
                };
                runs.push(self.measured(before, &data, || {
                    std::thread::scope(|scope| {
                        let started: Vec<_> = images.iter().map(|image| scope.spawn(move || start(image))).collect();
                        let join = |thread: std::thread::ScopedJoinHandle<'_, anyhow::Result<()>>| {
                            thread.join().unwrap_or_else(|_| anyhow::bail!("a thread panicked"))
                        };
                        started.into_iter().try_for_each(join)
                    })
                })?);
            }
        }
        report(&runs, |run| {
            format!("{:.1} MB in {} requests", run.fetched as f64 / 1e6, run.requests)
        });
        Ok(())
    }

    /// Runs `prepare` and `work` with a fresh mount of each server, alternating. Measures the time of `work` and the
    /// bytes fetched since the mount. `traces` has the recorded traces.
    fn in_turns<P, T>(
        &self,
        servers: Vec<Server>,
        link: &LinkModel,
        traces: &Path,
        prepare: impl Fn(&Mounted) -> anyhow::Result<P>,
        work: impl Fn(P) -> anyhow::Result<T>,
    ) -> anyhow::Result<Vec<(Server, Vec<Run>)>> {
        let mut runs: Vec<_> = servers.into_iter().map(|server| (server, Vec::new())).collect();
        for _ in 0..self.rounds {
            for (server, runs) in &mut runs {
                let registry: SocketAddr = self.registry.host().parse()?;
                let link = link.speed.map(|speed| Link::open(registry, speed)).transpose()?;
                let host = link.as_ref().map_or(registry, |link| link.addr).to_string();
                let before = self.registry.accesses().len();
                let mounted = server.mount(&self.image, &host, traces)?;
                let prepared = prepare(&mounted)?;
                runs.push(self.measured(before, &self.image.data, || work(prepared))?);
            }
        }
        Ok(runs)
    }

    /// Runs `work`. Counts the bytes fetched from the blobs `data` since line `before` of the registry's log.
    fn measured<T>(
        &self,
        before: usize,
        data: &[String],
        work: impl FnOnce() -> anyhow::Result<T>,
    ) -> anyhow::Result<Run> {
        let start = Instant::now();
        let done = work()?;
        let time = start.elapsed();
        // Waits for requests in flight to end.
        drop(done);
        // The registry logs a request after sending the response.
        std::thread::sleep(Duration::from_millis(200));
        let accesses = self.registry.accesses().split_off(before);
        let of_data = |access: &&Access| data.iter().any(|blob| access.path.ends_with(blob));
        let fetched: Vec<_> = accesses.iter().filter(of_data).map(|access| access.bytes).collect();
        Ok(Run {
            time,
            fetched: fetched.iter().sum(),
            requests: fetched.len(),
        })
    }
}

/// Prints a line for each server: median, range, and the ratio to the peer.
fn report(runs: &[(Server, Vec<Run>)], more: impl Fn(&Run) -> String) {
    let median = |runs: &[Run]| {
        let mut sorted = runs.to_vec();
        sorted.sort_by_key(|run| run.time);
        (sorted[sorted.len() / 2], sorted[0].time, sorted[sorted.len() - 1].time)
    };
    let peer = runs
        .iter()
        .find(|(server, _)| *server == Server::Nydusd)
        .map(|(_, runs)| median(runs).0);
    for (server, runs) in runs {
        let (middle, least, most) = median(runs);
        let ratio = peer.map(|peer| {
            format!(
                "  {:.2} x the peer's time",
                middle.time.as_secs_f64() / peer.time.as_secs_f64()
            )
        });
        println!(
            "  {:<22} {:>7.2} s ({:.2} to {:.2})  {}{}",
            server.name(),
            middle.time.as_secs_f64(),
            least.as_secs_f64(),
            most.as_secs_f64(),
            more(&middle),
            ratio.unwrap_or_default()
        );
    }
}
