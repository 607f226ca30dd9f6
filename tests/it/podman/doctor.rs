//! `nydus-store doctor` on healthy and on misconfigured hosts.

use serde_json::Value;

use super::{setup::SetUpHost, *};
use crate::common::{Release, copy_program};

/// Copies the program to a path that exists in Podman's mount namespace; returns the path.
fn program(podman: &Podman) -> String {
    let program = podman.dir().join("nydus-store");
    if !program.exists() {
        copy_program(&program);
    }
    program.to_str().unwrap().to_owned()
}

/// JSON report and exit status of a run of `doctor` on the Podman's host.
struct Visit {
    report: Value,
    status: i32,
}

impl Visit {
    fn new(host: &SetUpHost, podman: &Podman) -> Self {
        Self::with(host, podman, |_| ())
    }

    fn with(host: &SetUpHost, podman: &Podman, change: impl FnOnce(&mut Command)) -> Self {
        let mut command = podman.program(&program(podman));
        command.args(["doctor", "--json", "--root"]).arg(host.serve.root());
        command.arg("--config").arg(&host.config);
        change(&mut command);
        Self::of(&mut command)
    }

    fn of(command: &mut Command) -> Self {
        let output = command.output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        let report = serde_json::from_str(&text)
            .unwrap_or_else(|error| panic!("{error}: {text}{}", String::from_utf8_lossy(&output.stderr)));
        Self {
            report,
            status: output.status.code().unwrap(),
        }
    }

    fn finding(&self, name: &str) -> &Value {
        let findings = self.report["findings"].as_array().unwrap();
        let found = findings.iter().find(|finding| finding["name"] == name);
        found.unwrap_or_else(|| panic!("no {name} in {:#}", self.report))
    }

    /// Panics unless nothing prevents lazy images. Other findings depend on the test machine, such as clock
    /// synchronisation.
    fn is_well(&self) {
        assert_eq!(
            (self.status, &self.report["ok"]),
            (0, &Value::Bool(true)),
            "{:#}",
            self.report
        );
        for name in ["configuration", "podman", "storage", "store", "daemon", "fuse-device"] {
            assert_eq!(self.finding(name)["status"], "ok", "{:#}", self.report);
        }
    }

    /// Panics unless exactly these findings fail, and the first one contains `detail` and `advice`.
    fn fails(&self, names: &[&str], detail: &str, advice: &str) {
        assert_eq!(
            (self.status, &self.report["ok"]),
            (1, &Value::Bool(false)),
            "{:#}",
            self.report
        );
        let findings = self.report["findings"].as_array().unwrap().iter();
        let failed: Vec<_> = findings.filter(|finding| finding["status"] == "fail").collect();
        let failed_names: Vec<_> = failed.iter().map(|finding| finding["name"].as_str().unwrap()).collect();
        assert_eq!(failed_names, names, "{:#}", self.report);
        let text = |key: &str| failed[0][key].as_str().unwrap();
        assert!(
            text("detail").contains(detail) && text("advice").contains(advice),
            "{:#}",
            failed[0]
        );
    }
}

#[test]
fn healthy_host_passes() {
    let host = SetUpHost::start();
    for (release, words) in [
        (Release::Four, "look-ups in the layer store"),
        (Release::Five, "the auth helper"),
    ] {
        let podman = host.podman(release);
        let visit = Visit::new(&host, &podman);
        visit.is_well();
        let said = |name: &str| visit.finding(name)["detail"].as_str().unwrap().to_owned();
        assert!(said("podman").contains(words), "{}", said("podman"));
        let store = host.serve.root().join("store");
        assert!(said("storage").contains(store.to_str().unwrap()), "{}", said("storage"));
        assert!(
            said("signature-policy").contains("accepts images"),
            "{}",
            said("signature-policy")
        );

        let mut command = podman.program(&program(&podman));
        command.args(["doctor", "--root"]).arg(host.serve.root());
        let text = output(command.arg("--config").arg(&host.config));
        assert!(
            text.contains("\nThis host can run lazy images") && text.contains("ok    daemon"),
            "{text}"
        );
        assert!(!text.contains('\x1b'), "{text}");
    }
}

#[test]
fn missing_program_of_the_auth_helper_is_reported() {
    let host = SetUpHost::start();
    let podman = host.podman(Release::Five);
    Visit::new(&host, &podman).is_well();
    fs::remove_file(podman.outside("/usr/local/bin/nydus-store")).unwrap();
    Visit::new(&host, &podman).fails(
        &["auth-helper"],
        "runs /usr/local/bin/nydus-store, which is missing",
        "nydus-store setup",
    );
}

