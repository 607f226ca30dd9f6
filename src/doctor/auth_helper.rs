//! Whether Podman and CRI-O announce pulls by the auth helper.

use std::{
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

use super::{Finding, Status};
use crate::{
    error_chain::ErrorChain,
    registries_conf::{Registries, parse_auth_helper},
    setup::{
        Error, auth_helper,
        layout::{self, Layout},
    },
};

const NAME: &str = "auth-helper";
const AGAIN: &str = "run `nydus-store setup`, with the daemon's --root if it has one";

/// About the program that is run at each pull, for the daemon of `root`. `needed`: whether an engine of this host runs
/// it.
pub fn look(layout: &Layout, root: &Path, needed: bool) -> Finding {
    let root = std::path::absolute(root).unwrap_or_else(|_| root.to_owned());
    let finding = judge(layout, &root)
        .unwrap_or_else(|error| Finding::warn(NAME, ErrorChain(&error).to_string(), "mend the file"));
    match finding.status {
        // Nothing is lazy unless its pull is announced.
        Status::Warn if needed => Finding {
            status: Status::Fail,
            ..finding
        },
        _ => finding,
    }
}

/// What Podman is told to start.
struct Told {
    program: String,
    /// Where.
    by: PathBuf,
}

/// The last file counts.
fn told(layout: &Layout) -> Result<Option<Told>, Error> {
    let path = layout.ours();
    let ours = match layout::read(&path)? {
        Some(text) => parse_auth_helper(&path, &text)?,
        None => None,
    };
    let registries = Registries::read(&layout.registries, &layout.drop_ins, &path)?;
    let other = registries.auth_helper();
    let ours = ours.filter(|_| other.is_none_or(|other| !other.is_after_ours));
    Ok(match (ours, other) {
        (Some(program), _) => Some(Told { program, by: path }),
        (None, Some(other)) => Some(Told {
            program: other.program.clone(),
            by: other.file.clone(),
        }),
        (None, None) => None,
    })
}

fn judge(layout: &Layout, root: &Path) -> Result<Finding, Error> {
    let script = layout.auth_helper();
    let at = layout.at(Path::new(script));
    let text = layout::read(&at)?;
    Ok(match (told(layout)?, text) {
        (None, _) => Finding::warn(
            NAME,
            "no program is run at a pull, so that pulls are not announced",
            AGAIN,
        ),
        (Some(told), Some(text)) if told.program == script => of_script(layout, script, &at, &text, root),
        (Some(told), None) if told.program == script => {
            let detail = format!("{} has {script} run at each pull, which is missing", told.by.display());
            Finding::warn(NAME, detail, AGAIN)
        }
        (Some(told), _) => of_another(&told),
    })
}

fn of_another(told: &Told) -> Finding {
    let detail = format!(
        "{} has {} run at each pull, so that nydus-store learns of none: Podman runs one helper only",
        told.by.display(),
        told.program
    );
    let advice = format!(
        "take that line out of {}, or give the file an earlier name; then {AGAIN}",
        told.by.display()
    );
    Finding::warn(NAME, detail, advice)
}

/// `text` is that of the script, which is `at` a place.
fn of_script(layout: &Layout, script: &str, at: &Path, text: &str, root: &Path) -> Finding {
    let warn = |detail: String| Finding::warn(NAME, detail, AGAIN);
    if !can_start(at) {
        return warn(format!(
            "{script} cannot be started: it is no file that may be executed"
        ));
    }
    let Some((program, of)) = auth_helper::parse(text) else {
        let advice = format!(
            "see to it that it runs `nydus-store auth-helper --root {}`, or move it away, and {AGAIN}",
            root.display()
        );
        return Finding::warn(NAME, format!("{script} is not as setup writes it"), advice);
    };
    if !can_start(&layout.at(&program)) {
        return warn(format!(
            "{script} starts {}, which is missing or may not be executed",
            program.display()
        ));
    }
    if of != root {
        return warn(format!(
            "{script} announces pulls to the daemon of {}, and not to that of {}",
            of.display(),
            root.display()
        ));
    }
    Finding::ok(NAME, format!("{script} announces each pull"))
}

fn can_start(path: &Path) -> bool {
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

    /// A host on which `setup` was run.
    struct Host(tempfile::TempDir);

    impl Host {
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
        Host::new().is(Status::Ok, "announces each pull");
        let host = Host(tempfile::tempdir().unwrap());
        host.is(Status::Warn, "no program is run");
        let look = |needed| look(&host.layout(), Path::new(ROOT), needed).status;
        assert_eq!((look(true), look(false)), (Status::Fail, Status::Warn));
    }

    #[test]
    fn what_is_wrong_with_the_script() {
        let host = Host::new();
        let text = fs::read_to_string(host.0.path().join(SCRIPT)).unwrap();
        host.write(SCRIPT, &text, 0o644);
        host.is(Status::Warn, "cannot be started");
        host.write(SCRIPT, &text.replace(ROOT, "/srv/other"), 0o755);
        host.is(Status::Warn, "the daemon of /srv/other");
        host.write(SCRIPT, "#!/bin/sh\n", 0o755);
        host.is(Status::Warn, "not as setup writes it");
        host.write(SCRIPT, &text, 0o755);
        host.is(Status::Ok, "announces each pull");
        fs::remove_file(host.0.path().join("usr/bin/nydus-store")).unwrap();
        host.is(Status::Warn, "starts /usr/bin/nydus-store, which is missing");
        fs::remove_file(host.0.path().join(SCRIPT)).unwrap();
        host.is(
            Status::Warn,
            "nydus-store-auth-helper run at each pull, which is missing",
        );
    }

    #[test]
    fn another_program() {
        let theirs = "additional-layer-store-auth-helper = \"/usr/bin/other\"\n";
        for (name, status, words) in [
            ("registries.conf", Status::Ok, "announces each pull"),
            ("registries.conf.d/10.conf", Status::Ok, "announces each pull"),
            (
                "registries.conf.d/zzz.conf",
                Status::Warn,
                "zzz.conf has /usr/bin/other run",
            ),
            ("registries.conf.d/zz-nydus-store.conf", Status::Warn, "/usr/bin/other"),
        ] {
            let host = Host::new();
            host.write(&format!("etc/containers/{name}"), theirs, 0o644);
            host.is(status, words);
        }
        let host = Host(tempfile::tempdir().unwrap());
        host.write("etc/containers/registries.conf", theirs, 0o644);
        host.is(Status::Warn, "/usr/bin/other");
        host.write("etc/containers/registries.conf", "[", 0o644);
        assert!(judge(&host.layout(), Path::new(ROOT)).is_err());
    }
}
