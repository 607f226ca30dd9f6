//! The command line.

use std::{
    io::{IsTerminal as _, Write as _},
    path::PathBuf,
};

use anyhow::Context as _;
use clap::{Parser, Subcommand};
use tokio::runtime::{Builder, Runtime};
use tracing_subscriber::EnvFilter;

mod auth_helper;
mod bench;
mod demo;
mod doctor;
mod image_arg;
mod inspect;
mod job;
mod known;
mod mount;
mod preseed;
mod serve;
mod setup;
mod signals;
mod trace;
mod verify;

/// Run Nydus container images with Podman and CRI-O before they are downloaded.
///
/// Exit status: 0 done, 1 failed, 2 wrong usage.
#[derive(Debug, Parser)]
#[command(version, max_term_width = 100)]
pub struct Cli {
    /// What to log: error, warn, info, debug, trace, or a filter like `info,nydus_store::registry=debug`
    /// [default: info for serve, mount and inspect]
    #[arg(long, global = true, env = "NYDUS_STORE_LOG", value_name = "LEVEL")]
    log: Option<String>,

    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve the image store to Podman and CRI-O
    Serve(serve::Serve),
    /// Tell Podman and CRI-O where the store is
    Setup(setup::Setup),
    /// Check whether this host can run lazy images, and tell what to do
    Doctor(doctor::Doctor),
    /// Mount one image by itself, until interrupted
    Mount(mount::Mount),
    /// Show what an image is made of
    Inspect(inspect::Inspect),
    Pull(known::Pull),
    Images(known::Images),
    Rm(known::Rm),
    /// Fetch all of images beforehand, so that they run without a network
    ///
    /// Every chunk is fetched, verified and kept; an image's name is noted when all of it is there. Interrupted, the
    /// same command goes on where it stopped; a second time, it checks what is there and fetches nothing. A running daemon
    /// does the work itself.
    Preseed(preseed::Preseed),
    /// Check every byte that is cached
    ///
    /// Says of each image known on this host whether it is complete (it runs without a network), incomplete (what is
    /// missing is fetched when it is read) or corrupt. Exit status 1 if something is corrupt and stays so, or a REF is not
    /// known. A running daemon does the work itself.
    Verify(verify::Verify),
    /// See, export and import what starts of images have needed
    ///
    /// Which chunks an image needs first is noted when a container of it runs, and fetched beforehand at the next start from an
    /// empty cache. A trace that was made on one host speeds up others.
    Trace(trace::TraceCommand),
    /// Measure how fast chunks are fetched, or a mounted tree is read
    Bench(bench::Bench),
    AuthHelper(auth_helper::AuthHelper),
    /// See it at work: a made-up image, a registry and a store, with nothing left behind
    Demo(demo::Demo),
}

impl Command {
    /// What to log where nothing is said: what these print is for reading, and log lines are in the way.
    fn default_log(&self) -> &'static str {
        match self {
            Self::Demo(_) => "warn",
            // They tell of failures themselves.
            Self::Pull(_) | Self::Images(_) | Self::Rm(_) => "error",
            Self::Preseed(_) | Self::Verify(_) | Self::Trace(_) | Self::Bench(_) | Self::AuthHelper(_) => "error",
            _ => "info",
        }
    }
}

/// Option of the commands that use the daemon's root.
#[derive(Debug, clap::Args)]
struct RootArg {
    /// Where everything is kept; the store is mounted on DIR/store
    #[arg(long, value_name = "DIR", default_value = "/var/lib/nydus-store")]
    root: PathBuf,
}

/// Options of the commands that talk to registries.
#[derive(Debug, clap::Args)]
struct ConfigArg {
    /// The configuration file [default: /etc/nydus-store/config.toml, which may be missing]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

impl ConfigArg {
    fn load(&self) -> anyhow::Result<crate::config::Config> {
        Ok(crate::config::Config::load(self.config.as_deref())?)
    }
}

impl Cli {
    /// Does what was asked for.
    pub fn run(self) -> anyhow::Result<()> {
        log_to_stderr(self.log.as_deref().unwrap_or(self.command.default_log()))?;
        match self.command {
            Command::Serve(serve) => serve.run(),
            Command::Setup(setup) => setup.run(),
            Command::Doctor(doctor) => doctor.run(),
            Command::Mount(mount) => mount.run(),
            Command::Inspect(inspect) => inspect.run(),
            Command::Pull(pull) => pull.run(),
            Command::Images(images) => images.run(),
            Command::Rm(rm) => rm.run(),
            Command::Preseed(preseed) => preseed.run(),
            Command::Verify(verify) => verify.run(),
            Command::Trace(trace) => trace.run(),
            Command::Bench(bench) => bench.run(),
            Command::AuthHelper(helper) => helper.run(),
            Command::Demo(demo) => demo.run(),
        }
    }
}

/// Prints to standard output. That nobody reads it to the end (`… | head`) is no error.
fn print(text: &str) -> anyhow::Result<()> {
    match std::io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => Err(error).context("cannot print"),
        _ => Ok(()),
    }
}

fn log_to_stderr(filter: &str) -> anyhow::Result<()> {
    // The libraries below say in many words what is told here once, with the image's name. That a reply is not wanted any
    // more, since who asked has been killed, is no error.
    let filter = EnvFilter::try_new(format!(
        "fuser=error,fuser::reply=off,nydus_rafs=error,nydus_storage=error,nydus_builder=error,{filter}"
    ))
    .with_context(|| format!("`{filter}` is no log level or filter"))?;
    let terminal = std::io::stderr().is_terminal();
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(terminal);
    // The journal notes the time by itself.
    let started = match std::env::var_os("JOURNAL_STREAM") {
        Some(_) => builder.without_time().try_init(),
        None => builder.try_init(),
    };
    started.map_err(|error| anyhow::anyhow!("cannot start logging: {error}"))
}

fn runtime() -> anyhow::Result<Runtime> {
    Builder::new_multi_thread()
        .enable_all()
        .thread_name("worker")
        .build()
        .context("cannot start threads")
}
