//! `nydus-store bench read`: measures reading a directory tree.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::Context as _;
use clap::{Args, builder::RangedU64ValueParser};
use serde_json::{Value, json};

use super::{
    super::runtime,
    output::{OutputArgs, ensure_any_succeeded},
    progress::ProgressDisplay,
    seconds, stop_on_signals,
};
use crate::{
    bench::{
        read::{self, ReadPhase, ReadProgress, Settings, caches::DropCaches, file_list::FileList},
        report::{BenchKind, BenchReport, Subject},
        stop::StopSignal,
    },
    humanize::{megabytes, size, thousands},
};

/// Measure reading a directory tree on any file system
#[derive(Debug, Args)]
pub(super) struct BenchReadCommand {
    /// Directory to read, such as a mounted image
    #[arg(value_name = "DIR")]
    dir: PathBuf,

    /// Phases to run: walk, seq, random, all, parallel [default: all five]
    #[arg(long, value_name = "PHASE", value_delimiter = ',')]
    phases: Vec<ReadPhase>,

    /// Length of the phase `random`, in seconds
    #[arg(long, value_name = "SECS", default_value = "5", value_parser = seconds)]
    duration: Duration,

    /// Maximum length of each other phase, in seconds
    #[arg(long, value_name = "SECS", default_value = "300", value_parser = seconds)]
    limit: Duration,

    /// Reader threads of the phase `parallel`, 1 to 256
    #[arg(long, value_name = "N", default_value = "4",
          value_parser = RangedU64ValueParser::<usize>::new().range(1..=256))]
    threads: usize,

    /// Seed of the random pages
    #[arg(long, value_name = "N", default_value = "1")]
    seed: u64,

    /// Before each phase, drop the page cache of the files (files) or all kernel caches (system; needs root)
    #[arg(long, value_name = "WHAT", num_args = 0..=1, require_equals = true, default_missing_value = "files")]
    drop_caches: Option<DropCaches>,

    #[command(flatten)]
    output: OutputArgs,
}

impl BenchReadCommand {
    pub(super) fn run(&self) -> anyhow::Result<()> {
        let dir = self.dir.display();
        let metadata = self.dir.metadata().with_context(|| format!("cannot read {dir}"))?;
        anyhow::ensure!(metadata.is_dir(), "cannot read {dir}: it is not a directory");
        let output = self.output.open(BenchKind::Read)?;
        let runtime = runtime()?;
        let stop = stop_on_signals(runtime.handle())?;
        let measured = self.measure(&stop);
        runtime.shutdown_background();
        let report = measured?;
        output.show(&report)?;
        ensure_any_succeeded(&report)
    }

    fn measure(&self, stop: &StopSignal) -> anyhow::Result<BenchReport> {
        let settings = Settings {
            duration: self.duration,
            limit: self.limit,
            threads: self.threads,
            seed: self.seed,
        };
        let wanted = |phase: &ReadPhase| self.phases.is_empty() || self.phases.contains(phase);
        let mut report = BenchReport::new(BenchKind::Read, self.subject(), self.settings());
        let mut display = ProgressDisplay::new();
        // Every other phase needs the list of files.
        self.drop_caches(&FileList::default())?;
        display.begin(ReadPhase::Walk.name());
        let (row, list) = read::walk(
            &self.dir,
            &settings,
            stop,
            progress_callback(&mut display, settings.limit, 0),
        );
        let phases: Vec<_> = ReadPhase::ALL
            .into_iter()
            .filter(|phase| *phase != ReadPhase::Walk && wanted(phase))
            .collect();
        if wanted(&ReadPhase::Walk) {
            report.rows.push(row);
        }
        if list.files.is_empty() && !phases.is_empty() && !stop.is_requested() {
            anyhow::ensure!(wanted(&ReadPhase::Walk), "no regular file in {}", self.dir.display());
            return Ok(report);
        }
        for phase in phases {
            if stop.is_requested() {
                break;
            }
            self.drop_caches(&list)?;
            display.begin(phase.name());
            let (limit, goal) = match phase {
                ReadPhase::Random => (settings.duration, 0),
                ReadPhase::Seq => (settings.limit, list.largest(1).map(|entry| entry.size).sum()),
                _ => (settings.limit, list.bytes()),
            };
            let row = read::read(
                phase,
                &list,
                &settings,
                stop,
                progress_callback(&mut display, limit, goal),
            );
            report.rows.push(row);
        }
        Ok(report)
    }

    fn drop_caches(&self, list: &FileList) -> anyhow::Result<()> {
        let Some(drop) = self.drop_caches else { return Ok(()) };
        drop.now(list).with_context(|| match drop {
            DropCaches::System => "cannot drop the kernel's caches; run as root, or use --drop-caches=files",
            DropCaches::Files => "cannot drop cached pages",
        })
    }

    fn subject(&self) -> Subject {
        Subject {
            name: self.dir.display().to_string(),
            image: None,
            from: None,
            file_system: file_system(&self.dir),
        }
    }

    fn settings(&self) -> BTreeMap<String, Value> {
        let settings = json!({
            "duration": self.duration.as_secs_f64(),
            "threads": self.threads,
            "seed": self.seed,
            "drop_caches": self.drop_caches.map(DropCaches::name),
        });
        serde_json::from_value(settings).unwrap_or_default()
    }
}

/// Shows the progress of a phase by its bytes, or by its time if `goal` (bytes) is 0.
fn progress_callback(display: &mut ProgressDisplay, limit: Duration, goal: u64) -> impl FnMut(ReadProgress) {
    move |ReadProgress {
              operations,
              bytes,
              elapsed,
          }| {
        let share = match goal {
            0 => elapsed.as_secs_f64() / limit.as_secs_f64(),
            goal => bytes as f64 / goal as f64,
        };
        display.show(share.min(1.0), || {
            let rate = megabytes(bytes as f64 / elapsed.as_secs_f64().max(0.001));
            format!("{} operations, {}, {rate} MB/s", thousands(operations), size(bytes))
        });
    }
}

/// The file system type of `dir`, by its magic number (statfs(2)).
fn file_system(dir: &Path) -> Option<String> {
    const KNOWN: [(u32, &str); 8] = [
        (0x6573_5546, "fuse"),
        (0xe0f5_e1e2, "erofs"),
        (0x794c_7630, "overlayfs"),
        (0x0000_ef53, "ext4"),
        (0x5846_5342, "xfs"),
        (0x9123_683e, "btrfs"),
        (0x0102_1994, "tmpfs"),
        (0x7371_7368, "squashfs"),
    ];
    // The magic number has 32 bits, also where the field is longer.
    let number = rustix::fs::statfs(dir).ok()?.f_type as u32;
    let known = KNOWN.iter().find(|(known, _)| *known == number);
    Some(known.map_or_else(|| format!("file system {number:#x}"), |(_, name)| (*name).to_owned()))
}
