//! `nydus-store setup`

use std::path::{Path, PathBuf};

use clap::Args;

use super::{ConfigArg, print};
use crate::{
    config::{self, Config},
    setup::{
        Plan,
        change::{Change, Kind},
        layout::Layout,
    },
};

/// Tell Podman and CRI-O where the store is
///
/// Names the store where the installed versions read it, /etc/containers/storage.conf or storage.rootful.conf.d beside
/// it, and has them announce their pulls, whatever the registry (registries.conf.d). CRI-O gets a drop-in too, without
/// which it deletes all images after an unclean stop. What the person has set stays in force. It may be run again at
/// any time.
#[derive(Debug, Args)]
pub struct Setup {
    /// Print what would be written, file by file, and write nothing
    #[arg(long)]
    print: bool,

    /// Take out what setup has put in, this version or an earlier one
    #[arg(long)]
    remove: bool,

    /// Where the daemon keeps everything (its --root)
    #[arg(long, value_name = "DIR", default_value = "/var/lib/nydus-store")]
    root: PathBuf,

    /// Set up the tree of files at DIR, such as an image that is being built, instead of this host
    #[arg(long, value_name = "DIR")]
    sysroot: Option<PathBuf>,

    #[command(flatten)]
    config: ConfigArg,
}

impl Setup {
    pub fn run(&self) -> anyhow::Result<()> {
        anyhow::ensure!(
            self.print || self.sysroot.is_some() || rustix::process::geteuid().is_root(),
            "setup needs root, because it writes to /etc/containers: run it with sudo, or with --print to see what it \
             would write"
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
            eprintln!("Note: {note}");
        }
        Ok(())
    }

    /// The daemon does not start with a broken configuration, and a store that is not served is of no use. A tree has a
    /// configuration of its own.
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

/// The files as they would be.
fn preview(plan: &Plan) -> String {
    let file = |change: &Change| {
        let content = change.after.as_deref().unwrap_or_default();
        format!(
            "==> {} ({}) <==\n{content}",
            change.path.display(),
            change.kind().word()
        )
    };
    let dir = |dir: &PathBuf| format!("==> {}/ ({}) <==\n", dir.display(), Kind::New.word());
    let parts = relevant(plan).map(file).chain(plan.new_dirs.iter().map(dir));
    parts.collect::<Vec<_>>().join("\n")
}

/// What was done.
fn summary(plan: &Plan) -> String {
    let line = |change: &Change| format!("{:<10}{}\n", change.kind().word(), change.path.display());
    let dir = |dir: &PathBuf| format!("{:<10}{}/\n", Kind::New.word(), dir.display());
    relevant(plan).map(line).chain(plan.new_dirs.iter().map(dir)).collect()
}

/// All but a file that neither is nor shall be.
fn relevant(plan: &Plan) -> impl Iterator<Item = &Change> {
    plan.changes
        .iter()
        .filter(|change| change.before.is_some() || change.after.is_some())
}
