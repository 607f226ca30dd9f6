//! Cold reads: this program against nydusd, which is the peer; same image, same registry, in turns.
//!
//! `NYDUSD=/path/to/nydusd cargo bench --bench cold`, as root, with `docker-registry` and `python3` installed. nydusd comes
//! with `cargo install --locked nydus-rs`; without one, only this program is measured. All is on loopback; links are modelled by
//! a proxy. `NYDUS_BENCH_MIB` sets the image's size (1024), `NYDUS_BENCH_ROUNDS` how often each is measured (3), and arguments
//! choose scenarios: `files`, `program`, `many`.

use std::{
    env,
    fs::{self, File},
    io::Read as _,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use nydus_store::fixtures::{self, BuildOptions, LayerSource};

#[allow(dead_code, unused_imports, reason = "shared with the tests, which use more of it")]
#[path = "../../tests/it/common/mod.rs"]
mod common;
mod link;
mod peer;

use common::DockerRegistry;
use link::{Link, Speed};
use peer::{Image, Mounted, Server};

/// What is on the way to the registry.
struct Way {
    name: &'static str,
    speed: Option<Speed>,
}

const WAYS: [Way; 3] = [
    Way {
        name: "loopback",
        speed: None,
    },
    Way {
        name: "20 ms, 100 Mbit/s",
        speed: Some(Speed {
            round_trip: Duration::from_millis(20),
            bytes_per_second: 12.5e6,
        }),
    },
    Way {
        name: "5 ms, 1 Gbit/s",
        speed: Some(Speed {
            round_trip: Duration::from_millis(5),
            bytes_per_second: 125e6,
        }),
    },
];

/// Images that start at once.
const MANY: usize = 16;
const PROGRAM: &str =
    "import json, ssl, asyncio, sqlite3, unittest.mock, xml.dom.minidom, http.server, concurrent.futures, decimal";

fn main() -> anyhow::Result<()> {
    let chosen: Vec<_> = env::args().skip(1).filter(|word| !word.starts_with("--")).collect();
    let is_chosen = |name: &str| chosen.is_empty() || chosen.iter().any(|word| word == name);
    let bench = Bench::prepare()?;
    if is_chosen("files") {
        for way in &WAYS {
            bench.files(way)?;
        }
    }
    if is_chosen("program") {
        for way in &WAYS[..2] {
            bench.program(way)?;
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
    files: usize,
    plain_bytes: u64,
    servers: Vec<Server>,
    rounds: usize,
    dir: tempfile::TempDir,
}

/// What one run took.
#[derive(Clone, Copy)]
struct Run {
    time: Duration,
    /// Of blobs, in bytes.
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
        python(&tree)?;
        system(&tree, (number("NYDUS_BENCH_MIB", 1100) as u64) << 20)?;
        let (files, plain_bytes) = read_all(&tree)?;
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
            image: Image {
                repository: "bench/cold".to_owned(),
                bootstrap: built.bootstrap_path()?.to_owned(),
            },
            files,
            plain_bytes,
            servers,
            rounds: number("NYDUS_BENCH_ROUNDS", 3),
            dir,
        })
    }

    /// One reader reads every file.
    fn files(&self, way: &Way) -> anyhow::Result<()> {
        println!("\nevery file by one reader, {}", way.name);
        let servers = self
            .servers
            .iter()
            .copied()
            .filter(|server| *server != Server::Ours { learned: true });
        let runs = self.in_turns(servers.collect(), way, |mounted| {
            let (files, bytes) = read_all(&mounted.dir())?;
            anyhow::ensure!(
                (files, bytes) == (self.files, self.plain_bytes),
                "read {files} files, {bytes} bytes"
            );
            Ok(())
        })?;
        report(&runs, |run| {
            let rate = self.plain_bytes as f64 / run.time.as_secs_f64() / 1e6;
            let share = way
                .speed
                .map(|speed| run.fetched as f64 / run.time.as_secs_f64() / speed.bytes_per_second);
            let share = share.map_or_else(String::new, |share| format!(", {:.0} % of the link", share * 100.0));
            format!("{rate:.0} MB/s{share}")
        });
        Ok(())
    }

    /// A program starts.
    fn program(&self, way: &Way) -> anyhow::Result<()> {
        println!("\npython3 -c '{PROGRAM}', {}", way.name);
        // What is learned, is so once.
        let mut teacher = Server::Ours { learned: false }.mount(&self.image, self.registry.host(), &self.traces())?;
        run_program(&teacher)?;
        teacher.stop();
        if teacher.traces().exists() {
            peer::copy_dir(&teacher.traces(), &self.traces())?;
        }
        let runs = self.in_turns(self.servers.clone(), way, run_program)?;
        report(&runs, |run| {
            format!("{:.2} MB in {} requests", run.fetched as f64 / 1e6, run.requests)
        });
        Ok(())
    }

    /// Images of python3, each with a blob of its own.
    fn images(&self) -> anyhow::Result<Vec<Image>> {
        let tree = self.dir.path().join("small");
        python(&tree)?;
        let runtime = tokio::runtime::Runtime::new()?;
        let image = |number: usize| {
            fs::write(tree.join("number"), number.to_string())?;
            let out = self.dir.path().join(format!("small-{number}"));
            let built = fixtures::build(&[LayerSource::Dir(tree.clone())], &BuildOptions::default(), &out)?;
            let repository = format!("bench/small-{number}");
            runtime.block_on(built.push(&self.registry.url(), &repository, "1"))?;
            let bootstrap = built.bootstrap_path()?.to_owned();
            anyhow::Ok(Image { repository, bootstrap })
        };
        (0..MANY).map(image).collect()
    }

    /// Many images start at once, each mounted by a process of its own.
    fn many(&self, images: &[Image]) -> anyhow::Result<()> {
        println!("\n{MANY} images at once, each runs python3, loopback");
        let servers = self
            .servers
            .iter()
            .copied()
            .filter(|server| *server != Server::Ours { learned: true });
        let mut runs: Vec<(Server, Vec<Run>)> = servers.map(|server| (server, Vec::new())).collect();
        for _ in 0..self.rounds {
            for (server, runs) in &mut runs {
                let server = *server;
                let start = |image| run_program(&server.mount(image, self.registry.host(), &self.traces())?);
                runs.push(self.measured(|| {
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

    fn traces(&self) -> PathBuf {
        self.dir.path().join("traces")
    }

    /// Does `work` on a fresh mount of each server, in turns. Mounting is not counted, except for what goes on after it.
    fn in_turns(
        &self,
        servers: Vec<Server>,
        way: &Way,
        work: impl Fn(&Mounted) -> anyhow::Result<()>,
    ) -> anyhow::Result<Vec<(Server, Vec<Run>)>> {
        let mut runs: Vec<_> = servers.into_iter().map(|server| (server, Vec::new())).collect();
        for _ in 0..self.rounds {
            for (server, runs) in &mut runs {
                let registry: SocketAddr = self.registry.host().parse()?;
                let link = way.speed.map(|speed| Link::open(registry, speed)).transpose()?;
                let host = link.as_ref().map_or(registry, |link| link.addr).to_string();
                let mounted = server.mount(&self.image, &host, &self.traces())?;
                runs.push(self.measured(|| work(&mounted))?);
            }
        }
        Ok(runs)
    }

    fn measured(&self, work: impl FnOnce() -> anyhow::Result<()>) -> anyhow::Result<Run> {
        let before = self.registry.accesses().len();
        let start = Instant::now();
        work()?;
        let time = start.elapsed();
        // The registry writes its log when it has sent all.
        std::thread::sleep(Duration::from_millis(200));
        Ok(Run {
            time,
            fetched: self.registry.blob_bytes_since(before),
            requests: self.registry.accesses().len() - before,
        })
    }
}

/// Part of this machine's system, of that many bytes: the same files for who repeats it here, and files as images have them.
fn system(tree: &Path, bytes: u64) -> anyhow::Result<()> {
    let mut left = bytes;
    for entry in walkdir::WalkDir::new("/usr").sort_by_file_name().into_iter().flatten() {
        let to = tree.join(entry.path().strip_prefix("/")?);
        let size = entry.metadata().map_or(0, |metadata| metadata.len());
        // Huge files are not what an image is made of.
        if !entry.file_type().is_file() || to.exists() || size > 64 << 20 {
            continue;
        }
        fs::create_dir_all(to.parent().unwrap_or(tree))?;
        fs::copy(entry.path(), to)?;
        left = left.saturating_sub(size);
        if left == 0 {
            break;
        }
    }
    Ok(())
}

/// This machine's python3, with what it needs.
fn python(tree: &Path) -> anyhow::Result<()> {
    let script = "import sys, sysconfig; print(sys.executable); print(sysconfig.get_path('stdlib'))";
    let told = common::output(Command::new("/usr/bin/python3").args(["-c", script]));
    let mut lines = told.lines();
    let (program, library) = (lines.next().unwrap_or_default(), lines.next().unwrap_or_default());
    let mut wanted = vec![program.to_owned(), library.to_owned()];
    let objects = fs::read_dir(Path::new(library).join("lib-dynload"))?
        .flatten()
        .map(|entry| entry.path());
    for object in objects.chain([PathBuf::from(program)]) {
        let needs = common::output(Command::new("ldd").arg(object));
        wanted.extend(
            needs
                .split_whitespace()
                .filter(|word| word.starts_with('/'))
                .map(str::to_owned),
        );
    }
    wanted.sort();
    wanted.dedup();
    for path in wanted {
        let to = tree.join(path.trim_start_matches('/'));
        fs::create_dir_all(to.parent().unwrap_or(tree))?;
        common::output(
            Command::new("cp")
                .arg("-aL")
                .arg(&path)
                .arg(to.parent().unwrap_or(tree)),
        );
    }
    common::output(
        Command::new("mv")
            .arg(tree.join(program.trim_start_matches('/')))
            .arg(tree.join("python3")),
    );
    Ok(())
}

fn run_program(mounted: &Mounted) -> anyhow::Result<()> {
    let mut command = Command::new("chroot");
    command.arg(mounted.dir()).args(["/python3", "-B", "-c", PROGRAM]);
    let status = command.stdin(Stdio::null()).status()?;
    anyhow::ensure!(status.success(), "python3: {status}");
    Ok(())
}

/// Reads every file below `dir` in the order of the tree; their number and bytes.
fn read_all(dir: &Path) -> anyhow::Result<(usize, u64)> {
    let (mut files, mut bytes) = (0, 0);
    let mut buffer = vec![0; 1 << 20];
    for entry in walkdir::WalkDir::new(dir).sort_by_file_name() {
        let entry = entry?;
        if entry.file_type().is_file() {
            let mut file = File::open(entry.path())?;
            files += 1;
            loop {
                match file.read(&mut buffer)? {
                    0 => break,
                    len => bytes += len as u64,
                }
            }
        }
    }
    Ok((files, bytes))
}

/// Prints a line for each server: median, spread, and the ratio to the peer.
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
