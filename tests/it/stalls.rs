//! Slow, silent and unreachable registries: waits are bounded and do not delay requests for other registries.

use std::{
    fs,
    net::{SocketAddr, TcpListener},
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use nydus_store::fixtures::Fault;
use rustix::process::Signal;

use crate::common::{Guard, Lab, Sample, Serve, wait_until};

/// Short time-outs.
const SHORT_TIMEOUTS: &str = "[images]\nresolve_timeout = 2\nnegative_ttl = 60\n\
     [registry]\nconnect_timeout = 1\nread_timeout = 2\nrequest_timeout = 4\nretries = 1\n[fuse]\nthreads = 2\n";

/// A server that closes every connection; returns its address and the number of connections.
fn closing_server() -> (SocketAddr, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let (address, asked) = (listener.local_addr().unwrap(), Arc::new(AtomicUsize::new(0)));
    let count = Arc::clone(&asked);
    std::thread::spawn(move || {
        for _ in listener.incoming() {
            count.fetch_add(1, Ordering::SeqCst);
        }
    });
    (address, asked)
}

#[test]
fn failed_look_up_of_a_dead_registry_is_bounded_and_cached() {
    let lab = Lab::new(SHORT_TIMEOUTS);
    let good = Sample::new(1);
    let good_layer = lab.add(&good, "good");
    let (dead, asked) = closing_server();
    let reference = format!("{dead}/nobody/home:1");
    let layer = lab.serve.layer(&reference, &good.bootstrap_digest());
    let (before, start) = (lab.serve.log().len(), Instant::now());
    assert!(!layer.pull_publishes());
    assert!(start.elapsed() < Duration::from_secs(20));
    lab.assert_logged(before, &["WARN", &reference]);
    let before = asked.load(Ordering::SeqCst);
    for _ in 0..50 {
        assert!(!layer.pull_publishes());
    }
    assert_eq!(asked.load(Ordering::SeqCst), before, "the failure is cached");
    good.check(&good_layer);
}

#[test]
fn look_up_without_network_fails_in_bounded_time() {
    let mut serve = Serve::prepare(SHORT_TIMEOUTS);
    // A dead proxy stands in for a missing network.
    serve.launch_with(|command| {
        for name in ["HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy"] {
            command.env(name, "http://127.0.0.1:1");
        }
    });
    let digest = nydus_store::internals::Digest::of(b"");
    for reference in ["docker.io/library/alpine:3", "registry.invalid/a/b:1", "alpine"] {
        let start = Instant::now();
        assert!(!serve.layer(reference, &digest).pull_publishes());
        assert!(
            start.elapsed() < Duration::from_secs(20),
            "{reference}: {:?}",
            start.elapsed()
        );
    }
    assert!(serve.log().contains("docker.io/library/alpine:3"), "{}", serve.log());
}

/// The registry answers the manifest, and stalls in the bootstrap layer.
#[test]
fn silent_registry_is_waited_for_once() {
    let lab = Lab::new(SHORT_TIMEOUTS);
    let (good, other) = (Sample::new(1), Sample::new(2));
    let good_layer = lab.add(&good, "good");
    let layer = lab.add(&other, "silent");
    let boot = other.bootstrap_digest();
    lab.fault_on("silent", boot, Fault::StallAfter(10));
    let (before, start) = (lab.serve.log().len(), Instant::now());
    assert!(!layer.pull_publishes());
    assert!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
    lab.assert_logged(before, &["WARN", &lab.reference("silent")]);
    let start = Instant::now();
    for _ in 0..20 {
        assert!(!layer.pull_publishes());
    }
    assert!(start.elapsed() < Duration::from_secs(15), "{:?}", start.elapsed());
    good.check(&good_layer);
}

/// While readers of one registry's image wait, images of another registry are looked up and read, cached or not.
#[test]
fn waiting_readers_do_not_delay_other_registries() {
    const READERS: usize = 100;
    const DELAY: Duration = Duration::from_secs(12);
    let lab = Lab::new("[fuse]\nthreads = 2\n");
    let names: Vec<_> = (0..READERS).map(|number| format!("file-{number}")).collect();
    let files: Vec<_> = names.iter().map(|name| (name.as_str(), 300_000)).collect();
    let slow = Sample::of(&files, 1, &Sample::options());
    let slow_layer = lab.add(&slow, "slow");
    assert!(slow_layer.pull_publishes());
    let (cached, cold, new) = (Sample::new(2), Sample::new(3), Sample::new(4));
    let elsewhere = nydus_store::fixtures::EmbeddedRegistry::start().unwrap();
    let layer = |sample: &Sample, repository: &str| {
        elsewhere.add_image(&sample.image, repository, "1").unwrap();
        lab.serve
            .layer(&elsewhere.reference(repository, "1"), &sample.bootstrap_digest())
    };
    let (cached_layer, cold_layer, new_layer) = (layer(&cached, "b"), layer(&cold, "c"), layer(&new, "d"));
    cached.check(&cached_layer);
    assert!(cold_layer.pull_publishes());

    let data = slow.data_digest();
    lab.fault_on("slow", data, Fault::Delay(DELAY));
    let before = lab.registry.request_count();
    let start = Instant::now();
    let readers: Vec<_> = names
        .iter()
        .map(|name| {
            let path = slow_layer.diff().join(name);
            std::thread::spawn(move || fs::read(path).unwrap())
        })
        .collect();
    wait_until("reads are in flight", || {
        (lab.registry.request_count() >= before + 30).then_some(())
    });
    std::thread::sleep(Duration::from_millis(200));
    drop_pages();
    for (sample, layer, what) in [
        (&cached, &cached_layer, "cached"),
        (&new, &new_layer, "look-up"),
        (&cold, &cold_layer, "cold"),
    ] {
        sample.check(layer);
        assert!(start.elapsed() < DELAY, "{what} waited {:?}", start.elapsed());
    }
    lab.clear_fault("slow");
    for (reader, name) in readers.into_iter().zip(&names) {
        assert!(reader.join().unwrap() == slow.content(name), "{name} reads wrong");
    }
}

fn drop_pages() {
    fs::write("/proc/sys/vm/drop_caches", "1").unwrap();
}

/// A look-up waits in the kernel, where only an answer of the daemon ends the wait.
#[test]
fn killed_process_does_not_wait_for_a_silent_registry() {
    let mut lab = Lab::new("");
    let sample = Sample::new(1);
    let layer = lab.add(&sample, "image");
    sample.check(&layer);
    lab.serve.stop();
    fs::remove_dir_all(lab.serve.root().join("images")).unwrap();
    lab.fault("image", |_| Fault::Stall);
    lab.serve.launch();
    for signal in [Signal::KILL, Signal::TERM] {
        let mut list = Guard(Command::new("ls").arg(layer.diff()).spawn().unwrap());
        std::thread::sleep(Duration::from_millis(500));
        assert!(list.wait(Duration::ZERO).is_none());
        list.signal(signal);
        assert!(list.wait(Duration::from_secs(10)).is_some(), "{signal:?}");
    }
}
