//! Many hosts behind a caching proxy: blobs are fetched from the registry once.

use std::{fs, net::TcpStream, process::Command};

use tempfile::TempDir;

use crate::common::{DockerRegistry, Guard, Sample, Serve, free_port, wait_until};

/// nginx in front of a registry, with the configuration of docs/fleet.md on a loopback port and in a temporary
/// directory.
struct Nginx {
    host: String,
    _process: Guard,
    _dir: TempDir,
}

impl Nginx {
    fn in_front_of(registry: &DockerRegistry) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let host = format!("127.0.0.1:{}", free_port());
        let page = include_str!("../../docs/fleet.md");
        let (_, rest) = page.split_once("```nginx\n").unwrap();
        let (nginx_of_page, _) = rest.split_once("```").unwrap();
        let nginx_of_page = nginx_of_page
            .replace("/var/cache/nginx", &dir.path().join("cache").display().to_string())
            .replace("listen 80;", &format!("listen {host};"))
            .replace("https://registry.example", &registry.url());
        let temporary: String = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
            .map(|kind| format!("{kind}_temp_path {}/{kind};\n", dir.path().display()))
            .concat();
        let config = dir.path().join("nginx.conf");
        let text = format!(
            "daemon off;\nmaster_process off;\npid {0}/pid;\nerror_log stderr;\nevents {{}}\n\
             http {{\naccess_log off;\n{temporary}{nginx_of_page}}}\n",
            dir.path().display()
        );
        fs::write(&config, text).unwrap();
        let mut command = Command::new("nginx");
        command
            .arg("-p")
            .arg(dir.path())
            .arg("-c")
            .arg(&config)
            .args(["-e", "stderr"]);
        let process = Guard(command.spawn().expect("nginx is installed (scripts/test installs it)"));
        wait_until("nginx listens", || TcpStream::connect(&host).ok());
        Self {
            host,
            _process: process,
            _dir: dir,
        }
    }
}

/// Reads the whole image with a new daemon.
fn read_with_new_daemon(registry: &DockerRegistry, proxy: &Nginx, sample: &Sample) {
    let mut serve = Serve::prepare("");
    let conf = serve.config_path().with_file_name("registries.conf");
    let text = format!(
        "[[registry]]\nlocation = \"{}\"\n[[registry.mirror]]\nlocation = \"{}\"\ninsecure = true\n",
        registry.host(),
        proxy.host
    );
    fs::write(&conf, text).unwrap();
    serve.launch_with(|command| {
        command.env("CONTAINERS_REGISTRIES_CONF", &conf);
    });
    sample.check(&serve.layer(&registry.reference("team/app", "1"), &sample.bootstrap_digest()));
}

#[tokio::test(flavor = "multi_thread")]
async fn second_host_fetches_no_blob_from_the_registry() {
    let registry = DockerRegistry::start();
    let sample = Sample::of(&[("small", 9000), ("large", 5 << 20)], 1, &Sample::options());
    sample.image.push(&registry.url(), "team/app", "1").await.unwrap();
    let proxy = Nginx::in_front_of(&registry);
    let pushed = registry.blob_reads();
    read_with_new_daemon(&registry, &proxy, &sample);
    let first = registry.blob_reads();
    assert!(first > pushed);
    read_with_new_daemon(&registry, &proxy, &sample);
    assert_eq!(registry.blob_reads(), first);
}
