//! Credential helpers (`docker-credential-NAME`) in `$PATH`.

use super::*;

/// Writes the helper `test`, a shell script that runs `what` with its standard input in `$server`; returns its
/// directory.
fn write_helper(site: &AuthSite, what: &str) -> PathBuf {
    let dir = site.path("bin");
    fs::create_dir_all(&dir).unwrap();
    let program = dir.join("docker-credential-test");
    let text = format!(
        "#!/bin/sh\nserver=$(cat)\necho \"$1 $server\" >>{}\n{what}\n",
        site.path("asked").display()
    );
    fs::write(&program, text).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    dir
}

/// Requests to the helper: action and server.
fn helper_requests(site: &AuthSite) -> Vec<String> {
    let asked = fs::read_to_string(site.path("asked")).unwrap_or_default();
    asked.lines().map(str::to_owned).collect()
}

fn printing(user: &str, secret: &str) -> String {
    format!(r#"printf '{{"ServerURL":"%s","Username":"{user}","Secret":"{secret}"}}' "$server""#)
}

/// Runs `nydus-store inspect` on the private image, with `bin` in `$PATH`.
fn inspect(registry: &DockerRegistry, bin: &Path, config: &str, env: &[(&str, &Path)]) -> Output {
    let file = bin.join("config.toml");
    fs::write(&file, config).unwrap();
    let path = std::env::var("PATH").unwrap();
    let mut command = Command::new(BINARY);
    command.args(["inspect", &registry.reference("team/app", "1"), "--config"]);
    command.arg(&file).env("PATH", format!("{}:{path}", bin.display()));
    command.envs(env.iter().copied()).output().unwrap()
}

/// Runs [`inspect`] with an auth file that names the helper for the registry; returns standard error if it fails.
fn inspect_with(site: &AuthSite, registry: &DockerRegistry, what: &str) -> Result<(), String> {
    let bin = write_helper(site, what);
    let file = site.path("auth.json");
    fs::write(&file, json!({"credHelpers": {registry.host(): "test"}}).to_string()).unwrap();
    let output = inspect(registry, &bin, &config(&[&file]), &[]);
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!errors.contains(PASSWORD), "{errors}");
    output.status.success().then_some(()).ok_or(errors)
}

#[tokio::test(flavor = "multi_thread")]
async fn image_is_read_with_credentials_of_a_helper() {
    let site = AuthSite::new("team/app").await;
    let registry = site.private();
    let descriptors = site.path("descriptors");
    let looking = format!("readlink /proc/$$/fd/* >{} 2>&1\n", descriptors.display());
    let bin = write_helper(&site, &(looking + &printing(USER, PASSWORD)));
    let file = site.path("auth.json");
    fs::write(
        &file,
        json!({"credsStore": "test", "auths": {registry.host(): {}}}).to_string(),
    )
    .unwrap();
    let mut serve = Serve::prepare(&config(&[&file]));
    let path = std::env::var("PATH").unwrap();
    serve.launch_with(|command| {
        command.env("PATH", format!("{}:{path}", bin.display()));
    });
    site.sample.check(&site.layer(&serve, &registry, "team/app"));
    // The helper runs once, not per request.
    assert_eq!(helper_requests(&site), [format!("get {}", registry.host())]);
    assert!(!serve.log().contains(PASSWORD));
    // The helper inherits no descriptors of the daemon.
    let descriptors = fs::read_to_string(descriptors).unwrap();
    assert!(descriptors.contains("pipe:"), "{descriptors}");
    for theirs in ["fuse", "socket:", "anon_inode:", serve.root().to_str().unwrap()] {
        assert!(!descriptors.contains(theirs), "{descriptors}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn helper_may_return_an_identity_token() {
    let site = AuthSite::new("team/app").await;
    let tokens = TokenServer::start(site.dir.path()).await;
    let registry = site.open.sharing_storage(&tokens.config(site.dir.path()), "");
    inspect_with(&site, &registry, &printing("<token>", IDENTITY_TOKEN)).unwrap();
    assert_eq!(tokens.requests()[0].method, axum::http::Method::POST);
}

#[tokio::test(flavor = "multi_thread")]
async fn failing_helper_is_named_in_the_error() {
    let site = AuthSite::new("team/app").await;
    let registry = site.private();
    for (what, told) in [
        (
            "echo 'credentials not found in native keychain'; exit 1",
            "no credentials were found",
        ),
        (
            "echo 'the keyring is locked' >&2; echo pass-w0rd; exit 3",
            "docker-credential-test failed (exit status: 3): the keyring is locked",
        ),
        ("echo pass-w0rd", "the answer of docker-credential-test is not"),
        ("yes pass-w0rd", "the answer of docker-credential-test is not"),
    ] {
        let errors = inspect_with(&site, &registry, what).unwrap_err();
        assert!(errors.contains(told), "{errors}");
    }
    // Long output on standard error does no harm.
    let chatty = format!("head -c 300000 /dev/zero >&2\n{}", printing(USER, PASSWORD));
    inspect_with(&site, &registry, &chatty).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn hanging_helper_is_killed_with_its_process_group() {
    let site = AuthSite::new("team/app").await;
    let registry = site.private();
    let pids = site.path("pids");
    let what = format!("sleep 1000 &\necho $$ $! >{}\nwait", pids.display());
    let errors = inspect_with(&site, &registry, &what).unwrap_err();
    assert!(
        errors.contains("docker-credential-test did not answer within 10s"),
        "{errors}"
    );
    for pid in fs::read_to_string(pids).unwrap().split_whitespace() {
        wait_until("the helper is gone", || {
            let status = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            (status.is_empty() || status.contains(") Z ")).then_some(())
        });
    }
}

/// registries.conf may list helpers, in order of precedence.
#[tokio::test(flavor = "multi_thread")]
async fn helpers_of_registries_conf_are_used_in_order() {
    let site = AuthSite::new("team/app").await;
    let registry = site.private();
    let bin = write_helper(&site, &printing(USER, PASSWORD));
    let (conf, files) = (site.path("registries.conf"), site.path("auth.json"));
    let env = [
        ("CONTAINERS_REGISTRIES_CONF", conf.as_path()),
        ("REGISTRY_AUTH_FILE", &files),
    ];
    let run = |helpers: &str| {
        fs::write(&conf, helpers).unwrap();
        inspect(&registry, &bin, "", &env).status.success()
    };
    assert!(!run(""));
    assert_eq!(helper_requests(&site).len(), 0);
    assert!(run("credential-helpers = [\"containers-auth.json\", \"test\"]\n"));
    assert_eq!(helper_requests(&site), [format!("get {}", registry.host())]);
    site.auth_file(registry.host(), &password());
    assert!(run("credential-helpers = [\"containers-auth.json\", \"test\"]\n"));
    assert_eq!(helper_requests(&site).len(), 1);
}
