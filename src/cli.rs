//! The command line: [`Cli`] parses the arguments and runs one command.

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
mod columns;
mod demo;
mod doctor;
mod gc;
mod image_arg;
mod inspect;
mod job;
mod mount;
mod preseed;
mod registered_images;
mod serve;
mod setup;
mod signals;
mod status;
mod stop;
mod trace;
mod verify;

/// Run Nydus container images with Podman and CRI-O before they are downloaded.
///
/// Exit status: 0 done, 1 failed, 2 wrong usage.
#[derive(Debug, Parser)]
#[command(version, max_term_width = 100)]
pub struct Cli {
    /// Log level (error, warn, info, debug, trace) or filter, such as info,nydus_store::registry=debug
    ///
    /// The default is info for serve, setup, doctor, mount and inspect, warn for demo, and error for other commands.
    #[arg(long, global = true, env = "NYDUS_STORE_LOG", value_name = "LEVEL")]
    log: Option<String>,

    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Serve(serve::ServeCommand),
    Stop(stop::StopCommand),
    Setup(setup::SetupCommand),
    Doctor(doctor::DoctorCommand),
    Mount(mount::MountCommand),
    Inspect(inspect::InspectCommand),
    Pull(registered_images::PullCommand),
    Images(registered_images::ImagesCommand),
    Rm(registered_images::RmCommand),
    Status(status::StatusCommand),
    Pin(registered_images::PinCommand),
    Unpin(registered_images::UnpinCommand),
    Preseed(preseed::PreseedCommand),
    Verify(verify::VerifyCommand),
    Gc(gc::GcCommand),
    Trace(trace::TraceCommand),
    Bench(bench::BenchCommand),
    AuthHelper(auth_helper::AuthHelperCommand),
    Demo(demo::DemoCommand),
}

impl Command {
    /// The log level without `--log`. Commands whose output people read log less.
    fn default_log(&self) -> &'static str {
        match self {
            Self::Demo(_) => "warn",
            // These commands print their failures themselves.
            Self::Pull(_) | Self::Images(_) | Self::Rm(_) | Self::Pin(_) | Self::Unpin(_) => "error",
            Self::Status(_) | Self::Gc(_) => "error",
            Self::Preseed(_) | Self::Verify(_) | Self::Trace(_) | Self::Bench(_) | Self::AuthHelper(_) => "error",
            _ => "info",
        }
    }
}

/// `--root`, for commands that use the daemon's state directory.
#[derive(Debug, clap::Args)]
struct RootArg {
    /// State directory with the cache and the image store (DIR/store)
    #[arg(long, value_name = "DIR", default_value = "/var/lib/nydus-store")]
    root: PathBuf,
}

/// `--config`, for commands that access registries.
#[derive(Debug, clap::Args)]
struct ConfigArg {
    /// Configuration file [default: /etc/nydus-store/config.toml, if it exists]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

impl ConfigArg {
    fn load(&self) -> anyhow::Result<crate::config::Config> {
        Ok(crate::config::Config::load(self.config.as_deref())?)
    }
}

impl Cli {
    /// Runs the command.
    pub fn run(self) -> anyhow::Result<()> {
        log_to_stderr(self.log.as_deref().unwrap_or(self.command.default_log()))?;
        match self.command {
            Command::Serve(serve) => serve.run(),
            Command::Stop(stop) => stop.run(),
            Command::Setup(setup) => setup.run(),
            Command::Doctor(doctor) => doctor.run(),
            Command::Mount(mount) => mount.run(),
            Command::Inspect(inspect) => inspect.run(),
            Command::Pull(pull) => pull.run(),
            Command::Images(images) => images.run(),
            Command::Rm(rm) => rm.run(),
            Command::Status(status) => status.run(),
            Command::Pin(pin) => pin.run(),
            Command::Unpin(unpin) => unpin.run(),
            Command::Preseed(preseed) => preseed.run(),
            Command::Verify(verify) => verify.run(),
            Command::Gc(gc) => gc.run(),
            Command::Trace(trace) => trace.run(),
            Command::Bench(bench) => bench.run(),
            Command::AuthHelper(helper) => helper.run(),
            Command::Demo(demo) => demo.run(),
        }
    }
}

/// Prints to standard output. Ignores a closed pipe (`… | head`).
fn print(text: &str) -> anyhow::Result<()> {
    match std::io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => Err(error).context("cannot print"),
        _ => Ok(()),
    }
}

fn log_to_stderr(filter: &str) -> anyhow::Result<()> {
    // nydus-store logs the libraries' errors itself, with the image's name.
    let filter = EnvFilter::try_new(format!(
        "nydus_rafs=error,nydus_storage=error,nydus_builder=error,{filter}"
    ))
    .with_context(|| format!("invalid log level or filter `{filter}`"))?;
    let terminal = std::io::stderr().is_terminal();
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(terminal);
    // journald adds time stamps itself.
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
        .context("cannot start worker threads")
}
