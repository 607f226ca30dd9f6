//! The daemon dies or is replaced while programs read, and nothing notices.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::FileExt as _,
    path::Path,
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

use nydus_store::fixtures::{Fault, content::Random};
use rustix::process::Signal;

use crate::common::{BINARY, Lab, Sample, Serve, StoreLayer, output, wait_until};

const READERS: usize = 16;

/// Threads that read the files of an image again and again, past the page cache.
struct Readers {
    stop: Arc<AtomicBool>,
    reads: Arc<AtomicUsize>,
    threads: Vec<thread::JoinHandle<Vec<String>>>,
}

impl Readers {
    fn start(sample: &Sample, layer: &StoreLayer) -> Self {
        let (stop, reads) = (Arc::<AtomicBool>::default(), Arc::<AtomicUsize>::default());
        let files = sample
            .names()
            .into_iter()
            .map(|name| (layer.diff().join(&name), sample.content(&name)));
        let files: Arc<[_]> = files.collect();
        let reader = |seed: usize| {
            let (stop, reads, files) = (Arc::clone(&stop), Arc::clone(&reads), Arc::clone(&files));
            thread::spawn(move || {
                let mut random = Random::new(seed as u64);
                let mut problems = Vec::new();
                // Open all the time, as the program files of a container are.
                let open: Vec<_> = files.iter().map(|(path, _)| File::open(path).unwrap()).collect();
                while !stop.load(Ordering::Relaxed) {
                    let one = random.below(files.len() as u64) as usize;
                    let (path, content) = &files[one];
                    if let Err(problem) = check(&open[one], path, content) {
                        problems.push(format!("{}: {problem}", path.display()));
                    }
                    reads.fetch_add(1, Ordering::Relaxed);
                }
                problems
            })
        };
        let threads = (0..READERS).map(reader).collect();
        Self { stop, reads, threads }
    }

    /// Waits until each reader has read a few more files.
    fn go_on(&self) {
        let before = self.reads.load(Ordering::Relaxed);
        wait_until("the readers go on", || {
            (self.reads.load(Ordering::Relaxed) > before + 2 * READERS).then_some(())
        });
    }

    fn stop(self) -> usize {
        self.stop.store(true, Ordering::Relaxed);
        let problems: Vec<_> = self
            .threads
            .into_iter()
            .flat_map(|thread| thread.join().unwrap())
            .collect();
        assert!(
            problems.is_empty(),
            "{} problems: {:?}",
            problems.len(),
            &problems[..problems.len().min(5)]
        );
        self.reads.load(Ordering::Relaxed)
    }
}

/// Reads an open file and the file with its name, from the daemon and not from the page cache.
fn check(open: &File, path: &Path, content: &[u8]) -> io::Result<()> {
    rustix::fs::fadvise(open, 0, None, rustix::fs::Advice::DontNeed)?;
    let mut read = vec![0; content.len()];
    open.read_exact_at(&mut read, 0)?;
    if read != content {
        return Err(io::Error::other("wrong bytes through the open file"));
    }
    rustix::fs::fadvise(open, 0, None, rustix::fs::Advice::DontNeed)?;
    let metadata = path.metadata()?;
    if metadata.len() != content.len() as u64 || fs::read(path)? != content {
        return Err(io::Error::other("wrong bytes through the path"));
    }
    Ok(())
}

/// Drops entries and inodes, so that the kernel looks names up again.
fn drop_entries() {
    fs::write("/proc/sys/vm/drop_caches", "2").unwrap();
}

#[test]
fn readers_do_not_notice_that_the_daemon_is_killed() {
    let mut lab = Lab::with_daemon(Serve::supervised(""));
    let sample = Sample::new(1);
    let layer = lab.add(&sample, "image");
    // Slow enough that requests are in flight when the daemon dies.
    lab.fault("image", |_| Fault::Delay(Duration::from_millis(20)));
    sample.check(&layer);
    let (first_id, inode) = (lab.serve.supervised_id().unwrap(), inode(&layer));
    let readers = Readers::start(&sample, &layer);
    let mut random = Random::new(7);
    for round in 0..20 {
        readers.go_on();
        thread::sleep(Duration::from_millis(random.below(60)));
        if round % 5 == 0 {
            drop_entries();
            fs::remove_dir_all(lab.serve.root().join("cache")).ok();
        }
        let signal = [Signal::KILL, Signal::ABORT, Signal::TERM][round % 3];
        let before = lab.serve.times_served();
        wait_until("there is a daemon", || lab.serve.supervised_id());
        lab.serve.signal_supervised(signal);
        wait_until("the next daemon serves", || {
            (lab.serve.times_served() > before).then_some(())
        });
    }
    readers.go_on();
    let reads = readers.stop();
    assert_ne!(lab.serve.supervised_id(), Some(first_id));
    assert_eq!(self::inode(&layer), inode);
    println!("{reads} reads");
    lab.serve.stop();
}

fn inode(layer: &StoreLayer) -> u64 {
    use std::os::unix::fs::MetadataExt as _;
    layer.diff().join("dir/odd").metadata().unwrap().ino()
}

#[test]
fn hang_up_replaces_the_program_and_rereads_the_configuration() {
    for is_supervised in [false, true] {
        let serve = match is_supervised {
            true => Serve::supervised(""),
            false => Serve::start(),
        };
        let mut lab = Lab::with_daemon(serve);
        let sample = Sample::new(2);
        let layer = lab.add(&sample, "image");
        sample.check(&layer);
        let readers = Readers::start(&sample, &layer);
        for _ in 0..3 {
            readers.go_on();
            let before = lab.serve.times_served();
            lab.serve.process().signal(Signal::HUP);
            wait_until("the next program serves", || {
                (lab.serve.times_served() > before).then_some(())
            });
        }
        // A broken configuration does not end the daemon that runs.
        if !is_supervised {
            fs::write(lab.serve.config_path(), "nonsense").unwrap();
            lab.serve.process().signal(Signal::HUP);
            wait_until("the restart is refused", || {
                lab.serve
                    .log()
                    .contains("failed to restart; the configuration is invalid")
                    .then_some(())
            });
        }
        readers.go_on();
        println!("{}", lab.serve.log());
        readers.stop();
        lab.serve.stop();
        assert!(
            lab.serve
                .overlay()
                .read_dir()
                .unwrap()
                .next()
                .is_some_and(|entry| entry.unwrap().file_name() == "l")
        );
    }
}

#[test]
fn stop_ends_a_supervised_daemon_and_its_mounts() {
    let serve = Serve::supervised("");
    let mut lab = Lab::with_daemon(serve);
    let sample = Sample::new(3);
    let layer = lab.add(&sample, "image");
    sample.check(&layer);
    let mut stop = Command::new(BINARY);
    stop.arg("stop").arg("--root").arg(lab.serve.root());
    let second = lab.serve.command().arg("--supervise").output().unwrap();
    assert_eq!(second.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&second.stderr).contains("another supervisor is running"));
    let refused = stop.output().unwrap();
    assert_eq!(refused.status.code(), Some(2), "--unmount is required");
    stop.arg("--unmount");
    assert_eq!(output(&mut stop), "stopped\n");
    assert!(lab.serve.wait().success());
    assert!(!layer.diff().exists());
    assert_eq!(output(&mut stop), "no daemon was running\n");
}

#[test]
fn supervisor_exits_with_a_daemon_that_cannot_start() {
    let serve = Serve::prepare("nonsense = 1");
    let mut command = serve.command();
    let failed = command.arg("--supervise").output().unwrap();
    assert_eq!(failed.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&failed.stderr).contains("nonsense"));
}
