//! `nydus-store auth-helper`, started as by containers/image.

use std::{io::Write as _, os::unix::process::CommandExt as _, process::Stdio};

use super::*;

/// Runs it with `input` on standard input.
fn run_auth_helper(root: &Path, input: &str, change: impl FnOnce(&mut Command)) -> Output {
    let mut command = Command::new(BINARY);
    command.args(["auth-helper", "--root"]).arg(root);
    command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    change(&mut command);
    let mut child = command.spawn().unwrap();
    // It may exit before it has read all input.
    child.stdin.take().unwrap().write_all(input.as_bytes()).ok();
    child.wait_with_output().unwrap()
}

fn login(reference: &str, password: &str) -> String {
    json!({reference: {"username": USER, "password": password}}).to_string()
}

#[tokio::test(flavor = "multi_thread")]
async fn pushed_credentials_are_used_and_never_stored() {
    let site = AuthSite::new("team/app").await;
    let registry = site.private();
    let reference = registry.reference("team/app", "1");
    // Failures are cached for an hour; pushed credentials invalidate them.
    let config = "[images]\nnegative_ttl = 3600\n[registry]\nauth_files = []\n";
    let mut serve = Serve::with_config(config);
    let layer = site.layer(&serve, &registry, "team/app");
    assert!(!layer.pull_publishes());
    let refused = run_auth_helper(serve.root(), &login(&reference, "wrong"), |_| ());
    let errors = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(1), "{errors}");
    assert!(errors.contains(&reference), "{errors}");
    for _ in 0..2 {
        let done = run_auth_helper(serve.root(), &login(&reference, PASSWORD), |_| ());
        assert!(done.status.success() && done.stderr.is_empty(), "{done:?}");
    }
    site.sample.check(&layer);
    assert!(!serve.log().contains(PASSWORD));
    let files = walkdir::WalkDir::new(serve.root()).same_file_system(true).into_iter();
    for file in files.map(Result::unwrap).filter(|entry| entry.file_type().is_file()) {
        let bytes = fs::read(file.path()).unwrap();
        let found = bytes.windows(PASSWORD.len()).any(|part| part == PASSWORD.as_bytes());
        assert!(!found, "{}", file.path().display());
    }
    // The credentials do not survive a restart.
    serve.restart();
    let fresh = serve.layer(&registry.reference("team/app", "2"), &site.sample.bootstrap_digest());
    assert!(!fresh.pull_publishes());
}

/// The next process inherits them in memory, and only with a holder of its descriptors.
#[tokio::test(flavor = "multi_thread")]
async fn pushed_credentials_survive_the_death_of_a_supervised_daemon() {
    let site = AuthSite::new("team/app").await;
    let registry = site.private();
    let reference = registry.reference("team/app", "1");
    let mut serve = Serve::supervised("[registry]\nauth_files = []\n");
    let layer = site.layer(&serve, &registry, "team/app");
    let done = run_auth_helper(serve.root(), &login(&reference, PASSWORD), |_| ());
    assert!(done.status.success(), "{done:?}");
    for _ in 0..2 {
        let served = serve.times_served();
        serve.signal_supervised(Signal::KILL);
        wait_until("the next daemon serves", || {
            (serve.times_served() > served).then_some(())
        });
    }
    site.sample.check(&layer);
    assert!(!serve.log().contains(PASSWORD));
    serve.stop();
}

/// A pull must not fail because the daemon is missing.
#[test]
fn auth_helper_succeeds_without_a_daemon() {
    let dir = tempfile::tempdir().unwrap();
    let input = login("r.example/a:1", PASSWORD);
    for root in [dir.path().to_owned(), dir.path().join("missing")] {
        let done = run_auth_helper(&root, &input, |_| ());
        assert!(done.status.success() && done.stderr.is_empty(), "{done:?}");
    }
    // A socket without a listener.
    let path = dir.path().join("nydus-store.sock");
    drop(std::os::unix::net::UnixListener::bind(path).unwrap());
    assert!(run_auth_helper(dir.path(), &input, |_| ()).status.success());
    // No credentials, as for most pulls.
    assert!(
        run_auth_helper(dir.path(), r#"{"r.example/a:1":{}}"#, |_| ())
            .status
            .success()
    );
}

/// Only root has a store.
#[test]
fn auth_helper_of_other_users_does_nothing() {
    let serve = Serve::start();
    // Where other users can execute it.
    let dir = tempfile::tempdir().unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let program = dir.path().join("nydus-store");
    copy_program(&program);
    let done = run_auth_helper(serve.root(), &login("r.example/a:1", PASSWORD), |command| {
        let mut other = Command::new(&program);
        other.args(command.get_args());
        other
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        other.uid(65534).gid(65534);
        *command = other;
    });
    assert!(done.status.success() && done.stderr.is_empty(), "{done:?}");
    assert!(!serve.log().contains("received credentials"));
}

#[test]
fn malformed_announcement_is_rejected_without_quoting_it() {
    let serve = Serve::start();
    let long = format!("{{\"r.example/a:1\":{{\"password\":\"{}\"}}}}", "x".repeat(300_000));
    for input in [
        "",
        "pass-w0rd",
        r#"{"r.example/a:1":"pass-w0rd"}"#,
        &login("no name", PASSWORD),
        &long,
    ] {
        let done = run_auth_helper(serve.root(), input, |_| ());
        let errors = String::from_utf8_lossy(&done.stderr).into_owned();
        assert_eq!(done.status.code(), Some(1), "{input:.80}: {errors}");
        assert!(!errors.contains(PASSWORD) && !errors.is_empty(), "{errors}");
    }
    assert!(!serve.log().contains(PASSWORD));
}
