//! What a host needs for lazy images, looked at piece by piece, and what to do about what is missing.
//!
//! Looking and judging are apart: what is judged is plain data, so that it can be tested on any host. Whatever may hang is
//! looked at within bounds of time.
//!
//! - [`kernel`]: the kernel and its file systems; [`clock`]: the clock;
//! - [`podman`], [`crio`]: what they say of themselves, by way of [`command`]; [`door`]: how they announce pulls;
//! - [`storage`]: whether the set-up is in force; [`auth_helper`]: whether pulls are announced; [`policy`]: what may be
//!   pulled at all;
//! - [`serving`]: the daemon, the cache.

use std::path::Path;

use serde::Serialize;

use crate::{
    config::Config,
    error_chain::ErrorChain as ErrorReport,
    setup::{Setup, layout::Layout, programs::Programs},
};

pub mod auth_helper;
pub mod clock;
pub mod command;
pub mod crio;
pub mod door;
pub mod kernel;
pub mod podman;
pub mod policy;
pub mod serving;
pub mod storage;

/// How a thing is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// As it should be.
    Ok,
    /// Lazy images run, but not as well as they could, or not all of them.
    Warn,
    /// No lazy image runs.
    Fail,
}

impl Status {
    /// In a word.
    pub fn word(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Warn => "warn",
            Self::Fail => "FAIL",
        }
    }
}

/// What was found about one thing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What was looked at; it does not change from version to version.
    pub name: &'static str,
    /// How it is.
    pub status: Status,
    /// What was seen.
    pub detail: String,
    /// What to do, unless all is well.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub advice: Option<String>,
}

impl Finding {
    /// All is well.
    pub fn ok(name: &'static str, detail: impl Into<String>) -> Self {
        Self {
            name,
            status: Status::Ok,
            detail: detail.into(),
            advice: None,
        }
    }

    /// Something could be better.
    pub fn warn(name: &'static str, detail: impl Into<String>, advice: impl Into<String>) -> Self {
        Self {
            status: Status::Warn,
            advice: Some(advice.into()),
            ..Self::ok(name, detail)
        }
    }

    /// Something stops lazy images.
    pub fn fail(name: &'static str, detail: impl Into<String>, advice: impl Into<String>) -> Self {
        Self {
            status: Status::Fail,
            ..Self::warn(name, detail, advice)
        }
    }
}

/// All that was found.
#[derive(Debug, Serialize)]
pub struct Report {
    /// Whether nothing stops lazy images.
    pub ok: bool,
    /// In the order of what needs what.
    pub findings: Vec<Finding>,
}

impl Report {
    /// Looks at this host, for the daemon of `root`.
    pub fn of_host(root: &Path, config: Option<&Path>) -> Self {
        let mut findings = vec![privileges(), configuration(config)];
        findings.extend(kernel::look());
        findings.extend(engines(root));
        findings.extend(serving::look(root));
        findings.push(clock::look());
        Self {
            ok: findings.iter().all(|finding| finding.status != Status::Fail),
            findings,
        }
    }

    /// How many findings are of a kind.
    pub fn count(&self, status: Status) -> usize {
        self.findings.iter().filter(|finding| finding.status == status).count()
    }
}

/// About Podman and CRI-O, whichever there is, and what they are told.
fn engines(root: &Path) -> Vec<Finding> {
    let layout = Layout::new(None, |name| std::env::var_os(name));
    let setup = Setup::new(layout, root).and_then(|setup| {
        let programs = Programs::find(&setup.layout)?;
        Ok((setup, programs))
    });
    let (setup, programs) = match setup {
        Ok(found) => found,
        Err(error) => {
            let detail = ErrorReport(&error).to_string();
            return vec![Finding::fail(
                "storage",
                detail,
                "run doctor as root, with the daemon's --root",
            )];
        }
    };
    let (podman, crio) = (podman::look(), crio::look(&programs));
    let place = setup.place(&programs);
    let mut findings = vec![podman.finding(programs.has_crio)];
    // Without either, the files count.
    if podman.is_installed() || crio.is_none() {
        findings.push(storage::look(&setup, place, &podman));
    }
    findings.extend(crio.iter().flat_map(|crio| crio.findings(&setup, place)));
    let doors = [podman.door(), crio.as_ref().and_then(crio::Crio::door)];
    let runs_helper = doors.contains(&Some(door::Door::Helper));
    findings.extend([
        storage::files(root),
        auth_helper::look(&setup.layout, root, runs_helper),
        policy::look(&setup.layout),
    ]);
    findings
}

fn privileges() -> Finding {
    if rustix::process::geteuid().is_root() {
        Finding::ok("user", "root")
    } else {
        Finding::warn(
            "user",
            "not root: what follows is seen as this user, whose Podman is another than root's",
            "run doctor as root (sudo), as Podman is run for lazy images",
        )
    }
}

/// About the configuration.
fn configuration(path: Option<&Path>) -> Finding {
    match Config::load(path) {
        Ok(_) => {
            let named = path.unwrap_or(Path::new(crate::config::DEFAULT_PATH));
            let detail = if named.exists() {
                format!("{} is in order", named.display())
            } else {
                "the defaults: there is no file".to_owned()
            };
            Finding::ok("configuration", detail)
        }
        Err(error) => {
            let advice = "mend the file, or delete it: every key has a default. The daemon does not start with it";
            Finding::fail("configuration", ErrorReport(&error).to_string(), advice)
        }
    }
}
