//! What a host needs for lazy images, looked at piece by piece, and what to do about what is missing.
//!
//! Looking and judging are apart: what is judged is plain data, so that it can be tested on any host. Whatever may hang is
//! looked at within bounds of time.
//!
//! - [`kernel`]: the kernel and its file systems; [`clock`]: the clock;
//! - [`podman`]: what Podman says of itself, by way of [`command`]; [`drop_ins`]: whether the set-up is in force;
//!   [`auth_helper`]: whether credentials are handed over;
//! - [`serving`]: the daemon, the mirror, the cache.

use std::path::Path;

use serde::Serialize;

use crate::{config::Config, report::Report as ErrorReport};

pub mod auth_helper;
pub mod clock;
pub mod command;
pub mod drop_ins;
pub mod kernel;
pub mod podman;
pub mod serving;

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
        let (finding, config) = configuration(config);
        let mut findings = vec![privileges(), finding];
        findings.extend(kernel::look());
        let podman = podman::look();
        findings.push(podman.finding());
        findings.extend(drop_ins::look(root, &config.mirror, &podman));
        findings.push(auth_helper::look(root));
        findings.extend(serving::look(root, &config.mirror, podman.needs_mirror()));
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

/// The configuration; with a broken one the rest is looked at as if there were none.
fn configuration(path: Option<&Path>) -> (Finding, Config) {
    match Config::load(path) {
        Ok(config) => {
            let named = path.unwrap_or(Path::new(crate::config::DEFAULT_PATH));
            let detail = if named.exists() {
                format!("{} is in order", named.display())
            } else {
                "the defaults: there is no file".to_owned()
            };
            (Finding::ok("configuration", detail), config)
        }
        Err(error) => {
            let advice = "mend the file, or delete it: every key has a default. The daemon does not start with it";
            let finding = Finding::fail("configuration", ErrorReport(&error).to_string(), advice);
            (finding, Config::default())
        }
    }
}
