//! Checks whether Podman and CRI-O announce pulls by the auth helper.

use std::{
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

use super::{Finding, Status};
use crate::{
    error_chain::ErrorChain,
    registries_conf::{Registries, parse_auth_helper},
    setup::{
        SetupError, auth_helper,
        layout::{self, Layout},
    },
};

const NAME: &str = "auth-helper";
const RUN_SETUP: &str = "run `nydus-store setup`, with the daemon's --root if it has one";

/// Checks the configured auth helper for the daemon of `root`. `needed` says whether an engine of this host runs it.
pub fn check(layout: &Layout, root: &Path, needed: bool) -> Finding {
    let root = std::path::absolute(root).unwrap_or_else(|_| root.to_owned());
    let finding = judge(layout, &root)
        .unwrap_or_else(|error| Finding::warn(NAME, ErrorChain(&error).to_string(), "fix the file"));
    match finding.status {
        // No image is lazy unless its pull is announced.
        Status::Warn if needed => Finding {
            status: Status::Fail,
            ..finding
        },
        _ => finding,
    }
}

/// The auth helper that registries.conf and its drop-ins configure.
struct ConfiguredHelper {
    program: String,
    /// The file that configures it.
    by: PathBuf,
}

/// Finds the configured helper. The last file is in force.
fn configured(layout: &Layout) -> Result<Option<ConfiguredHelper>, SetupError> {
    let path = layout.registries_drop_in();
    let ours = match layout::read_optional(&path)? {
        Some(text) => parse_auth_helper(&path, &text)?,
        None => None,
    };
    let registries = Registries::read(&layout.registries, &layout.registries_drop_ins, &path)?;
    let other = registries.auth_helper();
    let ours = ours.filter(|_| other.is_none_or(|other| !other.is_after_ours));
    Ok(match (ours, other) {
        (Some(program), _) => Some(ConfiguredHelper { program, by: path }),
        (None, Some(other)) => Some(ConfiguredHelper {
            program: other.program.clone(),
            by: other.file.clone(),
        }),
        (None, None) => None,
    })
}

fn judge(layout: &Layout, root: &Path) -> Result<Finding, SetupError> {
    let script = layout.auth_helper();
    let at = layout.in_sysroot(Path::new(script));
    let text = layout::read_optional(&at)?;
    Ok(match (configured(layout)?, text) {
        (None, _) => Finding::warn(
            NAME,
            "no auth helper is configured, so pulls are not announced",
            RUN_SETUP,
        ),
        (Some(configured), Some(text)) if configured.program == script => {
            judge_script(layout, script, &at, &text, root)
        }
        (Some(configured), None) if configured.program == script => {
            let detail = format!("{} configures {script}, which is missing", configured.by.display());
            Finding::warn(NAME, detail, RUN_SETUP)
        }
        (Some(configured), _) => other_helper(&configured),
    })
}

fn other_helper(configured: &ConfiguredHelper) -> Finding {
    let detail = format!(
        "{} configures another auth helper, {}, so pulls are not announced to nydus-store",
        configured.by.display(),
        configured.program
    );
    let advice = format!(
        "remove that line from {}, or rename the file so that it sorts earlier; then {RUN_SETUP}",
        configured.by.display()
    );
    Finding::warn(NAME, detail, advice)
}

/// Judges the script with the path `at` and the contents `text`.
fn judge_script(layout: &Layout, script: &str, at: &Path, text: &str, root: &Path) -> Finding {
    let warn = |detail: String| Finding::warn(NAME, detail, RUN_SETUP);
    if !is_executable(at) {
        return warn(format!("{script} is not an executable file"));
    }
    let Some((program, of)) = auth_helper::parse(text) else {
        let advice = format!(
            "make sure that it runs `nydus-store auth-helper --root {}`, or move it away and {RUN_SETUP}",
            root.display()
        );
        return Finding::warn(NAME, format!("{script} was not written by setup"), advice);
    };
    if !is_executable(&layout.in_sysroot(&program)) {
        return warn(format!(
            "{script} runs {}, which is missing or not executable",
            program.display()
        ));
    }
    if of != root {
        return warn(format!(
            "{script} announces pulls to the daemon of {}, not to that of {}",
            of.display(),
            root.display()
        ));
    }
    Finding::ok(NAME, format!("{script} announces each pull"))
}

fn is_executable(path: &Path) -> bool {
    path.metadata()
        .is_ok_and(|data| data.is_file() && data.permissions().mode() & 0o111 != 0)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::{doctor::Status, setup::Setup};

    const ROOT: &str = "/var/lib/nydus-store";
    const SCRIPT: &str = "etc/containers/nydus-store-auth-helper";

    /// A sysroot on which setup was run.
    struct SetUpHost(tempfile::TempDir);

    impl SetUpHost {
        fn new() -> Self {
            let host = Self(tempfile::tempdir().unwrap());
            host.write("usr/bin/nydus-store", "", 0o755);
            let setup = Setup::new(host.layout(), Path::new(ROOT)).unwrap();
            setup.add().unwrap().apply().unwrap();
            host
        }

        fn layout(&self) -> Layout {
            Layout::new(Some(self.0.path()), |_| None)
        }

        fn write(&self, path: &str, text: &str, mode: u32) {
            let path = self.0.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, text).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        }

        fn is(&self, status: Status, words: &str) {
            let finding = judge(&self.layout(), Path::new(ROOT)).unwrap();
            assert_eq!(finding.status, status, "{finding:?}");
            assert!(finding.detail.contains(words), "{words}: {finding:?}");
        }
    }

    #[test]
    fn missing_helper_fails_where_it_is_needed() {
        SetUpHost::new().is(Status::Ok, "announces each pull");
        let host = SetUpHost(tempfile::tempdir().unwrap());
        host.is(Status::Warn, "no auth helper is configured");
        let check = |needed| check(&host.layout(), Path::new(ROOT), needed).status;
        assert_eq!((check(true), check(false)), (Status::Fail, Status::Warn));
    }

    #[test]
    fn faulty_scripts_are_reported() {
        let host = SetUpHost::new();
        let text = fs::read_to_string(host.0.path().join(SCRIPT)).unwrap();
        host.write(SCRIPT, &text, 0o644);
        host.is(Status::Warn, "is not an executable file");
        host.write(SCRIPT, &text.replace(ROOT, "/srv/other"), 0o755);
        host.is(Status::Warn, "the daemon of /srv/other");
        host.write(SCRIPT, "#!/bin/sh\n", 0o755);
        host.is(Status::Warn, "was not written by setup");
        host.write(SCRIPT, &text, 0o755);
        host.is(Status::Ok, "announces each pull");
        fs::remove_file(host.0.path().join("usr/bin/nydus-store")).unwrap();
        host.is(Status::Warn, "runs /usr/bin/nydus-store, which is missing");
        fs::remove_file(host.0.path().join(SCRIPT)).unwrap();
        host.is(Status::Warn, "nydus-store-auth-helper, which is missing");
    }

    #[test]
    fn another_helper_counts_if_its_file_is_later() {
        let theirs = "additional-layer-store-auth-helper = \"/usr/bin/other\"\n";
        for (name, status, words) in [
            ("registries.conf", Status::Ok, "announces each pull"),
            ("registries.conf.d/10.conf", Status::Ok, "announces each pull"),
            (
                "registries.conf.d/zzz.conf",
                Status::Warn,
                "zzz.conf configures another auth helper, /usr/bin/other",
            ),
            ("registries.conf.d/zz-nydus-store.conf", Status::Warn, "/usr/bin/other"),
        ] {
            let host = SetUpHost::new();
            host.write(&format!("etc/containers/{name}"), theirs, 0o644);
            host.is(status, words);
        }
        let host = SetUpHost(tempfile::tempdir().unwrap());
        host.write("etc/containers/registries.conf", theirs, 0o644);
        host.is(Status::Warn, "/usr/bin/other");
        host.write("etc/containers/registries.conf", "[", 0o644);
        assert!(judge(&host.layout(), Path::new(ROOT)).is_err());
    }
}