#[test]
fn stopped_or_killed_daemon_is_reported() {
    let mut host = SetUpHost::start();
    let podman = host.podman(Release::Five);
    host.serve.stop();
    let visit = Visit::new(&host, &podman);
    visit.fails(&["daemon"], "nothing is mounted", "systemctl enable --now nydus-store");
    host.serve.launch();
    host.serve.process().signal(rustix::process::Signal::KILL);
    host.serve.wait();
    // The dead mount stays, and Podman keeps working.
    let visit = Visit::new(&host, &podman);
    visit.fails(&["daemon"], "its mount is still on", "start it again");
}

/// Requests to the file system of a stopped process hang.
#[test]
fn hanging_daemon_is_reported() {
    let host = SetUpHost::start();
    let podman = host.podman(Release::Five);
    host.serve.process().signal(rustix::process::Signal::STOP);
    let visit = Visit::new(&host, &podman);
    host.serve.process().signal(rustix::process::Signal::CONT);
    assert_eq!(visit.status, 1);
    assert!(
        visit.finding("daemon")["detail"]
            .as_str()
            .unwrap()
            .contains("does not respond")
    );
    Visit::new(&host, &podman).is_well();
}

#[test]
fn malformed_configuration_is_reported() {
    let host = SetUpHost::start();
    let podman = host.podman(Release::Four);
    fs::write(&host.config, "[fuse]\nthread = 1\n").unwrap();
    Visit::new(&host, &podman).fails(&["configuration"], "line 2", "fix the file");
    fs::write(&host.config, "[mirror]\nlisten = \"127.0.0.1:5055\"\n").unwrap();
    Visit::new(&host, &podman).is_well();
}

#[test]
fn missing_or_overridden_settings_are_reported() {
    let host = SetUpHost::start();
    let podman = Podman::set_up(Release::Five, host.serve.root(), &host.registries(), |_| ());
    Visit::new(&host, &podman).fails(
        &["storage", "auth-helper"],
        "does not use the image store",
        "nydus-store setup",
    );

    // Another auth helper, in a drop-in with a later name.
    let podman = Podman::set_up(Release::Five, host.serve.root(), &host.registries(), |tree| {
        host.serve.set_up(tree, &host.config, &[]);
        fs::write(
            tree.join("etc/containers/registries.conf.d/zzz.conf"),
            "additional-layer-store-auth-helper = \"/usr/bin/other\"\n",
        )
        .unwrap();
    });
    Visit::new(&host, &podman).fails(&["auth-helper"], "/usr/bin/other", "sorts earlier");

    // Another storage.conf, selected by the environment.
    let podman = host.podman(Release::Five);
    let other = podman.dir().join("other.conf");
    fs::write(&other, "[storage]\ndriver = \"vfs\"\n").unwrap();
    let change = |command: &mut Command| {
        command.env("CONTAINERS_STORAGE_CONF", &other);
    };
    Visit::with(&host, &podman, change).fails(&["storage"], "driver is vfs", "driver = \"overlay\"");
}

#[test]
fn missing_podman_or_fuse_device_is_reported() {
    let host = SetUpHost::start();
    let podman = host.podman(Release::Five);
    let mut command = podman.program("env");
    command.args(["PATH=/nonexistent", &program(&podman), "doctor", "--json", "--root"]);
    let visit = Visit::of(command.arg(host.serve.root()).arg("--config").arg(&host.config));
    assert_eq!((visit.status, &visit.finding("podman")["status"]), (0, &"warn".into()));
    for name in ["storage", "auth-helper"] {
        assert_eq!(visit.finding(name)["status"], "ok", "{:#}", visit.report);
    }

    let script = "mount --bind /dev/null /dev/fuse && exec \"$0\" doctor --json --root \"$1\" --config \"$2\"";
    let mut command = podman.program("unshare");
    command.args([
        "--mount",
        "--propagation",
        "private",
        "sh",
        "-c",
        script,
        &program(&podman),
    ]);
    Visit::of(command.arg(host.serve.root()).arg(&host.config)).fails(
        &["fuse-device"],
        "cannot use /dev/fuse: not the FUSE device",
        "modprobe fuse",
    );
}
