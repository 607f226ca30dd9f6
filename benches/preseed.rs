//! Compares `preseed` with the lower bound of the same work in separate steps, each on all cores: download, decompress,
//! hash and write everything.
//!
//! Run `cargo bench --bench preseed` with `docker-registry` installed. Everything runs on loopback, in alternation.
//! `NYDUS_BENCH_MIB` sets the image's size in MiB (default 600), besides 10,000 small files.

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
    fs::{self, File},
    num::NonZero,
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::atomic::{AtomicUsize, Ordering},
    time::{Duration, Instant},
};

use anyhow::Context as _;
use nydus_store::{
    fixtures::{self, BuildOptions, BuiltImage, LayerSource},
    internals::{BlobLayout, Chunk, Tree},
};

#[allow(dead_code, unused_imports, reason = "shared with the tests, which use more of it")]
#[path = "../tests/it/common/mod.rs"]
mod common;

use common::{BINARY, DockerRegistry};

const ROUNDS: usize = 5;

fn main() -> anyhow::Result<()> {
    let runtime = tokio::runtime::Runtime::new()?;
    let dir = tempfile::tempdir()?;
    let registry = DockerRegistry::start();
    let mib = std::env::var("NYDUS_BENCH_MIB").ok().and_then(|text| text.parse().ok());
    let image = build(dir.path(), mib.unwrap_or(600))?;
    runtime.block_on(image.push(&registry.url(), "bench", "1"))?;
    let tree = Tree::load(image.bootstrap_path()?)?;
    let blob = &tree.blobs()[0];
    let stored = image.blobs.iter().find(|stored| stored.digest.hex() == blob.id);
    let work = Work::new(blob, &fs::read(&stored.context("the blob is built")?.path)?)?;
    println!(
        "image of {} files, {} MiB in {} chunks, stored {} MiB; median of {ROUNDS} (least to most), seconds",
        tree.summary().kinds.regular,
        work.plain.iter().map(Vec::len).sum::<usize>() >> 20,
        blob.chunks.len(),
        work.stored.len() >> 20
    );
    let url = format!("{}/v2/bench/blobs/sha256:{}", registry.url(), blob.id);
    let mut steps: [(&str, Vec<Duration>); 4] =
        ["download", "decompress", "hash", "write"].map(|name| (name, Vec::new()));
    let (mut floors, mut seeds, mut peak) = (Vec::new(), Vec::new(), 0);
    for _ in 0..ROUNDS {
        let times = [
            timed(|| runtime.block_on(download(&url)))?,
            timed(|| work.decompress())?,
            timed(|| work.hash())?,
            timed(|| work.write(dir.path()))?,
        ];
        steps.iter_mut().zip(times).for_each(|((_, all), time)| all.push(time));
        floors.push(times.iter().sum());
        let (time, memory) = preseed(dir.path(), &registry)?;
        seeds.push(time);
        peak = peak.max(memory);
    }
    for (name, times) in &mut steps {
        tell(name, times, None);
    }
    let floor = tell("floor", &mut floors, None);
    tell("preseed", &mut seeds, Some(floor));
    println!("  peak resident memory of preseed: {} MiB", peak >> 20);
    Ok(())
}

fn build(dir: &Path, mib: u64) -> anyhow::Result<BuiltImage> {
    let tree = dir.join("tree");
    fixtures::demo_tree(&tree.join("usr"), 10_000, 7)?;
    fixtures::big_tree(&tree.join("data"), mib << 20)?;
    let image = fixtures::build(
        &[LayerSource::Dir(tree.clone())],
        &BuildOptions::default(),
        &dir.join("image"),
    )?;
    fs::remove_dir_all(tree)?;
    Ok(image)
}

/// The input of each step, in memory.
struct Work {
    chunks: Vec<Chunk>,
    stored: Vec<u8>,
    plain: Vec<Vec<u8>>,
}

impl Work {
    fn new(blob: &BlobLayout, stored: &[u8]) -> anyhow::Result<Self> {
        let mut work = Self {
            chunks: blob.chunks.clone(),
            stored: stored.to_vec(),
            plain: Vec::new(),
        };
        let mut decompressor = zstd::bulk::Decompressor::new()?;
        for chunk in &work.chunks {
            let bytes = work.stored_of(chunk);
            work.plain.push(match chunk.compressed {
                true => decompressor.decompress(bytes, chunk.uncompressed_size as usize)?,
                false => bytes.to_vec(),
            });
        }
        Ok(work)
    }

