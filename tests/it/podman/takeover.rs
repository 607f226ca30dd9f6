//! The daemon is killed and replaced again and again while containers read and while engines and commands work.

use std::{
    process::Command,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use nydus_store::fixtures::{BuildOptions, content::Random};
use rustix::process::Signal;

use super::{NUMBERS, PodmanLab, Release, note, on_each_release, runnable_tree, sha256_in};
use crate::common::{BINARY, RunPodman as _, Serve, output, wait_until};

on_each_release!(containers_do_not_notice_kills, pulls_and_commands_survive_kills,);

/// Number of kills, fewer for the newest release, which differs from the one before in nothing that matters here.
fn kills(release: Release) -> usize {
    match release {
        Release::Four | Release::Five => 100,
        Release::Newest => 10,
    }
}

/// Containers, each with as many readers.
const CONTAINERS: usize = 4;
/// Reads all files again and again in each of four processes, and notes what goes wrong.
const READ: &str = "sha256sum /data/* /bin/busybox > /tmp/sums; \
     for reader in 1 2 3 4; do \
       ( while [ ! -e /tmp/stop ]; do sha256sum -c /tmp/sums > /dev/null 2>> /tmp/errors || echo wrong >> /tmp/errors; \
         echo >> /tmp/rounds; done ) & \
     done; wait; echo done > /tmp/done; sleep 1000";

/// Kills the daemon below the supervisor `count` times, at random moments at most `interval` apart.
fn kill_again_and_again(serve: &Serve, count: usize, interval: Duration, between: impl Fn(usize)) {
    let mut random = Random::new(3);
    for round in 0..count {
        thread::sleep(interval.mul_f64(random.below(1000) as f64 / 1000.0));
        between(round);
        let served = serve.times_served();
        wait_until("there is a daemon", || serve.supervised_id());
        serve.signal_supervised(Signal::KILL);
        wait_until("the next daemon serves", || {
            (serve.times_served() > served).then_some(())
        });
    }
}

/// Makes the kernel forget pages, entries and inodes, so that programs need the daemon.
fn drop_caches() {
    std::fs::write("/proc/sys/vm/drop_caches", "3").unwrap();
}

async fn containers_do_not_notice_kills(release: Release) {
    let mut lab = PodmanLab::start_supervised(release);
    let layer = lab.layer(runnable_tree);
    let numbers = sha256_in(&layer, NUMBERS);
    let image = lab.build(&[layer], &BuildOptions::default());
    let image = lab.push(&image, "base", "1").await;
    let names: Vec<_> = (0..CONTAINERS).map(|number| format!("reader{number}")).collect();
    for name in &names {
        let run = [
            "run",
            "--detach",
            "--name",
            name,
            "--network",
            "none",
            &image,
            "sh",
            "-c",
            READ,
        ];
        lab.podman.run(&run);
    }
    let exec = |name: &str, script: &str| lab.podman.run(&["exec", name, "sh", "-c", script]);
    for name in &names {
        wait_until("the readers start", || {
            (exec(name, "cat /tmp/rounds 2>/dev/null || true; echo x").len() > 1).then_some(())
        });
    }
    kill_again_and_again(&lab.serve, kills(release), Duration::from_millis(300), |round| {
        if round % 2 == 0 {
            drop_caches();
        }
    });
    for name in &names {
        exec(name, "touch /tmp/stop");
        wait_until("the readers stop", || {
            (exec(name, "cat /tmp/done 2>/dev/null || true") == "done").then_some(())
        });
        assert_eq!(exec(name, "cat /tmp/errors"), "");
        assert!(exec(name, "grep numbers /tmp/sums").starts_with(&numbers));
        println!("{name}: {} rounds", exec(name, "wc -l < /tmp/rounds"));
    }
    lab.podman.run(&["kill", "--all"]);
    lab.serve.stop();
}

/// Announced pulls, `pull`, `rm` and `preseed`, and containers that start.
async fn pulls_and_commands_survive_kills(release: Release) {
    let mut lab = PodmanLab::start_supervised(release);
    let mut images = Vec::new();
    for (name, text) in [("one", "1"), ("two", "2"), ("three", "3")] {
        let layers = [lab.layer(runnable_tree), lab.layer(note("note", text))];
        let image = lab.build(&layers, &BuildOptions::default());
        images.push((lab.push(&image, name, "1").await, text));
    }
    let is_done = AtomicBool::new(false);
    thread::scope(|scope| {
        let killer = scope.spawn(|| {
            let is_done = || is_done.load(Ordering::Relaxed);
            while !is_done() {
                kill_again_and_again(&lab.serve, 5, Duration::from_secs(2), |_| ());
            }
        });
        let start = Instant::now();
        while start.elapsed() < Duration::from_secs(20) {
            for (image, text) in &images {
                assert_eq!(lab.sh(image, "cat /note"), *text);
                lab.podman.run(&["rmi", image]);
            }
            for (image, _) in &images {
                lab.nydus_store(&["pull", image]);
            }
            for (image, text) in &images {
                assert_eq!(lab.sh(image, "cat /note"), *text);
            }
            let mut preseed = Command::new(BINARY);
            preseed
                .args(["preseed", &format!("docker://{}", images[0].0), "--root"])
                .arg(lab.serve.root());
            assert!(output(&mut preseed).contains("complete"));
            for (image, _) in &images {
                assert_eq!(lab.nydus_store(&["rm", image]).trim(), *image);
            }
        }
        is_done.store(true, Ordering::Relaxed);
        killer.join().unwrap();
    });
    println!("{} daemons", lab.serve.times_served());
    lab.serve.stop();
}
