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
        names::Pattern,
    },
};

/// Tell Podman and CRI-O where the store and the mirror are
///
/// Adds the store to /etc/containers/storage.conf, and gives each registry named the mirror, which Podman 5.1 and later
/// need, in /etc/containers/registries.conf.d/zz-nydus-store.conf. What these files and others there have already stays in
/// force. It may be run again at any time: registries named before keep the mirror.
#[derive(Debug, Args)]
pub struct Setup {
    /// A registry, as in names of images (docker.io, registry.example:5000), that is to have the mirror; may be repeated.
    /// *.example.com stands for the registries below a domain that this host knows from `podman login` or
    /// registries.conf
    #[arg(long = "registry", value_name = "HOST")]
    registries: Vec<String>,

    /// Have Podman (5.2 and later) hand over the credentials of each pull, for daemons that do not find them in root's
    /// auth files
    #[arg(long, conflicts_with = "remove")]
    auth_helper: bool,

    /// Print what would be written, file by file, and write nothing
    #[arg(long)]
    print: bool,

    /// Take out what setup has put in; with --registry, take the mirror from these registries only
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
        let patterns: Result<Vec<Pattern>, _> = self.registries.iter().map(|name| name.parse()).collect();
        let patterns = patterns?;
        anyhow::ensure!(
            self.print || self.sysroot.is_some() || rustix::process::geteuid().is_root(),
            "setup needs root, because it writes to /etc/containers: run it with sudo, or with --print to see what it \
             would write"
        );
        let layout = Layout::new(self.sysroot.as_deref(), |name| std::env::var_os(name));
        let setup = crate::setup::Setup::new(layout, &self.root)?;
        let plan = match (self.remove, patterns.is_empty()) {
            (false, _) => setup.add(&patterns, self.auth_helper, &self.load_config()?)?,
            (true, false) => setup.remove_registries(&patterns, &self.load_config()?)?,
            (true, true) => setup.remove()?,
        };
        if self.print {
            print(&preview(&plan))?;
        } else {
            plan.apply()?;
            print(&summary(&plan))?;
        }
        let mirrored = plan
            .changes
            .iter()
            .any(|change| change.path == setup.layout.ours() && change.after.is_some());
        let hint = (!self.remove && !mirrored).then(|| {
            "no registry has the mirror. Podman 5.1 and later find no Nydus layers without it: name each registry with \
             --registry HOST"
                .to_owned()
        });
        for note in plan.notes.iter().chain(&hint) {
            eprintln!("Note: {note}");
        }
        Ok(())
    }

    /// A tree has a configuration of its own.
    fn load_config(&self) -> anyhow::Result<Config> {
        match (&self.sysroot, &self.config.config) {
            (Some(sysroot), None) => {
                let path = sysroot.join(Path::new(config::DEFAULT_PATH).strip_prefix("/")?);
                Ok(if path.exists() {
                    Config::load(Some(&path))?
                } else {
                    Config::default()
                })
            }
            _ => self.config.load(),
        }
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
    let dir = plan
        .new_dir
        .as_ref()
        .map(|dir| format!("==> {}/ ({}) <==\n", dir.display(), Kind::New.word()));
    relevant(plan).map(file).chain(dir).collect::<Vec<_>>().join("\n")
}

/// What was done.
fn summary(plan: &Plan) -> String {
    let line = |change: &Change| format!("{:<10}{}\n", change.kind().word(), change.path.display());
    let dir = plan
        .new_dir
        .as_ref()
        .map(|dir| format!("{:<10}{}/\n", Kind::New.word(), dir.display()));
    relevant(plan).map(line).chain(dir).collect()
}

/// All but a file that neither is nor shall be.
fn relevant(plan: &Plan) -> impl Iterator<Item = &Change> {
    plan.changes
        .iter()
        .filter(|change| change.before.is_some() || change.after.is_some())
}
