//! `nydus-store setup`: configures Podman and CRI-O to use the store.

use std::path::{Path, PathBuf};

use clap::Args;

use super::{ConfigArg, print};
use crate::{
    config::{self, Config},
    setup::{
        Plan,
        change::{Change, ChangeKind},
        layout::Layout,
    },
};

/// Configure Podman and CRI-O to use the image store
///
/// Adds the image store to /etc/containers/storage.conf or to storage.rootful.conf.d, whichever the installed version
/// reads. Adds a drop-in to registries.conf.d that makes Podman and CRI-O announce pulls. For CRI-O, adds a drop-in
/// that disables `internal_repair`, which would delete all images after an unclean stop. Keeps existing settings. It is
/// safe to run setup again.
#[derive(Debug, Args)]
pub struct SetupCommand {
    /// Print the resulting files, and write nothing
    #[arg(long)]
    print: bool,

    /// Remove what setup added, also by earlier versions
    #[arg(long)]
    remove: bool,

    /// The daemon's state directory (its --root)
    #[arg(long, value_name = "DIR", default_value = "/var/lib/nydus-store")]
    root: PathBuf,

    /// Set up the root file system at DIR, such as a host image under construction
    #[arg(long, value_name = "DIR")]
    sysroot: Option<PathBuf>,

    #[command(flatten)]
    config: ConfigArg,
}

impl SetupCommand {
    pub fn run(&self) -> anyhow::Result<()> {
        anyhow::ensure!(
            self.print || self.sysroot.is_some() || rustix::process::geteuid().is_root(),
            "setup needs root to write to /etc/containers: run it with sudo, or with --print to see the changes"
        );
        self.check_config()?;
        let layout = Layout::new(self.sysroot.as_deref(), |name| std::env::var_os(name));
        let setup = crate::setup::Setup::new(layout, &self.root)?;
        let plan = if self.remove { setup.remove()? } else { setup.add()? };
        if self.print {
            print(&preview(&plan))?;
        } else {
            plan.apply()?;
            print(&summary(&plan))?;
        }
        for note in &plan.notes {
            eprintln!("note: {note}");
        }
        Ok(())
    }

    /// Fails if the daemon's configuration is broken, since the daemon would not start. With `--sysroot`, checks the
    /// configuration in that tree.
    fn check_config(&self) -> anyhow::Result<()> {
        if let (Some(sysroot), None) = (&self.sysroot, &self.config.config) {
            let path = sysroot.join(Path::new(config::DEFAULT_PATH).strip_prefix("/")?);
            if path.exists() {
                Config::load(Some(&path))?;
            }
            return Ok(());
        }
        self.config.load().map(drop)
    }
}

/// The contents of all files after the change.
fn preview(plan: &Plan) -> String {
    let file = |change: &Change| {
        let content = change.after.as_deref().unwrap_or_default();
        format!(
            "==> {} ({}) <==\n{content}",
            change.path.display(),
            change.kind().word()
        )
    };
    let dir = |dir: &PathBuf| format!("==> {}/ ({}) <==\n", dir.display(), ChangeKind::New.word());
    let parts = existing_files(plan).map(file).chain(plan.new_dirs.iter().map(dir));
    parts.collect::<Vec<_>>().join("\n")
}

/// One line for each file, with what was done to it.
fn summary(plan: &Plan) -> String {
    let line = |change: &Change| format!("{:<10}{}\n", change.kind().word(), change.path.display());
    let dir = |dir: &PathBuf| format!("{:<10}{}/\n", ChangeKind::New.word(), dir.display());
    existing_files(plan)
        .map(line)
        .chain(plan.new_dirs.iter().map(dir))
        .collect()
}

/// Leaves out files that exist neither before nor after the change.
fn existing_files(plan: &Plan) -> impl Iterator<Item = &Change> {
    plan.changes
        .iter()
        .filter(|change| change.before.is_some() || change.after.is_some())
}
