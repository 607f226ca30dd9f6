//! Measures `podman run` of an ordinary image with a pull, and of the same content as a Nydus image with an empty and
//! with a full cache. Also measures the daemon's memory with up to 20 images.
//!
//! Run `cargo bench --bench podman_run` as root, with Podman and `docker-registry` installed. Everything runs on
//! loopback, and the ratios compare alternating runs. `NYDUS_BENCH_MIB` sets the image's size in MiB (default 512).

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
    fs,
    path::Path,
    time::{Duration, Instant},
};

use nydus_store::fixtures::{self, BuildOptions, BuiltImage, LayerSource};

#[allow(dead_code, unused_imports, reason = "shared with the tests, which use more of it")]
#[path = "../tests/it/common/mod.rs"]
mod common;

use common::{DockerRegistry, Podman, Release, RunPodman as _, Serve};

const ROUNDS: usize = 5;
const IMAGES: usize = 20;

fn main() -> anyhow::Result<()> {
    let runtime = tokio::runtime::Runtime::new()?;
    let dir = tempfile::tempdir()?;
    let registry = DockerRegistry::start();
    let mib = std::env::var("NYDUS_BENCH_MIB")
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(512);
    let (plain, nydus) = build_pair(dir.path(), mib)?;
    runtime.block_on(async {
        plain.push(&registry.url(), "bench/plain", "1").await?;
        nydus.push(&registry.url(), "bench/nydus", "1").await
    })?;
    starts(&registry, mib, size(&plain), size(&nydus));
    memory(&registry, &runtime, dir.path())
}

fn build_pair(dir: &Path, mib: u64) -> anyhow::Result<(BuiltImage, BuiltImage)> {
    let tree = dir.join("tree");
    runnable(&tree)?;
    fixtures::demo_tree(&tree.join("usr"), 2000, 7)?;
    fixtures::big_tree(&tree.join("data"), mib << 20)?;
    let layers = [LayerSource::Dir(tree)];
    let options = BuildOptions::default();
    let plain = fixtures::plain_image(&layers, &options.image, &dir.join("plain"))?;
    Ok((plain, fixtures::build(&layers, &options, &dir.join("nydus"))?))
}

fn runnable(tree: &Path) -> anyhow::Result<()> {
    fs::create_dir_all(tree.join("bin"))?;
    fs::copy("/bin/busybox", tree.join("bin/sh"))?;
    Ok(())
}

fn size(image: &BuiltImage) -> u64 {
    image.blobs.iter().map(|blob| blob.size).sum()
}

/// Time until a container prints a line, starting with empty Podman storage.
fn run_once(podman: &Podman, reference: &str) -> Duration {
    podman.command(&["rmi", "--all", "--force"]).output().ok();
    let start = Instant::now();
    podman.run(&["run", "--rm", "--network", "none", reference, "sh", "-c", "echo hi"]);
    start.elapsed()
}

fn starts(registry: &DockerRegistry, mib: u64, plain_size: u64, nydus_size: u64) {
    let (mut pulled, mut cold, mut warm) = (Vec::new(), Vec::new(), Vec::new());
    let mut fetched = 0;
    let nydus = registry.reference("bench/nydus", "1");
    for _ in 0..ROUNDS {
        let ordinary = Podman::of(Release::Four, None, registry.host());
        pulled.push(run_once(&ordinary, &registry.reference("bench/plain", "1")));
        let serve = Serve::start();
        let lazy = Podman::of(Release::Four, Some(serve.root()), registry.host());
        let before = registry.accesses().len();
        cold.push(run_once(&lazy, &nydus));
        fetched = registry.blob_bytes_since(before);
        warm.push(run_once(&lazy, &nydus));
    }
    println!("podman run, image of {mib} MiB, median of {ROUNDS} (least to most), seconds");
    let base = median(&mut pulled);
    for (what, times) in [
        ("ordinary pull", &mut pulled),
        ("lazy, empty cache", &mut cold),
        ("lazy, full cache", &mut warm),
    ] {
        let middle = median(times);
        println!(
            "  {what:<18} {:>7.2} ({:.2} to {:.2})   {:.3} x the ordinary pull",
            middle.as_secs_f64(),
            times[0].as_secs_f64(),
            times[times.len() - 1].as_secs_f64(),
            middle.as_secs_f64() / base.as_secs_f64()
        );
    }
    println!(
        "  fetched by a lazy start from an empty cache: {} of {} bytes ({:.2} %); the ordinary image has {plain_size}",
        fetched,
        nydus_size,
        fetched as f64 * 100.0 / nydus_size as f64
    );
}

/// Sorts `times` and returns the median.
fn median(times: &mut [Duration]) -> Duration {
    times.sort();
    times[times.len() / 2]
}

fn memory(registry: &DockerRegistry, runtime: &tokio::runtime::Runtime, dir: &Path) -> anyhow::Result<()> {
    let serve = Serve::start();
    let podman = Podman::of(Release::Four, Some(serve.root()), registry.host());
    println!("resident memory of the daemon, images of 2000 files and some 30 MB");
    println!("  {:>2} images {:>7.1} MiB", 0, mebibytes(&serve));
    for number in 1..=IMAGES {
        let name = format!("bench/many-{number}");
        let tree = dir.join(format!("tree-{number}"));
        runnable(&tree)?;
        fixtures::demo_tree(&tree.join("usr"), 2000, number as u64)?;
        let out = dir.join(format!("out-{number}"));
        let image = fixtures::build(&[LayerSource::Dir(tree.clone())], &BuildOptions::default(), &out)?;
        runtime.block_on(image.push(&registry.url(), &name, "1"))?;
        let reference = registry.reference(&name, "1");
        podman.run(&[
            "run",
            "--rm",
            "--network",
            "none",
            &reference,
            "sh",
            "-c",
            "cat $(find /usr -type f) >/dev/null",
        ]);
        fs::remove_dir_all(tree)?;
        fs::remove_dir_all(out)?;
        if number == 1 || number == IMAGES {
            println!("  {number:>2} images {:>7.1} MiB", mebibytes(&serve));
        }
    }
    Ok(())
}

fn mebibytes(serve: &Serve) -> f64 {
    serve.resident_bytes() as f64 / f64::from(1 << 20)
}
