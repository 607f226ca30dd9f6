//! What root in a container gets of other images, the daemon and its metrics.

use std::fs;

use nydus_store::fixtures::BuildOptions;

use super::{PodmanLab, Release, note, on_each_release, runnable_tree};
use crate::common::{Podman, RunPodman as _, Serve, free_port};

on_each_release!(root_of_a_container_reads_only_its_own_image,);

/// Content of the other image.
const SECRET: &str = "of-another-image";

/// Options of `podman run`: user namespaces, and the host's network and processes.
fn cases(release: Release) -> Vec<&'static [&'static str]> {
    let mut cases: Vec<&[&str]> = vec![
        &["--network=none"],
        &["--network=host"],
        &["--network=none", "--uidmap=0:100000:65536", "--gidmap=0:100000:65536"],
        &["--network=none", "--userns=auto"],
    ];
    cases.push(match release {
        // runc mounts no sysfs in a user namespace with the host's network.
        Release::Four => &["--network=host", "--pid=host"],
        Release::Five | Release::Newest => &["--network=host", "--userns=auto"],
    });
    cases
}

/// A script that prints what it can read of the daemon and of other images, and `REACHED` with each path that it can
/// list or open.
fn attempts(lab: &PodmanLab, port: u16) -> String {
    let root = lab.serve.root();
    let names = [
        "",
        "store/overlay/l",
        "nydus-store.sock",
        "supervisor.sock",
        "published.redb",
    ];
    let mut paths: Vec<_> = names.iter().map(|name| root.join(name)).collect();
    // Guessed: the container is shown no id of another image's layer.
    let layers = fs::read_dir(lab.serve.overlay()).unwrap();
    paths.extend(layers.map(|layer| layer.unwrap().path().join("diff/secret")));
    paths.push(lab.serve.log_path());
    let paths: Vec<_> = paths.iter().map(|path| path.display().to_string()).collect();
    let (supervisor, daemon) = (lab.serve.id(), lab.serve.supervised_id().unwrap());
    // The kernel lets root list the numbers in `fd`; what they lead to is closed.
    format!(
        "reach() {{ cat $1; if ls $1 || head -c 1 $1 | grep -q .; then echo REACHED $1; fi; }} 2> /dev/null
         for root in '' /proc/{supervisor}/root /proc/{daemon}/root; do for path in {}; do reach $root$path; done; done
         for process in {supervisor} {daemon}; do
           for file in environ maps mem auxv fd/*; do
             for path in /proc/$process/$file; do head -c 1 $path 2> /dev/null | grep -q . && echo REACHED $path; done
           done
           for fd in /proc/$process/fd/*; do readlink $fd && echo REACHED $fd; done
         done
         find / -xdev -name 'nydus-store*' -o -xdev -name supervisor.sock 2> /dev/null
         awk '$8 ~ /^@.*(nydus|supervis)/' /proc/net/unix
         cat /dev/fuse 2> /dev/null && echo REACHED fuse
         umount / 2> /dev/null && echo REACHED umount
         wget -q -O - http://127.0.0.1:{port}/metrics 2> /dev/null
         cat /own",
        paths.join(" ")
    )
}

async fn root_of_a_container_reads_only_its_own_image(release: Release) {
    let port = free_port();
    let mut serve = Serve::prepare_shared(&format!("[metrics]\nlisten = \"127.0.0.1:{port}\"\n"));
    serve.launch_with(|command| _ = command.arg("--supervise"));
    let mut lab = PodmanLab::with_daemon(release, serve);
    // There are ids for `--userns=auto` in a mount namespace of its own.
    let podman = Podman::builder(release)
        .root(lab.serve.root())
        .registry(lab.registry.host());
    lab.podman = podman.userns().build();
    let build = |name, text| {
        let layers = [lab.layer(runnable_tree), lab.layer(note(name, text))];
        lab.build(&layers, &BuildOptions::default())
    };
    let own = lab.push(&build("own", "own"), "own", "1").await;
    // No metric has the word.
    let other = lab.push(&build("secret", SECRET), "zebra", "1").await;
    // Its data is cached, and its tree is in use.
    assert_eq!(lab.sh(&other, "cat /secret"), SECRET);
    lab.podman.run(&["pull", &own]);
    let script = attempts(&lab, port);
    for options in cases(release) {
        let said = lab
            .podman
            .run(&[&["run", "--rm"], options, &[&own, "sh", "-c", &script]].concat());
        assert!(said.ends_with("own"), "{options:?}: {said}");
        let has_metrics = said.contains("nydus_store_build_info");
        assert_eq!(has_metrics, options.contains(&"--network=host"), "{options:?}: {said}");
        for word in [SECRET, "REACHED", "zebra", "nydus-store.sock", "supervisor.sock"] {
            assert!(!said.contains(word), "{options:?}: {word} is in:\n{said}");
        }
    }
}