    fn stored_of(&self, chunk: &Chunk) -> &[u8] {
        let start = chunk.compressed_offset as usize;
        &self.stored[start..start + chunk.compressed_size as usize]
    }

    fn decompress(&self) -> anyhow::Result<()> {
        on_all_cores(self.chunks.len(), || {
            let mut decompressor = zstd::bulk::Decompressor::new()?;
            let mut buffer = vec![0; 16 << 20];
            Ok(move |number: usize| {
                let chunk = &self.chunks[number];
                if chunk.compressed {
                    decompressor.decompress_to_buffer(self.stored_of(chunk), &mut buffer)?;
                }
                Ok(())
            })
        })
    }

    fn hash(&self) -> anyhow::Result<()> {
        on_all_cores(self.chunks.len(), || {
            Ok(|number: usize| {
                anyhow::ensure!(*blake3::hash(&self.plain[number]).as_bytes() == self.chunks[number].digest);
                Ok(())
            })
        })
    }

    fn write(&self, dir: &Path) -> anyhow::Result<()> {
        let path = dir.join("written");
        let file = File::create(&path)?;
        on_all_cores(self.chunks.len(), || {
            Ok(|number: usize| Ok(file.write_all_at(&self.plain[number], self.chunks[number].uncompressed_offset)?))
        })?;
        file.sync_data()?;
        Ok(fs::remove_file(path)?)
    }
}

/// Runs the function of `start` for each number below `count`, in one thread per core.
fn on_all_cores<F>(count: usize, start: impl Fn() -> anyhow::Result<F> + Sync) -> anyhow::Result<()>
where
    F: FnMut(usize) -> anyhow::Result<()>,
{
    let next = AtomicUsize::new(0);
    let thread = || {
        let mut work = start()?;
        loop {
            match next.fetch_add(1, Ordering::Relaxed) {
                number if number < count => work(number)?,
                _ => return anyhow::Ok(()),
            }
        }
    };
    let cores = std::thread::available_parallelism().map_or(1, NonZero::get);
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..cores).map(|_| scope.spawn(thread)).collect();
        let join = |thread: std::thread::ScopedJoinHandle<'_, anyhow::Result<()>>| {
            thread.join().unwrap_or_else(|_| anyhow::bail!("a thread panicked"))
        };
        threads.into_iter().try_for_each(join)
    })
}

async fn download(url: &str) -> anyhow::Result<()> {
    nydus_store::internals::install_crypto_provider();
    let mut response = reqwest::get(url).await?.error_for_status()?;
    while response.chunk().await?.is_some() {}
    Ok(())
}

/// Time of `preseed` with an empty root, and its peak resident memory in bytes.
fn preseed(dir: &Path, registry: &DockerRegistry) -> anyhow::Result<(Duration, u64)> {
    let root: PathBuf = dir.join("root");
    let start = Instant::now();
    let mut command = Command::new(BINARY);
    command.args([
        "preseed",
        &format!("docker://{}", registry.reference("bench", "1")),
        "--root",
    ]);
    let mut child = command.arg(&root).stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
    let mut peak = 0;
    let status = loop {
        let text = fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap_or_default();
        let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        let kib = line.and_then(|line| line.split_whitespace().next()?.parse().ok());
        peak = peak.max(kib.unwrap_or(0_u64) << 10);
        match child.try_wait()? {
            Some(status) => break status,
            None => std::thread::sleep(Duration::from_millis(20)),
        }
    };
    let took = start.elapsed();
    anyhow::ensure!(status.success(), "preseed: {status}");
    fs::remove_dir_all(root)?;
    Ok((took, peak))
}

fn timed(work: impl FnOnce() -> anyhow::Result<()>) -> anyhow::Result<Duration> {
    let start = Instant::now();
    work().map(|()| start.elapsed())
}

/// Prints and returns the median.
fn tell(what: &str, times: &mut [Duration], base: Option<Duration>) -> Duration {
    times.sort();
    let middle = times[times.len() / 2];
    let (least, most) = (times[0].as_secs_f64(), times[times.len() - 1].as_secs_f64());
    let ratio = base.map(|base| format!("   {:.2} x the lower bound", middle.as_secs_f64() / base.as_secs_f64()));
    let middle_seconds = middle.as_secs_f64();
    println!(
        "  {what:<12} {middle_seconds:>7.2} ({least:.2} to {most:.2}){}",
        ratio.unwrap_or_default()
    );
    middle
}
