//! How long reads take while an ordinary user tries to hold them up.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
    thread,
    time::{Duration, Instant},
};

use nydus_store::fixtures::content::Random;
use rustix::fs::{FlockOperation, fcntl_lock, flock};

use super::{Ends, become_user, metrics_on};
use crate::common::{Lab, Sample, StoreLayer, free_port};

/// Files of an image, each of one chunk.
const FILES: usize = 300;
/// Time that is a hang, whatever the machine is busy with.
const HANG: Duration = Duration::from_secs(5);
/// Number of connections that send nothing but a byte from time to time.
const SLOW_CONNECTIONS: usize = 64;
/// Longest wait of an attacker for an answer.
const PATIENCE: Duration = Duration::from_millis(500);

/// An image of [`FILES`] files.
fn sample(seed: u64) -> Sample {
    let names: Vec<_> = (0..FILES).map(|number| format!("{number:03}")).collect();
    let files: Vec<_> = names.iter().map(|name| (name.as_str(), 64 << 10)).collect();
    Sample::of(&files, seed, &Sample::options())
}

/// Reads all files; returns how long each took.
fn read_all(sample: &Sample, layer: &StoreLayer) -> Vec<Duration> {
    let read = |name: &String| {
        let start = Instant::now();
        let read = fs::read(layer.diff().join(name)).unwrap();
        let took = start.elapsed();
        assert!(read == sample.content(name), "{name} reads wrong");
        took
    };
    sample.names().iter().map(read).collect()
}

/// Prints quantiles; panics if a duration is that of a hang.
fn report(what: &str, mut took: Vec<Duration>) {
    took.sort_unstable();
    let quantile = |hundredths: usize| took[(took.len() - 1) * hundredths / 100];
    let (median, high, longest) = (quantile(50), quantile(99), quantile(100));
    println!("{what}: p50 {median:?}, p99 {high:?}, longest {longest:?}");
    assert!(longest < HANG, "{what}: {longest:?}");
}

/// What an ordinary user does again and again.
struct Attack {
    port: u16,
    paths: Vec<PathBuf>,
    is_over: AtomicBool,
    rounds: AtomicUsize,
}

impl Attack {
    /// Runs `work` while all attacks run.
    fn during<T>(port: u16, root: &Path, work: impl FnOnce() -> T) -> T {
        let attack = Self {
            port,
            paths: walkdir::WalkDir::new(root)
                .same_file_system(true)
                .into_iter()
                .map(|entry| entry.unwrap().into_path())
                .collect(),
            is_over: AtomicBool::new(false),
            rounds: AtomicUsize::new(0),
        };
        thread::scope(|scope| {
            for step in [Self::slow, Self::garbage, Self::endless_header, Self::ask, Self::files] {
                let attack = &attack;
                scope.spawn(move || {
                    become_user();
                    attack.repeat(step);
                });
            }
            let _ends = Ends(&attack.is_over);
            let done = work();
            println!("{} rounds of attacks", attack.rounds.load(Ordering::Relaxed));
            done
        })
    }

    fn is_over(&self) -> bool {
        self.is_over.load(Ordering::Relaxed)
    }

    fn repeat(&self, step: fn(&Self)) {
        while !self.is_over() {
            step(self);
            self.rounds.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn connect(&self) -> Option<TcpStream> {
        let address = SocketAddr::from(([127, 0, 0, 1], self.port));
        let connection = TcpStream::connect_timeout(&address, PATIENCE).ok()?;
        connection.set_read_timeout(Some(PATIENCE)).unwrap();
        connection.set_write_timeout(Some(PATIENCE)).unwrap();
        Some(connection)
    }

    /// Many requests that never end.
    fn slow(&self) {
        let mut open: Vec<_> = (0..SLOW_CONNECTIONS).filter_map(|_| self.connect()).collect();
        let request = b"GET /metrics HTTP/1.1\r\nHost: slow\r\n"
            .iter()
            .chain(std::iter::repeat(&b'x'));
        for byte in request.take(100) {
            open.retain_mut(|connection| connection.write_all(&[*byte]).is_ok());
            if open.is_empty() || self.is_over() {
                break;
            }
            thread::sleep(Duration::from_millis(20));
        }
    }

    fn garbage(&self) {
        let mut bytes = vec![0; 64 << 10];
        Random::new(self.rounds.load(Ordering::Relaxed) as u64).fill(&mut bytes);
        self.send(|connection| connection.write_all(&bytes));
    }

    fn endless_header(&self) {
        self.send(|connection| {
            connection.write_all(b"GET /metrics HTTP/1.1\r\nX: ")?;
            (0..64).try_for_each(|_| connection.write_all(&[b'x'; 64 << 10]))
        });
    }

    fn ask(&self) {
        self.send(|connection| connection.write_all(b"GET /metrics HTTP/1.0\r\n\r\n"));
    }

    fn send(&self, write: impl FnOnce(&mut TcpStream) -> std::io::Result<()>) {
        if let Some(mut connection) = self.connect() {
            // It may be closed at any time.
            write(&mut connection).ok();
            connection.read_to_end(&mut Vec::new()).ok();
        }
    }

    /// Looks at all files, and tries to lock them: those whose locks the daemon and Podman wait for are among them.
    fn files(&self) {
        for path in &self.paths {
            path.symlink_metadata().ok();
            if let Ok(file) = fs::File::options().read(true).write(true).open(path) {
                flock(&file, FlockOperation::LockExclusive).ok();
                fcntl_lock(&file, FlockOperation::LockExclusive).ok();
                panic!("{} can be opened", path.display());
            }
        }
    }
}

#[test]
fn ordinary_user_holds_no_reads_up() {
    let port = free_port();
    // Each first read of a file is one request to the registry.
    let lab = Lab::new(&format!(
        "[fetch]\nread_ahead = false\nprefetch = false\nlearn = false\n[metrics]\nlisten = \"127.0.0.1:{port}\"\n"
    ));
    let warm = sample(1);
    let warm_layer = lab.add(&warm, "warm");
    warm.check(&warm_layer);
    let measure = |what: &str, seed: u64| {
        warm.drop_pages(&warm_layer);
        report(&format!("warm reads, {what}"), read_all(&warm, &warm_layer));
        let (cold, repository) = (sample(seed), format!("cold{seed}"));
        let layer = lab.add(&cold, &repository);
        let start = Instant::now();
        assert!(layer.pull_publishes());
        report(&format!("pull, {what}"), vec![start.elapsed()]);
        report(&format!("cold reads, {what}"), read_all(&cold, &layer));
        let scrape = |_| {
            let start = Instant::now();
            metrics_on(port);
            start.elapsed()
        };
        report(&format!("metrics, {what}"), (0..20).map(scrape).collect());
    };
    measure("quiet", 2);
    Attack::during(port, lab.serve.root(), || measure("attacked", 3));
    measure("quiet again", 4);
    assert!(lab.serve.is_running() && !lab.serve.log().contains("panicked"));
}
