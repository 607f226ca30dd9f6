//! Checks a host's requirements for lazy images. Each check yields a [`Finding`] with advice.
//!
//! Collecting and judging are separate functions: judging takes plain data, so that it can be tested on any host.
//! Operations that may hang have a time-out.
//!
//! - [`kernel`]: the kernel and its file systems; [`clock`]: the system clock;
//! - [`podman`], [`crio`]: the container engines, queried by [`command`]; [`announcement_method`]: how they announce
//!   pulls;
//! - [`storage`]: whether the engines use the store; [`auth_helper`]: whether they announce pulls; [`policy`]: the
//!   signature policy;
//! - [`serving`]: the daemon and the cache's disk space.

use std::path::Path;

use serde::Serialize;

use crate::{
    config::Config,
    error_chain::ErrorChain,
    setup::{Setup, layout::Layout, programs::Programs},
};

pub mod announcement_method;
pub mod auth_helper;
pub mod clock;
pub mod command;
pub mod crio;
pub mod kernel;
pub mod podman;
pub mod policy;
pub mod serving;
pub mod storage;

/// Severity of a finding.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// No problem.
    Ok,
    /// Some lazy images do not run, or run with restrictions.
    Warn,
    /// Lazy images cannot run.
    Fail,
}

impl Status {
    /// The word for output.
    pub fn word(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Warn => "warn",
            Self::Fail => "FAIL",
        }
    }
}

/// The result of one check.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// Name of the check; stable across versions.
    pub name: &'static str,
    /// Severity.
    pub status: Status,
    /// What was found.
    pub detail: String,
    /// What to do, if there is a problem.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub advice: Option<String>,
}

impl Finding {
    /// A finding without a problem.
    pub fn ok(name: &'static str, detail: impl Into<String>) -> Self {
        Self {
            name,
            status: Status::Ok,
            detail: detail.into(),
            advice: None,
        }
    }

    /// A problem that restricts lazy images.
    pub fn warn(name: &'static str, detail: impl Into<String>, advice: impl Into<String>) -> Self {
        Self {
            status: Status::Warn,
            advice: Some(advice.into()),
            ..Self::ok(name, detail)
        }
    }

    /// A problem that prevents lazy images.
    pub fn fail(name: &'static str, detail: impl Into<String>, advice: impl Into<String>) -> Self {
        Self {
            status: Status::Fail,
            ..Self::warn(name, detail, advice)
        }
    }
}

/// All findings.
#[derive(Debug, Serialize)]
pub struct DoctorReport {
    /// Whether no check failed.
    pub ok: bool,
    /// Findings, in the order of dependency.
    pub findings: Vec<Finding>,
}

impl DoctorReport {
    /// Checks this host, for the daemon of `root`.
    pub fn of_host(root: &Path, config: Option<&Path>) -> Self {
        let mut findings = vec![privileges(), configuration(config)];
        findings.extend(kernel::check());
        findings.extend(engines(root));
        findings.extend(serving::check(root));
        findings.push(clock::check());
        Self {
            ok: findings.iter().all(|finding| finding.status != Status::Fail),
            findings,
        }
    }

    /// Number of findings with `status`.
    pub fn count(&self, status: Status) -> usize {
        self.findings.iter().filter(|finding| finding.status == status).count()
    }
}

/// Checks Podman, CRI-O and their configuration.
fn engines(root: &Path) -> Vec<Finding> {
    let layout = Layout::new(None, |name| std::env::var_os(name));
    let setup = Setup::new(layout, root).and_then(|setup| {
        let programs = Programs::find(&setup.layout)?;
        Ok((setup, programs))
    });
    let (setup, programs) = match setup {
        Ok(found) => found,
        Err(error) => {
            let detail = ErrorChain(&error).to_string();
            return vec![Finding::fail(
                "storage",
                detail,
                "run doctor as root, with the daemon's --root",
            )];
        }
    };
    let (podman, crio) = (podman::check(), crio::check(&programs));
    let placement = setup.placement(&programs);
    let mut findings = vec![podman.finding(programs.has_crio)];
    // Without both engines, checks the configuration files alone.
    if podman.is_installed() || crio.is_none() {
        findings.push(storage::check(&setup, placement, &podman));
    }
    findings.extend(crio.iter().flat_map(|crio| crio.findings(&setup, placement)));
    let methods = [
        podman.announcement_method(),
        crio.as_ref().and_then(crio::InstalledCrio::announcement_method),
    ];
    let runs_helper = methods.contains(&Some(announcement_method::AnnouncementMethod::Helper));
    findings.extend([
        storage::files(root),
        auth_helper::check(&setup.layout, root, runs_helper),
        policy::check(&setup.layout),
    ]);
    findings
}

fn privileges() -> Finding {
    if rustix::process::geteuid().is_root() {
        Finding::ok("user", "root")
    } else {
        Finding::warn(
            "user",
            "not root: the checks below concern this user's Podman, not root's",
            "run doctor as root (sudo), because lazy images need root's Podman",
        )
    }
}

/// Checks the daemon's configuration file.
fn configuration(path: Option<&Path>) -> Finding {
    match Config::load(path) {
        Ok(_) => {
            let named = path.unwrap_or(Path::new(crate::config::DEFAULT_PATH));
            let detail = if named.exists() {
                format!("{} is valid", named.display())
            } else {
                "no configuration file: defaults apply".to_owned()
            };
            Finding::ok("configuration", detail)
        }
        Err(error) => {
            let advice = "fix the file, or delete it to use the defaults; the daemon does not start until then";
            Finding::fail("configuration", ErrorChain(&error).to_string(), advice)
        }
    }
}
